"""Prompts and engines for tests of serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from support.families import VOCAB_SIZE


def draw_prompts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths]
