"""``quantization_config`` of a checkpoint: which of the known layouts its quantised tensors are in, or why none."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moegraft.core.errors import CheckpointError
from moegraft.files import shorten

GROUP_SIZES = (32, 64, 128)
WHOLE_CHANNEL = -1
QUANTISATION_FIELDS = ("quantization_config", "compression_config")


class Layout(enum.StrEnum):
    """How the tensors of one quantised matrix are stored."""

    GPTQ = "gptq"
    AWQ = "awq"
    PACKED_INT4 = "pack-quantized"  # compressed-tensors
    INT8 = "int-quantized"  # compressed-tensors
    FP8 = "float-quantized"  # compressed-tensors
    FP8_BLOCKS = "fp8"  # weight_scale_inv: DeepSeek, Qwen, MiniMax
    MXFP4 = "mxfp4"  # gpt-oss
    NVFP4 = "NVFP4"  # modelopt
    PACKED_NVFP4 = "nvfp4-pack-quantized"  # compressed-tensors


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Tensors of one quantised matrix: last names. ``marker`` tells a quantised matrix from a plain one."""

    marker: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()

    @property
    def known(self) -> frozenset[str]:
        return self.required | self.optional

    def requiring(self, *names: str) -> Parts:
        """With these optional parts required."""
        return replace(self, required=self.required.union(names), optional=self.optional.difference(names))


def _parts(marker: str, required: str, optional: str = "") -> Parts:
    return Parts(marker=marker, required=frozenset(required.split()), optional=frozenset(optional.split()))


PARTS: Mapping[Layout, Parts] = {
    Layout.GPTQ: _parts("qweight", "qweight qzeros scales", "g_idx"),
    Layout.AWQ: _parts("qweight", "qweight qzeros scales"),
    Layout.PACKED_INT4: _parts(
        "weight_packed", "weight_packed weight_scale", "weight_shape weight_zero_point weight_g_idx"
    ),
    Layout.INT8: _parts("weight_scale", "weight weight_scale"),
    Layout.FP8: _parts("weight_scale", "weight weight_scale", "input_scale"),
    Layout.FP8_BLOCKS: _parts("weight_scale_inv", "weight weight_scale_inv", "activation_scale input_scale"),
    Layout.NVFP4: _parts("weight_scale_2", "weight weight_scale weight_scale_2", "input_scale"),
    Layout.PACKED_NVFP4: _parts(
        "weight_global_scale", "weight_packed weight_scale weight_global_scale", "input_global_scale"
    ),
}
CACHE_SCALES = frozenset({"k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale"})
"""Last names of what stands beside attention for a quantised cache."""
GROUP_ORDER: Mapping[Layout, str] = {Layout.GPTQ: "g_idx", Layout.PACKED_INT4: "weight_g_idx"}
"""The part that tells the group of each input, of layouts that have one."""
FORMAT_OF_LAYOUT: Mapping[Layout, str] = {
    Layout.GPTQ: "int4",
    Layout.AWQ: "int4",
    Layout.PACKED_INT4: "int4",
    Layout.INT8: "int8",
    Layout.FP8: "fp8",
    Layout.FP8_BLOCKS: "fp8",
    Layout.MXFP4: "mxfp4",
    Layout.NVFP4: "nvfp4",
    Layout.PACKED_NVFP4: "nvfp4",
}
"""``ExpertsWeights.format_name`` of each layout."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What the config says of every quantised matrix. ``group_size``: WHOLE_CHANNEL, or input columns a scale.

    ``zeros_plus_one``: GPTQ's first format stores zero points less one. ``has_zeros``: compressed-tensors stores zero
    points. ``has_group_order``: inputs were sorted before they were quantised (act-order), so that only a tensor of
    its own tells their groups. ``is_static``: activations have scales of their own in the checkpoint.
    """

    layout: Layout
    group_size: int = WHOLE_CHANNEL
    zeros_plus_one: bool = False
    has_zeros: bool = False
    has_group_order: bool = False
    block_size: tuple[int, int] | None = None
    is_static: bool = False

    @property
    def format_name(self) -> str:
        return FORMAT_OF_LAYOUT[self.layout]

    @property
    def parts(self) -> Parts:
        """Tensors of one matrix. Not of mxfp4, whose experts are stored fused."""
        parts = PARTS[self.layout]
        if self.has_zeros:
            parts = parts.requiring("weight_zero_point")
        # One group of all inputs has no order.
        return parts.requiring(GROUP_ORDER[self.layout]) if self.has_group_order and self.group_size > 0 else parts

    @property
    def weight_dtype(self) -> torch.dtype:
        """The name of ``weight``, where the layout has a tensor of that name."""
        return {Layout.INT8: torch.int8, Layout.NVFP4: torch.uint8}.get(self.layout, torch.float8_e4m3fn)

    @property
    def description(self) -> str:
        """For messages and tables: the layout and what goes with it."""
        if self.format_name == "int4":
            size = "whole channels" if self.group_size == WHOLE_CHANNEL else f"groups of {self.group_size}"
            return f"{self.layout} int4, {size}"
        if self.block_size is not None:
            return f"{self.layout}, blocks of {self.block_size[0]} x {self.block_size[1]}"
        return str(self.layout)


def find_schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a ``config.json``; none where it is not quantised, or by a method that is not known here.

    Several tell apart by the names and dtypes of their tensors. Raises CheckpointError for a known method with options
    that are not served; the message names the field.
    """
    fields = quantisation_fields(config)
    reader = None if fields is None else _READERS.get(str(fields.get("quant_method")))
    return () if fields is None or reader is None else reader(_Fields(fields))


def read_schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """As ``find_schemes``, one at least. Raises CheckpointError where there is none."""
    fields = quantisation_fields(config)
    if fields is None:
        raise CheckpointError(
            "config.json has no quantization_config: the checkpoint is not quantised; load it with transformers"
        )
    schemes = find_schemes(config)
    if not schemes:
        method = shorten(fields.get("quant_method"))
        raise CheckpointError(
            f"config.json: quantization_config.quant_method is {method}, expected one of {', '.join(_READERS)}"
        )
    return schemes


def quantisation_fields(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of the model or of its text stack; None where there is none."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in QUANTISATION_FIELDS:
            fields = holder.get(key)
            if isinstance(fields, Mapping):
                return fields
    return None


def cache_note(config: Mapping[str, Any]) -> str | None:
    """What a config says of a quantised cache, which is not used: keys and values stay in the model's dtype."""
    fields = quantisation_fields(config) or {}
    names = [name for name in ("kv_cache_scheme", "kv_cache_quant_algo") if fields.get(name)]
    return f"quantization_config.{names[0]} is not used: keys and values are not quantised" if names else None


class _Fields:
    """Fields of an untrusted object; each error names the field, what was found and what was expected."""

    def __init__(self, fields: Mapping[str, Any], path: str = "quantization_config") -> None:
        self.fields = fields
        self.path = path

    def get(self, name: str, *allowed: Any, default: Any) -> Any:
        """A field that must equal one of ``allowed`` (of the same type)."""
        value = self.fields.get(name, default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.refused(name, value, " or ".join(map(str, allowed)))
        return value

    def absent(self, name: str, why: str) -> None:
        """A field that may be there only where it is null, false or empty."""
        if self.fields.get(name):
            raise self.refused(name, self.fields[name], f"none: {why}")

    def object(self, name: str) -> _Fields:
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            raise self.refused(name, value, "an object")
        return _Fields(value, f"{self.path}.{name}")

    def refused(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"config.json: {self.path}.{name} is {shorten(value)}, expected {expected}")


def _read_gptq(fields: _Fields) -> tuple[Scheme, ...]:
    fields.get("bits", 4, default=None)
    fields.get("pack_dtype", "int32", default="int32")
    rules = fields.fields.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(_changes_nothing(fields, *rule) for rule in rules.items()):
        raise fields.refused("dynamic", rules, "rules that leave modules out (-:), or that repeat what holds for all")
    form = fields.get("checkpoint_format", "gptq", "gptq_v2", default=fields.fields.get("format", "gptq"))
    scheme = Scheme(
        layout=Layout.GPTQ,
        group_size=fields.get("group_size", *GROUP_SIZES, WHOLE_CHANNEL, default=None),
        zeros_plus_one=form == "gptq",
        has_group_order=bool(fields.get("desc_act", True, False, None, default=None)),
    )
    return (scheme,)


def _changes_nothing(fields: _Fields, rule: Any, values: Any) -> bool:
    """A rule of GPTQModel that leaves modules out, which the tensors tell, or gives some the options of all."""
    if str(rule).startswith("-:"):
        return True
    return isinstance(values, Mapping) and all(fields.fields.get(name) == value for name, value in values.items())


def _read_awq(fields: _Fields) -> tuple[Scheme, ...]:
    bits = "bits" if "bits" in fields.fields else "w_bit"
    size = "group_size" if "group_size" in fields.fields else "q_group_size"
    fields.get(bits, 4, default=None)
    version = "version" if "version" in fields.fields else "format"
    fields.get(version, "gemm", "GEMM", default="gemm")
    scheme = Scheme(
        layout=Layout.AWQ,
        group_size=fields.get(size, *GROUP_SIZES, WHOLE_CHANNEL, default=None),
    )
    return (scheme,)


def _read_fp8(fields: _Fields) -> tuple[Scheme, ...]:
    fields.get("expert_dtype", "fp8", default="fp8")
    fields.get("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    fields.absent("modules_to_convert", "tables in fp8 are not served")
    block_size = fields.fields.get("weight_block_size", [128, 128])
    if block_size is not None and block_size != [128, 128]:
        raise fields.refused("weight_block_size", block_size, "[128, 128] or null")
    scheme = Scheme(
        layout=Layout.FP8_BLOCKS,
        block_size=None if block_size is None else (128, 128),
        is_static=fields.get("activation_scheme", "dynamic", "static", default="dynamic") == "static",
    )
    if "weight_block_size" in fields.fields:
        return (scheme,)
    # AutoFP8 says nothing of blocks, and names its scales as compressed-tensors does.
    return scheme, Scheme(layout=Layout.FP8, is_static=scheme.is_static)


def _read_modelopt(fields: _Fields) -> tuple[Scheme, ...]:
    """NVIDIA's: what is quantised how stands in its tensors; activations of fp8 have scales of their own."""
    algo = fields.get("quant_algo", "FP8", "NVFP4", "MIXED_PRECISION", default=None)
    fp8 = Scheme(layout=Layout.FP8, is_static=True)
    nvfp4 = Scheme(layout=Layout.NVFP4, group_size=fields.get("group_size", 16, None, default=None) or 16)
    return {"FP8": (fp8,), "NVFP4": (nvfp4,)}.get(algo, (fp8, nvfp4))


def _read_mxfp4(fields: _Fields) -> tuple[Scheme, ...]:
    return (Scheme(layout=Layout.MXFP4, group_size=32),)


def _read_compressed_tensors(fields: _Fields) -> tuple[Scheme, ...]:
    fields.get("quantization_status", "compressed", default="compressed")
    sparsity = fields.fields.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise fields.refused("sparsity_config", sparsity, "none: sparse weights are not served")
    fields.absent("transform_config", "rotations of activations are not served")
    groups = fields.object("config_groups")
    schemes = []
    for name in groups.fields:
        group = groups.object(name)
        form = group.fields.get("format") or fields.fields.get("format")
        if group.fields.get("weights") is not None:  # others quantise activations of what stays plain
            schemes.append(_read_group(group, form))
    schemes = list(dict.fromkeys(schemes))
    layouts = [scheme.layout for scheme in schemes]
    if not schemes or len(set(layouts)) < len(layouts):
        # Whose tensors are whose could only be told by evaluating the patterns in their targets.
        expected = "one group or several, each in a layout of its own"
        raise fields.refused("config_groups", sorted(groups.fields), expected)
    return tuple(schemes)


# compressed-tensors' actorder: what sorts the inputs of a matrix, and what sorts them for the calibration alone.
_SORTED = ("group", "dynamic")
_UNSORTED = ("weight", "static")


def _read_group(group: _Fields, form: Any) -> Scheme:
    weights = group.object("weights")
    layouts = {str(layout): layout for layout in (Layout.PACKED_INT4, Layout.INT8, Layout.FP8, Layout.PACKED_NVFP4)}
    if not isinstance(form, str) or form not in layouts:
        raise group.refused("format", form, " or ".join(layouts))
    layout = layouts[form]
    if layout is Layout.PACKED_NVFP4:  # activations are read as they are, whatever input_activations says
        weights.get("num_bits", 4, default=None)
        weights.get("type", "float", default=None)
        return Scheme(layout=layout, group_size=weights.get("group_size", 16, default=None))
    weights.get("num_bits", 4 if layout is Layout.PACKED_INT4 else 8, default=None)
    weights.get("type", "float" if layout is Layout.FP8 else "int", default="int")
    symmetric = weights.get("symmetric", *((True, False) if layout is Layout.PACKED_INT4 else (True,)), default=True)
    inputs = None if group.fields.get("input_activations") is None else group.object("input_activations")
    if layout is Layout.PACKED_INT4:
        if inputs is not None:
            raise group.refused("input_activations", inputs.fields, "null beside int4 weights")
        strategy = weights.get("strategy", "group", "channel", default="group")
        sizes = GROUP_SIZES if strategy == "group" else (None, WHOLE_CHANNEL)
        size = weights.get("group_size", *sizes, default=None)
        order = weights.get("actorder", None, True, False, *_SORTED, *_UNSORTED, default=None)
        return Scheme(
            layout=layout,
            group_size=WHOLE_CHANNEL if size is None else size,
            has_zeros=not symmetric,
            has_group_order=order is True or order in _SORTED,
        )
    strategy = weights.get("strategy", "channel", "tensor", *(("block",) if layout is Layout.FP8 else ()), default=None)
    block_size = None
    if strategy == "block":
        if weights.fields.get("block_structure") != [128, 128]:
            raise weights.refused("block_structure", weights.fields.get("block_structure"), "[128, 128]")
        block_size = (128, 128)
    is_static = inputs is not None and not inputs.get("dynamic", True, False, default=False)
    if layout is Layout.INT8 and is_static:
        raise group.refused("input_activations", "static", "null, or dynamic ones (which are then read unquantised)")
    return Scheme(layout=layout, block_size=block_size, is_static=is_static)


_READERS = {
    "fp8": _read_fp8,
    "mxfp4": _read_mxfp4,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed_tensors,
    "modelopt": _read_modelopt,
}
