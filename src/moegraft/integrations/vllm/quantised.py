"""Quantised experts under LoRA: vLLM loads a checkpoint's tensors, and before it repacks them they become ours.

Methods that are named here go through three steps more: what vLLM would choose is put aside when a method is made; its
own ``process_weights_after_loading`` is left out where the tensors fit a format of ``moegraft.formats``; the experts
class reads those. Any other method, and any layer whose tensors do not fit, keeps vLLM's way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, make_unquantized_moe_kernel

from moegraft.formats.base import ExpertsWeights
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import Int4Experts, Int4Matrix
from moegraft.formats.mxfp4 import MXFP4Experts, MXFP4Matrix
from moegraft.integrations.vllm.experts import MoegraftExperts, is_interleaved, why_not_engine, why_not_experts
from moegraft.kernels.weights import kernel_weights

logger = init_logger("vllm.moegraft")

_LAYERS = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_LAYERS}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16"
_ZEROS_OF_8 = 0x77777777
"""Eight zero points as GPTQ stores them, less one."""


def _fp8(method: Any, layer: Any) -> ExpertsWeights:
    if not method.block_quant:
        raise ValueError("fp8 weights without blocks of scales")
    b13, b2 = _biases(method, layer)
    return Fp8Experts.from_checkpoint(
        w13=layer.w13_weight.data,
        w2=layer.w2_weight.data,
        w13_scale=layer.w13_weight_scale_inv.data,
        w2_scale=layer.w2_weight_scale_inv.data,
        block_size=tuple(getattr(method, "moe_block_shape", None) or method.weight_block_size),
        num_halves=_num_halves(method),
        b13=b13,
        b2=b2,
    )


def _gptq(method: Any, layer: Any) -> ExpertsWeights:
    config = method.quant_config
    if config.quant_type.size_bits != 4:
        raise ValueError(f"weights of {config.quant_type.size_bits} bits")
    if config.desc_act:
        raise ValueError("act-order")

    def matrix(name: str) -> Int4Matrix:
        codes, scales = getattr(layer, f"{name}_qweight").data, getattr(layer, f"{name}_scales").data
        return _in_out(codes, scales, None, config.group_size)

    return _int4(method, layer, matrix)


def _awq(method: Any, layer: Any) -> ExpertsWeights:
    def matrix(name: str) -> Int4Matrix:
        codes, zeros, scales = (getattr(layer, f"{name}_{part}").data for part in ("qweight", "qzeros", "scales"))
        group = method.quant_config.group_size
        return Int4Matrix.stack(
            [Int4Matrix.from_awq(*each, group=group) for each in zip(codes, zeros, scales, strict=True)]
        )

    return _int4(method, layer, matrix)


def _compressed(method: Any, layer: Any) -> ExpertsWeights:
    if method.num_bits != 4:
        raise ValueError(f"weights of {method.num_bits} bits")
    if getattr(method, "actorder", None) == "group":
        raise ValueError("act-order")

    def matrix(name: str) -> Int4Matrix:
        codes, scales = getattr(layer, f"{name}_weight_packed").data, getattr(layer, f"{name}_weight_scale").data
        zeros = getattr(layer, f"{name}_weight_zero_point", None)
        if getattr(method, "is_transposed", True):  # vLLM 0.26 turns them round as it loads them, 0.33 does not
            return _in_out(codes, scales, zeros, method.group_size)
        packed = [codes, scales] if zeros is None else [codes, scales, zeros.data]
        each = [
            Int4Matrix.from_compressed_tensors(*one, num_inputs=8 * codes.shape[2], group=method.group_size)
            for one in zip(*packed, strict=True)
        ]
        return Int4Matrix.stack(each)

    return _int4(method, layer, matrix)


def _mxfp4(method: Any, layer: Any) -> ExpertsWeights:
    """gpt-oss: gate and up alternate; here they stand one after the other."""

    def matrix(name: str, order: torch.Tensor | None) -> MXFP4Matrix:
        blocks, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale").data
        each = [
            MXFP4Matrix.from_blocks(
                (b if order is None else b[order]).unflatten(-1, (-1, 16)), s if order is None else s[order]
            )
            for b, s in zip(blocks, scales, strict=True)
        ]
        return MXFP4Matrix.stack(each)

    rows = torch.arange(layer.w13_weight.shape[1], device=layer.w13_weight.device)
    order = torch.cat([rows[::2], rows[1::2]])
    b13, b2 = _biases(method, layer)
    b13 = None if b13 is None else b13[:, order].contiguous()
    return MXFP4Experts(w13=matrix("w13", order), w2=matrix("w2", None), b13=b13, b2=b2)


def _in_out(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group: int) -> Int4Matrix:
    """codes int32 [E, in / 8, out], scales [E, groups, out], zeros int32 [E, groups, out / 8] or absent (8); an expert
    at a time, since its numbers lie unpacked for a while."""
    offset = 0 if zeros is not None else 1
    if zeros is None:
        zeros = codes.new_full((1, scales.shape[1], scales.shape[2] // 8), _ZEROS_OF_8).expand(len(codes), -1, -1)
    each = zip(codes, zeros.data, scales, strict=True)
    return Int4Matrix.stack([Int4Matrix.from_gptq(c, z, s, group=group, zero_offset=offset) for c, z, s in each])


def _int4(method: Any, layer: Any, matrix: Callable[[str], Int4Matrix]) -> ExpertsWeights:
    b13, b2 = _biases(method, layer)
    return Int4Experts(w13=matrix("w13"), w2=matrix("w2"), num_halves=_num_halves(method), b13=b13, b2=b2)


def _num_halves(method: Any) -> int:
    if is_interleaved(method.moe.activation):
        raise ValueError("gate and up that alternate")
    return 2 if method.moe.is_act_and_mul else 1


def _biases(method: Any, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    b13, b2 = (getattr(layer, name, None) for name in ("w13_bias", "w2_bias"))
    dtype = method.moe.in_dtype
    return None if b13 is None else b13.data.to(dtype), None if b2 is None else b2.data.to(dtype)


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A method of vLLM's. ``absent``: attributes that it has where vLLM found kernels, given its module."""

    module: str
    name: str
    read: Callable[[Any, Any], ExpertsWeights]
    absent: Callable[[Any], Mapping[str, Any]] = field(default=lambda module: {"experts_cls": None})


SEAMS = (
    Seam(module=f"{_LAYERS}.fp8", name="Fp8MoEMethod", read=_fp8),
    Seam(module=f"{_LAYERS}.auto_gptq", name="AutoGPTQMoEMethod", read=_gptq,
         absent=lambda module: {"wna16_moe_backend": None, "experts_cls": None}),
    Seam(module=f"{_LAYERS}.auto_awq", name="AutoAWQMoEMethod", read=_awq,
         absent=lambda module: {"wna16_moe_backend": None, "experts_cls": None}),
    Seam(module=_COMPRESSED, name="CompressedTensorsWNA16MoEMethod", read=_compressed,
         absent=lambda module: {
             "wna16_backend": None, "experts_cls": None, "is_marlin": False, "is_transposed": False,
             "input_dtype": None,
         }),
    Seam(module=f"{_COMPRESSED}_marlin", name="CompressedTensorsWNA16MarlinMoEMethod", read=_compressed,
         absent=lambda module: {"wna16_backend": None, "experts_cls": None}),
    Seam(module=f"{_LAYERS}.mxfp4", name="GptOssMxfp4MoEMethod", read=_mxfp4,
         absent=lambda module: {
             "mxfp4_backend": module.Mxfp4MoeBackend.NONE, "experts_cls": None, "max_capture_size": 0,
             "_cache_permute_indices": {}, "w13_precision_config": None, "w2_precision_config": None,
         }),
)  # fmt: skip


def _why_not(moe: Any) -> str | None:
    """As ``why_not_engine``: empty where nothing was asked for."""
    reason = why_not_engine(moe, base_too=False)
    return why_not_experts(moe) if reason is None else reason


def _take(method: Any, layer: Any, weights: ExpertsWeights) -> None:
    """The layer's tensors become ours, which its kernel reads; vLLM's are free."""
    method.moe_quant_config = FusedMoEQuantConfig.make(
        gemm1_alpha=getattr(layer, "swiglu_alpha", None), gemm1_clamp_limit=getattr(layer, "swiglu_limit", None)
    )
    method.moe_kernel = make_unquantized_moe_kernel(
        quant_config=method.moe_quant_config,
        moe_config=method.moe,
        backend=UnquantizedMoeBackend.TRITON,
        experts_cls=MoegraftExperts,
        routing_tables=layer._expert_routing_tables(),
    )
    experts = method.moe_kernel.fused_experts
    activation = experts.activation_of(method.moe.activation)
    experts.stored = kernel_weights(weights, activation, method.moe.in_dtype)
    for name in list(layer._parameters):
        delattr(layer, name)
    layer.w13_weight = torch.nn.Parameter(experts.stored.w13, requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(experts.stored.w2, requires_grad=False)
    logger.info_once("moegraft serves the experts: %s weights", weights.format_name)


def _go_through(cls: Any, seam: Seam, module: Any) -> None:
    make, process = cls.__init__, cls.process_weights_after_loading

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except (NotImplementedError, ValueError):  # vLLM has no kernel for this machine
            if getattr(self, "moe", None) is None or _why_not(self.moe) is not None:
                raise
            for name, value in seam.absent(module).items():
                if not hasattr(self, name):
                    setattr(self, name, value)
        self._experts_cls_of_vllm = getattr(self, "experts_cls", None)
        if self._experts_cls_of_vllm is not None and _why_not(self.moe) is None:
            self.experts_cls = MoegraftExperts  # before the weights are there vLLM asks it what kind of kernel it is

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        reason = _why_not(self.moe)
        try:
            if reason is None:
                return _take(self, layer, seam.read(self, layer))
        except ValueError as error:
            reason = str(error)
        if reason:
            logger.info_once("moegraft leaves the experts to vLLM: %s", reason)
        if hasattr(self, "experts_cls"):
            self.experts_cls = self._experts_cls_of_vllm
        return process(self, layer)

    cls.__init__, cls.process_weights_after_loading = __init__, process_weights_after_loading


def install() -> None:
    """Once a process; methods that a version has elsewhere keep vLLM's way."""
    for seam in SEAMS:
        try:
            module = import_module(seam.module)
        except ImportError:
            continue
        cls = getattr(module, seam.name, None)
        if cls is not None and cls.__init__.__module__ != __name__:
            _go_through(cls, seam, module)
