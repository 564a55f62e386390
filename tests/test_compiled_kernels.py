"""The kernels compiled for GPUs that are not here, as the host functions would launch them there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moegraft.core import config
from moegraft.core.config import DeviceTarget
from moegraft.tuning.heuristic import H200, fit_device, tuning_device
from moegraft.tuning.tiles import GemmTile

KERNELS = Path(__file__).parents[1] / "src" / "moegraft" / "kernels"
SCRIPT = Path(__file__).parent / "support" / "ahead_of_time.py"
KIB = 1024
AMPERE = {"capability": 80, "shared_memory": 163 * KIB}
ADA = {"capability": 89, "shared_memory": 99 * KIB}
HOPPER = {"capability": 90, "shared_memory": 227 * KIB}
QWEN3 = (128, 2048, 768, 8)
GPT_OSS = (32, 2880, 2880, 4)
LLAMA4 = (16, 5120, 8192, 1)


def compiled(
    device: dict[str, int],
    layer: tuple[int, ...],
    tokens: list[int],
    tmp_path: Path,
    *,
    rank: int = 64,
    as_gpt_oss: bool = False,
    int8: bool = False,
    only: tuple[str, ...] = ("",),
) -> list[dict[str, Any]]:
    """The kernels of a call without adapters and one with, for every number of tokens; ``only``: how names begin."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    case = json.dumps(
        {**device, "layer": layer, "tokens": tokens, "rank": rank, "as_gpt_oss": as_gpt_oss, "int8": int8, "only": only}
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("device", "tokens"),
    [
        pytest.param(ADA, [8], marks=pytest.mark.soak),
        (ADA, [4096]),  # the least shared memory
        pytest.param(AMPERE, [4096], marks=pytest.mark.soak),
        (HOPPER, [4096]),
    ],
    ids=lambda value: f"sm{value['capability']}" if isinstance(value, dict) else None,
)
def test_every_kernel_has_the_shared_memory_that_it_asks_for(
    device: dict[str, int], tokens: list[int], tmp_path: Path
) -> None:
    kernels = compiled(device, QWEN3, tokens, tmp_path)
    assert {kernel["kernel"] for kernel in kernels} == {"route", "shrink", "gemm13", "gemm2", "sum"}
    for kernel in kernels:
        assert kernel["shared"] <= device["shared_memory"], kernel


def test_one_routed_row_whose_shrink_is_split(tmp_path: Path) -> None:
    """Triton takes a size of one for a constant."""
    # gpt-oss's layout: not a token's own kernels
    kernels = compiled(HOPPER, LLAMA4, [1], tmp_path, rank=16, as_gpt_oss=True, only=("shrink",))
    assert any(kernel["kernel"] == "shrink" and kernel["splits"] > 1 for kernel in kernels)


def test_a_gemm_without_lanes_reads_nothing_before_it_waits(tmp_path: Path) -> None:
    kernels = compiled(HOPPER, QWEN3, [8], tmp_path, rank=16, only=("gemm",))
    assert len(kernels) == 4
    for kernel in kernels:
        # With lanes the base product runs while the shrink does: that is what the late wait is for.
        late = kernel["waits"] > kernel["multiplies"]
        assert late is kernel["has_lora"], kernel
        if not kernel["has_lora"]:
            assert kernel["waits"] < kernel["reads"], kernel


def test_gate_and_up_in_turns_are_copied_as_fast_as_one_after_the_other(tmp_path: Path) -> None:
    """gpt-oss: read apart, every second number of a row is a load of two bytes that nothing can run ahead of."""
    copies = [
        [kernel["async_copies"] for kernel in compiled(
            HOPPER, GPT_OSS, [8], tmp_path, rank=16, as_gpt_oss=as_gpt_oss, only=("gemm13",)
        )]
        for as_gpt_oss in (False, True)
    ]  # fmt: skip
    assert copies[0] == copies[1]
    assert min(copies[0]) > 0


def test_device_functions_take_their_arguments_in_groups() -> None:
    sizes = {
        f"{path.relative_to(KERNELS)}: {node.name}": len(node.args.args)
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
    }
    assert len(sizes) > 50
    # Their docstrings say why: output, bias, columns and alignment, or weights, of four maps.
    assert {name: size for name, size in sizes.items() if size > 20} == {
        "lora_linear/device.py: expand_group_kernel": 33,
        "linear_few_rows/device.py: few_rows_kernel": 27,
    }


@pytest.mark.parametrize(("only", "launches"), [("engine 1", 26), ("q, k, v 1 ", 7), ("linear 1 r16", 4)])
def test_what_runs_beside_the_experts_compiles(only: str, launches: int, tmp_path: Path) -> None:
    """For one row too, whose number is a constant to the compiler and a tensor to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "found.json"
    script = [sys.executable, str(KERNELS.parents[2] / "scripts" / "compare_kernels.py"), "dump", "--sm", "90"]
    done = subprocess.run(
        [*script, "--src", str(KERNELS.parents[1]), "--out", str(out), "--only", only],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ((_, found),) = json.loads(out.read_text()).items()
    assert len(found) == launches


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_an_h200_gets_the_tiles_that_were_measured_on_it(block_m: int) -> None:
    for num_halves, block_n in ((2, 128), (1, 256)):
        tile = GemmTile(block_n=block_n, block_k=64, num_stages=4, num_warps=8)
        assert fit_device(tile, block_m, num_halves=num_halves, device=H200) == tile


def test_the_device_is_asked_for_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, total_memory=24 << 30,
        shared_memory_per_multiprocessor=100 * KIB,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda", 5): found}.__getitem__)
    config._target_of.cache_clear()
    try:
        device = tuning_device()
        assert DeviceTarget.of(torch.device("cuda:5")) is device  # what the oracle and the launches ask
    finally:
        config._target_of.cache_clear()
    expected = {"kind": "cuda", "name": "NVIDIA L4", "capability": (8, 9), "has_triton": True, "num_sms": 58}
    assert device == DeviceTarget(**expected, shared_memory=99 * KIB, memory=24 << 30)
    assert not device.has_hopper_features and not device.has_wgmma


def test_scales_and_biases_round_alike_with_lanes_and_without(tmp_path: Path) -> None:
    """A product that is merged with the sum behind it is rounded once: base rows would have other bits."""
    kernels = compiled(HOPPER, (4, 160, 192, 2), [16], tmp_path, rank=16, int8=True, only=("gemm",))
    for name in ("gemm13", "gemm2"):
        without, with_lanes = (kernel["arithmetic"] for kernel in kernels if kernel["kernel"] == name)
        assert without == with_lanes and without[0] > 0
