"""Whether two revisions compile to the same machine code, without a GPU.

    python scripts/compare_kernels.py dump --sm 90 --src OLD/src --out before.json
    python scripts/compare_kernels.py dump --sm 90 --src src --out after.json
    python scripts/compare_kernels.py compare before.json after.json

``dump`` calls host functions on tensors without memory, with a driver that only says which GPU to compile for, and
keeps the PTX of every launch. ``compare`` pairs launches by case and order. PTX is the same where it differs in the
names of registers, labels and parameters, or in the
order of two terms or factors. Of other kernels it says what ptxas makes of both: instructions,
registers, spills and shared memory. Exits 1 where any kernel differs.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB}
PAGE_ELEMS = 32768
QWEN3, MIXTRAL, GPT_OSS, LLAMA4 = (128, 2048, 768, 8), (8, 4096, 14336, 2), (32, 2880, 2880, 4), (16, 5120, 8192, 1)

Launch = tuple[str, int, str]
"""Name, bytes of shared memory, PTX."""


def cases(capability: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls; on GPUs before Hopper fewer, whose tiles are the same."""
    all_tokens = (1, 8, 64, 4096) if capability == 90 else (1, 4096)
    for tokens in all_tokens:
        for rank in (0, 16, 64):
            yield f"qwen3 {tokens} r{rank}", functools.partial(call_layer, QWEN3, tokens, rank)
        yield f"gpt-oss {tokens} r16", functools.partial(call_layer, GPT_OSS, tokens, 16, storage="paired")
        for storage in ("int8", "fp8 columns", "fp8 blocks", "int4 128", "int4 32 zeros", "int4 channel", "mxfp4"):
            if storage.startswith("fp8") and capability == 80:
                continue
            yield f"{storage} {tokens} r16", functools.partial(call_layer, QWEN3, tokens, 16, storage=storage)
    for rows in (1, 64):
        yield f"engine {rows}", functools.partial(call_engine, rows)
    for rows in (1, 4, 4096):
        yield f"separate {rows}", functools.partial(call_separate, QWEN3, rows)
        for rank in (16, 64):
            yield f"linear {rows} r{rank}", functools.partial(call_linear, rows, rank)
        yield f"q, k, v {rows} r16", functools.partial(call_linears, rows, 16)
    yield "q, k, v 32 r64", functools.partial(call_linears, 32, 64)
    if capability < 90:
        return
    yield "llama4 1 r16", functools.partial(call_layer, LLAMA4, 1, 16)
    yield "mixtral 32 r16", functools.partial(call_layer, MIXTRAL, 32, 16)
    yield "mixtral 512 r0", functools.partial(call_layer, MIXTRAL, 512, 0)
    yield "ungated 8 r16", functools.partial(call_layer, QWEN3, 8, 16, gated=False, kind="relu2")
    yield "bias 8 r16", functools.partial(call_layer, QWEN3, 8, 16, bias=True, kind="gelu_tanh", on_input=True)
    yield "invariant 8 r16", functools.partial(call_layer, QWEN3, 8, 16, invariant=True)
    yield "half 8 r16", functools.partial(call_layer, QWEN3, 8, 16, half=True)
    yield "mxfp4 gpt-oss 512 r16", functools.partial(call_layer, GPT_OSS, 512, 16, storage="mxfp4", bias=True)
    yield "fp8 blocks 512 r0", functools.partial(call_layer, QWEN3, 512, 0, storage="fp8 blocks")
    yield "int4 channel zeros 32 r0", functools.partial(call_layer, QWEN3, 32, 0, storage="int4 channel zeros")


def call_layer(
    layer: tuple[int, ...], tokens: int, rank: int, *, storage: str = "dense", gated: bool = True, kind: str = "silu",
    bias: bool = False, on_input: bool = False, invariant: bool = False, half: bool = False,
) -> object:  # fmt: skip
    import torch

    from moegraft.kernels.moe_forward.host import fused_moe_lora
    from moegraft.tuning.heuristic import batch_invariant_tiles

    E, D, _, K = layer
    dtype = torch.float16 if half else torch.bfloat16
    return fused_moe_lora(
        empty(tokens, D, dtype=dtype),
        make_weights(layer, storage, dtype, gated=gated, kind=kind, bias=bias),
        empty(tokens, K, dtype=torch.int32),
        empty(tokens, K, dtype=torch.float32),
        lora=make_lora(E, tokens, rank, dtype, num_halves=1 + gated) if rank else None,
        apply_router_weight_on_input=on_input,
        **({"tiles": batch_invariant_tiles()} if invariant else {}),
    )


def call_separate(layer: tuple[int, ...], rows: int) -> None:
    import torch

    from moegraft.kernels.lora_expand.host import add_lora_w2, add_lora_w13, route_lora_rows
    from moegraft.kernels.records import LayerSizes

    E, D, F, _ = layer
    sizes = LayerSizes(num_experts=E, hidden_size=D, intermediate_size=F)
    lora = make_lora(E, rows, 16, torch.bfloat16, num_halves=2)
    routed = route_lora_rows(empty(rows, dtype=torch.int32), lora, sizes)
    add_lora_w13(empty(rows, 2 * F), empty(rows, D), routed)
    add_lora_w13(empty(rows, 2 * F, dtype=torch.float32), empty(rows, D), routed, is_interleaved=True)
    add_lora_w2(empty(rows, D), empty(rows, F), routed)


def call_linear(rows: int, rank: int) -> None:
    import torch

    from moegraft.core.tables import NUM_FIELDS, LinearFactor, LinearTables
    from moegraft.kernels.lora_linear.host import add_lora_linear

    tables = LinearTables(
        pool=empty(16 * PAGE_ELEMS),
        page_table=empty(8, 16, dtype=torch.int32),
        factors=empty(8, len(LinearFactor), NUM_FIELDS, dtype=torch.int32),
        page_elems=PAGE_ELEMS,
    )
    slots = empty(rows, dtype=torch.int32)
    for bias, run_length in ((None, 1), (empty(4096), 64)):
        add_lora_linear(
            empty(rows, 4096), empty(rows, 2048), slots, tables, rank_bound=rank, run_length=run_length, bias_O=bias
        )


def call_linears(rows: int, rank: int) -> None:
    import torch

    from moegraft.core.tables import NUM_FIELDS, LinearTables
    from moegraft.kernels.linear_few_rows.host import MAX_ROWS, linear_few_rows
    from moegraft.kernels.lora_linear.host import add_lora_linears

    factors = empty(8, 3, 3, NUM_FIELDS, dtype=torch.int32)
    tables = [
        LinearTables(
            pool=empty(16 * PAGE_ELEMS),
            page_table=empty(8, 16, dtype=torch.int32),
            factors=factors[:, i],
            page_elems=PAGE_ELEMS,
        )
        for i in range(3)
    ]
    ys, slots = [empty(rows, width) for width in (4096, 512, 512)], empty(rows, dtype=torch.int32)
    if rows <= MAX_ROWS:
        weights = [empty(width, 2048) for width in (4096, 512, 512)]
        linear_few_rows(empty(rows, 2048), weights, [None] * 3)
        linear_few_rows(empty(rows, 2048), weights, [None] * 3, token_slots_M=slots, tables=tables, rank_bound=rank)
    for run_length in (1, 64):
        add_lora_linears(
            ys, empty(rows, 2048), slots, tables, rank_bound=rank, run_length=run_length, biases=[None] * 3
        )


def call_engine(rows: int) -> None:
    """What a decode step and a chunk of a prompt run outside of the experts."""
    import torch

    from moegraft.kernels.paged_decode.host import run_paged_decode, write_pages
    from moegraft.kernels.paged_prefill import PrefillChunks, block_tokens
    from moegraft.kernels.paged_prefill.host import paged_prefill
    from moegraft.kernels.rms_norm.host import rms_norm
    from moegraft.kernels.rotary.host import rotary
    from moegraft.kernels.router_topk.host import router_topk

    ints = functools.partial(empty, dtype=torch.int32)
    for heads, kv_heads, size in ((32, 4, 128), (64, 8, 64), (8, 2, 256)):
        q, k, pages = empty(rows, heads, size), empty(rows, kv_heads, size), empty(64, 16, kv_heads, size)
        write_pages(pages, pages, k, k, empty(rows, dtype=torch.long))
        table, lengths = ints(rows, 64), ints(rows)
        for window, softcap, sinks in ((0, 0.0, None), (128, 30.0, empty(heads))):
            run_paged_decode(q, pages, pages, table, lengths, 0.1, window, softcap, sinks)
            block = block_tokens(heads // kv_heads, size, 2)
            chunks = PrefillChunks(
                rows_N=ints(rows), tokens_N=ints(rows), contexts_N=ints(rows), page_table_NP=table,
                blocks={block: ints(rows, 2)},
            )  # fmt: skip
            paged_prefill(
                empty(rows, heads, size), q, pages, pages, chunks, scale=0.1, window=window, softcap=softcap,
                sinks_H=sinks,
            )  # fmt: skip
        angles = empty(rows, 1, size)
        rotary(q[:, :, None], k[:, :, None], angles, angles)
    rms_norm(empty(rows, 2048), empty(2048), 1e-6, rounds_first=True)
    router_topk(empty(rows, 128), 8, of_all=True, is_summed=True, dtype=torch.bfloat16)


def make_weights(layer: tuple[int, ...], storage: str, dtype: Any, *, gated: bool, kind: str, bias: bool) -> Any:
    import torch

    from moegraft.core.config import Activation, ActivationKind
    from moegraft.kernels.records import MoEWeights, Quantisation, WeightFormat

    E, D, F, _ = layer
    G = 1 + gated
    activation = Activation(kind=ActivationKind("swiglu_oai" if storage == "paired" else kind), gated=gated)
    biases = (empty(E, G * F, dtype=dtype), empty(E, D, dtype=dtype)) if bias or storage == "paired" else (None, None)
    common: dict[str, Any] = {"b13": biases[0], "b2": biases[1], "activation": activation}
    if storage == "dense":
        return MoEWeights(w13=empty(E, G * F, D, dtype=dtype), w2=empty(E, D, F, dtype=dtype), **common)
    if storage == "paired":
        w13, w2 = empty(E, D, G * F, dtype=dtype), empty(E, F, D, dtype=dtype)
        return MoEWeights(w13=w13, w2=w2, is_transposed=True, is_interleaved=True, **common)
    name = storage.split()[0]
    sizes: dict[str, Any] = {"format": WeightFormat(name), "hidden_size": D, "intermediate_size": F}
    if name in ("int8", "fp8"):
        group = 128 if "blocks" in storage else 0
        shapes = [(G * F // 128, D // 128), (D // 128, F // 128)] if group else [(G * F,), (D,)]
        stored = torch.int8 if name == "int8" else torch.float8_e4m3fn
        w13, w2 = empty(E, G * F, D, dtype=stored), empty(E, D, F, dtype=stored)
        scales13, scales2 = (empty(E, *shape, dtype=torch.float32) for shape in shapes)
        zeros: tuple[Any, Any] = (None, None)
    else:
        group = 0 if "channel" in storage else 32 if name == "mxfp4" else int(storage.split()[1])
        rows = [(-(-D // 128), G * F), (-(-F // 128), D)]
        w13, w2 = (empty(E, P, R, 32, dtype=torch.int16) for P, R in rows)
        whole = [(E, P if group else 1, R, 1) for P, R in rows]
        words = {0: torch.float32, 128: torch.int32, 32: torch.int32 if name == "mxfp4" else torch.int64}[group]
        scales13, scales2 = (empty(*size, dtype=words) for size in whole)
        zeros = tuple(empty(*size, dtype=torch.int32) for size in whole) if "zeros" in storage else (None, None)
    quantisation = Quantisation(
        scales13=scales13, scales2=scales2, zeros13=zeros[0], zeros2=zeros[1], scale_group=group, **sizes
    )
    return MoEWeights(w13=w13, w2=w2, quantisation=quantisation, **common)


def make_lora(E: int, rows: int, rank: int, dtype: Any, *, num_halves: int) -> Any:
    import torch

    from moegraft.core.tables import NUM_FIELDS, ExpertsFactor, ExpertsTables
    from moegraft.kernels.records import LoRABatch

    tables = ExpertsTables(
        pool=empty(16 * PAGE_ELEMS, dtype=dtype),
        page_table=empty(8, 16, dtype=torch.int32),
        factors=empty(8, len(ExpertsFactor), NUM_FIELDS, dtype=torch.int32),
        expert_index=empty(8, E, dtype=torch.int32),
        page_elems=PAGE_ELEMS,
    )
    slots = empty(rows, dtype=torch.int32)
    return LoRABatch(tables=tables, token_slots_T=slots, rank13=num_halves * rank, rank2=rank)


def empty(*size: int, dtype: Any = None) -> Any:
    import torch

    return torch.empty(size, dtype=dtype or torch.bfloat16, device="meta")


class AbsentDriver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def pretend(capability: int) -> None:
    """Host functions see this GPU, wherever the revision asks for it, and launches compile."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(AbsentDriver(GPUTarget("cuda", capability, 32)))
    properties = types.SimpleNamespace(
        name="absent",
        major=capability // 10,
        minor=capability % 10,
        shared_memory_per_multiprocessor=SHARED_MEMORY[capability] + KIB,
        multi_processor_count=132,
        total_memory=140 << 30,
    )
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.current_device = lambda: 0
    # The tensors are on no device: whatever a revision asks of theirs is asked of the GPU.
    for name, module in list(sys.modules.items()):
        if name.startswith("moegraft.") and hasattr(module, "has_hopper_features"):
            module.has_hopper_features = lambda device: capability >= 90
        if name.startswith("moegraft.") and hasattr(module, "_target_of"):
            of = functools.lru_cache(inspect.unwrap(module._target_of))
            module._target_of = lambda device, of=of: of(torch.device("cuda", 0))


def dump(source: Path, out: Path, capability: int, only: str, kernels: list[str]) -> None:
    sys.path.insert(0, str(source.resolve()))
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="compare_kernels_"))
    import triton.backends.nvidia.compiler as backend
    from triton.runtime.jit import JITFunction

    import moegraft.kernels.lora_expand.host
    import moegraft.kernels.lora_linear.host
    import moegraft.kernels.moe_forward.host
    import moegraft.kernels.paged_prefill.host
    import moegraft.kernels.rms_norm.host
    import moegraft.kernels.rotary.host
    import moegraft.kernels.router_topk.host  # noqa: F401  # every device file, before ``pretend`` looks for modules

    backend.CUDABackend.make_cubin = lambda *arguments: b""  # ptxas takes longest, and PTX says enough
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if kernels and self.__name__ not in kernels:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.__name__, kernel.metadata.shared, kernel.asm["ptx"]))
        return kernel

    JITFunction.run = compile_only
    found: dict[str, list[Launch]] = {}
    pretend(capability)
    for name, call in cases(capability):
        if only in name:
            launches = found.setdefault(f"sm{capability} {name}", [])
            call()
            print(f"sm{capability} {name}: {len(launches)} launches", file=sys.stderr, flush=True)
    out.write_text(json.dumps(found))


def compare(before: Path, after: Path) -> int:
    old, new = (json.loads(path.read_text()) for path in (before, after))
    same, different = 0, 0
    for case in [*old, *(case for case in new if case not in old)]:
        for a, b in itertools.zip_longest(old.get(case, []), new.get(case, [])):
            if a is None or b is None:
                different += 1
                print(f"{case}: {(a or b)[0]} is launched {'before' if b is None else 'after'} only")
            elif a[1] == b[1] and canonical(a[2]) == canonical(b[2]):
                same += 1
            else:
                different += 1
                print(f"{case}: {b[0]}: {describe_change(a, b)}")
    print(f"{same} launches compile to the same code, {different} do not")
    return int(different > 0)


REGISTER = re.compile(r"%(?:rd|rs|r|f|fd|p|b|h|hh|rq)\d+\b|\$L__\w+|\w+_param_\d+")

COMMUTATIVE = re.compile(r"((?:@\S+ )?(?:add|mul|and|or|xor|min|max)\.\S+\s+[^,]+), ([^,]+), ([^,]+);")


@functools.cache
def canonical(ptx: str) -> str:
    """The instructions, with registers, labels and parameters named by their first use; nothing for debuggers."""
    entry = ptx[ptx.index(".visible .entry") :].partition(".section\t.debug")[0]
    lines = []
    for line in entry.splitlines():
        text = line.partition("//")[0].strip()
        is_noise = not text or text.startswith((".loc", ".file", ".reg", ".param", "ld.param", ".visible"))
        if not is_noise and not re.fullmatch(r"\$L__(tmp|func|debug|info)\w*:", text):
            lines.append(text)
    names: dict[str, str] = {}

    def named(text: str) -> str:
        return REGISTER.sub(lambda m: names.setdefault(m[0], f"%{len(names)}"), text)

    found = []
    for text in lines:
        if product := COMMUTATIVE.fullmatch(text):
            head, *operands = product.groups()
            # The first of two new operands is named first, as they stand; else the order says nothing.
            first, second = sorted(operands, key=lambda operand: operand not in names)
            text = f"{head}, {', '.join(sorted((named(first), named(second))))};"
            text = named(head) + text.removeprefix(head)
        else:
            text = named(text)
        found.append(text)
    return "\n".join(found)


@functools.cache
def machine_code(shared: int, ptx: str) -> Counter[str]:
    """What ptxas makes of it: instructions by name, registers, spills, shared memory."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    version, arch = re.search(r"\.version (\S+)", ptx), re.search(r"\.target\s+(\w+)", ptx)
    assert version is not None and arch is not None
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        for ptxas in ("ptxas", "ptxas-blackwell"):  # the first that knows this version of PTX
            command = [tools / ptxas, "-v", f"--gpu-name={arch[1]}", source, "-o", cubin]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        command = [tools / "cuobjdump", "-sass", cubin]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE))
    found["instructions"] = found.total()
    found["registers"] = int(re.findall(r"Used (\d+) registers", done.stderr)[0])
    found["spilled bytes"] = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    found["shared bytes"] = shared
    return found


def describe_change(before: Launch, after: Launch) -> str:
    old, new = machine_code(*before[1:]), machine_code(*after[1:])
    changes = [f"{key} {old[key]} -> {new[key]}" for key in {**new, **old} if old[key] != new[key]]
    return "; ".join(reversed(changes)) or "the same number of each instruction, registers and shared memory"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump")
    dumping.add_argument("--src", type=Path, default=Path("src"))
    dumping.add_argument("--out", type=Path, required=True)
    dumping.add_argument("--sm", type=int, choices=SHARED_MEMORY, required=True)
    dumping.add_argument("--only", default="", help="cases whose names contain this")
    dumping.add_argument("--kernels", nargs="+", default=[], help="these alone")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "dump":
        dump(options.src, options.out, options.sm, options.only, options.kernels)
        return 0
    return compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
