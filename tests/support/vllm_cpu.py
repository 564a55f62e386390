"""Real vLLM on a CPU from its CUDA wheel: a platform plug-in, and torch in place of the C++ operators it then lacks.

What it replaces is attention, the cache, the router's top-k and LoRA on the maps that vLLM keeps; scheduler, runner,
models, loading and the modular experts kernel are vLLM's own. A process that has this platform imports it through the
entry point that ``install`` writes, workers of tensor parallel groups included.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".vllm"
"""Where scripts/test.sh puts vLLM and the packages it needs beside those of .venv."""

ENTRY_POINTS = """[vllm.platform_plugins]
moegraft_test = support.vllm_cpu:platform

[vllm.general_plugins]
moegraft = moegraft.integrations.vllm:register
"""


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """For a process that runs vLLM with the plug-in here; ``folder`` gets the entry points and caches."""
    package = folder / "entry_points" / "moegraft_test-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: moegraft-test\nVersion: 0\n")
    paths = [ROOT / "src", ROOT / "tests", package.parent, Path(os.environ.get("MOEGRAFT_TEST_VLLM", SITE))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HOME": str(folder),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_MLA_DISABLE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        **extra,
    }


def platform() -> str:
    """vLLM's entry point for platforms."""
    return "support.vllm_cpu.TestPlatform"


def __getattr__(name: str) -> Any:
    """The classes need vLLM, which this module's other readers do without."""
    makers = {"TestPlatform": _platform_class, "TestWorker": _worker_class, "TestPunica": _punica_class}
    if name not in makers:
        raise AttributeError(name)
    made = makers[name]()
    globals()[name] = made
    return made


def _platform_class() -> type:
    from vllm.platforms.cpu import CpuPlatform

    class TestPlatform(CpuPlatform):
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            super().check_and_update_config(vllm_config)
            if vllm_config.parallel_config.worker_cls.endswith("CPUWorker"):
                vllm_config.parallel_config.worker_cls = "support.vllm_cpu.TestWorker"
            vllm_config.compilation_config.mode = 0
            vllm_config.compilation_config.custom_ops = ["none"]

        @classmethod
        def pre_register_and_update(cls, parser: Any = None) -> None:
            super().pre_register_and_update(parser)
            _allow_float32()

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 8 << 30

        @classmethod
        def get_punica_wrapper(cls) -> str:
            return "support.vllm_cpu.TestPunica"

        @classmethod
        def import_kernels(cls) -> None:
            """There are none for this machine."""

    return TestPlatform


def _worker_class() -> type:
    import torch
    import vllm.v1.worker.cpu_worker as cpu_worker
    from vllm.v1.worker.gpu_worker import Worker

    replace_operators()

    class TestWorker(cpu_worker.CPUWorker):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            Worker.__init__(self, *args, **kwargs)  # CPUWorker's own asks for memory nodes through C++
            self.parallel_config.disable_custom_all_reduce = True
            self.profiler = None

        def init_device(self) -> None:
            from vllm.v1.worker.workspace import init_workspace_manager

            init_workspace_manager(torch.device("cpu"), 1)
            keep = torch.set_num_threads
            super().init_device()
            torch.set_num_threads = keep

        def determine_available_memory(self) -> int:
            self.model_runner.warming_up_model()
            return 64 << 20

    return TestWorker


def _punica_class() -> type:
    """vLLM's wrapper for GPUs, whose mapping the plug-in reads, with torch in its own products."""
    import torch
    import vllm.lora.punica_wrapper.punica_gpu as punica_gpu

    if not hasattr(punica_gpu, "LoRAKernelMeta"):
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

        punica_gpu.LoRAKernelMeta = LoRAKernelMeta

    def rows_of(slots: torch.Tensor, stacked: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        # Rows of prompts, where their logprobs are asked for, are more than vLLM maps: the rest holds anything.
        return [(slot, slots == slot) for slot in range(stacked.shape[0]) if bool((slots == slot).any())]

    class TestPunica(punica_gpu.PunicaWrapperGPU):
        def _slots(self, num_rows: int, meta: Any) -> torch.Tensor:
            return meta.token_lora_mapping[: 0 if bool(meta.no_lora_flag_cpu) else num_rows]

        def add_lora_linear(
            self, y: Any, x: Any, a_stacked: Any, b_stacked: Any, scale: float, slices: Any, **rest: Any
        ) -> None:
            for slot, mine in rows_of(self._slots(x.shape[0], self.token_mapping_meta), a_stacked[0]):
                first = 0
                for a, b, width in zip(a_stacked, b_stacked, slices, strict=True):
                    y[mine, first : first + width] += scale * (x[mine] @ a[slot, 0].T) @ b[slot, 0].T
                    first += width

        def add_lora_logits(self, y: Any, x: Any, a: Any, b: Any, scale: float, **rest: Any) -> None:
            for slot, mine in rows_of(self._slots(x.shape[0], self.prompt_mapping_meta), a):
                y[mine] += scale * (x[mine] @ a[slot, 0].T) @ b[slot, 0].T

        def add_lora_embedding(self, y: Any, x: Any, b: Any, **rest: Any) -> None:
            for slot, mine in rows_of(self._slots(x.shape[0], self.token_mapping_meta), b):
                y[mine] += x[mine] @ b[slot, 0].T

    return TestPunica


def replace_operators() -> None:
    """Torch in place of the operators that the wheel has for CUDA only. Once a process."""
    import torch
    import vllm._custom_ops as ops
    import vllm.v1.attention.backends.cpu_attn as cpu_attn

    from support.fp8_interpreter import round_fp8_exactly
    from support.interpreter import hasten_interpreter

    hasten_interpreter()
    round_fp8_exactly(pytest.MonkeyPatch())
    ops.cpu_attn_reshape_and_cache = _write_cache
    ops.cpu_attention_with_kv_cache = _attend
    ops.cpu_attn_get_scheduler_metadata = lambda *args, **kwargs: None
    ops.topk_softmax = _topk_softmax
    cpu_attn._get_attn_isa = lambda *args, **kwargs: "vec"
    library = torch.library.Library("_C", "FRAGMENT")
    globals()["_library"] = library  # its operators live as long as it does
    library.define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
        "Tensor(a!) slot_mapping, int block_size) -> ()"
    )
    library.impl("compute_slot_mapping_kernel_impl", _map_slots, "CPU")
    library.define("greedy_argmax(Tensor logits) -> Tensor")
    library.impl("greedy_argmax", lambda logits: logits.argmax(-1), "CPU")
    library.define("silu_and_mul(Tensor(a!) out, Tensor input) -> ()")
    library.impl("silu_and_mul", _silu_and_mul, "CPU")


def _allow_float32() -> None:
    """Quantised models too, whose kernels in vLLM read half precision only: float32 shows smaller errors."""
    import torch
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config

    for config in (Fp8Config, Mxfp4Config):
        config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32, torch.bfloat16])


def _map_slots(starts_R: Any, positions_T: Any, block_table_RB: Any, slots_T: Any, block_size: int) -> None:
    starts = starts_R.tolist()
    slots_T[starts[-1] :] = -1
    for request, (begin, end) in enumerate(pairwise(starts)):
        at = positions_T[begin:end].long()
        slots_T[begin:end] = block_table_RB[request][at // block_size].long() * block_size + at % block_size


def _write_cache(key: Any, value: Any, keys: Any, values: Any, slot_mapping: Any, isa: str, **rest: Any) -> None:
    """Caches [blocks, kv heads, block size, head size]."""
    size = keys.shape[2]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            keys[slot // size, :, slot % size] = key[row]
            values[slot // size, :, slot % size] = value[row]


def _attend(
    *, query: Any, key_cache: Any, value_cache: Any, output: Any, query_start_loc: Any, seq_lens: Any, scale: float,
    block_table: Any, sliding_window: Any = -1, s_aux: Any = None, **rest: Any,
) -> None:  # fmt: skip
    """Causal attention of each request over its own blocks; ``s_aux``: of each head, a logit that gives zero."""
    import torch

    starts, size = query_start_loc.tolist(), key_cache.shape[2]
    window = sliding_window[0] + 1 if isinstance(sliding_window, tuple) else sliding_window
    for request, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        q_NHD = query[rows].float()
        num_new = q_NHD.shape[0]
        if num_new == 0:
            continue
        blocks = block_table[request, : -(-length // size)].long()
        repeats = q_NHD.shape[1] // key_cache.shape[1]
        k_LHD, v_LHD = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(repeats, 1).float()
            for cache in (key_cache, value_cache)
        )
        scores_HNL = torch.einsum("nhd,lhd->hnl", q_NHD, k_LHD) * scale
        at_N, at_L = torch.arange(length - num_new, length)[:, None], torch.arange(length)[None]
        seen_NL = at_L <= at_N
        if window > 0:
            seen_NL &= at_L > at_N - window
        scores_HNL.masked_fill_(~seen_NL, float("-inf"))
        if s_aux is not None:
            sinks = s_aux.float()[:, None, None].expand(-1, num_new, 1)
            scores_HNL = torch.cat([scores_HNL, sinks], dim=-1)
        weights_HNL = scores_HNL.softmax(-1)[..., :length]
        result = torch.einsum("hnl,lhd->nhd", weights_HNL, v_LHD).to(output.dtype)
        output[rows] = result.reshape(output[rows].shape)


def _topk_softmax(weights: Any, ids: Any, order: Any, logits: Any, renormalize: bool = False, *rest: Any) -> None:
    chosen, index = logits.float().softmax(-1).topk(ids.shape[1], dim=-1)
    weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
    ids.copy_(index)


def _silu_and_mul(out: Any, x: Any) -> None:
    import torch

    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def missing() -> str | None:
    """Why vLLM cannot be imported, for the tests' one message; None where it can."""
    site = Path(os.environ.get("MOEGRAFT_TEST_VLLM", SITE))
    if not (site / "vllm").is_dir():
        return f"vLLM is not at {site}: run scripts/test.sh, which puts it there, on Python {sys.version.split()[0]}"
    return None
