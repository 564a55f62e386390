"""Attention of chunks of prompts over pages of keys and values. What callers make of a step is here, without Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

LARGEST_HEAD = 256
"""Elements of a head of queries, keys or values, at most."""


@dataclass(frozen=True, kw_only=True)
class PrefillChunks:
    """N chunks of rows, int32 on the device: first rows [N], tokens [N], tokens of the contexts, which end with the
    chunk's [N], pages of the contexts [N, P].

    blocks: by the tokens that a program takes, (chunk, first token) of every program [B, 2]; -1 for one without work.
    """

    rows_N: torch.Tensor
    tokens_N: torch.Tensor
    contexts_N: torch.Tensor
    page_table_NP: torch.Tensor
    blocks: Mapping[int, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PrefillTile:
    """``block_m``: rows of a program, of some tokens and the query heads of a head of keys · ``block_l``: keys that it
    takes at once."""

    block_m: int
    block_l: int
    num_warps: int
    num_stages: int = 2


@lru_cache(maxsize=64)
def choose_tile(group: int, widest_head: int, element_size: int) -> PrefillTile:
    """``group``: query heads of a head of keys."""
    at_least = max(16, _power_of_2(group))
    if element_size > 2:
        return PrefillTile(block_m=max(32, at_least), block_l=32, num_warps=4, num_stages=1)
    if widest_head > 128:
        return PrefillTile(block_m=max(64, at_least), block_l=32, num_warps=4)
    return PrefillTile(block_m=max(128, at_least), block_l=64, num_warps=8)


def block_tokens(group: int, widest_head: int, element_size: int) -> int:
    """Tokens that a program takes."""
    return choose_tile(group, widest_head, element_size).block_m // _power_of_2(group)


def blocks_of(tokens: Sequence[int], per_block: int) -> list[tuple[int, int]]:
    """(chunk, first token) of every program, for chunks of so many tokens. The last of a chunk, which read most, go
    first."""
    found = [(n, first) for n, count in enumerate(tokens) for first in range(0, count, per_block)]
    return sorted(found, key=lambda block: -block[1])


def _power_of_2(group: int) -> int:
    return 1 << (group - 1).bit_length()
