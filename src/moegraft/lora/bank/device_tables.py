"""The bank's tables on the device: allocated once, then updated in place, one row a slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegraft.core.tables import NUM_FIELDS, ExpertsTables, LinearTables
from moegraft.lora.bank.address_space import AddressSpace
from moegraft.lora.bank.layout import BankLayout
from moegraft.lora.bank.pool import PagePool


class DeviceTables:
    """All int32, an adapter's row of each updated by one copy.

    ``page_table`` [slots, num_pages] · ``factors`` [slots, num_entries, NUM_FIELDS] · ``expert_index`` [slots, E summed
    over the experts modules] · ``experts`` and ``linears``: the views of each module.
    """

    def __init__(self, layout: BankLayout, pool: PagePool, *, max_slots: int) -> None:
        device = pool.data.device
        # A tensor made in inference mode could not be updated in place outside of it.
        with torch.inference_mode(False):
            self.page_table = torch.zeros(max_slots, pool.num_pages, dtype=torch.int32, device=device)
            self.factors = torch.zeros(max_slots, layout.num_entries, NUM_FIELDS, dtype=torch.int32, device=device)
            self.expert_index = torch.full((max_slots, layout.num_expert_columns), -1, dtype=torch.int32, device=device)
        self._pin = device.type == "cuda"
        self.experts = {
            name: ExpertsTables(
                pool=pool.data,
                page_table=self.page_table,
                factors=self.factors[:, layout.module_entries(name)],
                expert_index=self.expert_index[:, layout.expert_columns(name)],
                page_elems=pool.page_elems,
            )
            for name in layout.experts
        }
        self.linears = {
            name: LinearTables(
                pool=pool.data,
                page_table=self.page_table,
                factors=self.factors[:, layout.module_entries(name)],
                page_elems=pool.page_elems,
            )
            for name in layout.linears
        }

    def fill(self, slot: int, space: AddressSpace, pages: Sequence[int]) -> None:
        """Shows an adapter in ``slot``: three copies, enqueued on the current stream."""
        rows = (
            (self.page_table[slot, : len(pages)], torch.tensor(pages, dtype=torch.int32)),
            (self.factors[slot], space.descriptors),
            (self.expert_index[slot], space.expert_index),
        )
        for target, row in rows:
            # A fresh page-locked row: torch keeps it until its copy is done, whatever the host does next.
            target.copy_(row.pin_memory() if self._pin and row.numel() else row, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Makes ``slot`` a base slot: rank 0 everywhere, no expert held."""
        self.factors[slot].zero_()
        self.expert_index[slot].fill_(-1)
