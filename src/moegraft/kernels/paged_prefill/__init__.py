"""Attention of chunks of prompts over pages of keys and values. What callers make of a step is here, without Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST_HEAD = 256
"""Elements of a head of queries, keys or values, at most."""


@dataclass(frozen=True, kw_only=True)
class PrefillChunks:
    """N chunks of rows. int32 on the device: first rows [N], tokens [N], tokens of the contexts, which end with the
    chunk's [N], pages of the contexts [N, P] · longest: tokens of the longest chunk."""

    rows_N: torch.Tensor
    tokens_N: torch.Tensor
    contexts_N: torch.Tensor
    page_table_NP: torch.Tensor
    longest: int
