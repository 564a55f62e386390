"""Compiles paged decode for a GPU that need not be there: ``python compile_paged_decode.py 90 232448``.

Prints a JSON line a kernel. A process of its own, because Triton's interpreter must be off when kernels are defined.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from moegraft.kernels.paged_decode.host import paged_decode
from support.ahead_of_time import pretend

# (query heads, heads of keys, head size, of values): Qwen3-30B, DeepSeek-V3's latents.
MODELS = ((32, 4, 128, 128), (128, 1, 576, 512))


def main() -> None:
    pretend(int(sys.argv[1]), int(sys.argv[2]))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        name = self.__name__.removesuffix("_kernel")
        print(json.dumps({"kernel": name, "shared": kernel.metadata.shared}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for q_heads, kv_heads, size, value_size in MODELS:

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        paged_decode(
            empty(8, q_heads, size),
            empty(100, 16, kv_heads, size),
            empty(100, 16, kv_heads, value_size),
            empty(8, 32, dtype=torch.int32),
            empty(8, dtype=torch.int32),
            scale=0.1,
            sinks_H=empty(q_heads),
        )


if __name__ == "__main__":
    main()
