"""Every rank has all rows and all experts, but only its columns of F: partial outputs are summed over the ranks.

Shape letters: T tokens · M rows · K experts per token · D hidden size
"""

from __future__ import annotations

from typing import ClassVar

import torch

from moegraft.core.config import MoEConfig
from moegraft.moe.layer import (
    ExpertsOutput,
    NoDispatchPrepareAndFinalize,
    PreparedRows,
    weighted_sum_float32,
)
from moegraft.parallel.collectives import Communicator


class TensorParallelPrepareAndFinalize(NoDispatchPrepareAndFinalize):
    """One all-reduce a layer. The ranks bring the same rows and call together.

    A delta needs no exchange of its own: B of w13 lands on the rank's columns before the activation, and what A of w2
    makes of them is a part of the sum. Where an experts class leaves the sum over K to ``finalize``, the partial
    outputs travel in float32 and are rounded once; where its kernels have summed, in their dtype.
    """

    keeps_rows: ClassVar[bool] = False

    def __init__(self, config: MoEConfig, tp: Communicator) -> None:
        super().__init__(config)
        self._tp = tp

    def finalize(self, output: ExpertsOutput, rows: PreparedRows) -> torch.Tensor:
        if output.is_reduced:
            return self._tp.all_reduce(output.y)
        return self._tp.all_reduce(weighted_sum_float32(output, rows)).to(output.y.dtype)
