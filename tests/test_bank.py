from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
import torch
from support.bank import (
    HIDDEN,
    all_factors,
    assert_content,
    make_bank,
    random_weights,
    same_bits,
)

from moegraft.core.errors import (
    AdapterError,
    AdapterInUseError,
    AdapterMemoryError,
    AdapterMismatchError,
    AdapterNameError,
    AdapterTensorError,
    MoegraftError,
    UnknownAdapterError,
)
from moegraft.core.tables import NUM_FIELDS, Field, LinearFactor
from moegraft.lora.bank import AdapterBank, BankLayout
from moegraft.lora.targets import AdapterWeights, ExpertsLoRA, ExpertsTarget, LinearLoRA, ModelTargets

NOTHING = AdapterWeights()


def linear_weights(rank: int, *, fill: float | None = None) -> AdapterWeights:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape) if fill is None else torch.full(shape, fill)

    return AdapterWeights(linears={"q": LinearLoRA(a=draw(rank, HIDDEN), b=draw(rank, 20))})


def pages_weights(bank: AdapterBank, num_pages: int) -> AdapterWeights:
    """An adapter of exactly ``num_pages`` pages: a router whose A and B fill them."""
    rank = 1
    while True:
        weights = AdapterWeights(linears={"router": LinearLoRA(a=torch.ones(rank, HIDDEN), b=torch.ones(rank, 5))})
        probe = AdapterBank(bank.layout, capacity_bytes=1 << 20, device="cpu")
        if probe.load("probe", weights).space.num_pages == num_pages:
            return weights
        rank += 1


def addresses(bank: AdapterBank) -> tuple[int, ...]:
    tensors = [bank.pool.data, bank.tables.page_table, bank.tables.factors, bank.tables.expert_index]
    for module in bank.layout.experts:
        tables = bank.experts_tables(module)
        tensors += [tables.factors, tables.expert_index]
    tensors += [bank.linear_tables(module).factors for module in bank.layout.linears]
    return tuple(tensor.data_ptr() for tensor in tensors)


def test_an_adapter_that_touches_nothing_costs_nothing():
    bank = make_bank()
    handle = bank.load("nothing", NOTHING)
    assert handle.space.num_pages == handle.space.num_bytes == 0
    assert bank.pool.num_free == bank.pool.num_pages
    assert bank.tables.factors[handle.slot].eq(0).all()
    assert bank.tables.expert_index[handle.slot].eq(-1).all()
    assert bank.info("nothing").modules == ()
    assert all(bank.factor(handle, module, factor) is None for module, factor in all_factors(bank))
    bank.evict("nothing")
    with bank.acquire(["nothing", None]) as batch:
        assert batch.row_slots == (0, -1)
        assert batch.max_ranks("layers.0") == ()
    bank.check_integrity()


def test_memory_is_by_true_rank_and_by_layers_touched():
    target = ExpertsTarget(name="e", num_experts=32, hidden_size=64, intermediate_size=32)
    targets = ModelTargets(
        model_type="tiny", experts={f"layers.{i}": replace(target, name=f"layers.{i}") for i in range(8)}
    )
    layout = BankLayout(targets, dtype=torch.bfloat16, page_bytes=4096)
    bank = AdapterBank(layout, capacity_bytes=16 << 20, device="cpu")

    def adapter(rank: int, layers: int) -> AdapterWeights:
        def draw(rows: int, row_len: int) -> torch.Tensor:
            return torch.randn(32, rows, row_len).bfloat16()

        lora = ExpertsLoRA(
            expert_ids=tuple(range(32)),
            a13=draw(2 * rank, 64),
            b_gate=draw(rank, 32),
            b_up=draw(rank, 32),
            up_lane=rank,
            a2=draw(rank, 32),
            b2=draw(rank, 64),
        )
        return AdapterWeights(experts={f"layers.{i}": lora for i in range(layers)})

    infos = {}
    for rank, layers in [(4, 8), (16, 8), (16, 1)]:
        bank.load(f"{rank}x{layers}", adapter(rank, layers))
        infos[rank, layers] = bank.info(f"{rank}x{layers}")
    row_bytes = 32 * (2 * 64 + 2 * 32 + 32 + 64) * 2  # per rank and layer
    for (rank, layers), info in infos.items():
        assert info.num_bytes == rank * layers * row_bytes
        assert info.num_pages * layout.page_bytes - info.num_bytes < layout.page_bytes
    assert infos[16, 8].num_pages == 4 * infos[4, 8].num_pages == 8 * infos[16, 1].num_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_load_evict_and_restore(dtype: torch.dtype):
    rng = random.Random(3)
    bank = make_bank(dtype, max_slots=30, pages=400)
    loaded = {f"a{i}": random_weights(rng, dtype=dtype) for i in range(20)}
    for name, weights in loaded.items():
        bank.load(name, weights)
    for name in sorted(loaded, key=lambda _: rng.random()):
        bank.evict(name)
        bank.evict(name)
    assert bank.pool.num_free == bank.pool.num_pages
    assert bank.pool.data.isnan().all()
    bank.check_integrity()
    for name in sorted(loaded, key=lambda _: rng.random()):
        bank.ensure_resident([name])
    for name, weights in loaded.items():
        assert_content(bank, bank.get(name), weights)
    bank.check_integrity()


def test_saved_parameters_keep_shape_dtype_and_every_bit():
    bank = make_bank(torch.bfloat16)
    nan_with_payload = torch.tensor([0x7FC12345] * 5, dtype=torch.int32).view(torch.float32)
    saved = {
        "norm": {"weight": torch.randn(HIDDEN).bfloat16()},
        "router": {"weight": torch.randn(5, HIDDEN), "bias": nan_with_payload, "calls": torch.tensor(2**53 + 1)},
        "conv": {"weight": torch.randn(3, 2, 4).bfloat16().permute(2, 1, 0), "mask": torch.tensor([True, False, True])},
        "empty": {"weight": torch.empty(0, HIDDEN)},
    }
    handle = bank.load("full", AdapterWeights(saved=saved))
    for module, params in saved.items():
        for param, tensor in params.items():
            stored = bank.saved(handle, module, param)
            assert stored is not None
            assert same_bits(stored, tensor)
    assert bank.saved(bank.load("none", NOTHING), "norm", "weight") is None
    weight = bank.saved(handle, "norm", "weight")
    assert weight is not None
    assert weight.untyped_storage().data_ptr() == bank.pool.data.untyped_storage().data_ptr()


def test_factors_are_views_where_pages_follow_each_other():
    bank = make_bank(pages=8)
    weights = three_pages_of_router_rows(bank)
    handle = bank.load("whole", weights)
    a = bank.factor(handle, "router", LinearFactor.A)
    assert a is not None
    assert a.untyped_storage().data_ptr() == bank.pool.data.untyped_storage().data_ptr()
    assert bank.factor(handle.slot, "router", LinearFactor.A) is a
    assert_content(bank, handle, weights)


def test_factors_on_scattered_pages_are_gathered():
    bank = make_bank(pages=10, max_slots=16)
    for index in range(10):
        bank.load(f"{index}", pages_weights(bank, 1))
    for index in range(0, 10, 2):
        bank.unload(f"{index}")
    weights = three_pages_of_router_rows(bank)
    handle = bank.load("scattered", weights)
    assert bank.tables.page_table[handle.slot, :5].tolist() == [0, 2, 4, 6, 8]
    assert_content(bank, handle, weights)
    a = bank.factor(handle, "router", LinearFactor.A)
    assert a is not None
    assert a.untyped_storage().data_ptr() != bank.pool.data.untyped_storage().data_ptr()
    bank.check_integrity()


def three_pages_of_router_rows(bank: AdapterBank) -> AdapterWeights:
    """An A of exactly three pages, whose rows fill them, and a B of two, whose rows of 5 leave gaps."""
    rank = 3 * bank.layout.page_elems // HIDDEN
    return AdapterWeights(linears={"router": LinearLoRA(a=torch.randn(rank, HIDDEN), b=torch.randn(rank, 5))})


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_non_empty_string(name: object):
    with pytest.raises(AdapterNameError, match="non-empty string"):
        make_bank().load(name, NOTHING)  # type: ignore[arg-type]


def test_names_are_unique_and_unknown_ones_are_told_what_is_loaded():
    bank = make_bank()
    bank.load("a", linear_weights(1), source="somewhere")
    bank.load("b", NOTHING)
    with pytest.raises(AdapterNameError, match="'a' is already loaded"):
        bank.load("a", NOTHING)
    for call in (bank.unload, bank.evict, bank.pin, bank.unpin, bank.get, bank.info):
        with pytest.raises(UnknownAdapterError, match="no adapter 'c' is loaded; loaded: 'a', 'b'"):
            call("c")
    with pytest.raises(UnknownAdapterError):
        bank.acquire(["a", "c"])
    assert not bank.get("a").in_use
    assert bank.names() == ("a", "b")
    assert bank.info("a").source == "somewhere"
    assert bank.info("a").ranks == {"q": 1}


def experts_lora(**changes: object) -> AdapterWeights:
    lora = ExpertsLoRA(
        expert_ids=(1, 3),
        a13=torch.ones(2, 4, HIDDEN),
        b_gate=torch.ones(2, 2, 12),
        b_up=torch.ones(2, 2, 12),
        up_lane=2,
        a2=torch.ones(2, 1, 12),
        b2=torch.ones(2, 1, HIDDEN),
    )
    return AdapterWeights(experts={"layers.0": replace(lora, **changes)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            experts_lora(a13=torch.ones(3, 4, HIDDEN)),
            AdapterTensorError,
            r"layers.0 a13: shape \[3, 4, 8\], expected \[2 or 1",
        ),
        (experts_lora(b2=torch.ones(2, 1, 12)), AdapterTensorError, r"b2: shape .*, expected \[2 or 1, rank, 8\]"),
        (experts_lora(b_up=torch.ones(2, 3, 12)), AdapterTensorError, "b_up: reads lanes 2 to 5, a13 has 4"),
        (experts_lora(up_lane=-1), AdapterTensorError, "b_up: reads lanes -1"),
        (experts_lora(a2=None), AdapterTensorError, "a2 and b2 come together"),
        (experts_lora(a13=None), AdapterTensorError, "a13 needs b_gate or b_up"),
        (experts_lora(b_gate=None, b_up=None), AdapterTensorError, "a13 needs b_gate or b_up"),
        (experts_lora(b2=torch.ones(2, 2, HIDDEN)), AdapterTensorError, "a2 has rank 1, b2 has rank 2"),
        (experts_lora(a2=torch.ones(2, 0, 12)), AdapterTensorError, "a2: rank 0"),
        (experts_lora(a2=torch.ones(2, 1, 12).half()), AdapterTensorError, "float16, expected torch.float32"),
        (experts_lora(expert_ids=()), AdapterTensorError, "no expert ids"),
        (experts_lora(expert_ids=(3, 1)), AdapterTensorError, "not strictly ascending"),
        (experts_lora(expert_ids=(1, 5)), AdapterMismatchError, "expert ids 1..5, the base has 5"),
        (
            AdapterWeights(
                experts={
                    "layers.1": ExpertsLoRA(expert_ids=(0,), a13=torch.ones(1, 2, HIDDEN), b_gate=torch.ones(1, 2, 6))
                }
            ),
            AdapterMismatchError,
            "no gate",
        ),
        (AdapterWeights(experts={"q": ExpertsLoRA(expert_ids=())}), AdapterMismatchError, "no experts module 'q'"),
        (
            AdapterWeights(linears={"q": LinearLoRA(a=torch.ones(2, HIDDEN), b=torch.ones(3, 20))}),
            AdapterTensorError,
            r"q b: shape \[3, 20\], expected \[2, 20\]",
        ),
        (
            AdapterWeights(linears={"q": LinearLoRA(a=torch.ones(2, HIDDEN), b=torch.ones(2, 20), gain=torch.ones(1))}),
            AdapterTensorError,
            r"q gain: shape \[1\], expected \[20\]",
        ),
        (
            AdapterWeights(linears={"k": LinearLoRA(a=torch.ones(2, HIDDEN), b=torch.ones(2, 20))}),
            AdapterMismatchError,
            "no linear map 'k'",
        ),
        (AdapterWeights(saved={"norm": {"bias": torch.ones(HIDDEN)}}), AdapterMismatchError, "norm.bias"),
        (
            AdapterWeights(saved={"norm": {"weight": torch.ones(HIDDEN)}}),
            AdapterTensorError,
            "float32, expected .*bfloat16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_changes(
    weights: AdapterWeights, error: type[Exception], message: str
):
    bank = make_bank()
    kept = linear_weights(2)
    bank.load("kept", kept)
    with pytest.raises(error, match=message):
        bank.load("wrong", weights)
    assert bank.names() == ("kept",)
    assert_content(bank, bank.get("kept"), kept)
    bank.check_integrity()


def test_unknown_modules_have_no_tables():
    bank = make_bank()
    for call in (bank.experts_tables, bank.linear_tables):
        with pytest.raises(AdapterMismatchError):
            call("embed")
    handle = bank.load("a", NOTHING)
    with pytest.raises(AdapterMismatchError, match="'embed' has no factor"):
        bank.factor(handle, "embed", LinearFactor.GAIN)
    with pytest.raises(AdapterMismatchError, match="no module 'k'"):
        bank.factor(handle, "k", LinearFactor.A)


def test_tensors_of_what_is_not_resident_are_refused():
    bank = make_bank()
    handle = bank.load("a", linear_weights(1))
    bank.evict("a")
    for adapter in (handle, 0, -1, 99):
        with pytest.raises(AdapterError, match="is not resident"):
            bank.factor(adapter, "q", LinearFactor.A)


def test_an_adapter_larger_than_the_pool_says_so():
    bank = make_bank(pages=3)
    page = bank.layout.page_bytes
    with pytest.raises(
        AdapterMemoryError, match=rf"needs {4 * page} bytes \(4 pages\).*has {3 * page} bytes \(3 pages\)"
    ):
        bank.load("huge", pages_weights(bank, 4))
    assert bank.names() == ()


def test_least_recently_used_adapters_leave_and_come_back():
    bank = make_bank(pages=3)
    for name in "abc":
        bank.load(name, pages_weights(bank, 1))
    bank.acquire(["a"]).release()
    bank.load("d", pages_weights(bank, 1))
    assert [name for name in bank.names() if bank.get(name).resident] == ["a", "c", "d"]
    with bank.acquire(["b", None, "b"]) as batch:
        assert batch.row_slots == (bank.get("b").slot, -1, bank.get("b").slot)
    assert [name for name in bank.names() if bank.get(name).resident] == ["a", "b", "d"]
    bank.check_integrity()


def test_slots_are_room_too():
    bank = make_bank(max_slots=2)
    for name in "abc":
        bank.load(name, NOTHING)
    assert [bank.get(name).slot for name in "abc"] == [-1, 1, 0]
    message = r"'a' need 0 bytes .* 1 slots; .* 0 of 2 slots; .*'c' .*in use.*'b' .*wanted"
    with bank.acquire(["c"]), pytest.raises(AdapterMemoryError, match=message):
        bank.acquire(["a", "b"])
    assert not any(bank.get(name).in_use for name in "abc")
    bank.check_integrity()


def test_an_adapter_whose_leaving_does_not_help_stays():
    bank = make_bank(pages=4)
    bank.load("small", pages_weights(bank, 1))
    bank.load("large", pages_weights(bank, 3))
    bank.load("new", pages_weights(bank, 3))
    assert bank.get("small").resident
    assert not bank.get("large").resident


def test_pinned_and_used_adapters_stay_and_are_named():
    bank = make_bank(pages=4)
    bank.load("pinned", pages_weights(bank, 1))
    bank.load("used", pages_weights(bank, 1))
    bank.load("idle", pages_weights(bank, 2))
    bank.pin("pinned")
    page = bank.layout.page_bytes
    with bank.acquire(["used"]):
        with pytest.raises(AdapterMemoryError) as caught:
            bank.load("new", pages_weights(bank, 3))
        assert f"'new' need {3 * page} bytes (3 pages)" in str(caught.value)
        assert f"free: 0 of {4 * page} bytes" in str(caught.value)
        assert f"'pinned' {page} bytes (pinned); 'used' {page} bytes (in use)" in str(caught.value)
        assert bank.get("idle").resident
        for call in (bank.evict, bank.unload):
            with pytest.raises(AdapterInUseError, match="'used' serves a batch"):
                call("used")
    with pytest.raises(AdapterInUseError, match="'pinned' is pinned"):
        bank.evict("pinned")
    bank.unpin("pinned")
    bank.evict("pinned")
    bank.pin("pinned")
    assert bank.get("pinned").resident
    bank.unload("pinned")
    bank.check_integrity()


def test_a_batch_of_more_than_fits_leaks_nothing():
    bank = make_bank(pages=3)
    for name in "ab":
        bank.load(name, pages_weights(bank, 2))
    with pytest.raises(AdapterMemoryError, match=r"'a' need .*'b' .*wanted by this batch"):
        bank.acquire(["a", "b"])
    assert not any(bank.get(name).in_use for name in "ab")
    bank.unload("a")
    bank.unload("b")
    assert bank.pool.num_free == 3


def test_a_failed_copy_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    bank = make_bank(pages=4)
    weights = pages_weights(bank, 2)

    def fail(*_: object) -> None:
        raise RuntimeError("no such device")

    with monkeypatch.context() as patch:
        patch.setattr(bank.tables, "fill", fail)
        with pytest.raises(RuntimeError, match="no such device"):
            bank.load("a", weights)
    assert bank.names() == ()
    bank.check_integrity()
    assert_content(bank, bank.load("a", weights), weights)


def test_batches_know_their_rows_and_ranks():
    bank = make_bank()
    rows = [None, None]
    with bank.acquire(rows) as base:
        assert not base.has_adapters
        assert base.row_slots == (-1, -1)
    with bank.acquire([]) as empty:
        assert empty.row_slots == ()
    bank.load("a", experts_lora())
    bank.load("b", linear_weights(3))
    bank.load("c", linear_weights(5))
    with bank.acquire(["b", None, "a", "b", "c"]) as batch:
        assert [handle.name for handle in batch.handles] == ["b", "a", "c"]
        assert batch.row_slots == (1, -1, 0, 1, 2)
        assert batch.max_ranks("layers.0") == (4, 2, 2, 1, 1, 0, 0, 0)
        assert batch.max_ranks("q") == (5, 5, 0)
        assert batch.max_ranks("layers.1") == ()


def test_two_batches_hold_one_adapter_until_both_are_released():
    bank = make_bank()
    bank.load("a", linear_weights(1))
    first, second = bank.acquire(["a"]), bank.acquire(["a", "a"])
    assert bank.get("a").users == 2
    first.release()
    first.release()
    assert bank.info("a").in_use
    with pytest.raises(AdapterInUseError):
        bank.unload("a")
    with pytest.raises(ZeroDivisionError), second:
        raise ZeroDivisionError
    bank.unload("a")
    bank.check_integrity()


def test_addresses_never_change():
    rng = random.Random(5)
    bank = make_bank(pages=24)
    weights = [linear_weights(rank) for rank in (1, 2, 5)] + [random_weights(rng) for _ in range(5)]
    before = addresses(bank)
    for step in range(2000):
        name = f"a{rng.randrange(12)}"
        if name not in bank.names():
            bank.load(name, rng.choice(weights))
        elif step % 3 == 0:
            bank.unload(name)
        elif step % 3 == 1:
            bank.evict(name)
        else:
            bank.acquire([name]).release()
    assert addresses(bank) == before
    assert bank.tables.factors.shape == (4, bank.layout.num_entries, NUM_FIELDS)
    bank.check_integrity()


def test_the_bank_lives_in_and_out_of_inference_mode():
    with torch.inference_mode():
        bank = make_bank(pages=3)
        bank.load("a", pages_weights(bank, 2))
    weights = pages_weights(bank, 2)
    handle = bank.load("b", weights)
    assert_content(bank, handle, weights)
    bank.ensure_resident(["a"])
    bank.check_integrity()


def test_threads_load_while_others_serve():
    bank = make_bank(pages=48, max_slots=6)
    for value in (1, 2, 3):
        bank.load(f"{value}", linear_weights(value, fill=float(value)))
    errors: list[BaseException] = []
    stop = threading.Event()

    def serve(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                names = rng.choices(["1", "2", "3", None], k=3)
                with bank.acquire(names) as batch:
                    for name, slot in zip(batch.names, batch.row_slots, strict=True):
                        if name is not None:
                            a = bank.factor(slot, "q", LinearFactor.A)
                            assert a is not None
                            assert a.shape[0] == int(name)
                            assert a.eq(float(name)).all()
        except BaseException as error:
            errors.append(error)

    servers = [threading.Thread(target=serve, args=(seed,)) for seed in (1, 2)]
    for server in servers:
        server.start()
    refused = 0
    try:
        for step in range(300):
            try:
                bank.load("passing", linear_weights(7, fill=7.0))
                bank.evict(f"{step % 3 + 1}")
            except (AdapterInUseError, AdapterMemoryError):
                refused += 1
            bank.check_integrity()
            if "passing" in bank.names():
                bank.unload("passing")
    finally:
        stop.set()
        for server in servers:
            server.join()
    assert errors == []
    assert refused < 300
    assert not any(bank.get(name).in_use for name in bank.names())
    bank.check_integrity()


@pytest.mark.gpu
def test_cuda_bank_never_waits_for_the_device_and_keeps_every_bit():
    rng = random.Random(7)
    bank = make_bank(torch.bfloat16, pages=40, max_slots=8, device="cuda")
    loaded = {f"a{i}": random_weights(rng, dtype=torch.bfloat16) for i in range(20)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, weights in loaded.items():
            bank.load(name, weights)
        for _ in range(200):
            bank.acquire(rng.choices([*loaded, None], k=2)).release()
        for name in rng.sample(sorted(loaded), 5):
            bank.unload(name)
            bank.load(name, loaded[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bank.check_integrity()
    for name, weights in loaded.items():
        image = bank.get(name).image
        assert image is not None
        assert image.is_pinned() or image.numel() == 0
        with bank.acquire([name]) as batch:
            assert_content(bank, batch.handles[0], weights)
    bank.check_integrity()


@pytest.mark.gpu
def test_a_captured_graph_sees_adapters_come_and_go():
    bank = make_bank(device="cuda")
    tables = bank.linear_tables("q")
    rows = bank.pool.data.view(-1, HIDDEN)
    rows_per_page = tables.page_elems // HIDDEN
    assert tables.page_elems % HIDDEN == 0

    def first_row_of_slot_0() -> torch.Tensor:
        fields = tables.factors[0, LinearFactor.A].long()
        page = tables.page_table[0].index_select(0, fields[Field.FIRST_PAGE, None]).long()
        row = rows.index_select(0, page * rows_per_page + fields[Field.OFFSET] // HIDDEN)[0]
        return torch.where(fields[Field.RANK] > 0, row, 0.0)

    bank.load("warm", linear_weights(1))
    first_row_of_slot_0()
    bank.unload("warm")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = first_row_of_slot_0()
    for rank in (1, 5, 3):
        weights = linear_weights(rank)
        bank.load("a", weights)
        graph.replay()
        assert torch.equal(seen.cpu(), weights.linears["q"].a[0])
        bank.unload("a")
        graph.replay()
        assert seen.eq(0).all()


def test_integrity_check_sees_damage():
    bank = make_bank()
    handle = bank.load("a", experts_lora())
    damages = (
        (bank.tables.factors[handle.slot, 0, Field.RANK], "descriptors differ"),
        (bank.tables.expert_index[handle.slot, 0], "expert positions differ"),
        (bank.tables.page_table[handle.slot, 0], "page table"),
        (bank.tables.factors[handle.slot + 1, 0, Field.RANK], "is free, its table rows are not"),
    )
    for cell, message in damages:
        intact = cell.clone()
        cell += 1
        with pytest.raises(MoegraftError, match=message):
            bank.check_integrity()
        cell.copy_(intact)
    bank.check_integrity()
    bank.pool.allocate(1)
    with pytest.raises(MoegraftError, match="neither free nor owned"):
        bank.check_integrity()


class TestForSchedulers:
    """What can be held, what it costs, and versions."""

    def test_can_hold_is_what_acquire_does(self) -> None:
        bank = make_bank(pages=4, max_slots=3)
        for name in "abc":
            bank.load(name, pages_weights(bank, 2))
        before = bank.infos()
        assert bank.can_hold(["a", None, "b"]) and not bank.can_hold(["a", "b", "c"])
        assert bank.infos() == before
        with pytest.raises(UnknownAdapterError, match="no adapter 'x' is loaded"):
            bank.can_hold(["x"])
        with bank.acquire(["a"]):
            assert bank.can_hold(["c"]) and not bank.can_hold(["b", "c"])
            resident = [name for name, info in bank.infos().items() if info.resident]
            with pytest.raises(AdapterMemoryError):
                bank.acquire(["b", "c"])
            # It failed fast: nothing was evicted for it.
            assert [name for name, info in bank.infos().items() if info.resident] == resident

    def test_memory_says_what_is_free_and_what_would_make_room(self) -> None:
        bank = make_bank(pages=8, max_slots=3)
        for name, pages in (("a", 1), ("b", 2), ("c", 3)):
            bank.load(name, pages_weights(bank, pages))
        bank.pin("a")
        with bank.acquire(["b"]):
            memory = bank.memory()
        assert (memory.num_pages, memory.free_pages, memory.evictable_pages) == (8, 2, 3)
        assert (memory.num_slots, memory.free_slots, memory.evictable_slots) == (3, 0, 1)
        assert memory.page_bytes == bank.layout.page_bytes
        assert bank.memory().evictable_pages == 5

    def test_prefetch_makes_room_and_refuses_without_a_change(self) -> None:
        bank = make_bank(pages=4, max_slots=4)
        weights = {name: pages_weights(bank, 2) for name in "abc"}
        for name in "abc":
            bank.load(name, weights[name], resident=name != "c")
        assert not bank.info("c").resident
        with bank.acquire(["a"]):
            assert bank.prefetch(["c"])
            assert {name for name, info in bank.infos().items() if info.resident} == {"a", "c"}
            before = bank.infos()
            assert not bank.prefetch(["b", "c"])
            assert bank.infos() == before
        with bank.acquire(["c"]):
            assert_content(bank, bank.get("c"), weights["c"])
        bank.check_integrity()

    def test_uids_are_never_given_again(self) -> None:
        bank = make_bank()
        seen = []
        for _ in range(3):
            seen.append(bank.load("a", linear_weights(1)).uid)
            bank.unload("a")
        assert len(set(seen)) == 3 and seen == sorted(seen)
        with pytest.raises(AdapterTensorError):
            bank.load("b", AdapterWeights(linears={"q": _broken()}))
        assert bank.load("b", linear_weights(1)).uid == seen[-1] + 1 == bank.info("b").uid


def _broken() -> LinearLoRA:
    return LinearLoRA(a=torch.zeros(0, 8), b=torch.zeros(0, 20))


def test_a_built_adapter_cannot_be_named_before_it_is_installed():
    bank = make_bank(pages=4)
    new = bank.build("a", pages_weights(bank, 2))
    assert bank.names() == () and bank.pool.num_free == 2
    assert [handle.name for handle in bank.handles(coming=True)] == ["a"]
    bank.check_integrity()
    bank.discard(new)
    bank.discard(new)
    assert bank.pool.num_free == 4
    new = bank.build("a", pages_weights(bank, 2))
    assert bank.install(new) is bank.install(new) is bank.get("a")
    late = bank.build("b", pages_weights(bank, 1))
    bank.load("b", pages_weights(bank, 1))
    with pytest.raises(AdapterNameError, match="'b' is already loaded"):
        bank.install(late)
    assert bank.pool.num_free == 1
    bank.check_integrity()


def test_a_built_adapter_and_a_batch_that_are_lost_give_back_what_they_held():
    """As where an interrupt came before the caller had them."""
    bank = make_bank(pages=4)
    bank.build("lost", pages_weights(bank, 2))
    bank.check_integrity()
    assert bank.pool.num_free == 4
    bank.load("a", pages_weights(bank, 2))
    bank.acquire(["a"])
    assert not bank.get("a").in_use
    bank.unload("a")
