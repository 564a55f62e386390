"""LoRA on a linear map in plain torch: the truth that the kernels are held to."""

from __future__ import annotations

import torch

from moegraft.core.tables import Field, LinearFactor, LinearTables


def add_lora_linear_reference(
    y_MO: torch.Tensor,
    x_MI: torch.Tensor,
    token_slots_M: torch.Tensor,
    tables: LinearTables,
    *,
    bias_O: torch.Tensor | None = None,
) -> None:
    """Semantics: see ``host.add_lora_linear``. One adapter at a time; synchronises the device."""
    for slot in token_slots_M.unique().tolist():
        if slot < 0:
            continue
        mine = token_slots_M == slot
        y_LO = y_MO[mine].float()
        delta_LO = torch.zeros_like(y_LO)
        a_RI = read_factor(tables, slot, LinearFactor.A, x_MI.shape[1])
        b_RO = read_factor(tables, slot, LinearFactor.B, y_MO.shape[1])
        gain_1O = read_factor(tables, slot, LinearFactor.GAIN, y_MO.shape[1])
        v_LR = (x_MI[mine].float() @ a_RI.float().T).to(x_MI.dtype)
        delta_LO += v_LR.float() @ b_RO.float()
        if gain_1O.shape[0]:
            delta_LO += (gain_1O.float() - 1) * (y_LO if bias_O is None else y_LO - bias_O.float())
        y_MO[mine] = (y_LO + delta_LO).to(y_MO.dtype)


def read_factor(tables: LinearTables, slot: int, factor: LinearFactor, row_len: int) -> torch.Tensor:
    """The rank rows of a factor [r, row_len], one by one by the formula of core/tables.py; r = 0 where it is absent."""
    fields = tables.factors[slot, factor].tolist()
    rows_per_page = tables.page_elems // row_len
    rows = []
    for row in range(fields[Field.RANK]):
        page = int(tables.page_table[slot, fields[Field.FIRST_PAGE] + row // rows_per_page])
        element = page * tables.page_elems + fields[Field.OFFSET] + row % rows_per_page * row_len
        rows.append(tables.pool[element : element + row_len])
    return torch.stack(rows) if rows else tables.pool.new_empty(0, row_len)
