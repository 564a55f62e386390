"""fp8 (e4m3) expert weights, and the quantisation of the activations that meet them.

Shape letters: M rows · I columns · Q groups of columns
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import pad

from moegraft.formats.scaled import BLOCK, Granularity, ScaledExperts

FP8_MAX = 448.0
SMALLEST_AMAX = 1e-10
"""Groups of smaller numbers are scaled as if this were their largest, so that no scale underflows."""


@dataclass(frozen=True, kw_only=True)
class Fp8Experts(ScaledExperts):
    """e4m3 weights; the GEMMs read activations in e4m3 too.

    Weights scaled in blocks meet activations scaled by groups of 128 columns of a row; weights scaled by row (or by
    tensor) meet activations scaled by row, or by ``x_scale`` and ``h_scale`` (float32, no axes): the static scales of
    the inputs of w13 and of w2.
    """

    format_name: ClassVar[str] = "fp8"
    stored_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    stored_max: ClassVar[float] = FP8_MAX

    x_scale: torch.Tensor | None = None
    h_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.x_scale is None) != (self.h_scale is None):
            raise ValueError("fp8 experts: found one of x_scale and h_scale, expected both or neither")
        if self.x_scale is None or self.h_scale is None:
            return
        if self.is_block_scaled:
            raise ValueError("fp8 experts: found static activation scales for block-scaled weights, expected none")
        for name, scale in (("x_scale", self.x_scale), ("h_scale", self.h_scale)):
            if scale.dim() or scale.dtype != torch.float32:
                raise ValueError(f"fp8 experts: found {name} {tuple(scale.shape)} {scale.dtype}, expected () float32")

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*super().tensors, *(scale for scale in (self.x_scale, self.h_scale) if scale is not None))

    @property
    def group_size(self) -> int | None:
        """Columns of activations under one scale; None: a whole row."""
        return BLOCK if self.is_block_scaled else None

    def quantise_input(self, x_MI: torch.Tensor, *, of_w2: bool = False) -> torch.Tensor:
        scale = self.h_scale if of_w2 else self.x_scale
        stored_MI, scale_MQ = quantise_rows(x_MI, group_size=self.group_size, static_scale=scale)
        return dequantise_rows(stored_MI, scale_MQ, x_MI.dtype)

    @classmethod
    def pack(
        cls,
        w13_EGFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        *,
        granularity: Granularity = Granularity.BLOCK,
        num_halves: int = 2,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
    ) -> Fp8Experts:
        """Canonical weights (gate rows, then up rows), rounded to nearest; ``dequantise`` is the inverse."""
        w13, w13_scale = cls.quantise_weight(w13_EGFD.unflatten(1, (num_halves, -1)), granularity)
        w2, w2_scale = cls.quantise_weight(w2_EDF[:, None], granularity)
        return cls(
            w13=w13,
            w2=w2,
            w13_scale=w13_scale,
            w2_scale=w2_scale,
            b13=b13,
            b2=b2,
            num_halves=num_halves,
        )

    @classmethod
    def from_checkpoint(
        cls,
        *,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor,
        w2_scale: torch.Tensor,
        block_size: tuple[int, int] | None = None,
        num_halves: int = 2,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
    ) -> Fp8Experts:
        """Checkpoint tensors of all experts, stacked: w13 [E, G*F, D], w2 [E, D, F], and scales that multiply.

        These are ``weight_scale_inv`` of DeepSeek-V3 and Qwen3-FP8 (``block_size`` as the config's
        ``weight_block_size``) and ``weight_scale`` of compressed-tensors, in any shape that ``read_scales`` takes and
        any dtype, E8M0 included; gate and up concatenated along axis 1. Weights are kept, not copied. Activations are
        quantised dynamically; ``with_static_scales`` changes that. Raises ValueError for what does not fit.
        """
        if block_size is not None and tuple(block_size) != (BLOCK, BLOCK):
            raise ValueError(f"fp8 experts: found blocks of {tuple(block_size)}, expected {(BLOCK, BLOCK)}")
        scales = cls._read_scales(w13, w2, (w13_scale, w2_scale), num_halves, is_block=block_size is not None)
        return cls(w13=w13, w2=w2, **scales, b13=b13, b2=b2, num_halves=num_halves)

    def with_static_scales(self, x_scale: torch.Tensor, h_scale: torch.Tensor) -> Fp8Experts:
        """With static scales of the inputs of w13 and w2 (``input_scale``, ``activation_scale``), of any shape.

        The largest serves all experts: a row is quantised once, not once for each expert that it goes to.
        """
        return replace(self, x_scale=x_scale.float().amax(), h_scale=h_scale.float().amax())


def quantise_rows(
    x_MI: torch.Tensor, *, group_size: int | None = None, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [M, I], float32 scales [M, Q]) with x = stored * scale; Q = ceil(I / group_size), or 1 a row.

    Semantics: scale = amax * (1 / 448), stored = round(x * (448 / amax)), to nearest even, with amax the largest
    magnitude of the group, at least 1e-10. With a static scale: stored = round(clamp(x * (1 / scale), -448, 448)).
    """
    M, I = x_MI.shape  # noqa: E741
    group = group_size or max(I, 1)
    num_groups = max(1, -(-I // group))
    groups_MQG = pad(x_MI.float(), (0, num_groups * group - I)).view(M, num_groups, group)
    if static_scale is None:
        largest_MQ = groups_MQG.abs().amax(2).clamp(min=SMALLEST_AMAX)
        # A tensor over a tensor: of a number over a tensor, torch takes the reciprocal first and rounds twice.
        inverse_MQ, scale_MQ = torch.full_like(largest_MQ, FP8_MAX) / largest_MQ, largest_MQ * (1 / FP8_MAX)
    else:
        scale_MQ = static_scale.float().expand(M, num_groups)
        inverse_MQ = 1.0 / scale_MQ
    stored = (groups_MQG * inverse_MQ[:, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return stored.view(M, num_groups * group)[:, :I], scale_MQ


def dequantise_rows(stored_MI: torch.Tensor, scale_MQ: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of ``quantise_rows``, rounded once to ``dtype``."""
    I, num_groups = stored_MI.shape[1], scale_MQ.shape[1]  # noqa: E741
    over_columns = scale_MQ if num_groups == 1 else scale_MQ.repeat_interleave(BLOCK, dim=1)[:, :I]
    return (stored_MI.float() * over_columns).to(dtype)
