"""Which adapter each row of a batch asks for: one vocabulary of popularity for tests, benchmarks and users."""

from __future__ import annotations

import enum

import torch


class Popularity(enum.StrEnum):
    """How the rows of a batch spread over the adapters; the words are Punica's (Chen et al., 2023).

    Adapter 0 is the most popular one in ``IDENTICAL``, ``ZIPF`` and ``SKEWED``.
    """

    IDENTICAL = "identical"  # every row asks for adapter 0
    DISTINCT = "distinct"  # row i asks for adapter i mod num_adapters
    UNIFORM = "uniform"  # independent draws, all adapters alike
    ZIPF = "zipf"  # independent draws, P(i) ~ 1 / (i + 1)
    SKEWED = "skewed"  # independent draws, each adapter 1.5 times as popular as the next


SKEW = 1.5


def draw_adapters(
    popularity: Popularity | str, num_rows: int, num_adapters: int, *, base_share: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Adapter index of each row, [num_rows] int32 on the CPU; -1 is a row without an adapter.

    ``base_share``: share of rows that become -1, rounded to whole rows, at places drawn by ``seed``.
    ``draw_adapters("distinct", ...).sort().values`` gives contiguous segments of equal length.
    Raises ValueError for an unknown popularity, a negative size, no adapters, or a share outside [0, 1].
    """
    popularity = Popularity(popularity)
    if num_rows < 0 or num_adapters < 1:
        raise ValueError(f"expected num_rows >= 0 and num_adapters >= 1, found {num_rows} and {num_adapters}")
    if not 0.0 <= base_share <= 1.0:
        raise ValueError(f"expected base_share in [0, 1], found {base_share}")
    generator = torch.Generator().manual_seed(seed)
    index_N = _draw(popularity, num_rows, num_adapters, generator).to(torch.int32)
    num_base = round(base_share * num_rows)
    index_N[torch.randperm(num_rows, generator=generator)[:num_base]] = -1
    return index_N


def _draw(popularity: Popularity, num_rows: int, num_adapters: int, generator: torch.Generator) -> torch.Tensor:
    rank_S = torch.arange(num_adapters, dtype=torch.float64)
    match popularity:
        case Popularity.IDENTICAL:
            return torch.zeros(num_rows)
        case Popularity.DISTINCT:
            return torch.arange(num_rows) % num_adapters
        case Popularity.UNIFORM:
            weight_S = torch.ones_like(rank_S)
        case Popularity.ZIPF:
            weight_S = 1 / (rank_S + 1)
        case Popularity.SKEWED:
            weight_S = SKEW**-rank_S
    cumulative_S = weight_S.cumsum(0) / weight_S.sum()
    drawn_N = torch.rand(num_rows, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative_S, drawn_N, right=True).clamp_(max=num_adapters - 1)
