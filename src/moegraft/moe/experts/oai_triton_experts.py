"""UnfusedOAITritonExperts: mxfp4 weights, 16-bit activations, in the kernels of TritonExperts. gpt-oss's backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from moegraft.moe.experts.triton_experts import MIN_CAPABILITY, TritonExperts


class UnfusedOAITritonExperts(TritonExperts):
    """As TritonExperts, over e2m1 numbers and their block scales; number times scale is exact in bfloat16."""

    has_invariant_tiles: ClassVar[bool] = False  # steps of a granule are longer than those of the invariant tiles
    min_capabilities: ClassVar[Mapping[str, tuple[int, int]]] = {"mxfp4": MIN_CAPABILITY}
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)
