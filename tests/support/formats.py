"""Every storage format, as a function of dense weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moegraft.formats.base import DenseExperts
from moegraft.formats.fp8 import Fp8Experts
from moegraft.formats.int4 import Int4Experts
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.mxfp4 import MXFP4Experts
from moegraft.formats.nvfp4 import NVFP4Experts
from moegraft.formats.scaled import Granularity
from support.layers import Pack


@dataclass(frozen=True)
class Packing:
    format_name: str
    pack: Pack | None


def _canonical(dense: DenseExperts) -> dict[str, object]:
    w13, w2 = dense.dequantise(torch.float32)
    assert not dense.is_interleaved, "the biases would be in another order"
    return {"w13_EGFD": w13, "w2_EDF": w2, "b13": dense.b13, "b2": dense.b2, "num_halves": dense.num_halves}


def _fp8(dense: DenseExperts, granularity: Granularity) -> Fp8Experts:
    return Fp8Experts.pack(**_canonical(dense), granularity=granularity)  # type: ignore[arg-type]


def _fp8_static(dense: DenseExperts) -> Fp8Experts:
    # Inputs of unit variance: what is larger than 4 (or 6) is clamped.
    x_scale, h_scale = torch.tensor([4 / 448, 6 / 448], device=dense.device)
    return _fp8(dense, Granularity.TENSOR).with_static_scales(x_scale, h_scale)


def _int8(dense: DenseExperts) -> Int8Experts:
    return Int8Experts.pack(**_canonical(dense))  # type: ignore[arg-type]


def _int4(dense: DenseExperts, group: int, is_symmetric: bool) -> Int4Experts:
    return Int4Experts.pack(**_canonical(dense), group=group, is_symmetric=is_symmetric)  # type: ignore[arg-type]


def _mxfp4(dense: DenseExperts) -> MXFP4Experts:
    return MXFP4Experts.pack(**_canonical(dense))  # type: ignore[arg-type]


def _nvfp4(dense: DenseExperts) -> NVFP4Experts:
    return NVFP4Experts.pack(**_canonical(dense))  # type: ignore[arg-type]


PACKS: dict[str, Packing] = {
    "dense": Packing("dense", None),
    "fp8 block": Packing("fp8", partial(_fp8, granularity=Granularity.BLOCK)),
    "fp8 channel": Packing("fp8", partial(_fp8, granularity=Granularity.CHANNEL)),
    "fp8 tensor": Packing("fp8", partial(_fp8, granularity=Granularity.TENSOR)),
    "fp8 static": Packing("fp8", _fp8_static),
    "int8": Packing("int8", _int8),
    "int4": Packing("int4", partial(_int4, group=32, is_symmetric=False)),
    "int4 symmetric": Packing("int4", partial(_int4, group=128, is_symmetric=True)),
    "mxfp4": Packing("mxfp4", _mxfp4),
    "nvfp4": Packing("nvfp4", _nvfp4),
}
