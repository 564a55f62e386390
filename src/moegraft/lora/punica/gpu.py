"""PunicaWrapperGPU: the primitives as Triton kernels. Importing this module does not need Triton; calling it does."""

from __future__ import annotations

import torch

from moegraft.core.tables import Field, LinearFactor, LinearTables
from moegraft.lora.mapping import AdapterMapping
from moegraft.lora.punica.cpu import PunicaWrapperCPU


class PunicaWrapperGPU(PunicaWrapperCPU):
    """Linear maps run on kernels that read the bank's pages in place, without a sort and without a host sync.

    The separate form of the experts' LoRA (``add_lora_w13``, ``add_lora_w2``) is the inherited torch code, which is
    right on every device; experts classes of a GPU add their delta inside their own GEMMs.
    """

    def add_lora_linear(
        self,
        y_MO: torch.Tensor,
        x_MI: torch.Tensor,
        mapping: AdapterMapping,
        tables: LinearTables,
        *,
        bias_O: torch.Tensor | None = None,
        rank_bound: int | None = None,
    ) -> None:
        """See the base class. ``rank_bound``: no adapter of the call has a larger rank here.

        Without it the largest rank is read from the tables, once a batch and linear map: a host sync, which a CUDA
        graph may not capture, so a batch must have run once before it is captured. A graph that shall serve adapters
        of larger ranks later on needs the bound.
        """
        from moegraft.kernels.lora_linear.host import add_lora_linear

        if rank_bound is None:
            rank_bound = _largest_rank(mapping, tables)
        x_MI = x_MI if x_MI.stride(-1) == 1 else x_MI.contiguous()
        add_lora_linear(
            y_MO,
            x_MI,
            mapping.token_slots,
            tables,
            rank_bound=rank_bound,
            run_length=mapping.repeats,
            bias_O=bias_O,
        )


def _largest_rank(mapping: AdapterMapping, tables: LinearTables) -> int:
    """Over the adapters of the batch. They hold their slots and ranks while the batch lives: read once."""
    bounds: dict[int, int] = mapping.shared.setdefault("linear_rank_bounds", {})
    key = id(tables)
    if key not in bounds:
        ranks_S = tables.factors[list(mapping.active_slots), LinearFactor.A, Field.RANK]
        bounds[key] = int(ranks_S.max()) if mapping.active_slots else 0
    return bounds[key]
