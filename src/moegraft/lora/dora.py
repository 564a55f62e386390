"""DoRA (arXiv 2402.09353) where a rank has only some columns of a base weight: norms that all ranks add up.

Shape letters: r rank · I, O input and output features of the whole map
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moegraft.core.cuts import cut_tensor
from moegraft.core.errors import AdapterTensorError
from moegraft.lora.targets import LinearLoRA
from moegraft.parallel.groups import ParallelGroups
from moegraft.parallel.slices import Pieces

if TYPE_CHECKING:
    from moegraft.lora.targets import AdapterWeights


@dataclass(frozen=True, kw_only=True)
class UnfinishedDora:
    """A row-parallel map with DoRA, as one rank reads it.

    a [r, I of the rank] · b [r, O of the rank], scaled, not yet multiplied with the gain · magnitude [O] ·
    square_sums_O: float64, of the rank's columns of each row of W + BA · outputs: of O, None for all · ``dtype`` that
    the factors will have · ``where``: file and tensor, for messages.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor
    square_sums_O: torch.Tensor
    outputs: Pieces | None
    dtype: torch.dtype
    where: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors and of the gain that it will be."""
        return (self.a.numel() + self.b.numel() + self.b.shape[1]) * self.dtype.itemsize

    def finish(self, square_sums_O: torch.Tensor) -> LinearLoRA:
        """With the sums of all ranks. Raises AdapterTensorError where a gain or a factor is out of range."""
        gain_O = self.magnitude.double() / square_sums_O.sqrt()
        if self.outputs is not None:
            gain_O = cut_tensor(gain_O, {0: self.outputs})
        factors = {"a": self.a, "b": self.b * gain_O.to(self.b.dtype), "gain": gain_O}
        cast = {name: tensor.to(self.dtype).contiguous() for name, tensor in factors.items()}
        for name, tensor in cast.items():
            if not tensor.isfinite().all():
                raise AdapterTensorError(f"{self.where}: {name}, once scaled, is outside the range of {self.dtype}")
        return LinearLoRA(**cast)


def finish_dora(weights: AdapterWeights, groups: ParallelGroups) -> AdapterWeights:
    """The adapter with the norms of all ranks: what the bank takes. Nothing to do where none is missing.

    Collective, one all-reduce over the control group: every rank has read its slice of the same adapter, and knows
    that the others have. Raises AdapterTensorError as ``UnfinishedDora.finish``.
    """
    if not weights.unfinished:
        return weights
    parts = [weights.unfinished[module] for module in sorted(weights.unfinished)]
    # The ranks of every expert-parallel place bring the same columns once more.
    sums = groups.control.all_reduce(torch.cat([part.square_sums_O for part in parts])) / groups.ep.size
    each = sums.split([part.square_sums_O.shape[0] for part in parts])
    finished = {
        module: part.finish(own) for module, part, own in zip(sorted(weights.unfinished), parts, each, strict=True)
    }
    return replace(weights, linears={**weights.linears, **finished}, unfinished={})
