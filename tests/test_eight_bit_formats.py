"""fp8 and int8 expert weights: round trips, checkpoint shapes, cuts, and the quantisation of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moegraft.formats import FORMAT_NAMES
from moegraft.formats.fp8 import Fp8Experts, dequantise_rows, quantise_rows
from moegraft.formats.int8 import Int8Experts
from moegraft.formats.scaled import BLOCK, Granularity, ScaledExperts
from moegraft.testing import relative_error

# (E, D, F): whole blocks, odd sizes with partial blocks, less than a block, and nothing at all.
SIZES = [(2, 256, 128), (3, 200, 300), (2, 37, 19), (0, 64, 32), (2, 64, 0), (2, 0, 32)]
PACKS: dict[str, Callable[..., ScaledExperts]] = {
    "fp8 block": Fp8Experts.pack,
    "fp8 channel": lambda w13, w2, **kw: Fp8Experts.pack(w13, w2, granularity=Granularity.CHANNEL, **kw),
    "fp8 tensor": lambda w13, w2, **kw: Fp8Experts.pack(w13, w2, granularity=Granularity.TENSOR, **kw),
    "int8": Int8Experts.pack,
}
# Half a unit in the last place: 3 bits of mantissa, or 127 steps of the largest of a row.
TOL = {"fp8 block": 2**-4, "fp8 channel": 2**-4, "fp8 tensor": 2**-4, "int8": 2**-6}


def canonical(E: int, D: int, F: int, num_halves: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different sizes, so that a scale that lands in another row shows."""
    generator = torch.Generator().manual_seed(E + D + F)
    w13 = torch.randn(E, num_halves * F, D, generator=generator) * torch.logspace(-2, 2, num_halves * F)[:, None]
    w2 = torch.randn(E, D, F, generator=generator) * torch.logspace(-1, 1, D)[:, None]
    return w13, w2


@pytest.mark.parametrize("num_halves", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_round_trip(name: str, sizes: tuple[int, int, int], num_halves: int) -> None:
    w13, w2 = canonical(*sizes, num_halves)
    packed = PACKS[name](w13, w2, num_halves=num_halves)
    assert (packed.num_experts, packed.hidden_size, packed.intermediate_size) == sizes
    found13, found2 = packed.dequantise(torch.float32)
    if name == "fp8 tensor":  # small rows fall below the smallest number of a scale that all rows share
        assert relative_error(found13, w13) < 2**-4
    else:
        for found, expected in zip(found13.flatten(0, 1), w13.flatten(0, 1), strict=True):
            # Blocks have neighbours 128 rows away of ten times the size; their scale is the largest of them.
            assert relative_error(found, expected) <= TOL[name]
    assert relative_error(found2, w2) <= TOL[name]
    # What can be stored exactly comes back exactly.
    again = PACKS[name](found13, found2, num_halves=num_halves)
    for first, second in zip(again.dequantise(torch.float32), (found13, found2), strict=True):
        assert relative_error(first, second) <= 1e-6
    assert packed.format_name in FORMAT_NAMES


@pytest.mark.parametrize("name", PACKS)
def test_meta_has_the_shapes_and_no_memory(name: str) -> None:
    w13, w2 = canonical(2, 200, 300)
    real = PACKS[name](w13, w2)
    packed = PACKS[name](w13.to("meta"), w2.to("meta"))
    assert packed.device.type == "meta"
    assert packed.num_bytes == real.num_bytes
    assert [(t.shape, t.dtype) for t in packed.tensors] == [(t.shape, t.dtype) for t in real.tensors]
    assert packed.take_experts([1]).take_intermediate(128, 300).intermediate_size == 172
    assert [t.shape for t in packed.dequantise(torch.bfloat16)] == [w13.shape, w2.shape]


def test_partial_blocks_are_padded_as_checkpoints_do() -> None:
    """DeepSeek-V3: scales [ceil(rows / 128), ceil(columns / 128)] for gate, up and down by themselves."""
    w13, w2 = canonical(2, 200, 300)
    packed = Fp8Experts.pack(w13, w2)
    assert packed.w13_scale.shape == (2, 2 * 3, 2)
    assert packed.w2_scale.shape == (2, 2, 3)
    gate, up = w13.unflatten(1, (2, 300)).unbind(1)
    assert torch.allclose(packed.w13_scale[0, 2, 1], gate[0, 256:300, 128:200].abs().max() / 448)
    assert torch.allclose(packed.w13_scale[0, 3, 0], up[0, :128, :128].abs().max() / 448)


CUTS = [(0, 128, None), (128, 300, None), (128, 256, 200), (256, 300, 128), (0, 300, 512), (300, 300, 128)]


@pytest.mark.parametrize(("start", "stop", "padded_to"), CUTS)
@pytest.mark.parametrize("name", PACKS)
def test_a_cut_is_the_cut_of_what_is_stored(name: str, start: int, stop: int, padded_to: int | None) -> None:
    w13, w2 = canonical(3, 200, 300)
    packed = PACKS[name](w13, w2, b13=torch.randn(3, 600), b2=torch.randn(3, 200))
    cut = packed.take_experts([2, 0]).take_intermediate(start, stop, padded_to=padded_to)
    width = padded_to or stop - start
    whole13, whole2 = (tensor[[2, 0]] for tensor in packed.dequantise(torch.float32))
    expected13 = torch.zeros(2, 2, width, 200)
    expected13[:, :, : stop - start] = whole13.unflatten(1, (2, 300))[:, :, start:stop]
    expected2 = torch.zeros(2, 200, width)
    expected2[:, :, : stop - start] = whole2[:, :, start:stop]
    found13, found2 = cut.dequantise(torch.float32)
    assert torch.equal(found13, expected13.flatten(1, 2))
    assert torch.equal(found2, expected2)
    assert packed.b13 is not None and cut.b13 is not None and cut.b2 is not None and packed.b2 is not None
    assert torch.equal(cut.b13[:, : stop - start], packed.b13[[2, 0], start:stop])
    assert torch.equal(cut.b2, packed.b2[[2, 0]])
    memory = {t.untyped_storage().data_ptr() for t in packed.tensors}
    assert not memory & {t.untyped_storage().data_ptr() for t in cut.tensors}


def test_a_cut_through_a_block_is_refused() -> None:
    packed = Fp8Experts.pack(*canonical(1, 200, 300))
    assert packed.intermediate_granule == BLOCK
    for start, stop in ((0, 100), (64, 128), (1, 300)):
        with pytest.raises(ValueError, match=f"columns {start} to {stop} of 300 cut a block of scales"):
            packed.take_intermediate(start, stop)
    assert PACKS["fp8 channel"](*canonical(1, 200, 300)).intermediate_granule == 1


class TestCheckpoints:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
    def test_weight_scale_inv_in_blocks(self, dtype: torch.dtype) -> None:
        """As transformers holds Qwen3-FP8 and DeepSeek-V3 once experts are merged: [E, 2F, D] and block scales."""
        packed = Fp8Experts.pack(*canonical(2, 256, 384))
        scales = [scale.log2().round().exp2() for scale in (packed.w13_scale, packed.w2_scale)]
        read = Fp8Experts.from_checkpoint(
            w13=packed.w13,
            w2=packed.w2,
            w13_scale=scales[0].to(dtype),
            w2_scale=scales[1].to(dtype),
            block_size=(128, 128),
        )
        expected = replace(packed, w13_scale=scales[0], w2_scale=scales[1])
        for found, right in zip(read.dequantise(torch.float32), expected.dequantise(torch.float32), strict=True):
            assert torch.equal(found, right)
        assert read.w13.data_ptr() == packed.w13.data_ptr()

    @pytest.mark.parametrize("cls", [Fp8Experts, Int8Experts])
    @pytest.mark.parametrize("shape13", [(2, 38), (2, 38, 1), (2, 2), (2, 2, 1), (2,), (2, 1), (2, 1, 1)])
    def test_weight_scale_by_row_half_or_expert(
        self, cls: type[Fp8Experts] | type[Int8Experts], shape13: tuple[int, ...]
    ) -> None:
        w13 = torch.randint(-100, 100, (2, 38, 37)).to(cls.stored_dtype)
        w2 = torch.randint(-100, 100, (2, 37, 19)).to(cls.stored_dtype)
        scale13 = torch.rand(shape13).to(torch.bfloat16)
        scale2 = torch.rand((2, 37, 1) if 38 in shape13 else (2, 1, 1))
        read = cls.from_checkpoint(w13=w13, w2=w2, w13_scale=scale13, w2_scale=scale2)
        found13, found2 = read.dequantise(torch.float32)
        by_half = scale13.float().reshape(2, -1)
        over_rows = by_half.repeat_interleave(38 // by_half.shape[1], 1)[:, :, None]
        assert torch.equal(found13, w13.float() * over_rows)
        assert torch.equal(found2, w2.float() * scale2)

    def test_static_scales(self) -> None:
        """One scale an expert; the largest serves all."""
        packed = PACKS["fp8 tensor"](*canonical(2, 64, 32))
        assert isinstance(packed, Fp8Experts)
        static = packed.with_static_scales(torch.tensor([0.5, 0.25]), torch.tensor([[0.125], [1.0]]))
        x = torch.tensor([[1.0, -300.0, 0.26, 500.0]])
        # e4m3 has 3 bits behind the leading one and ends at 448: 448 * 0.5 = 224
        assert static.quantise_input(x).tolist() == [[1.0, -224.0, 0.25, 224.0]]
        assert static.quantise_input(x, of_w2=True).tolist() == [[1.0, -288.0, 0.25, 448.0]]
        assert static.num_bytes == packed.num_bytes + 8
        assert static.take_experts([1]).x_scale is static.x_scale

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_size": (64, 64)}, r"found blocks of \(64, 64\), expected \(128, 128\)"),
            ({"w13_scale": torch.ones(2, 5)}, r"found scales of shape \(2, 5\) for 2 experts of 38 rows"),
            ({"w13_scale": torch.ones(3, 1)}, r"found scales of shape \(3, 1\)"),
            ({"w13": torch.zeros(2, 38, 37, dtype=torch.uint8)}, "found w13 in torch.uint8, expected torch.float8"),
            ({"w13": torch.zeros(2, 38, 36).to(torch.float8_e4m3fn)}, r"found w13 \(2, 38, 36\), expected"),
            ({"block_size": (128, 128)}, r"block scales of shape \(2, 38\)"),
            ({"block_size": (128, 128), "w13_scale": torch.ones(2, 1, 1)}, r"found w13_scale \(2, 1, 1\)"),
        ],
    )
    def test_what_does_not_fit_is_named(self, changes: dict[str, object], message: str) -> None:
        tensors: dict[str, object] = {
            "w13": torch.zeros(2, 38, 37).to(torch.float8_e4m3fn),
            "w2": torch.zeros(2, 37, 19).to(torch.float8_e4m3fn),
            "w13_scale": torch.ones(2, 38),
            "w2_scale": torch.ones(2, 1, 1),
        }
        with pytest.raises(ValueError, match=message):
            Fp8Experts.from_checkpoint(**{**tensors, **changes})  # type: ignore[arg-type]


class TestActivations:
    @pytest.mark.parametrize("group_size", [None, BLOCK])
    @pytest.mark.parametrize("shape", [(5, 300), (1, 128), (0, 64), (3, 0), (4, 37)])
    def test_rows_are_within_half_a_unit(self, shape: tuple[int, int], group_size: int | None) -> None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x[:, ::7] = 0
        stored, scale = quantise_rows(x, group_size=group_size)
        assert stored.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        assert stored.shape == shape and scale.shape == (shape[0], 3 if shape[1] == 300 and group_size else 1)
        back = dequantise_rows(stored, scale, torch.float32)
        per_column = scale.repeat_interleave(group_size or max(shape[1], 1), 1)[:, : shape[1]]
        # Half of 2**-3 of a number, and half of the smallest step, 2**-9, of its scale.
        assert ((back - x).abs() <= x.abs() * 2**-4 + per_column * 2**-10).all()

    def test_a_row_does_not_see_its_neighbours(self) -> None:
        """What the promise about base rows needs; a scale over a batch would break it."""
        packed = Fp8Experts.pack(*canonical(1, 256, 128))
        x = torch.randn(4, 256)
        together = packed.quantise_input(x)
        assert torch.equal(packed.quantise_input(torch.cat([x[:1], 1000 * x[1:]]))[:1], together[:1])

    def test_large_and_small_groups_keep_their_scales(self) -> None:
        x = torch.cat([torch.full((1, BLOCK), 1e6), torch.full((1, BLOCK), 1e-6)], 1)
        blocks = Fp8Experts.pack(*canonical(1, 256, 128)).quantise_input(x)
        assert relative_error(blocks[:, BLOCK:], x[:, BLOCK:]) < 1e-6
        rows = PACKS["fp8 channel"](*canonical(1, 256, 128)).quantise_input(x)
        assert not rows[:, BLOCK:].any()

    def test_zero_rows_stay_zero(self) -> None:
        stored, scale = quantise_rows(torch.zeros(2, 64))
        assert not stored.float().any() and scale.isfinite().all() and (scale > 0).all()

    def test_int8_reads_activations_as_they_are(self) -> None:
        x = torch.randn(3, 64)
        assert Int8Experts.pack(*canonical(1, 64, 32)).quantise_input(x) is x
