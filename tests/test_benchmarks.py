"""What benchmarks print last is one line of JSON, also where nothing is there to compare with."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import moe_lora_grid

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    return moe_lora_grid


def row(shape: str) -> dict[str, object]:
    times = {"base_us": 20.0, "lora_us": 30.0, "base_floor_us": 10.0, "floor_us": 10.0}
    return {"shape": shape, "tokens": 8, "slots": 8, "active_adapters": 8, "rank": 16, **times}


@pytest.mark.parametrize("format_name", ["fp8", "int8"])
def test_a_format_that_no_peer_has(grid: ModuleType, format_name: str) -> None:
    summary = json.loads(json.dumps(grid._summary([row("qwen3-30b")], format_name), allow_nan=False))
    assert summary["speedup"] == {}
    assert summary["over_bf16"]["off"] > 0
    assert summary["on_over_off"] == {"8": 1.5}


def test_a_shape_that_the_peer_lacks(grid: ModuleType) -> None:
    summary = json.loads(json.dumps(grid._summary([row("another")], "int4"), allow_nan=False))
    assert summary["speedup"] == summary["over_bf16"] == {}
    speedup = grid._summary([row("qwen3-30b")], "int4")["speedup"]
    assert speedup.keys() == {"on", "on_worst", "off", "off_worst"}
    assert min(speedup.values()) > 0


def test_a_wrong_tile_of_one_token_is_not_small(grid: ModuleType) -> None:
    """In the norm of 4096 tokens it would hide: each layer's check looks at every token by itself."""
    problem = importlib.import_module("grid_problem")
    shape = problem.LayerShape(name="tiny", E=4, D=256, F=16, K=2)
    torch.manual_seed(0)
    experts = problem.make_experts(shape, "bf16", "cpu")
    adapters, batch = problem.make_adapters(shape, [4, 2], "cpu"), problem.make_batch(shape, 4096, 2, "cpu")
    base, out = problem.oracle(experts, None, batch), problem.oracle(experts, adapters, batch)
    assert problem.check_layer(out, base, experts, adapters, batch).small
    out[7, 128:] = base[7, 128:]
    errors = problem.check_layer(out, base, experts, adapters, batch)
    assert errors.delta < 0.02 < 0.3 < errors.worst_token
    assert not errors.small
