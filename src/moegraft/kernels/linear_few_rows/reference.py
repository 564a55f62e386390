"""Linear maps with LoRA in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegraft.core.tables import LinearTables
from moegraft.kernels.lora_linear.reference import add_lora_linear_reference


def linear_few_rows_reference(
    x_MI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    token_slots_M: torch.Tensor | None,
    tables: Sequence[LinearTables],
) -> list[torch.Tensor]:
    """Semantics: see ``host.linear_few_rows``; float32."""
    found = []
    for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y_MO = torch.nn.functional.linear(x_MI.float(), weight.float(), None if bias is None else bias.float())
        if token_slots_M is not None:
            add_lora_linear_reference(y_MO, x_MI, token_slots_M, tables[place], bias_O=bias)
        found.append(y_MO)
    return found
