"""Damaged and hostile adapters, generated deterministically, each with the error that it must end in.

All are made for ``families.build(FAMILY)``; the adapter that they damage (``good_adapter``) loads.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from moegraft.core.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterFileError,
    AdapterMismatchError,
    AdapterTensorError,
)
from support.adapters import PREFIX, TensorFactory, write_adapter
from support.families import EXPERT_SIZE, HIDDEN_SIZE, VOCAB_SIZE

FAMILY = "qwen3_moe"
NUM_EXPERTS = 7
WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "adapter_model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"
EXPERTS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
CONFIG_FIELDS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": 2,
    "lora_alpha": 4,
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


@dataclass(frozen=True, kw_only=True)
class HostileCase:
    """``path`` must not load: ``error_type``, with every text of ``must_mention`` in its message."""

    name: str
    path: Path
    error_type: type[AdapterError]
    must_mention: tuple[str, ...]


def good_tensors() -> dict[str, torch.Tensor]:
    """Two experts of layer 0 in the names of transformers 4, layer 1 fused, attention, embedding, router, norm."""
    factory = TensorFactory()
    for expert in (0, 3):
        factory.linear(f"{EXPERTS[0]}.{expert}.gate_proj", HIDDEN_SIZE, EXPERT_SIZE)
        factory.linear(f"{EXPERTS[0]}.{expert}.down_proj", EXPERT_SIZE, HIDDEN_SIZE)
    factory.fused(f"{EXPERTS[1]}.base_layer", NUM_EXPERTS, HIDDEN_SIZE, 2 * EXPERT_SIZE)
    factory.fused(EXPERTS[1], NUM_EXPERTS, EXPERT_SIZE, HIDDEN_SIZE)
    factory.linear(Q_PROJ, HIDDEN_SIZE, HIDDEN_SIZE)
    factory.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = factory.draw(2, VOCAB_SIZE)
    factory.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = factory.draw(HIDDEN_SIZE, 2)
    factory.tensors[f"{PREFIX}model.layers.0.mlp.gate.weight"] = factory.draw(NUM_EXPERTS, HIDDEN_SIZE)
    factory.tensors[f"{PREFIX}model.norm.weight"] = factory.draw(HIDDEN_SIZE)
    return factory.tensors


def good_adapter(folder: Path) -> Path:
    return write_adapter(folder, good_tensors(), **CONFIG_FIELDS)


def hostile_cases(tmp_path: Path) -> Iterator[HostileCase]:
    """All cases, each in a folder of its own below ``tmp_path``."""
    made = _Maker(tmp_path)
    for generate in (
        _truncated,
        _bad_headers,
        _bad_entries,
        _bad_tensors,
        _bad_names,
        _bad_configs,
        _bad_files,
        _shards,
        _bombs,
    ):
        yield from generate(made)


class _Maker:
    """Makes the folders, numbered."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._count = 0
        self.good = save(good_tensors())
        length = int.from_bytes(self.good[:8], "little")
        self.header: dict[str, Any] = json.loads(self.good[8 : 8 + length])
        self.data = self.good[8 + length :]

    def folder(self, *, config: bool = True) -> Path:
        self._count += 1
        folder = self._root / f"{self._count:04d}"
        folder.mkdir(parents=True)
        if config:
            (folder / CONFIG).write_text(json.dumps(CONFIG_FIELDS))
        return folder

    def with_weights(self, content: bytes) -> Path:
        folder = self.folder()
        (folder / WEIGHTS).write_bytes(content)
        return folder

    def with_header(self, header: Any, data: bytes | None = None) -> Path:
        return self.with_weights(_file(json.dumps(header).encode(), self.data if data is None else data))

    def with_tensors(self, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
        return write_adapter(self.folder(), tensors, **{**CONFIG_FIELDS, **config})

    def with_config(self, content: bytes | str) -> Path:
        folder = self.with_weights(self.good)
        (folder / CONFIG).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder


def _file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _case(name: str, path: Path, error_type: type[AdapterError], *must_mention: str) -> HostileCase:
    return HostileCase(name=name, path=path, error_type=error_type, must_mention=must_mention)


def _truncated(made: _Maker) -> Iterator[HostileCase]:
    size = len(made.good)
    header_end = size - len(made.data)
    cuts = {0, 1, 7, 8, 9, header_end - 1, header_end, size - 1}
    cuts |= set(range(16, header_end, header_end // 25)) | set(range(header_end, size, len(made.data) // 25))
    for cut in sorted(cuts):
        yield _case(f"cut at {cut}", made.with_weights(made.good[:cut]), AdapterFileError, WEIGHTS)
    for extra in (b"\0", b"x" * 100):
        yield _case("bytes behind the data", made.with_weights(made.good + extra), AdapterFileError, WEIGHTS, "behind")


def _bad_headers(made: _Maker) -> Iterator[HostileCase]:
    header_end = len(made.good) - len(made.data)
    for position in range(8, header_end, header_end // 40):  # a zero byte is not allowed anywhere in JSON
        content = made.good[:position] + b"\0" + made.good[position + 1 :]
        yield _case(f"zero byte at {position}", made.with_weights(content), AdapterFileError, WEIGHTS, "header")
    length = header_end - 8
    for lie in (0, 1, length - 1, length + 1, length + 8, len(made.good), 10**8 + 1, 2**31, 2**63, 2**64 - 1):
        content = struct.pack("<Q", lie) + made.good[8:]
        yield _case(f"header length {lie}", made.with_weights(content), AdapterFileError, WEIGHTS)
    name = next(key for key in made.header if key != "__metadata__")
    entry = json.dumps(made.header[name])
    texts = {
        "array": "[]",
        "number": "7",
        "nothing": "",
        "not utf-8": b"\xff\xfe{}",
        "duplicate name": f'{{"{name}": {entry}, "{name}": {entry}}}',
        "duplicate key": f'{{"{name}": {{"dtype": "F32", "dtype": "F32", "shape": [], "data_offsets": [0, 4]}}}}',
        "NaN": f'{{"{name}": {{"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}}}',
        "nested": "[" * 100_000 + "]" * 100_000,
        "nested objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "long integer": f'{{"{name}": {{"dtype": "F32", "shape": [{"9" * 10_000}], "data_offsets": [0, 4]}}}}',
        "metadata of numbers": '{"__metadata__": {"format": 1}}',
        "metadata is a list": '{"__metadata__": ["pt"]}',
    }
    for what, text in texts.items():
        raw = text if isinstance(text, bytes) else text.encode()
        yield _case(f"header: {what}", made.with_weights(_file(raw, made.data)), AdapterFileError, WEIGHTS)
    yield _case("no tensors", made.with_weights(_file(b"{}", b"")), AdapterFileError, "no tensors")


def _bad_entries(made: _Maker) -> Iterator[HostileCase]:
    """One entry of a header that is otherwise right lies."""
    lies: dict[str, tuple[Callable[[dict[str, Any]], Any], type[AdapterError]]] = {
        "no dtype": (lambda e: {k: e[k] for k in ("shape", "data_offsets")}, AdapterFileError),
        "extra key": (lambda e: e | {"strides": [1]}, AdapterFileError),
        "a list": (lambda e: [e], AdapterFileError),
        "null": (lambda e: None, AdapterFileError),
        "unknown dtype": (lambda e: e | {"dtype": "F33"}, AdapterTensorError),
        "integers": (lambda e: e | {"dtype": "I32"}, AdapterTensorError),
        "booleans": (lambda e: e | {"dtype": "BOOL"}, AdapterTensorError),
        "fp8": (lambda e: e | {"dtype": "F8_E4M3"}, AdapterTensorError),
        "dtype is a list": (lambda e: e | {"dtype": ["F32"]}, AdapterTensorError),
        "narrower dtype": (lambda e: e | {"dtype": "F16"}, AdapterFileError),
        "wider dtype": (lambda e: e | {"dtype": "F64"}, AdapterFileError),
        "one row more": (lambda e: e | {"shape": [e["shape"][0] + 1, *e["shape"][1:]]}, AdapterFileError),
        "negative size": (lambda e: e | {"shape": [-2, -1]}, AdapterFileError),
        "huge size": (lambda e: e | {"shape": [2**62, 2**62]}, AdapterFileError),
        "huge size beside zero": (lambda e: e | {"shape": [0, 2**40]}, AdapterFileError),
        "boolean size": (lambda e: e | {"shape": [True]}, AdapterFileError),
        "fractional size": (lambda e: e | {"shape": [2.0, 32.0]}, AdapterFileError),
        "shape is text": (lambda e: e | {"shape": "2,32"}, AdapterFileError),
        "many dimensions": (lambda e: e | {"shape": [1] * 100 + e["shape"]}, AdapterFileError),
        "offsets swapped": (lambda e: e | {"data_offsets": e["data_offsets"][::-1]}, AdapterFileError),
        "negative offsets": (lambda e: e | {"data_offsets": [o - 10**6 for o in e["data_offsets"]]}, AdapterFileError),
        "offsets behind the file": (
            lambda e: e | {"data_offsets": [o + 10**9 for o in e["data_offsets"]]},
            AdapterFileError,
        ),
        "overlap or hole": (lambda e: e | {"data_offsets": [o + 4 for o in e["data_offsets"]]}, AdapterFileError),
        "three offsets": (lambda e: e | {"data_offsets": [*e["data_offsets"], 0]}, AdapterFileError),
        "fractional offsets": (lambda e: e | {"data_offsets": [0.0, 4.5]}, AdapterFileError),
    }
    names = [name for name in made.header if name != "__metadata__"]
    for name in (names[0], names[-1]):
        for what, (lie, error_type) in lies.items():
            path = made.with_header(made.header | {name: lie(dict(made.header[name]))})
            mention = () if what == "overlap or hole" else (name,)  # the neighbour may be the one that is named
            yield _case(f"entry {name}: {what}", path, error_type, WEIGHTS, "tensor", *mention)
    twin = made.header[names[0]]
    yield _case("two names for one range", made.with_header(made.header | {"twin": twin}), AdapterFileError, "overlap")
    for long in ("", "x" * 5000):
        path = made.with_header({long: made.header[names[0]]}, made.data[: twin["data_offsets"][1]])
        yield _case(f"name of {len(long)} characters", path, AdapterFileError, WEIGHTS, "characters")


def _bad_tensors(made: _Maker) -> Iterator[HostileCase]:
    """Well-formed files in which one tensor does not fit."""
    tensors = good_tensors()
    for name, tensor in tensors.items():
        for what, value in (("NaN", math.nan), ("infinity", math.inf), ("minus infinity", -math.inf)):
            damaged = tensor.clone()
            damaged.view(-1)[tensor.numel() // 2] = value
            path = made.with_tensors(tensors | {name: damaged})
            yield _case(f"{name}: {what}", path, AdapterTensorError, WEIGHTS, name, "NaN or infinite")
        shapes = {
            "a row more": torch.cat([tensor, tensor[:1]]),
            "a dimension more": tensor[None],
            "flat": tensor.reshape(-1) if tensor.dim() > 1 else tensor[:-1],
            "no rows": tensor[:0],
            "a scalar": tensor.reshape(-1)[0],
        }
        for what, wrong in shapes.items():
            yield _case(
                f"{name}: {what}", made.with_tensors(tensors | {name: wrong}), AdapterTensorError, WEIGHTS, name
            )
        integers = made.with_tensors(tensors | {name: tensor.long()})
        yield _case(f"{name}: int64", integers, AdapterTensorError, WEIGHTS, name, "I64")
        if ".lora_" in name:
            left = {key: value for key, value in tensors.items() if key != name}
            partner = name.translate(str.maketrans("AB", "BA"))
            yield _case(f"{name}: absent", made.with_tensors(left), AdapterTensorError, WEIGHTS, partner, "beside")
    q = f"{PREFIX}{Q_PROJ}.lora_A.weight"
    for rank in (1, 3, 64):
        yield _case(
            f"r {rank} in the config", made.with_tensors(tensors, r=rank), AdapterTensorError, "rank 2", f"r {rank}"
        )
    pattern = {"q_proj": 5}
    path = made.with_tensors(tensors, rank_pattern=pattern)
    yield _case("rank_pattern", path, AdapterTensorError, q, "rank_pattern 'q_proj': 5")
    q_b = q.replace("lora_A", "lora_B")
    path = made.with_tensors(tensors | {q_b: tensors[q_b] * 1e30}, lora_alpha=1e20)
    yield _case("overflow", path, AdapterTensorError, q_b, "outside the range")


def _bad_names(made: _Maker) -> Iterator[HostileCase]:
    """Well-formed files with tensors that belong nowhere, or twice to one place."""
    tensors = good_tensors()
    q = f"{PREFIX}{Q_PROJ}.lora_A.weight"
    twins = (
        q.removeprefix(PREFIX),
        q.replace("lora_A", "lora_A.default"),
        q.replace("model.layers", "_orig_mod.model.layers"),
        q.replace(".lora_A", ".base_layer.lora_A"),
    )
    for twin in twins:
        yield _case(
            f"twin {twin}", made.with_tensors(tensors | {twin: tensors[q]}), AdapterTensorError, twin, "same factor"
        )
    saved = f"{PREFIX}model.norm.weight"
    twin = f"{PREFIX}model.norm.modules_to_save.weight"
    path = made.with_tensors(tensors | {twin: tensors[saved] + 1})
    yield _case("saved twice, in two versions", path, AdapterTensorError, saved, twin)
    aliens = [
        "../../../etc/passwd",
        "/etc/passwd",
        f"{PREFIX}../../x.lora_A.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.math.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_C.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.bias",
        f"{PREFIX}model.layers.0.self_attn.q_proj.hada_w1_a",
        f"{PREFIX}model.layers.99.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}model.layers.-1.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.self_attn.Q_PROJ.lora_A.weight",
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight",
        f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.-1.gate_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.1e0.gate_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.01.gate_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.\u0663.gate_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.7.gate_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.99999999999999999999.gate_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.0.side_proj.lora_A.weight",
        f"{PREFIX}model.layers.0.mlp.experts.gate_up_proj",
        f"{PREFIX}model.layers.0.mlp.experts.gate_up_proj_bias",
        f"{PREFIX}score.weight",
        f"{PREFIX}.lora_A.weight",
        ".lora_A.weight",
        "lora_A.weight",
        "weight",
        ".",
        PREFIX,
        "\U0001f40d" * 300,
    ]
    for alien in aliens:
        path = made.with_tensors(tensors | {alien: torch.ones(2, HIDDEN_SIZE)})
        yield _case(f"alien {alien[:80]}", path, AdapterMismatchError, WEIGHTS, "tensor", repr(alien)[1:100])
    misplaced = {
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, HIDDEN_SIZE),
        f"{PREFIX}{Q_PROJ}.token_adapter.trainable_tokens_delta": torch.ones(2, HIDDEN_SIZE),
        f"{PREFIX}{Q_PROJ}.lora_B.bias": torch.ones(HIDDEN_SIZE),
        f"{PREFIX}{Q_PROJ}.lora_A.bias": torch.ones(2),
        f"{PREFIX}{Q_PROJ}.lora_embedding_A": torch.ones(2, HIDDEN_SIZE),
        f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": torch.ones(HIDDEN_SIZE),
        f"{PREFIX}model.embed_tokens.lora_A.weight": torch.ones(2, VOCAB_SIZE),
        f"{PREFIX}{EXPERTS[0]}.lora_embedding_B": torch.ones(HIDDEN_SIZE, 2),
        f"{PREFIX}{EXPERTS[1]}.base_layer.base_layer.lora_A.weight": torch.ones(14, HIDDEN_SIZE),
        f"{PREFIX}{EXPERTS[1]}.up_proj.lora_A.weight": torch.ones(7, 2, HIDDEN_SIZE),
    }
    for name, tensor in misplaced.items():
        yield _case(f"misplaced {name}", made.with_tensors(tensors | {name: tensor}), AdapterTensorError, WEIGHTS, name)
    for name in (f"{EXPERTS[0]}.0.gate_proj", "model.embed_tokens"):
        path = made.with_tensors(tensors | {f"{PREFIX}{name}.lora_magnitude_vector": torch.ones(EXPERT_SIZE)})
        kind = AdapterTensorError if "experts" in name else AdapterConfigError  # which take DoRA, if said
        yield _case(f"DoRA on {name}", path, kind, "use_dora", name)
    pairs = {
        f"{EXPERTS[0]}.0.w1": (torch.ones(2, HIDDEN_SIZE), torch.ones(EXPERT_SIZE, 2)),
        f"{EXPERTS[1]}.w2": (torch.ones(1, 2, EXPERT_SIZE), torch.ones(NUM_EXPERTS, HIDDEN_SIZE, 2)),
        f"{EXPERTS[1]}.w1": (torch.ones(3, 2, HIDDEN_SIZE), torch.ones(1, EXPERT_SIZE, 2)),
    }
    for name, (a, b) in pairs.items():
        factors = {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        yield _case(f"second form of {name}", made.with_tensors(tensors | factors), AdapterTensorError, name)


def _bad_configs(made: _Maker) -> Iterator[HostileCase]:
    texts: dict[str, bytes | str] = {
        "empty": "",
        "text": "not json",
        "array": "[]",
        "null": "null",
        "binary": bytes(range(256)),
        "utf-16": json.dumps(CONFIG_FIELDS).encode("utf-16"),
        "cut": json.dumps(CONFIG_FIELDS)[:-5],
        "duplicate key": '{"peft_type": "LORA", "r": 2, "r": 2, "lora_alpha": 4}',
        "nested": "[" * 100_000,
        "long integer": '{"peft_type": "LORA", "r": ' + "9" * 10_000 + "}",
        "NaN": '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
        "infinity": '{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}',
        "large": " " * (17 * 2**20),
    }
    for what, text in texts.items():
        yield _case(f"config: {what}", made.with_config(text), AdapterConfigError, CONFIG)
    values: dict[str, tuple[Any, ...]] = {
        "peft_type": (None, "LOHA", "IA3", "ADALORA", "PREFIX_TUNING", "VERA", "lora", 7, ["LORA"]),
        "r": (None, 0, -1, 1.5, 2.0, "2", True, [2], 2**40),
        "lora_alpha": (None, "4", True, [], 1e999, -1e999, {}),
        "use_rslora": ("yes", 1, []),
        "use_dora": ("yes", 1, {}),
        "bias": ("some", 1, None, ["none"]),
        "target_parameters": ("experts.gate_up_proj", [1], [""], {"a": 1}),
        "peft_version": (1, "new", [], "v0.19", "9" * 5000 + ".1"),
        "init_lora_weights": ("pissa", "pissa_niter_4", "corda", "olora", "loftq", "lora_ga", "magic", 3, ["gaussian"]),
        "rank_pattern": (["q_proj"], {"q_proj": 0}, {"q_proj": "2"}, {"(": 2}, {"(?=a)a": 2}, {"x" * 2000 + "*": 2}),
        "alpha_pattern": ("q_proj", {"q_proj": None}, {"q_proj": "a"}, {"[": 2}, {r"(a)\1": 2}, {"a{2}{3}": 2}),
        "alora_invocation_tokens": ([1, 2],),
        "trainable_token_indices": (
            "x",
            [1, -1],
            [1, 1],
            [True],
            {"embed_tokens": "a"},
            {"": [2**40]},
            list(range(2000)),
        ),
        "layer_replication": ([[0, 1]],),
        "lora_bias": ("yes", 1, []),
        "use_qalora": (True,),
        "use_bdlora": ({"nblocks": 2},),
        "arrow_config": ({"top_k": 1},),
        "kasa_config": ({"beta": 1},),
        "monteclora_config": ({"a": 1},),
    }
    for field, wrong in values.items():
        for value in wrong:
            text = (
                json.dumps({**CONFIG_FIELDS, field: value}).replace("-Infinity", "-1e999").replace("Infinity", "1e999")
            )
            yield _case(f"config: {field} {str(value)[:40]}", made.with_config(text), AdapterConfigError, CONFIG, field)
    for depth in range(100, 1000, 50):  # some of these are read, but could not be printed
        text = '{"peft_type": "LORA", "lora_alpha": 4, "r": ' + "[" * depth + "]" * depth + "}"
        yield _case(f"config: r nested {depth} deep", made.with_config(text), AdapterConfigError, CONFIG)
    for field in ("peft_type", "r", "lora_alpha"):
        left = {key: value for key, value in CONFIG_FIELDS.items() if key != field}
        yield _case(f"config: no {field}", made.with_config(json.dumps(left)), AdapterConfigError, CONFIG, field)


def _bad_files(made: _Maker) -> Iterator[HostileCase]:
    folder = made.folder(config=False)
    (folder / WEIGHTS).write_bytes(made.good)
    yield _case("no config", folder, AdapterConfigError, CONFIG, "missing")
    folder = made.folder(config=False)
    (folder / WEIGHTS).write_bytes(made.good)
    (folder / CONFIG).mkdir()
    yield _case("config is a folder", folder, AdapterConfigError, CONFIG, "not a regular file")
    yield _case("no weights", made.folder(), AdapterFileError, WEIGHTS, INDEX)
    yield _case("empty folder", made.folder(config=False), AdapterConfigError, CONFIG)
    folder = made.folder()
    yield _case("no folder", folder / "absent", AdapterFileError, "absent", "no such folder")
    yield _case("a file", folder / CONFIG, AdapterFileError, CONFIG, "is a file")
    folder = made.folder()
    (folder / WEIGHTS).mkdir()
    yield _case("weights are a folder", folder, AdapterFileError, WEIGHTS, "not a regular file")
    folder = made.folder()
    os.mkfifo(folder / WEIGHTS)
    yield _case("weights are a pipe", folder, AdapterFileError, WEIGHTS, "not a regular file")
    for name in ("adapter_model.bin", "adapter_model.pt"):
        folder = made.folder()
        (folder / name).write_bytes(pickle.dumps({"a": 1}))
        yield _case(f"pickle {name}", folder, AdapterFileError, name, "pickle", "safe_serialization")
    folder = made.with_weights(pickle.dumps({"a": list(range(1000))}))
    yield _case("a pickle under another name", folder, AdapterFileError, WEIGHTS, "not a safetensors file")
    outside = made.folder() / WEIGHTS
    outside.write_bytes(made.good)
    for name, target in ((WEIGHTS, outside), (CONFIG, outside.parent / CONFIG)):
        folder = made.with_weights(made.good)
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        error_type = AdapterConfigError if name == CONFIG else AdapterFileError
        yield _case(f"link out of the folder: {name}", folder, error_type, name, "leaves the folder")
    folder = made.folder()
    (folder / WEIGHTS).symlink_to("/dev/zero")
    yield _case("link to a device", folder, AdapterFileError, WEIGHTS, "leaves the folder")
    folder = made.folder()
    (folder / WEIGHTS).symlink_to(WEIGHTS)
    yield _case("link to itself", folder, AdapterFileError, WEIGHTS)
    folder = made.with_weights(made.good)
    (folder / INDEX).write_text("{}")
    yield _case("weights and index", folder, AdapterFileError, WEIGHTS, INDEX)


def _shards(made: _Maker) -> Iterator[HostileCase]:
    tensors = good_tensors()
    names = sorted(tensors)
    halves = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    right = {name: file for file, held in halves.items() for name in held}

    def sharded(index: Any, *, extra: Mapping[str, list[str]] | None = None) -> Path:
        folder = made.folder()
        for file, held in (halves | dict(extra or {})).items():
            save_file({name: tensors[name] for name in held}, folder / file)
        text = index if isinstance(index, str) else json.dumps(index)
        (folder / INDEX).write_text(text)
        return folder

    tricks = (
        "../one.safetensors",
        "/etc/passwd",
        "/var/x.safetensors",
        "sub/one.safetensors",
        "sub\\one.safetensors",
        "C:\\one.safetensors",
        "one.safetensors\0",
        "one.safetensors:stream.safetensors",
        "..",
        ".",
        "",
        "one.bin",
        7,
        None,
        ["one.safetensors"],
        "three.safetensors",
        "x" * 5000 + ".safetensors",
        "\ud800.safetensors",
    )
    for trick in tricks:
        mention = repr(trick)[1:8] if isinstance(trick, str) and trick else names[0]
        path = sharded({"weight_map": right | {names[0]: trick}})
        yield _case(f"shard {trick!r}", path, AdapterFileError, mention)
    wrong: dict[str, Any] = {
        "empty": {},
        "no map": {"metadata": {}},
        "empty map": {"weight_map": {}},
        "map is a list": {"weight_map": names},
        "not json": "weight_map",
        "an array": [],
        "duplicate": json.dumps({"weight_map": right})[:-1] + ', "weight_map": {}}',
    }
    for what, index in wrong.items():
        yield _case(f"index: {what}", sharded(index), AdapterFileError, INDEX)
    path = sharded({"weight_map": right | {names[0]: "two.safetensors"}})
    yield _case("index: wrong shard", path, AdapterFileError, names[0], INDEX)
    path = sharded({"weight_map": {name: file for name, file in right.items() if name != names[-1]}})
    yield _case("index: a tensor less", path, AdapterFileError, names[-1], INDEX)
    path = sharded({"weight_map": right | {"ghost": "one.safetensors"}})
    yield _case("index: a tensor more", path, AdapterFileError, "ghost", INDEX)
    path = sharded({"weight_map": right}, extra={"two.safetensors": [*names[9:], names[0]]})
    yield _case("a tensor in two shards", path, AdapterFileError, names[0])
    path = sharded({"weight_map": right})
    content = (path / "two.safetensors").read_bytes()
    (path / "two.safetensors").write_bytes(content[:-1])
    yield _case("a shard cut short", path, AdapterFileError, "two.safetensors")
    path = sharded({"weight_map": right})
    (path / "two.safetensors").unlink()
    (path / "two.safetensors").symlink_to(path.parent / path.name / ".." / "x.safetensors")
    yield _case("a shard that is a dead link", path, AdapterFileError, "two.safetensors")


def _bombs(made: _Maker) -> Iterator[HostileCase]:
    """Small files that ask for much time or memory."""
    tensors = good_tensors()
    for prefix in ("model.", "language_model."):
        header = {f"{prefix * (700 // len(prefix))}{i}.lora_A.weight": _EMPTY for i in range(10_000)}
        yield _case(f"10,000 names of {prefix}", made.with_header(header, b""), AdapterFileError, "characters")
        header = {f"{prefix * (450 // len(prefix))}{i}.lora_A.weight": _EMPTY for i in range(10_000)}
        yield _case(
            f"10,000 shorter names of {prefix}", made.with_header(header, b""), AdapterMismatchError, "that long"
        )
    for names in (tensors, {f"{PREFIX}{'model.' * 20}{Q_PROJ}.lora_A.weight": torch.ones(2, HIDDEN_SIZE)}):
        path = made.with_tensors(names, rank_pattern={".*.*.*.*[!?]": 3}, alpha_pattern={"(.*a*)*[!?]": 3})
        if names is not tensors:
            yield _case("regex bomb", path, AdapterMismatchError, WEIGHTS)
    many = {f"layers.{i}*": 2 for i in range(257)}
    yield _case("257 expressions", made.with_tensors(tensors, rank_pattern=many), AdapterConfigError, "rank_pattern")
    path = made.with_config(json.dumps(CONFIG_FIELDS | {"target_parameters": [f"a{i}" for i in range(200_000)]}))
    yield _case("200,000 target_parameters", path, AdapterConfigError, "target_parameters", "at most")
    folder = made.folder()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 86 * 2**20))
        file.truncate(90 * 2**20)
    yield _case("header of 86 MB", folder, AdapterFileError, WEIGHTS, "header at most")
    for name in ("q_proj\n", "q_proj\r", "q_proj\u2028", "q_proj\u200b", "q_proj\x1b[31m", "q_proj\ud800"):
        header = {f"{PREFIX}model.layers.0.self_attn.{name}.lora_A.weight": _EMPTY}
        yield _case(f"name {name!r}", made.with_header(header, b""), AdapterFileError, WEIGHTS, "control characters")
    huge = torch.ones(2, HIDDEN_SIZE, dtype=torch.float64) * 1e300
    for name in (f"{PREFIX}{Q_PROJ}.lora_A.weight", f"{PREFIX}{EXPERTS[0]}.0.gate_proj.lora_A.weight"):
        yield _case(f"float64 beyond float32: {name}", made.with_tensors(tensors | {name: huge}), AdapterTensorError)


_EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
