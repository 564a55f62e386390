"""``inspect_peft_adapter``: what is in an adapter, where it would go, and all that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from moegraft.core.errors import AdapterError
from moegraft.files import TensorInfo, WeightFolder, limits
from moegraft.lora.peft.build import (
    build_bias,
    build_embedding,
    build_linear,
    build_saved,
    build_tokens,
    check_twins,
)
from moegraft.lora.peft.build_experts import build_experts
from moegraft.lora.peft.config import PeftConfig, read_config
from moegraft.lora.peft.loader import as_adapter_error, open_folder, open_weights, read_config_bytes
from moegraft.lora.peft.names import Factor, TensorKey, parse_key
from moegraft.lora.peft.plan import AdapterPlan, plan_adapter
from moegraft.lora.targets import ModelTargets


@dataclass(frozen=True, kw_only=True)
class ModuleSummary:
    """One module of an adapter. ``name``: in the file; of several modules (the experts of a layer), the first one.

    ``kind``: ``experts``, ``linear``, ``embedding``, ``tokens`` (rows of an embedding or head) or ``saved``; without a
    base model ``lora`` or ``saved``.
    ``ranks``: projection -> rank for experts, ``{"lora": rank}`` else, empty for saved parameters. ``target``: the
    module of the base model that it is applied to, None where that is unknown. ``nbytes``: as stored.
    """

    name: str
    kind: str
    ranks: Mapping[str, int]
    tensors: int
    nbytes: int
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterInspection:
    """What an adapter holds. ``problems`` as ``ErrorType: message``, at most 100; empty where it would load."""

    path: str
    peft_version: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    tensors_in_file: int = 0
    bytes_in_file: int = 0
    dtypes: tuple[str, ...] = ()
    modules: tuple[ModuleSummary, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found; without targets, nothing wrong with the files alone."""
        return not self.problems


def inspect_peft_adapter(path: str | os.PathLike[str], targets: ModelTargets | None = None) -> AdapterInspection:
    """Looks at every file and tensor of an adapter and collects what is wrong instead of raising.

    With ``targets`` it goes through all that ``load_peft_adapter`` does, one module at a time. Without, ranks are
    read from the shapes, and names are not looked up.
    """
    problems: list[AdapterError] = []
    folder = _attempt(lambda: open_folder(path), problems)
    if folder is None:
        return AdapterInspection(path=os.fspath(path), problems=_texts(problems))
    with folder:
        config = _attempt(lambda: read_config(read_config_bytes(folder)), problems)
        tensors = _attempt(lambda: open_weights(folder, targets), problems)
    contents = _Contents()
    if tensors is not None:
        with tensors:
            contents = _examine(tensors, config, targets, problems)
    return AdapterInspection(
        path=str(folder.path),
        peft_version=config.peft_version if config else None,
        r=config.r if config else None,
        lora_alpha=config.lora_alpha if config else None,
        use_rslora=bool(config and config.use_rslora),
        use_dora=bool(config and config.use_dora),
        tensors_in_file=len(tensors.infos) if tensors else 0,
        bytes_in_file=tensors.nbytes if tensors else 0,
        dtypes=contents.dtypes,
        modules=contents.modules,
        notes=(*(config.notes if config else ()), *contents.notes),
        problems=_texts(problems),
    )


@dataclass(frozen=True, kw_only=True)
class _Contents:
    dtypes: tuple[str, ...] = ()
    modules: tuple[ModuleSummary, ...] = ()
    notes: tuple[str, ...] = ()


def _examine(
    tensors: WeightFolder, config: PeftConfig | None, targets: ModelTargets | None, problems: list[AdapterError]
) -> _Contents:
    infos = tensors.infos
    dtypes = tuple(sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()}))
    notes: list[str] = []
    if sum(info.nbytes for info in infos.values()) > limits.MAX_EXAMINED_BYTES:
        notes.append(f"more than {limits.MAX_EXAMINED_BYTES} bytes of tensors: no value was looked at")
    if config is None or targets is None:
        for name in () if notes else infos:
            _attempt(partial(tensors.check_values, name), problems)
        return _Contents(dtypes=dtypes, modules=tuple(_modules_by_name(infos.values())), notes=tuple(notes))
    plan = plan_adapter(infos, config, targets)
    problems += plan.problems
    for build in () if notes else _builds(plan, targets, tensors):
        _attempt(build, problems)
    return _Contents(dtypes=dtypes, modules=tuple(_planned_modules(plan)), notes=(*notes, *plan.notes))


_Result = TypeVar("_Result")


def _attempt(action: Callable[[], _Result], problems: list[AdapterError]) -> _Result | None:
    try:
        with as_adapter_error():
            return action()
    except AdapterError as error:
        problems.append(error)
        return None


def _texts(problems: list[AdapterError]) -> tuple[str, ...]:
    texts = [f"{type(error).__name__}: {error}" for error in problems[: limits.MAX_PROBLEMS]]
    if len(problems) > limits.MAX_PROBLEMS:
        texts.append(f"and {len(problems) - limits.MAX_PROBLEMS} more problems")
    return tuple(texts)


def _builds(plan: AdapterPlan, targets: ModelTargets, tensors: WeightFolder) -> Iterator[Callable[[], object]]:
    """One build for each module. The result is thrown away: float32, so that only the file can be at fault.

    Of modules that would take much memory the values are looked at, in pieces.
    """
    dtype, read = torch.float32, tensors.read
    yield partial(check_twins, plan.twins, read)
    for experts in plan.experts.values():
        yield from _one_build(tensors, experts.infos(), partial(build_experts, experts, read, dtype))
    for linear in plan.linears.values():
        yield from _one_build(tensors, linear.infos, partial(build_linear, linear, read, dtype))
        if linear.bias is not None:
            base = targets.saveable[linear.target.name]["bias"]
            yield from _one_build(tensors, [linear.bias], partial(build_bias, linear, base, read))
    for embedding in plan.embeddings.values():
        yield from _one_build(tensors, embedding.pair.infos, partial(build_embedding, embedding, read, dtype))
    for module, tokens in plan.tokens.items():
        base = targets.saveable[module][tokens.param]
        yield from _one_build(tensors, [tokens.info], partial(build_tokens, tokens, base, read, dtype))
    for module, params in plan.saved.items():
        for param, info in params.items():
            base = targets.saveable[module][param]
            yield from _one_build(tensors, [info], partial(build_saved, plan, module, param, base, info, read))


def _one_build(
    tensors: WeightFolder, infos: Iterable[TensorInfo], build: Callable[[], object]
) -> Iterator[Callable[[], object]]:
    held = list(infos)
    if sum(info.nbytes for info in held) <= limits.MAX_BUILT_BYTES:
        yield build
    else:
        yield from (partial(tensors.check_values, info.name) for info in held)


def _planned_modules(plan: AdapterPlan) -> Iterator[ModuleSummary]:
    for name, experts in plan.experts.items():
        yield _summary(name, "experts", experts.infos(), ranks=experts.ranks())
    for name, linear in plan.linears.items():
        yield _summary(name, "linear", linear.infos, ranks={"lora": linear.pair.rank})
    for name, embedding in plan.embeddings.items():
        yield _summary(name, "embedding", embedding.pair.infos, ranks={"lora": embedding.pair.rank})
    for name, tokens in plan.tokens.items():
        yield _summary(name, "tokens", [tokens.info], ranks={"rows": len(tokens.tokens)})
    for name, params in plan.saved.items():
        yield _summary(name, "saved", params.values(), ranks={})


def _summary(target: str, kind: str, infos: Iterable[TensorInfo], *, ranks: Mapping[str, int]) -> ModuleSummary:
    held = list(infos)
    name = parse_key(held[0].name).module
    nbytes = sum(info.nbytes for info in held)
    return ModuleSummary(name=name, kind=kind, ranks=ranks, tensors=len(held), nbytes=nbytes, target=target)


def _modules_by_name(infos: Iterable[TensorInfo]) -> Iterator[ModuleSummary]:
    groups: dict[str, list[tuple[TensorKey, TensorInfo]]] = {}
    for info in infos:
        key = parse_key(info.name)
        groups.setdefault(key.module, []).append((key, info))
    for module, members in groups.items():
        ranks = [info.shape[0] for key, info in members if key.factor in (Factor.A, Factor.EMBEDDING_A) and info.shape]
        yield ModuleSummary(
            name=module,
            kind="lora" if ranks else "saved",
            ranks={"lora": max(ranks)} if ranks else {},
            tensors=len(members),
            nbytes=sum(info.nbytes for _, info in members),
        )
