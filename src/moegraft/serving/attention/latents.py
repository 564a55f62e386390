"""Latent attention (MLA): pages keep what ``kv_a_proj`` gave of a token, its latent, and not the heads made of it.

transformers' modules make heads in ``expand_kv``, through ``kv_b_proj``, right before attention. While an engine has
the model that call gives latents back as they are, and keys and values are made at attention time:

    chunks of prompts     expanded, with the adapter of their sequence, then attention as for any heads
    decode rows           absorbed: the query goes through the keys' half of kv_b_proj, attends over latents as one head
                          of keys, and what comes out goes through the values' half. LoRA on kv_b_proj is absorbed too.

Shape letters: B rows · H heads · L tokens of a context · N, V sizes of a head's keys without positions and of its
values · P size of the rotated part · R size of the latent, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from moegraft.core.errors import BatchError
from moegraft.core.tables import LinearFactor
from moegraft.integrations.transformers import GraftedModel
from moegraft.lora.punica.cpu import LoRASegments, segments_of


class LatentExpansion:
    """Stands in for ``expand_kv`` of one attention module, whose ``kv_b_proj`` has this name in the model."""

    def __init__(self, module: nn.Module, name: str, graft: GraftedModel) -> None:
        self.module = module
        self.name = name
        self._graft = graft
        self._expand: Callable[..., tuple[torch.Tensor, torch.Tensor]] = module.expand_kv  # type: ignore[assignment]
        self.key_size: int = module.qk_nope_head_dim  # type: ignore[assignment]
        self.value_size: int = module.v_head_dim  # type: ignore[assignment]
        self.latent_size: int = module.kv_lora_rank  # type: ignore[assignment]

    def __call__(self, latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return latent, rotated

    def expand(self, row: int, k_LC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [L, H, N + P] and values [L, H, V] of the tokens in k [L, R + P], of the sequence of a row."""
        latent_LR, rotated_LP = k_LC.split([self.latent_size, k_LC.shape[1] - self.latent_size], dim=1)
        call = self._graft.current_call()
        with nullcontext() if call is None else call.spread(row, k_LC.shape[0]):
            key, value = self._expand(latent_LR[None, None], rotated_LP[None, None])
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    @property
    def can_absorb(self) -> bool:
        """Whether the map is a plain matrix, and adapters in flight do nothing to it but LoRA that the host knows."""
        linear, call = self.module.kv_b_proj, self._graft.current_call()
        if type(linear) is not nn.Linear or linear.bias is not None or type(linear.weight) is not nn.Parameter:
            return False
        if call is None or not call.touches(self.name):
            return True
        if call.rank_bound is not None or call.slots_M is not None:
            return False
        return not call.batch.max_ranks(self.name)[LinearFactor.GAIN]

    def check_can_expand(self) -> None:
        """Raises BatchError where a graph is to be captured that serves other adapters too: expansion asks the host."""
        call = self._graft.current_call()
        if call is not None and call.rank_bound is not None:
            raise BatchError(f"a graph cannot serve adapters on {self.name!r} over latents")

    def absorb(self, q_BHC: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Queries over latents, [B, H, R + P]. rows: which of the pass they are."""
        nope_BHN, rotated_BHP = q_BHC.split([self.key_size, q_BHC.shape[2] - self.key_size], dim=2)
        latent_HBR = torch.bmm(nope_BHN.transpose(0, 1), self._weight_HCR()[:, : self.key_size])
        out_BHR = latent_HBR.transpose(0, 1)
        found = self._factors(rows)
        if found is not None:
            segments, a_SrR, b_SrHC = found
            delta_LHR = torch.cat(
                [
                    torch.einsum("bhn,rhn->bhr", nope_BHN[rows_L].float(), b_rHC[..., : self.key_size]) @ a_rR
                    for (_, rows_L), a_rR, b_rHC in zip(segments.rows_of_segments(), a_SrR, b_SrHC, strict=True)
                ]
            )
            out_BHR = out_BHR.float().index_add(0, segments.rows_L, delta_LHR).to(q_BHC.dtype)
        return torch.cat([out_BHR, rotated_BHP], dim=2)

    def release(self, latent_BHR: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Values [B, H, V] of latents that attention has summed."""
        value_HBV = torch.bmm(latent_BHR.transpose(0, 1), self._weight_HCR()[:, self.key_size :].transpose(1, 2))
        out_BHV = value_HBV.transpose(0, 1)
        found = self._factors(rows)
        if found is not None:
            segments, a_SrR, b_SrHC = found
            delta_LHV = torch.cat(
                [
                    torch.einsum("bhr,rhv->bhv", latent_BHR[rows_L].float() @ a_rR.T, b_rHC[..., self.key_size :])
                    for (_, rows_L), a_rR, b_rHC in zip(segments.rows_of_segments(), a_SrR, b_SrHC, strict=True)
                ]
            )
            out_BHV = out_BHV.float().index_add(0, segments.rows_L, delta_LHV).to(latent_BHR.dtype)
        return out_BHV

    def _weight_HCR(self) -> torch.Tensor:
        weight: torch.Tensor = self.module.kv_b_proj.weight  # type: ignore[union-attr,assignment]
        return weight.view(-1, self.key_size + self.value_size, self.latent_size)

    def _factors(self, rows: Sequence[int]) -> tuple[LoRASegments, torch.Tensor, torch.Tensor] | None:
        """(rows by adapter, A [S, r, R], B [S, r, H, N + V]), lanes past an adapter's rank being zero in B; None
        where no row has LoRA here."""
        call = self._graft.current_call()
        if call is None or not call.touches(self.name):
            return None
        found = call.rows_at(rows)
        if not found.has_adapters:
            return None
        segments, tables = segments_of(found), self._graft.bank.linear_tables(self.name)
        width = self._weight_HCR().shape[0] * (self.key_size + self.value_size)
        a = segments.factors.whole(tables, LinearFactor.A, self.latent_size, segments.slots)
        b = segments.factors.whole(tables, LinearFactor.B, width, segments.slots)
        if a is None or b is None:
            return None
        index, b_SrO = b
        lane_r = torch.arange(index.max_rank, device=b_SrO.device)
        b_SrO = b_SrO.masked_fill((lane_r >= index.rank_S[:, None])[..., None], 0)
        return segments, a[1], b_SrO.unflatten(2, (-1, self.key_size + self.value_size))


def keep_latents(model: PreTrainedModel, graft: GraftedModel) -> list[LatentExpansion]:
    """Puts an expansion in the place of every ``expand_kv``; ``give_back`` undoes it."""
    found = [
        LatentExpansion(module, f"{name}.kv_b_proj", graft)
        for name, module in model.named_modules()
        if hasattr(module, "expand_kv") and isinstance(getattr(module, "kv_b_proj", None), nn.Module)
    ]
    for expansion in found:
        vars(expansion.module)["expand_kv"] = expansion
    return found


def give_back(expansions: Sequence[LatentExpansion]) -> None:
    """Undoes ``keep_latents``."""
    for expansion in expansions:
        vars(expansion.module).pop("expand_kv", None)
