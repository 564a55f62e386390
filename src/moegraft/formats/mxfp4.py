"""MXFP4 weights (e2m1 numbers, an E8M0 scale for 32 of them), as gpt-oss publishes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moegraft.core.halves import join_halves, split_halves
from moegraft.formats.four_bit import FourBitExperts, FourBitMatrix

BLOCK = 32
MAX_SCALE = 128
"""Largest E8M0 byte (2.0) for which a kernel can make number times scale in one bfloat16 product."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

# For each run: where a word has the three bits below the sign (their lowest), and the sign. Shifted to bits 6 and 15
# they are a bfloat16 that is 2**-126 of the number; two of the four are one shift and one mask away from it.
_MAGNITUDE_BIT = (6, 3, 0, 9)
_SIGN_BIT = (15, 12, 13, 14)


@dataclass(frozen=True, kw_only=True)
class MXFP4Matrix(FourBitMatrix):
    """e2m1(code) * 2**(scale - 127); scales are uint8."""

    group: int = BLOCK

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group != BLOCK or self.zeros is not None or self.scales.dtype != torch.uint8:
            raise ValueError(
                f"mxfp4 weights: found {self.scales.dtype} scales of groups of {self.group}"
                f"{'' if self.zeros is None else ' with zero points'}, expected torch.uint8 of {BLOCK} without"
            )

    @staticmethod
    def spread(numbers: torch.Tensor) -> torch.Tensor:
        words = torch.zeros_like(numbers[..., 0, :])
        for run, (magnitude, sign) in enumerate(zip(_MAGNITUDE_BIT, _SIGN_BIT, strict=True)):
            words |= ((numbers[..., run, :] & 7) << magnitude) | (numbers[..., run, :] >> 3 << sign)
        return words

    @staticmethod
    def gather(words: torch.Tensor) -> torch.Tensor:
        bits = zip(_MAGNITUDE_BIT, _SIGN_BIT, strict=True)
        return torch.stack([(words >> magnitude & 7) | (words >> sign & 1) << 3 for magnitude, sign in bits], -2)

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        codes = self.codes().to(torch.int32)
        table = torch.tensor(_MAGNITUDES, device=codes.device)
        numbers = table[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
        return torch.ldexp(numbers, self.over_inputs(self.scale_rows()).to(torch.int32) - 127).to(dtype)

    @classmethod
    def quantise(cls, w: torch.Tensor) -> MXFP4Matrix:
        """Round to nearest of a floating matrix [..., R, I]; a scale has the exponent of the block's maximum less 2."""
        num_inputs = w.shape[-1]
        padded = torch.nn.functional.pad(w.float(), [0, -num_inputs % BLOCK])
        blocks = padded.unflatten(-1, (padded.shape[-1] // BLOCK, BLOCK))
        largest = blocks.abs().amax(-1).clamp(min=2.0**-120)
        exponents = (torch.frexp(largest).exponent - 1 - 2).clamp(-127, MAX_SCALE - 127)
        scaled = torch.ldexp(blocks, -exponents.unsqueeze(-1))
        # between two numbers, ties go to the one with the even code
        midpoints = torch.tensor(_MIDPOINTS, device=w.device)
        below = torch.bucketize(scaled.abs(), midpoints, right=False)
        above = torch.bucketize(scaled.abs(), midpoints, right=True)
        magnitudes = torch.where(below % 2 == 0, below, above)
        codes = (magnitudes + 8 * (scaled < 0)).flatten(-2)[..., :num_inputs]
        return cls.from_codes(codes.to(torch.uint8), (exponents + 127).to(torch.uint8), group=BLOCK)

    @classmethod
    def from_blocks(cls, blocks: torch.Tensor, scales: torch.Tensor) -> MXFP4Matrix:
        """blocks uint8 [..., R, I/32, 16], the first of two numbers in a byte's low half; scales uint8 [..., R, I/32].

        Raises ValueError for scales above 2.0 (and the one that stands for NaN).
        """
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or tuple(blocks.shape) != (*scales.shape, 16):
            raise ValueError(
                f"mxfp4 weights: found blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} "
                f"{list(scales.shape)}, expected torch.uint8 [..., rows, columns/32, 16] and [..., rows, columns/32]"
            )
        if scales.device.type != "meta" and scales.numel() and int(scales.max()) > MAX_SCALE:
            raise ValueError(
                f"mxfp4 weights: found a scale byte of {int(scales.max())}, expected at most {MAX_SCALE} (2.0)"
            )
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-3)
        return cls.from_codes(codes, scales, group=BLOCK)

    def to_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of ``from_blocks``."""
        codes = self.codes().unflatten(-1, (self.num_inputs // BLOCK, BLOCK // 2, 2))
        return codes[..., 0] | codes[..., 1] << 4, self.scale_rows()


@dataclass(frozen=True, kw_only=True)
class MXFP4Experts(FourBitExperts):
    """w13 and w2 of e2m1 numbers. gpt-oss interleaves gate and up; here they stand one after the other."""

    format_name: ClassVar[str] = "mxfp4"
    matrix_type: ClassVar[type[FourBitMatrix]] = MXFP4Matrix

    w13: MXFP4Matrix
    w2: MXFP4Matrix

    @classmethod
    def pack(
        cls,
        w13_EGFD: torch.Tensor,
        w2_EDF: torch.Tensor,
        *,
        b13: torch.Tensor | None = None,
        b2: torch.Tensor | None = None,
        num_halves: int = 2,
    ) -> MXFP4Experts:
        """Canonical weights (gate rows, then up rows), rounded to the nearest."""
        w13, w2 = MXFP4Matrix.quantise(w13_EGFD), MXFP4Matrix.quantise(w2_EDF)
        return cls(w13=w13, w2=w2, b13=b13, b2=b2, num_halves=num_halves)

    @classmethod
    def from_checkpoint(cls, tensors: dict[str, torch.Tensor]) -> MXFP4Experts:
        """One layer of gpt-oss, by the names behind ``mlp.experts.``:

        gate_up_proj_blocks [E, 2F, D/32, 16], gate_up_proj_scales [E, 2F, D/32], gate_up_proj_bias [E, 2F] (gate and up
        alternate), down_proj_blocks [E, D, F/32, 16], down_proj_scales [E, D, F/32], down_proj_bias [E, D].
        Raises ValueError for what is missing, unknown or does not fit.
        """
        names = {f"{proj}_{part}" for proj in ("gate_up_proj", "down_proj") for part in ("blocks", "scales", "bias")}
        if set(tensors) != names:
            missing, unknown = sorted(names - set(tensors)), sorted(set(tensors) - names)
            raise ValueError(f"gpt-oss mxfp4 experts: missing {missing}, unknown {unknown}")
        blocks, scales = (_halves_apart(tensors[f"gate_up_proj_{part}"]) for part in ("blocks", "scales"))
        return cls(
            w13=MXFP4Matrix.from_blocks(blocks, scales),
            w2=MXFP4Matrix.from_blocks(tensors["down_proj_blocks"], tensors["down_proj_scales"]),
            b13=_halves_apart(tensors["gate_up_proj_bias"]),
            b2=tensors["down_proj_bias"],
        )

    def to_checkpoint(self) -> dict[str, torch.Tensor]:
        """Inverse of ``from_checkpoint``. Raises ValueError for a layer without gate or biases."""
        if self.num_halves != 2 or self.b13 is None or self.b2 is None:
            raise ValueError("gpt-oss mxfp4 experts: found a layer without gate or without biases, expected both")
        blocks13, scales13 = self.w13.to_blocks()
        blocks2, scales2 = self.w2.to_blocks()
        return {
            "gate_up_proj_blocks": _halves_alternate(blocks13),
            "gate_up_proj_scales": _halves_alternate(scales13),
            "gate_up_proj_bias": _halves_alternate(self.b13),
            "down_proj_blocks": blocks2,
            "down_proj_scales": scales2,
            "down_proj_bias": self.b2,
        }


def _halves_apart(tensor: torch.Tensor) -> torch.Tensor:
    """[E, 2F, ...] with alternating rows: those of gate, then those of up."""
    return join_halves(split_halves(tensor, 1, num_halves=2, is_interleaved=True), 1, is_interleaved=False)


def _halves_alternate(tensor: torch.Tensor) -> torch.Tensor:
    return join_halves(split_halves(tensor, 1, num_halves=2, is_interleaved=False), 1, is_interleaved=True)
