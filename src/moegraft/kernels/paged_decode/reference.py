"""Paged decode attention in plain torch: the truth that the kernel is held to."""

from __future__ import annotations

import torch


def paged_decode_reference(
    q_BHC: torch.Tensor,
    keys_PSHC: torch.Tensor,
    values_PSHC: torch.Tensor,
    page_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Semantics: see ``host.paged_decode``. One row at a time, float32; synchronises the device."""
    rows = []
    for q_HC, pages_N, length in zip(q_BHC, page_table_BN, lengths_B.tolist(), strict=True):
        if length == 0:
            rows.append(q_HC.new_zeros(q_HC.shape[0], values_PSHC.shape[-1]))
            continue
        first = 0 if window is None else max(0, length - window)
        group = q_HC.shape[0] // keys_PSHC.shape[2]
        k_HLC = _gathered(keys_PSHC, pages_N, length)[first:].transpose(0, 1).repeat_interleave(group, 0)
        v_HLC = _gathered(values_PSHC, pages_N, length)[first:].transpose(0, 1).repeat_interleave(group, 0)
        scores_HL = (k_HLC @ q_HC.float()[:, :, None])[..., 0] * scale
        if softcap is not None:
            scores_HL = softcap * torch.tanh(scores_HL / softcap)
        if sinks_H is not None:
            scores_HL = torch.cat([scores_HL, sinks_H.float()[:, None]], dim=1)
        weights_HL = scores_HL.softmax(-1)[:, : v_HLC.shape[1]]
        rows.append((weights_HL[:, None] @ v_HLC)[:, 0].to(q_HC.dtype))
    return torch.stack(rows)


def _gathered(pool_PSHC: torch.Tensor, pages_N: torch.Tensor, length: int) -> torch.Tensor:
    """[length, H, C] float32 of one row."""
    page_size = pool_PSHC.shape[1]
    count = -(-length // page_size)
    return pool_PSHC[pages_N[:count].long()].flatten(0, 1)[:length].float()
