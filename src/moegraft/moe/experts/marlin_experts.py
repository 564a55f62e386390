"""MarlinExperts: int4 weights, 16-bit activations, in the kernels of TritonExperts. The backend of GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moegraft.moe.experts.triton_experts import MIN_CAPABILITY, TritonExperts


class MarlinExperts(TritonExperts):
    """As TritonExperts, over int4 weights that were packed once, at load, in the order in which a tile reads them.

    Codes become bfloat16 or float16 in registers. Scales of groups of 32 and 64 are rounded to the dtype of the rows,
    as all of Marlin's are; those of groups of 128 and of whole channels stay float32.
    """

    has_invariant_tiles: ClassVar[bool] = False  # steps of a granule are longer than those of the invariant tiles
    min_capabilities: ClassVar[Mapping[str, tuple[int, int]]] = {"int4": MIN_CAPABILITY}
