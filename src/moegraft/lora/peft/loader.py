"""From a folder to ``AdapterWeights``: files opened and checked, names and shapes fitted to a model, values read."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import torch

from moegraft.core.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterFileError,
    AdapterMemoryError,
    AdapterNameError,
    AdapterTensorError,
    FileError,
    StoredTensorError,
)
from moegraft.files import Folder, TensorInfo, WeightFiles, WeightFolder, limits, shorten
from moegraft.lora.peft.build import (
    Read,
    build_bias,
    build_embedding,
    build_linear,
    build_saved,
    build_tokens,
    check_twins,
    lora_param,
)
from moegraft.lora.peft.build_experts import build_experts, num_elems, tensors_elsewhere
from moegraft.lora.peft.config import CONFIG_FILE, read_config
from moegraft.lora.peft.plan import AdapterPlan, EmbeddingPlan, LinearPlan, plan_adapter
from moegraft.lora.peft.report import LoadReport
from moegraft.lora.targets import AdapterWeights, EmbeddingLoRA, LinearLoRA, ModelTargets, UnfinishedDora
from moegraft.parallel.slices import WHOLE_EXPERTS, WHOLE_LINEAR, LinearSlice, RankSlice

ADAPTER_FILES = WeightFiles(
    weights="adapter_model.safetensors",
    pickles=("adapter_model.bin", "adapter_model.bin.index.json", "adapter_model.pt", "adapter_model.pth"),
    advice=(
        "pickles can run code when they are opened, so they are not read; load the adapter with PEFT where you trust "
        "it and save it again with save_pretrained(..., safe_serialization=True)"
    ),
)
# What the digest samples of the values: at most 1 MiB in 256 reads, a small part of loading the largest adapters.
SAMPLED_TENSORS = 256
SAMPLED_BYTES = 4096

_WHOLE = RankSlice()
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_peft_adapter(
    path: str | os.PathLike[str],
    targets: ModelTargets,
    *,
    dtype: torch.dtype,
    name: str | None = None,
    rank_slice: RankSlice = _WHOLE,
    max_bytes: int | None = None,
    skip_unserved: bool = False,
) -> tuple[AdapterWeights, LoadReport]:
    """Reads an adapter that PEFT saved and fits it to a base model: ``PeftAdapter`` and its ``build`` in one.

    Raises what they raise.
    """
    with PeftAdapter(path, targets, name=name, skip_unserved=skip_unserved) as adapter:
        return adapter.build(dtype=dtype, rank_slice=rank_slice, max_bytes=max_bytes)


class PeftAdapter:
    """An adapter whose files are open and whose names and shapes fit a base model; no tensor was read. Close it after.

    ``path``: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or its shards with their index.
    ``targets``: the whole model, also where a rank holds a slice. ``name``: for messages and the report; the folder's
    name by default. What was checked is what is digested and read, through the same handles. ``skip_unserved``: what
    the adapter has on modules that the model has and that are not served (``targets.left_out``) is left out, and listed
    in the report.

    Raises:
        AdapterFileError: a file is missing, malformed, a pickle, or outside the folder.
        AdapterConfigError: the config is malformed, or asks for something that cannot be served.
        AdapterTensorError: a tensor has the wrong shape or dtype, or has no partner.
        AdapterMismatchError: a tensor names a module that the base model does not have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        targets: ModelTargets,
        *,
        name: str | None = None,
        skip_unserved: bool = False,
    ) -> None:
        with open_folder(path) as folder:
            if name is not None and (not isinstance(name, str) or not name):
                raise AdapterNameError(f"name {name!r}, expected a string that is not empty")
            self.name = name or folder.path.resolve().name
            self.path = folder.path
            self._config_bytes = read_config_bytes(folder)
            self.config = read_config(self._config_bytes)
            self._tensors = open_weights(folder, targets)
        try:
            self._targets = targets
            self.plan = plan_adapter(self._tensors.infos, self.config, targets, skip_unserved=skip_unserved)
            _raise_first(self.plan.problems)
        except BaseException:
            self.close()
            raise

    def digest(self) -> str:
        """As ``adapter_digest``."""
        return _digest(self._config_bytes, self._tensors)

    def build(
        self, *, dtype: torch.dtype, rank_slice: RankSlice = _WHOLE, max_bytes: int | None = None
    ) -> tuple[AdapterWeights, LoadReport]:
        """Reads the values. Every tensor of the checkpoint is applied, or the adapter is refused with an error.

        ``dtype``: of the LoRA factors; the scale is folded into B in float32 before the cast. Saved parameters take the
        dtype of the parameter that they replace. ``rank_slice``: what this rank holds: only that is read and kept, in
        the sizes of ``local_targets(targets, rank_slice)``. Where a rank has only its columns of a base weight (row
        parallel), ``finish_dora`` must follow before the bank takes an adapter with DoRA on it. ``max_bytes``: what
        the factors may take.

        Raises AdapterMemoryError before anything is read; AdapterTensorError where a value is not finite, or does not
        fit into ``dtype``; AdapterFileError where a file has changed.
        """
        self._check_size(dtype, rank_slice, max_bytes)
        infos = self._tensors.infos
        left_out = self.plan.left_out
        self._tensors.unread = set(infos) - set(self.plan.unused) - left_out.keys()
        with as_adapter_error():
            check_twins(self.plan.twins, self._tensors.read)
            weights, notes = _build(self.plan, self._targets, self._tensors.read, dtype, rank_slice)
        unread = self._tensors.unread
        elsewhere = _tensors_elsewhere(self.plan, rank_slice) & unread
        unused = unread - elsewhere
        if unused:
            raise AdapterTensorError(f"{infos[min(unused)].where}: was not applied")
        report = LoadReport(
            name=self.name,
            path=str(self.path),
            peft_version=self.config.peft_version,
            tensors_in_file=len(infos),
            tensors_applied=len(infos) - len(unread) - len(left_out),
            tensors_elsewhere=len(elsewhere),
            tensors_left_out=len(left_out),
            bytes_in_file=self._tensors.nbytes,
            bytes_read=self._tensors.bytes_read,
            bytes_held=weights.num_bytes,
            experts={module: experts.ranks() for module, experts in self.plan.experts.items()},
            linears={module: plan.pair.rank for module, plan in self.plan.linears.items()},
            embeddings={module: plan.pair.rank for module, plan in self.plan.embeddings.items()},
            tokens={module: plan.tokens for module, plan in self.plan.tokens.items()},
            saved={module: tuple(params) for module, params in weights.saved.items()},
            left_out={module: self._targets.left_out[module] for module in sorted(set(left_out.values()))},
            notes=(*self.config.notes, *self.plan.notes, *_cast_notes(infos.values(), dtype), *notes),
        )
        return weights, report

    def close(self) -> None:
        """Closes the files."""
        self._tensors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_size(self, dtype: torch.dtype, mine: RankSlice, max_bytes: int | None) -> None:
        needed = dtype.itemsize * (
            sum([num_elems(plan, mine.experts.get(name, WHOLE_EXPERTS)) for name, plan in self.plan.experts.items()])
            + sum([_num_elems(plan, mine.linears.get(name, WHOLE_LINEAR)) for name, plan in self.plan.linears.items()])
            + sum(
                [_num_elems(plan, mine.linears.get(name, WHOLE_LINEAR)) for name, plan in self.plan.embeddings.items()]
            )
        )
        if max_bytes is not None and needed > max_bytes:
            raise AdapterMemoryError(
                f"adapter {self.name!r} needs {needed} bytes at least, the adapter memory has {max_bytes} bytes"
            )


@contextmanager
def as_adapter_error() -> Iterator[None]:
    """What the readers of files refuse, as an error of the adapter."""
    try:
        yield
    except StoredTensorError as error:
        raise AdapterTensorError(str(error)) from error
    except FileError as error:
        raise AdapterFileError(str(error)) from error


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """The adapter's folder. Raises AdapterFileError where it is missing, a file, or the id of a hub repository."""
    try:
        return Folder(path)
    except FileError as error:
        hint = f"; expected the folder that holds {CONFIG_FILE}"
        if not os.path.lexists(path) and _HUB_ID.fullmatch(os.fspath(path)):
            hint = "; ids of hub repositories are not supported: download it first and pass the folder"
        raise AdapterFileError(f"{error}{hint}") from None


def read_config_bytes(folder: Folder) -> bytes:
    """``adapter_config.json`` as it is. Raises AdapterConfigError."""
    try:
        return folder.read(CONFIG_FILE, max_bytes=limits.MAX_CONFIG_BYTES)
    except FileError as error:
        inside = "" if folder.has(CONFIG_FILE) else _adapters_inside(folder)
        raise AdapterConfigError(f"{error}{inside}") from error


def _adapters_inside(folder: Folder) -> str:
    """The adapters that lie in a folder that is none, in words."""
    found = []
    with os.scandir(folder.path) as entries:
        for entry in itertools.islice(entries, limits.MAX_STRAY):
            if os.path.lexists(os.path.join(entry.path, CONFIG_FILE)):
                found.append(shorten(entry.name))
    return f"; adapters lie in its folders {', '.join(sorted(found)[:10])}: pass one of them" if found else ""


def open_weights(folder: Folder, targets: ModelTargets | None = None) -> WeightFolder:
    """The tensors, from one file or from shards. Raises AdapterFileError or AdapterTensorError.

    With ``targets`` no more tensors than an adapter of that model may have, twice over.
    """
    most = limits.MAX_ADAPTER_TENSORS
    if targets is not None:
        of_experts = sum([6 * target.num_experts for target in targets.experts.values()])
        others = 3 * len(targets.linears) + 3 * len(targets.embeddings) + sum(map(len, targets.saveable.values()))
        others += 3 * len(targets.left_out)
        most = min(most, limits.LEAST_TENSORS + 2 * (of_experts + others))
    with as_adapter_error():
        return WeightFolder(folder, ADAPTER_FILES, max_tensors=most)


def adapter_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the config, name, dtype and shape of every tensor, and the first bytes of a sample of them.

    Ranks compare it, so that none of them loads another version of an adapter. Another step of one training differs in
    nearly every tensor, so in the sample too: tensors at even steps of the sorted names, which are those of all layers.
    Files that differ elsewhere only are not told apart. Raises AdapterError.
    """
    with open_folder(path) as folder:
        config = read_config_bytes(folder)
        with open_weights(folder) as tensors:
            return _digest(config, tensors)


def _digest(config: bytes, tensors: WeightFolder) -> str:
    digest = hashlib.sha256(config)
    names = sorted(tensors.infos)
    for name in names:
        info = tensors.infos[name]
        digest.update(f"\0{name}\0{info.dtype}\0{list(info.shape)}".encode())
    with as_adapter_error():
        for name in names[:: -(-len(names) // SAMPLED_TENSORS) or 1]:
            digest.update(tensors.read_start(name, SAMPLED_BYTES))
    return digest.hexdigest()


def _num_elems(plan: LinearPlan | EmbeddingPlan, mine: LinearSlice) -> int:
    """Elements of A and B, without padding."""
    if mine is WHOLE_LINEAR:
        return math.prod(plan.pair.a.shape) + math.prod(plan.pair.b.shape)
    size_in, size_out = plan.pair.a.shape[1], plan.pair.b.shape[0]
    lanes = plan.pair.rank if mine.lanes is None else mine.lanes.of(plan.pair.rank).size
    return lanes * mine.num_inputs(size_in) + plan.pair.rank * mine.num_outputs(size_out)


def _raise_first(problems: tuple[AdapterError, ...]) -> None:
    """Raises the first problem, with a note on how many more there are."""
    if not problems:
        return
    if len(problems) > 1:
        problems[0].add_note(f"and {len(problems) - 1} more problems; inspect_peft_adapter lists them")
    raise problems[0]


def _build(
    plan: AdapterPlan, targets: ModelTargets, read: Read, dtype: torch.dtype, mine: RankSlice
) -> tuple[AdapterWeights, list[str]]:
    saved, notes = _build_saved(plan, targets, read, mine)
    merged = {module for module, params in saved.items() if lora_param(plan, module) in params}
    notes += [f"{module} is another one than the base model's: LoRA was merged into it" for module in sorted(merged)]
    experts = {
        module: build_experts(item, read, dtype, mine.experts.get(module, WHOLE_EXPERTS))
        for module, item in plan.experts.items()
    }
    linears = {
        module: build_linear(item, read, dtype, mine.linears.get(module, WHOLE_LINEAR))
        for module, item in plan.linears.items()
        if module not in merged
    }
    tokens = {
        module: build_tokens(
            item, targets.saveable[module][item.param], read, dtype, mine.linears.get(module, WHOLE_LINEAR)
        )
        for module, item in plan.tokens.items()
    }
    weights = AdapterWeights(
        experts={module: lora for module, lora in experts.items() if lora is not None},
        linears={module: lora for module, lora in {**linears, **tokens}.items() if isinstance(lora, LinearLoRA)},
        unfinished={module: part for module, part in linears.items() if isinstance(part, UnfinishedDora)},
        embeddings={
            module: build_embedding(item, read, dtype, mine.linears.get(module, WHOLE_LINEAR))
            for module, item in plan.embeddings.items()
            if module not in merged
        }
        | {module: lora for module, lora in tokens.items() if isinstance(lora, EmbeddingLoRA)},
        saved=saved,
        tokens=frozenset(tokens),
    )
    return weights, notes


def _tensors_elsewhere(plan: AdapterPlan, mine: RankSlice) -> set[str]:
    return {
        tensor
        for module, experts in plan.experts.items()
        for tensor in tensors_elsewhere(experts, mine.experts.get(module, WHOLE_EXPERTS))
    }


def _build_saved(
    plan: AdapterPlan, targets: ModelTargets, read: Read, mine: RankSlice
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    saved: dict[str, dict[str, torch.Tensor]] = {}
    notes = []
    for module, params in plan.saved.items():
        for param, info in params.items():
            base = targets.saveable[module][param]
            tensor = build_saved(plan, module, param, base, info, read, mine.saved.get((module, param)))
            if tensor is None:
                notes.append(f"{info.name} equals the base model's {module}.{param}")
            else:
                saved.setdefault(module, {})[param] = tensor
    for module, linear in plan.linears.items():
        if linear.bias is not None:
            base = saved.get(module, {}).get("bias", targets.saveable[module]["bias"])
            bias = build_bias(linear, base, read, mine.saved.get((module, "bias")))
            saved.setdefault(module, {})["bias"] = bias
    return saved, notes


def _cast_notes(infos: Iterable[TensorInfo], dtype: torch.dtype) -> list[str]:
    found = sorted({str(info.dtype).removeprefix("torch.") for info in infos if info.dtype is not dtype})
    return [f"tensors stored as {name} were cast to {str(dtype).removeprefix('torch.')}" for name in found]
