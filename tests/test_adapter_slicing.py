"""Adapters in memory, cut for any world: what the ranks hold adds up to what one process holds, expert by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.slicing import slice_experts, slice_linear

from moegraft.core.config import MoEConfig
from moegraft.lora.targets import ExpertsLoRA, ExpertsTarget, LinearLoRA
from moegraft.parallel import ExpertsSlice, LinearSlice, Share, column_parallel, experts_slice, row_parallel
from moegraft.parallel.slices import contiguous_experts, round_robin_experts
from moegraft.testing import LoRASpec, make_lora

ranks = st.integers(0, 5)
specs = st.builds(
    LoRASpec,
    r_gate=ranks,
    r_up=st.integers(1, 5),
    r2=ranks,
    shared_a13=st.booleans(),
    shared_outer=st.booleans(),
    expert_ids=st.none() | st.sets(st.integers(0, 4), min_size=1).map(sorted).map(tuple),
)


@given(
    spec=specs,
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 11)),
    worlds=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    granule=st.integers(1, 4),
    fully_sharded=st.booleans(),
    deal=st.sampled_from([contiguous_experts, round_robin_experts]),
)
def test_deltas_of_all_ranks_are_the_delta(
    spec: LoRASpec,
    sizes: tuple[int, int],
    worlds: tuple[int, int],
    granule: int,
    fully_sharded: bool,
    deal: object,
) -> None:
    (D, F), (tp, ep) = sizes, worlds
    config = MoEConfig(num_experts=5, top_k=1, hidden_size=D, intermediate_size=F)
    whole = ExpertsLoRA(**vars(make_lora(spec, config, generator=torch.Generator().manual_seed(0))))
    target = ExpertsTarget(name="experts", num_experts=5, hidden_size=D, intermediate_size=F)
    assert callable(deal)
    seen = []
    for ep_rank in range(ep):
        held = deal(5, ep, ep_rank)
        slices = [
            experts_slice(
                num_experts=5,
                intermediate_size=F,
                tp=Share(tp, tp_rank),
                ep=Share(ep, ep_rank),
                granule=granule,
                experts=held,
                fully_sharded=fully_sharded,
            )
            for tp_rank in range(tp)
        ]
        parts = [slice_experts(whole, target, mine) for mine in slices]
        found = [part for part in parts if part is not None]
        assert len(found) in (0, tp)
        for local in found[0].expert_ids if found else ():
            seen.append(held[local])
            expected = deltas([whole], [ExpertsSlice()], whole.expert_ids.index(held[local]), (D, F))
            together = deltas(found, slices, found[0].expert_ids.index(local), (D, F))
            assert expected.keys() == together.keys()
            for name, delta in expected.items():
                torch.testing.assert_close(together[name], delta, rtol=1e-5, atol=1e-5, msg=name)
    assert sorted(seen) == list(whole.expert_ids)


def deltas(
    parts: Sequence[ExpertsLoRA], slices: Sequence[ExpertsSlice], position: int, sizes: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """gate and up [F, D] and down [D, F] of one expert, as the ranks' layers compute them together."""
    D, F = sizes

    def of(part: ExpertsLoRA, name: str) -> torch.Tensor:
        factor = getattr(part, name)
        return factor[0 if factor.shape[0] == 1 else position]

    found = {}
    if parts[0].a13 is not None:
        is_shared_out = slices[0].low_rank is not None
        a13 = torch.cat([of(part, "a13") for part in parts]) if is_shared_out else of(parts[0], "a13")
        for name, lane in (("b_gate", 0), ("b_up", parts[0].up_lane)):
            if getattr(parts[0], name) is None:
                continue
            delta = torch.zeros(F, D)
            for part, mine in zip(parts, slices, strict=True):
                b, columns = of(part, name), mine.columns(F)
                delta[columns.start : columns.stop] = (b.T @ a13[lane : lane + b.shape[0]])[: columns.size]
            found[name] = delta
    if parts[0].a2 is not None:
        delta = torch.zeros(D, F)
        for part, mine in zip(parts, slices, strict=True):
            columns, a2 = mine.columns(F), of(part, "a2")
            for other, theirs in zip(parts, slices, strict=True):
                rows = theirs.hidden(D)
                delta[rows.start : rows.stop, columns.start : columns.stop] = (of(other, "b2").T @ a2)[
                    : rows.size, : columns.size
                ]
        found["down"] = delta
    return found


@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9)),
    world=st.integers(1, 5),
    fully_sharded=st.booleans(),
    kind=st.sampled_from([column_parallel, row_parallel]),
)
def test_slices_of_a_linear_map_are_the_map(
    sizes: tuple[int, int, int], world: int, fully_sharded: bool, kind: object
) -> None:
    size_in, size_out, r = sizes
    lora = LinearLoRA(a=torch.rand(r, size_in), b=torch.rand(r, size_out), gain=torch.rand(size_out))
    shares = [Share(world, rank) for rank in range(world)]
    if kind is column_parallel:
        slices = [column_parallel(size_out, share, fully_sharded=fully_sharded) for share in shares]
    else:
        slices = [row_parallel(size_in, size_out, share, fully_sharded=fully_sharded) for share in shares]
    parts = [slice_linear(lora, mine) for mine in slices]
    assert torch.equal(put_together([part.b for part in parts], [mine.outputs for mine in slices]), lora.b)
    gains = [part.gain[None] for part in parts if part.gain is not None]
    assert torch.equal(put_together(gains, [mine.outputs for mine in slices])[0], lora.gain)
    if slices[0].lanes is None:
        a = put_together([part.a for part in parts], [mine.inputs for mine in slices])
    else:
        a = torch.cat([part.a for part in parts])
        assert not a[r:].any()
        assert len({len(part.a) for part in parts}) == 1
    assert torch.equal(a[:r], lora.a)
    for mine, part in zip(slices, parts, strict=True):
        assert part.a.shape[1] == mine.num_inputs(size_in)
        assert part.b.shape[1] == mine.num_outputs(size_out)


def put_together(parts: Sequence[torch.Tensor], pieces: Sequence[object]) -> torch.Tensor:
    """Columns of all ranks side by side; where every rank has all of them, these."""
    if pieces[0] is None:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(list(parts), dim=1)


def test_a_whole_slice_changes_nothing() -> None:
    lora = LinearLoRA(a=torch.rand(2, 3), b=torch.rand(2, 4))
    found = slice_linear(lora, LinearSlice())
    assert found.a is lora.a and found.b is lora.b and found.gain is None
