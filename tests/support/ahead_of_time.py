"""Compiles the kernels of one experts layer for a GPU that need not be there: ``python ahead_of_time.py '{...}'``.

Prints a JSON line a kernel. A process of its own, because Triton's interpreter must be off when kernels are defined.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moegraft.core.config import Activation, ActivationKind, DeviceTarget
from moegraft.core.tables import NUM_FIELDS, ExpertsFactor, ExpertsTables
from moegraft.kernels.device import groups
from moegraft.kernels.moe_forward.host import fused_moe_lora
from moegraft.kernels.records import LoRABatch, MoEWeights, Quantisation, WeightFormat
from moegraft.tuning import heuristic, table

PAGE_ELEMS = 32768


class AbsentDriver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def pretend(capability: int, shared_memory: int) -> None:
    """Host functions see this GPU, and launches compile."""
    driver.set_active(AbsentDriver(capability))
    device = DeviceTarget(
        kind="cuda", capability=divmod(capability, 10), has_triton=True, name="absent", shared_memory=shared_memory
    )
    for module in (heuristic, table):
        module.tuning_device = lambda: device
    DeviceTarget.of = staticmethod(lambda torch_device: device)


def layer(E: int, D: int, F: int, *, as_gpt_oss: bool) -> MoEWeights:
    """``as_gpt_oss``: [E, in, out], gate and up in turns."""
    sizes = ((D, 2 * F), (F, D)) if as_gpt_oss else ((2 * F, D), (D, F))
    w13, w2 = (torch.empty(E, *size, dtype=torch.bfloat16, device="meta") for size in sizes)
    return MoEWeights(w13=w13, w2=w2, is_transposed=as_gpt_oss, is_interleaved=as_gpt_oss)


def int8_layer(E: int, D: int, F: int) -> MoEWeights:
    """With biases and GELU, whose sums a compiler could merge with the scales of the columns."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    return MoEWeights(
        w13=empty(E, 2 * F, D, dtype=torch.int8),
        w2=empty(E, D, F, dtype=torch.int8),
        b13=empty(E, 2 * F),
        b2=empty(E, D),
        activation=Activation(kind=ActivationKind.GELU),
        quantisation=Quantisation(
            format=WeightFormat.INT8,
            scales13=empty(E, 2 * F, dtype=torch.float32),
            scales2=empty(E, D, dtype=torch.float32),
            hidden_size=D,
            intermediate_size=F,
        ),
    )


def adapters(E: int, T: int, rank: int, slots: int = 8) -> LoRABatch:
    def ints(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device="meta")

    tables = ExpertsTables(
        pool=torch.empty(16 * PAGE_ELEMS, dtype=torch.bfloat16, device="meta"),
        page_table=ints(slots, 16),
        factors=ints(slots, len(ExpertsFactor), NUM_FIELDS),
        expert_index=ints(slots, E),
        page_elems=PAGE_ELEMS,
    )
    return LoRABatch(tables=tables, token_slots_T=ints(T), rank13=2 * rank, rank2=rank)


def describe(name: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    ptx = kernel.asm["ptx"].splitlines()

    def first(*instructions: str) -> int | None:
        return next((i for i, line in enumerate(ptx) if any(word in line for word in instructions)), None)

    return {
        "kernel": name.removesuffix("_kernel"),
        "shared": kernel.metadata.shared,
        "has_lora": any(isinstance(arg, groups.Expand) and arg.u is not None for arg in args),
        "splits": getattr(options.get("TILE"), "SPLITS", None),
        "async_copies": sum("cp.async.cg" in line for line in ptx),
        "waits": first("griddepcontrol.wait"),
        "reads": first("ld.global", "cp.async", "cp.async.bulk"),
        "multiplies": first("mma.sync", "wgmma.mma_async"),
        "arithmetic": [sum(word in line for line in ptx) for word in ("fma.rn.f32", "mul.f32", "add.f32")],
    }


def main() -> None:
    case = json.loads(sys.argv[1])
    pretend(case["capability"], case["shared_memory"])
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not self.__name__.startswith(tuple(case["only"])):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps(describe(self.__name__, kernel, args, options)), flush=True)
        return kernel

    JITFunction.run = compile_only
    E, D, F, K = case["layer"]
    weights = int8_layer(E, D, F) if case["int8"] else layer(E, D, F, as_gpt_oss=case["as_gpt_oss"])
    for T in case["tokens"]:
        x_TD = torch.empty(T, D, dtype=torch.bfloat16, device="meta")
        ids_TK, weights_TK = (torch.empty(T, K, dtype=dtype, device="meta") for dtype in (torch.int32, torch.float32))
        for lora in (None, adapters(E, T, case["rank"])):
            fused_moe_lora(x_TD, weights, ids_TK, weights_TK, lora=lora)


if __name__ == "__main__":
    main()
