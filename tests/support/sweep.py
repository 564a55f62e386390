"""Every Mixture-of-Experts model that transformers has, tried: which rows its modules see, and a mixed batch of it.

``python scripts/models_table.py`` writes what comes out into docs/models.md; ``pytest -m families_all`` holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import PreTrainedModel

import moegraft
from moegraft.integrations.transformers.host.storage import is_adopted
from moegraft.integrations.transformers.host.targets import discover_targets, find_unsupported
from moegraft.lora.targets import ModelTargets
from support.family_adapters import NOT_FOR_PEFT, PEFT_MISTAKES, output_of, save_all_of
from support.zoo import IMAGE_TOKEN, NO_IMAGES, image_inputs, moe_model_types, text_inputs, tiny_model

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one model type. ``reason``: why it is refused. ``errors``: of a mixed batch without and with
    images, relative to the effect of the adapters in PEFT's live model. ``stray``: modules that see other rows."""

    model_type: str
    class_name: str
    reason: str = ""
    errors: tuple[float, ...] = ()
    stray: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def sweep(model_types: Iterable[str] | None = None) -> Iterator[Verdict]:
    """In alphabetical order; models without any experts (towers that have a type of their own) are passed over."""
    for model_type in model_types or moe_model_types():
        model = tiny_model(model_type)
        reason = find_unsupported(model)
        if reason is not None:
            if not reason.endswith("no mixture-of-experts layer"):
                yield Verdict(model_type=model_type, class_name=type(model).__name__, reason=reason)
            continue
        inputs = [text_inputs(model)]
        images = None if model_type in NO_IMAGES else image_inputs(model)
        inputs += [] if images is None else [images]
        yield Verdict(
            model_type=model_type,
            class_name=type(model).__name__,
            errors=tuple(mixed_batch_error(model_type, one) for one in inputs),
            stray=tuple(f"{name}: {why}" for one in inputs for name, why in stray_rows(model, one).items()),
            left_out=tuple(_places(discover_targets(model))),
        )


def table(verdicts: Iterable[Verdict]) -> str:
    """Markdown, between the two comments that docs/models.md has around it."""
    served, refused = [], []
    for one in verdicts:
        if one.reason:
            reason = one.reason.removeprefix(f"{one.class_name}: ").replace("|", "\\|")
            reason = re.sub(r"[.]\d+[.]", ".*.", reason)
            refused.append(f"| `{one.model_type}` | {reason} |")
            continue
        how = "text and images" if len(one.errors) > 1 else "text"
        left_out = ", ".join(one.left_out)
        served.append(f"| `{one.model_type}` | {one.class_name} | {how} | {left_out} |")
    head = ("| `model_type` | class | tried with | left out |", "|---|---|---|---|")
    refused_head = ("| `model_type` | why it is refused |", "|---|---|")
    return "\n".join([BEGIN, "", *head, *served, "", *refused_head, *refused, "", END])


def _places(targets: ModelTargets) -> list[str]:
    """The towers that are left out, and single modules; layers and places in a list as stars."""
    places: dict[str, None] = {}
    for name, reason in targets.left_out.items():
        owner = re.match(r"belongs to '([^']+)'", reason)
        stack = re.match(r"stands outside of the text stack '([^']*)'", reason)
        if stack:
            parts = name.split(".")
            pairs = zip(parts, stack[1].split("."), strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            places[".".join(parts[: shared + 1])] = None
        else:
            places[owner[1] if owner else re.sub(r"\b\d+\b", "*", name)] = None
    outer = [name for name in places if not any(name.startswith(f"{other}.") for other in places)]
    return [f"`{name}`" + (" but its linear maps" if name in targets.towers else "") for name in outer]


def mixed_batch_error(model_type: str, inputs: Inputs) -> float:
    """Errors of two adapters on everything beside a base row, each against PEFT's live model with that adapter alone.

    Infinite where the base row has other bits than in a batch without adapters.
    """
    left_out = (*PEFT_MISTAKES, *NOT_FOR_PEFT.get(model_type.partition("_omni")[0], ()))
    truths = {}
    with TemporaryDirectory() as folder, torch.no_grad():
        for seed, name in enumerate(("a", "b")):
            adapter = save_all_of(tiny_model(model_type), Path(folder) / name, left_out=left_out, seed=seed)
            truths[name] = adapter.truth(**inputs)
        base = output_of(tiny_model(model_type)(**inputs))
        with moegraft.attach(tiny_model(model_type), adapter_memory="16MiB") as graft:
            for name in truths:
                report = graft.load_adapter(Path(folder) / name)
                assert report.tensors_applied == report.tensors_in_file > 0
            mixed = output_of(graft(**inputs, adapters=["a", None, "b"]))
            plain = output_of(graft(**inputs))
    if not torch.equal(mixed[1], plain[1]):
        return float("inf")
    errors = []
    for row, name in ((0, "a"), (2, "b")):
        effect = (truths[name] - base)[row]
        assert effect.abs().max() > 0.01
        errors.append(((mixed - plain)[row] - effect).abs().max() / effect.abs().max())
    return float(max(errors))


def stray_rows(model: PreTrainedModel, inputs: Inputs) -> dict[str, str]:
    """The described modules whose rows are not those of the tokens [B, S] in order, and how that shows.

    One token after the other is changed, the last of each sequence: the rows of that sequence may change, its own must.
    """
    targets = discover_targets(model)
    by_weight = {name for name, linear in targets.linears.items() if linear.router}
    linears = [name for name, linear in targets.linears.items() if linear.tower is None]
    # Llama 4's experts see every token for each expert: what they give a token says whose it was.
    experts = [name for name in targets.experts if not is_adopted(model.get_submodule(name))]
    names = dict.fromkeys((*experts, *linears, *targets.embeddings, *targets.saveable))
    before = _seen(model, inputs, names)
    problems = {name: "is never called" for name in names if name not in before and name not in by_weight}
    B, S = inputs["input_ids"].shape
    for row in range(B):
        ids = inputs["input_ids"].clone()
        ids[row, -1] = 3 + (ids[row, -1] + 4) % (IMAGE_TOKEN - 3)
        after = _seen(model, {**inputs, "input_ids": ids}, names)
        for name, calls in before.items():
            is_saved_alone = name not in {*targets.experts, *targets.linears, *targets.embeddings}
            for x, y in zip(calls, after[name], strict=True):
                problem = _compare(x, y, row, (B, S), _width(targets, name), along_first=is_saved_alone)
                if problem is not None:
                    problems[name] = problem
    return problems


def _compare(
    x: torch.Tensor, y: torch.Tensor, row: int, shape: tuple[int, int], width: int | None, *, along_first: bool
) -> str | None:
    """``width``: of a row of x, None where x is one number a row. ``along_first``: rows may also stand along the first
    dimension alone, one a sequence: a module of which parameters are replaced is run on some of them."""
    B, S = shape
    if x.shape != y.shape:
        return f"sees {list(x.shape)} or {list(y.shape)}, whatever tokens there are"
    sizes = [size for size in (x.shape if width is None else x.shape[:-1]) if size != 1]
    if along_first and x.shape[0] == B:
        num_rows, own = B, [row]
    elif sizes[:2] == [B, S] or (sizes and sizes[0] % (B * S) == 0):
        num_rows, own = B * S, range(row * S, (row + 1) * S)
    else:
        return f"sees {list(x.shape)} for {B} sequences of {S} tokens"
    first, second = x.reshape(num_rows, -1).double(), y.reshape(num_rows, -1).double()
    changed = ((first - second).abs().amax(1) > 1e-5 * first.abs().max()).nonzero().flatten().tolist()
    if not set(changed) <= set(own):
        return f"mixes rows: {sorted(set(changed) - set(own))} change with sequence {row}"
    return None if own[-1] in changed else "does not see a token that changes in its row"


def _width(targets: ModelTargets, name: str) -> int | None:
    if name in targets.experts:
        return targets.experts[name].hidden_size
    if name in targets.linears:
        return targets.linears[name].in_features
    return None if name in targets.embeddings else 1


def _seen(model: PreTrainedModel, inputs: Inputs, names: Iterable[str]) -> dict[str, list[torch.Tensor]]:
    """The first tensor that each module was given, call by call."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook_of(name: str) -> object:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            seen.setdefault(name, []).append(given.clone())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
