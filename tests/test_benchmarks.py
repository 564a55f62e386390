"""What benchmarks print last is one line of JSON, also where nothing is there to compare with."""

from __future__ import annotations

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
    assert summary["speedup"] == {"on": None, "on_worst": None, "off": None, "off_worst": None}
    assert summary["over_bf16"]["off"] > 0
    assert summary["on_over_off"] == {"8": 1.5}


def test_a_shape_that_the_peer_lacks(grid: ModuleType) -> None:
    summary = json.loads(json.dumps(grid._summary([row("another")], "int4"), allow_nan=False))
    assert set(summary["speedup"].values()) == set(summary["over_bf16"].values()) == {None}
    assert all(value > 0 for value in grid._summary([row("qwen3-30b")], "int4")["speedup"].values())
