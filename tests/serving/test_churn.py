"""Adapters are loaded, unloaded, replaced, evicted and pinned, and requests cancelled, while others run.

A checker knows the right tokens of every adapter's files: whatever happens meanwhile, a request's tokens are those of
the files that stood behind its name when it was submitted, to its end or to where it was cut off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.churn import NARROW, Churn, expect
from support.families import build

from moegraft import Engine


@pytest.mark.parametrize(
    "seconds", [5, pytest.param(float(os.environ.get("MOEGRAFT_SOAK_SECONDS", "60")), marks=pytest.mark.soak)]
)
def test_no_wrong_token_and_nothing_is_lost(kinds: dict[str, Path], truth: Any, seconds: float) -> None:
    with Engine(build("qwen3_moe"), **NARROW) as engine:
        churn = Churn(engine, kinds, expect(truth))
        churn.run(seconds)
        print(churn.counts, engine.stats().preemptions, engine.stats().steps)
        churn.check_end()
