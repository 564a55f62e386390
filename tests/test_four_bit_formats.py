"""Int4 and mxfp4 weights: packing has an inverse, checkpoints' layouts mean what their libraries say, cuts are cuts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moegraft.formats.base import ExpertsWeights
from moegraft.formats.four_bit import FourBitMatrix
from moegraft.formats.int4 import Int4Experts, Int4Matrix
from moegraft.formats.mxfp4 import MXFP4Experts, MXFP4Matrix
from moegraft.formats.nvfp4 import NVFP4Experts

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def integers(*size: int, high: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed))


def random_matrix(R: int, num_inputs: int, group: int, *, with_zeros: bool) -> tuple[Int4Matrix, torch.Tensor]:
    """A matrix and its values by the formula."""
    groups = -(-num_inputs // group) if group else 1
    codes = integers(2, R, num_inputs)
    scales = torch.rand(2, R, groups, generator=torch.Generator().manual_seed(1)) + 0.1
    zeros = integers(2, R, groups, seed=2) if with_zeros else None
    matrix = Int4Matrix.from_codes(codes.to(torch.uint8), scales, group=group, zeros=zeros)
    of = torch.arange(num_inputs) // (group or num_inputs + 1)
    return matrix, (codes - (8 if zeros is None else zeros[..., of])) * scales[..., of]


def pack_words(numbers: torch.Tensor, places: list[int] | range = range(8)) -> torch.Tensor:
    """Eight numbers of the last axis to an int32; number i of a word lies in the nibble ``places.index(i)``."""
    words = numbers.unflatten(-1, (numbers.shape[-1] // 8, 8)).long()
    packed = sum(words[..., i] << 4 * nibble for nibble, i in enumerate(places))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group", [0, 32, 64, 128, 256])
@pytest.mark.parametrize(("R", "num_inputs"), [(6, 256), (3, 200), (1, 1), (0, 128), (4, 0)])
def test_int4_packing_has_an_inverse(R: int, num_inputs: int, group: int, with_zeros: bool) -> None:
    matrix, expected = random_matrix(R, num_inputs, group, with_zeros=with_zeros)
    assert torch.equal(matrix.values(torch.float32), expected)
    again = Int4Matrix.from_codes(matrix.codes(), matrix.scale_rows(), group=matrix.group, zeros=matrix.zero_rows())
    for name in ("packed", "scales", "zeros"):
        found = getattr(again, name)
        assert found is None or torch.equal(found, getattr(matrix, name))


@pytest.mark.parametrize(("R", "num_inputs"), [(6, 256), (3, 200), (19, 37), (1, 1), (0, 128), (4, 0)])
def test_mxfp4_packing_has_an_inverse(R: int, num_inputs: int) -> None:
    """Odd sizes too: a last block of fewer than 32 numbers has a scale of its own."""
    codes, scales = integers(2, R, num_inputs), integers(2, R, -(-num_inputs // 32), high=129, seed=1)
    matrix = MXFP4Matrix.from_codes(codes, scales.to(torch.uint8), group=32)
    assert torch.equal(matrix.codes(), codes.to(torch.uint8)) and torch.equal(matrix.scale_rows().long(), scales)
    exponents = scales[..., torch.arange(num_inputs) // 32] - 127
    expected = torch.tensor(E2M1)[codes].double() * torch.exp2(exponents.double())
    assert torch.equal(matrix.values(torch.float32), expected.float())


def test_a_word_holds_an_input_of_each_run() -> None:
    codes = integers(1, 256)
    words = Int4Matrix.from_codes(codes, torch.ones(1, 2), group=128).packed
    assert words.shape == (2, 1, 32)
    nibbles = [(int(words[1, 0, 5]) & 0xFFFF) >> 4 * j & 15 for j in range(4)]
    assert nibbles == codes[0, [128 + 5, 160 + 5, 192 + 5, 224 + 5]].tolist()


def test_an_mxfp4_word_gives_bfloat16_with_shifts_and_masks() -> None:
    """What the kernel does with a word, in integers: bits 15 and 6..8 are a bfloat16 that is 2**-126 of the number."""
    numbers = torch.arange(16).repeat(8)[None]
    word = MXFP4Matrix.from_codes(numbers, torch.full((1, 4), 127, dtype=torch.uint8), group=32).packed.int()
    runs = (
        word & 0x81C0,
        word << 3 & 0x81C0,
        (word << 6 & 0x01C0) | (word << 2 & 0x8000),
        (word >> 3 & 0x01C0) | (word << 1 & 0x8000),
    )
    bits = torch.cat(runs, -1).flatten()
    values = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(values.double() * 2.0**126, torch.tensor(E2M1, dtype=torch.float64).repeat(8))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_gptq(group: int, version: int) -> None:
    size = 256 if group < 0 else group
    codes, scales, zeros = integers(256, 24), torch.rand(256 // size, 24).half(), integers(256 // size, 24, seed=1)
    zeros[0, :4] = torch.tensor([0, 15, 0, 0])
    # GPTQModel's rule for version 1: the stored words, eight zero points each, less 0x11111111 as a whole. A zero point
    # of 0 so borrows from its neighbour, and is no 15 beside which the others are what they were less one.
    words = pack_words(zeros).long() - (0x11111111 if version == 1 else 0)
    matrix = Int4Matrix.from_gptq(
        pack_words(codes.T).T.contiguous(),
        torch.where(words < -(2**31), words + 2**32, words).int(),
        scales,
        torch.arange(256, dtype=torch.int32) // size,
        group=group,
        zero_offset=2 - version,
    )
    of = torch.arange(256) // size
    assert torch.equal(matrix.values(torch.float32), ((codes - zeros[of]) * scales[of].float()).T)


def test_awq() -> None:
    codes, scales, zeros = integers(2, 256, 16), torch.rand(2, 2, 16), integers(2, 2, 16, seed=1)
    matrix = Int4Matrix.from_awq(pack_words(codes, AWQ_ORDER), pack_words(zeros, AWQ_ORDER), scales, group=128)
    of = torch.arange(256) // 128
    assert torch.equal(matrix.values(torch.float32), ((codes - zeros[:, of]) * scales[:, of]).mT)


@pytest.mark.parametrize("with_zeros", [False, True])
def test_compressed_tensors(with_zeros: bool) -> None:
    """Signed numbers plus 8, padded to whole words; zero points likewise, along the rows."""
    codes, scales = integers(20, 200), torch.rand(20, 7).bfloat16()
    zeros = integers(20, 7, seed=1)
    padded_zeros = torch.nn.functional.pad(zeros.T, [0, 4])
    matrix = Int4Matrix.from_compressed_tensors(
        pack_words(codes),
        scales,
        pack_words(padded_zeros).T if with_zeros else None,
        torch.full((200,), -1),
        num_inputs=200,
        group=32,
    )
    of = torch.arange(200) // 32
    signed_zeros = zeros[:, of] - 8 if with_zeros else 0
    assert torch.equal(matrix.values(torch.float32), ((codes - 8) - signed_zeros) * scales[:, of].float())


def test_act_order_is_refused() -> None:
    g_idx = torch.arange(64) // 32
    args = (torch.zeros(8, 8, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 8))
    Int4Matrix.from_gptq(*args, g_idx, group=32)
    with pytest.raises(ValueError, match=r"g_idx out of order.*act-order"):
        Int4Matrix.from_gptq(*args, g_idx.flip(0), group=32)


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_int4_rounds_to_the_nearest(group: int, is_symmetric: bool) -> None:
    w = torch.randn(3, 8, 200, generator=torch.Generator().manual_seed(0))
    matrix = Int4Matrix.quantise(w, group=group, is_symmetric=is_symmetric)
    step = matrix.over_inputs(matrix.scale_rows())
    assert ((matrix.values(torch.float32) - w).abs() <= 0.5001 * step).all() or not is_symmetric
    assert (matrix.values(torch.float32) - w).norm() < 0.2 * w.norm()
    again = Int4Matrix.quantise(matrix.values(torch.float32), group=group, is_symmetric=is_symmetric)
    assert torch.allclose(again.values(torch.float32), matrix.values(torch.float32), atol=1e-5)


def test_mxfp4_rounds_to_the_nearest_and_its_numbers_to_themselves() -> None:
    w = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    w[0, 0] = 0
    matrix = MXFP4Matrix.quantise(w)
    assert (matrix.values(torch.float32) - w).norm() < 0.15 * w.norm()
    assert torch.equal(
        MXFP4Matrix.quantise(matrix.values(torch.float32)).values(torch.float32), matrix.values(torch.float32)
    )


def gpt_oss_layer(E: int = 2, D: int = 96, F: int = 64) -> dict[str, torch.Tensor]:
    return {
        "gate_up_proj_blocks": integers(E, 2 * F, D // 32, 16, high=256).to(torch.uint8),
        "gate_up_proj_scales": integers(E, 2 * F, D // 32, high=129).to(torch.uint8),
        "gate_up_proj_bias": torch.randn(E, 2 * F),
        "down_proj_blocks": integers(E, D, F // 32, 16, high=256, seed=1).to(torch.uint8),
        "down_proj_scales": integers(E, D, F // 32, high=129, seed=1).to(torch.uint8),
        "down_proj_bias": torch.randn(E, D),
    }


def test_gpt_oss_checkpoint_round_trip() -> None:
    tensors = gpt_oss_layer()
    experts = MXFP4Experts.from_checkpoint(tensors)
    for name, tensor in experts.to_checkpoint().items():
        assert torch.equal(tensor, tensors[name]), name
    w13, w2 = experts.dequantise(torch.float32)
    blocks, table = tensors["down_proj_blocks"].long(), torch.tensor(E2M1)
    numbers = torch.stack([table[blocks & 15], table[blocks >> 4]], -1).flatten(-2)
    assert torch.equal(w2, torch.ldexp(numbers, tensors["down_proj_scales"][..., None].int() - 127).flatten(2))
    up_3 = tensors["gate_up_proj_blocks"][1, 7, 2].long()
    scale = 2.0 ** (int(tensors["gate_up_proj_scales"][1, 7, 2]) - 127)
    assert torch.equal(w13[1, 64 + 3, 64::2], table[up_3 & 15] * scale)
    assert torch.equal(experts.b13[:, 3], tensors["gate_up_proj_bias"][:, 6])


def test_gpt_oss_checkpoints_that_do_not_fit() -> None:
    tensors = gpt_oss_layer()
    with pytest.raises(ValueError, match=r"missing \['down_proj_bias'\], unknown \['down_proj'\]"):
        MXFP4Experts.from_checkpoint(
            {k: v for k, v in tensors.items() if k != "down_proj_bias"} | {"down_proj": tensors["down_proj_bias"]}
        )
    with pytest.raises(ValueError, match="scale byte of 255, expected at most 128"):
        MXFP4Experts.from_checkpoint(tensors | {"down_proj_scales": torch.full_like(tensors["down_proj_scales"], 255)})
    with pytest.raises(ValueError, match=r"found w13 .* and w2 .*, expected"):
        MXFP4Experts.from_checkpoint(tensors | {k: v[:1] for k, v in tensors.items() if k.startswith("down")})


def make_experts(kind: str, *, D: int = 160, F: int = 192, E: int = 3, device: str = "cpu") -> ExpertsWeights:
    generator = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(E, 2 * F, D, generator=generator), torch.randn(E, D, F, generator=generator)
    b13, b2 = torch.randn(E, 2 * F, generator=generator), torch.randn(E, D, generator=generator)
    w13, w2, b13, b2 = (tensor.to(device) for tensor in (w13, w2, b13, b2))
    if kind == "mxfp4":
        return MXFP4Experts.pack(w13, w2, b13=b13, b2=b2)
    group, is_symmetric = {"int4": (64, True), "int4 zeros": (32, False), "int4 channel": (0, False)}[kind]
    return Int4Experts.pack(w13, w2, group=group, is_symmetric=is_symmetric, b13=b13, b2=b2)


KINDS = ["int4", "int4 zeros", "int4 channel", "mxfp4"]


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_are_those_of_the_dequantised_weights(kind: str) -> None:
    experts = make_experts(kind)
    cut = experts.take_experts([2, 0]).take_intermediate(64, 192, padded_to=140)
    w13, w2 = experts.dequantise(torch.float32)
    expected = torch.zeros(2, 2, 140, 160)
    expected[:, :, :128] = w13[[2, 0]].unflatten(1, (2, 192))[:, :, 64:]
    found13, found2 = cut.dequantise(torch.float32)
    assert torch.equal(found13, expected.flatten(1, 2))
    assert torch.equal(found2[:, :, :128], w2[[2, 0], :, 64:]) and not found2[:, :, 128:].any()
    assert torch.equal(
        cut.b13.unflatten(1, (2, 140))[:, :, :128], experts.b13[[2, 0]].unflatten(1, (2, 192))[:, :, 64:]
    )
    assert not cut.b13.unflatten(1, (2, 140))[:, :, 128:].any() and torch.equal(cut.b2, experts.b2[[2, 0]])
    own = {tensor.untyped_storage().data_ptr() for tensor in experts.tensors}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in cut.tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("F", [24, 72, 192])
def test_a_rank_behind_the_last_column_has_zeros(kind: str, F: int) -> None:
    """Wherever F ends, inside a group too."""
    cut = make_experts(kind, F=F).take_intermediate(F, F, padded_to=64)
    found13, found2 = cut.dequantise(torch.float32)
    assert found13.shape == (3, 128, 160) and found2.shape == (3, 160, 64)
    # Rows of w13 that pad have scales of zero.
    assert not found13.any() and not found2.any() and not cut.b13.any()


@pytest.mark.parametrize("kind", ["int4", "mxfp4"])
def test_a_cut_through_a_scale_group_is_refused(kind: str) -> None:
    experts = make_experts(kind)
    assert experts.intermediate_granule == (64 if kind == "int4" else 32)
    with pytest.raises(ValueError, match=rf"cut at \[16, 192\).*multiples of {experts.intermediate_granule}"):
        experts.take_intermediate(16, 192)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_sized_and_meta(kind: str) -> None:
    for sizes in ({"E": 0}, {"F": 0}, {"D": 0}):
        experts = make_experts(kind, **sizes)
        w13, w2 = experts.dequantise(torch.float32)
        E, D, F = experts.num_experts, experts.hidden_size, experts.intermediate_size
        assert w13.shape == (E, 2 * F, D) and w2.shape == (E, D, F)
    meta, real = make_experts(kind, device="meta"), make_experts(kind)
    assert [(t.shape, t.dtype) for t in meta.tensors] == [(t.shape, t.dtype) for t in real.tensors]
    assert meta.num_bytes == real.num_bytes
    cut, real_cut = (e.take_experts([1]).take_intermediate(64, 128, padded_to=96) for e in (meta, real))
    assert [(t.shape, t.dtype) for t in cut.tensors] == [(t.shape, t.dtype) for t in real_cut.tensors]
    assert meta.dequantise(torch.float32)[0].shape == real.dequantise(torch.float32)[0].shape


def test_matrices_join_as_a_checkpoint_has_them() -> None:
    """One matrix a projection and expert, gate and up one above the other."""
    parts = [[random_matrix(4, 128, 32, with_zeros=True)[0].at(e) for e in range(2)] for _ in range(2)]
    joined = Int4Matrix.stack([Int4Matrix.cat_rows([gate, up]) for gate, up in zip(*parts, strict=True)])
    expected = torch.stack(
        [torch.cat([g.values(torch.float32), u.values(torch.float32)]) for g, u in zip(*parts, strict=True)]
    )
    assert torch.equal(joined.values(torch.float32), expected)
    other, _ = random_matrix(4, 128, 64, with_zeros=True)
    with pytest.raises(ValueError, match="groups of 64 with zero points, expected 128 inputs in groups of 32 with"):
        Int4Matrix.cat_rows([parts[0][0], other.at(0)])


def test_shapes_that_do_not_fit_are_named() -> None:
    matrix, _ = random_matrix(4, 128, 32, with_zeros=False)
    with pytest.raises(ValueError, match="found groups of 32 inputs in w13 and 64 in w2"):
        Int4Experts(w13=matrix, w2=random_matrix(128, 2, 64, with_zeros=False)[0])
    with pytest.raises(ValueError, match=r"found scales .*expected"):
        Int4Matrix(packed=matrix.packed, scales=matrix.scales[:, :, :3], num_inputs=128, group=32)
    whole, _ = random_matrix(4, 128, 0, with_zeros=True)
    with pytest.raises(ValueError, match=r"found scales alone in torch\.bfloat16, expected torch\.float32"):
        replace(whole, scales=whole.scales.bfloat16())
    with pytest.raises(ValueError, match=r"found zeros torch\.uint8, expected torch\.int32"):
        replace(whole, zeros=whole.zeros.to(torch.uint8))
    with pytest.raises(ValueError, match="group of 48"):
        Int4Matrix.from_codes(integers(2, 96), torch.ones(2, 2), group=48)
    with pytest.raises(ValueError, match=r"found packed torch\.int32"):
        FourBitMatrix.__post_init__(Int4Matrix(**{**vars(matrix), "packed": matrix.packed.int()}))


class TestNVFP4:
    """Numbers, block scales and a scale for each matrix; the reader's tests have the library's own."""

    def packed(self, num_halves: int = 2) -> tuple[NVFP4Experts, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(num_halves)
        w13 = torch.randn(3, num_halves * 48, 32, generator=generator) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
        w2 = torch.randn(3, 32, 48, generator=generator)
        biases = {"b13": torch.randn(3, num_halves * 48), "b2": torch.randn(3, 32)}
        return NVFP4Experts.pack(w13, w2, num_halves=num_halves, **biases), w13, w2

    @pytest.mark.parametrize("num_halves", [1, 2])
    def test_round_trip(self, num_halves: int) -> None:
        packed, w13, w2 = self.packed(num_halves)
        assert (packed.num_experts, packed.hidden_size, packed.intermediate_size) == (3, 32, 48)
        found13, found2 = packed.dequantise(torch.float32)
        for found, weight in ((found13, w13), (found2, w2)):
            # Half a step of e2m1 near its largest number, of a scale with three bits.
            largest = weight.abs().unflatten(-1, (-1, 16)).amax(-1).repeat_interleave(16, -1)
            assert ((found - weight).abs() <= largest / 5).all()
        again = NVFP4Experts.pack(found13, found2, num_halves=num_halves)
        for found, expected in zip(again.dequantise(torch.float32), (found13, found2), strict=True):
            torch.testing.assert_close(found, expected, rtol=0.2, atol=0.1 * expected.abs().max().item())
        assert packed.num_bytes < 0.7 * (w13.numel() + w2.numel()) + sum(t.nbytes for t in packed.tensors[4:])

    def test_parts(self) -> None:
        packed, _, _ = self.packed()
        w13, w2 = packed.dequantise(torch.float32)
        some = packed.take_experts([2, 0])
        assert all(map(torch.equal, some.dequantise(torch.float32), (w13[[2, 0]], w2[[2, 0]])))
        cut = packed.take_intermediate(16, 48, padded_to=48)
        found13, found2 = cut.dequantise(torch.float32)
        halves = w13.unflatten(1, (2, 48))
        expected = torch.cat([halves[:, :, 16:], torch.zeros(3, 2, 16, 32)], 2).flatten(1, 2)
        assert torch.equal(found13, expected)
        assert torch.equal(found2, torch.cat([w2[:, :, 16:], torch.zeros(3, 32, 16)], 2))
        assert cut.b13 is not None and cut.b2 is not None and torch.equal(cut.b2, packed.b2)
        with pytest.raises(ValueError, match=r"columns 8 to 48 of 48 .* multiples of 16"):
            packed.take_intermediate(8, 48)

    def test_refusals(self) -> None:
        packed, _, _ = self.packed()
        with pytest.raises(ValueError, match=r"found w13_scale \(3, 96, 3\), expected \(3, 96, 2\)"):
            replace(packed, w13_scale=torch.zeros(3, 96, 3).to(torch.float8_e4m3fn))
        with pytest.raises(ValueError, match=r"torch.float32, torch.float32, expected"):
            replace(packed, w2_scale=packed.w2_scale.float())
