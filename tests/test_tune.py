"""``moegraft tune``: the search with a fake stopwatch, its tables, the timer in Triton's interpreter, the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.families import build
from typer.testing import CliRunner, Result

from moegraft.cli import tune as tune_module
from moegraft.cli.app import app
from moegraft.cli.console import CommandError
from moegraft.cli.tune import make_request, parse_layer, run_tune, state_path
from moegraft.core.config import Activation, ActivationKind, MoEConfig
from moegraft.kernels.moe_forward import host
from moegraft.tuner.compiler import TileCompiler
from moegraft.tuner.search import (
    BLOCK_MS,
    MAX_DEFAULT_RATIO,
    MIN_GAIN,
    DeviceLostError,
    Journal,
    Measure,
    TileSearch,
    Trial,
    Verdict,
    WrongResultError,
    block_ms,
    candidates,
)
from moegraft.tuner.timer import TileTimer, TunedLayer
from moegraft.tuning import table
from moegraft.tuning.heuristic import H200, heuristic_tiles, tuning_device
from moegraft.tuning.table import TileTableError, choose_tiles, forget_tables, read_table, use_tables, write_table
from moegraft.tuning.tiles import MoETiles, TuningShape

SHAPE = TuningShape(num_tokens=8, num_experts=16, top_k=4, hidden_size=256, intermediate_size=192)
SHAPES = [replace(SHAPE, num_tokens=num_tokens) for num_tokens in (1, 8, 512)]
LAYER = "16,256,192,4"
DEVICE_NAME = "Some GPU"


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the user's, and a device that no shipped table is for."""
    folder = tmp_path / "user_tables"
    folder.mkdir()
    for module in (table, tune_module):
        monkeypatch.setattr(module, "USER_TABLES", folder)
    monkeypatch.setattr(table, "tuning_device", lambda: replace(H200, name=DEVICE_NAME))
    forget_tables()
    yield folder
    use_tables()


def cost(shape: TuningShape, tiles: MoETiles) -> float:
    """Best: block_m 32, GEMM 13 with 32 columns, GEMM 2 through pointers. Wide tiles do not fit, and what would be
    fastest is wrong."""
    if tiles.gemm13.block_n > 64:
        raise RuntimeError("out of resources")
    if tiles.gemm2.num_stages == 2:
        raise WrongResultError("relative error 1.0")
    return 100.0 + 10 * (tiles.block_m != 32) + 5 * (tiles.gemm13.block_n != 32) + 2 * tiles.gemm2.tma


class FakeTimer:
    """``cost``, counted; at trial number ``stop_at`` it raises ``error``."""

    def __init__(self, stop_at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.stop_at, self.error = stop_at, error
        self.calls: list[tuple[TuningShape, MoETiles]] = []

    def __call__(self, shape: TuningShape, tiles: MoETiles) -> float:
        if len(self.calls) == self.stop_at:
            raise self.error("stopped")
        self.calls.append((shape, tiles))
        return cost(shape, tiles)


def searched(measure: Measure, journal: Path, shapes: list[TuningShape] = SHAPES) -> TileSearch:
    search = TileSearch(shapes, measure, Journal(journal))
    assert search.run()
    return search


# The search


@pytest.mark.parametrize("num_tokens", [1, 8, 64, 512, 4096])
def test_candidates_start_with_the_heuristic_and_differ(num_tokens: int) -> None:
    shape = replace(SHAPE, num_tokens=num_tokens)
    found = candidates(shape)
    assert found[0] == heuristic_tiles(shape)
    assert len(set(found)) == len(found)
    assert found == candidates(shape)
    assert {tiles.block_m for tiles in found} == set(block_ms(shape)) <= set(BLOCK_MS)
    for tiles in found:
        assert (tiles.shrink13, tiles.shrink2, tiles.tile_m) == (found[0].shrink13, found[0].shrink2, found[0].tile_m)
        for tile in (tiles.gemm13, tiles.gemm2):
            assert min(tile.block_n, tile.block_k) >= 16 and tile.num_stages >= 2 and tile.num_warps in (4, 8)


def test_the_best_of_either_gemm_is_joined_and_wins(tmp_path: Path) -> None:
    search = searched(cost, tmp_path / "journal", [SHAPE])
    (entry,) = search.entries()
    assert (entry["block_m"], entry["gemm13"]["block_n"], entry["gemm2"]["tma"]) == (32, 32, False)
    assert entry["us"] == 100.0
    assert entry["heuristic_us"] == cost(SHAPE, heuristic_tiles(SHAPE))


def test_wrong_and_failing_tiles_are_counted_and_never_win(tmp_path: Path) -> None:
    default = heuristic_tiles(SHAPE)

    def measure(shape: TuningShape, tiles: MoETiles) -> float:
        if tiles.gemm2.num_stages != default.gemm2.num_stages:
            raise WrongResultError
        if tiles.gemm13.tma != default.gemm13.tma:
            raise ValueError("does not compile")
        return 100.0 if tiles == default else 98.0 + tiles.gemm2.num_stages / 10

    search = searched(measure, tmp_path / "journal", [SHAPE])
    trials = search.trials[SHAPE].values()
    wrong = [trial for trial in trials if trial.tiles.gemm2.num_stages != default.gemm2.num_stages]
    failed = [t for t in trials if t not in wrong and t.tiles.gemm13.tma != default.gemm13.tma]
    assert wrong and failed
    assert {trial.verdict for trial in wrong} == {Verdict.WRONG}
    assert {trial.verdict for trial in failed} == {Verdict.FAILED}
    assert search.counts == {
        Verdict.WRONG: len(wrong),
        Verdict.FAILED: len(failed),
        Verdict.MEASURED: len(trials) - len(wrong) - len(failed),
    }
    (entry,) = search.entries()
    assert entry["gemm2"]["num_stages"] == default.gemm2.num_stages
    assert entry["gemm13"]["tma"] == default.gemm13.tma


def test_a_gain_within_noise_keeps_the_heuristic(tmp_path: Path) -> None:
    default = heuristic_tiles(SHAPE)

    def measure(shape: TuningShape, tiles: MoETiles) -> float:
        return 100.0 if tiles == default else 100.0 * (1 - MIN_GAIN / 2)

    (entry,) = searched(measure, tmp_path / "journal", [SHAPE]).entries()
    assert (entry["us"], entry["block_m"], entry["gemm13"]["block_n"]) == (
        100.0,
        default.block_m,
        default.gemm13.block_n,
    )


def test_where_the_heuristic_does_not_run_something_else_wins(tmp_path: Path) -> None:
    default = heuristic_tiles(SHAPE)

    def measure(shape: TuningShape, tiles: MoETiles) -> float:
        if tiles.gemm2.num_stages >= default.gemm2.num_stages:
            raise RuntimeError("out of resources")
        return 50.0

    (entry,) = searched(measure, tmp_path / "journal", [SHAPE]).entries()
    assert entry["gemm2"]["num_stages"] < default.gemm2.num_stages
    assert "heuristic_us" not in entry


def test_where_nothing_runs_there_is_no_entry(tmp_path: Path) -> None:
    def measure(shape: TuningShape, tiles: MoETiles) -> float:
        if shape.num_tokens == 8:
            raise RuntimeError("out of resources")
        return 1.0

    search = searched(measure, tmp_path / "journal")
    assert [entry["num_tokens"] for entry in search.entries()] == [1, 512]


def test_a_block_m_that_is_far_behind_is_not_searched(tmp_path: Path) -> None:
    def measure(shape: TuningShape, tiles: MoETiles) -> float:
        return 100.0 if tiles.block_m == 32 else 100.0 * MAX_DEFAULT_RATIO + 1

    (trials,) = searched(measure, tmp_path / "journal", [SHAPE]).trials.values()
    tried = Counter(tiles.block_m for tiles in trials)
    assert tried.keys() == set(block_ms(SHAPE))
    assert all((count > 1) == (block_m == 32) for block_m, count in tried.items())


def test_trials_are_prepared_once_and_before_they_are_measured(tmp_path: Path) -> None:
    prepared: list[tuple[TuningShape, MoETiles]] = []

    class Timer(FakeTimer):
        def __call__(self, shape: TuningShape, tiles: MoETiles) -> float:
            assert (shape, tiles) in prepared
            return super().__call__(shape, tiles)

    with pytest.raises(KeyboardInterrupt):
        TileSearch(SHAPES, Timer(20), Journal(tmp_path / "journal"), prepared.extend).run()
    prepared.clear()
    timer = Timer()
    assert TileSearch(SHAPES, timer, Journal(tmp_path / "journal"), prepared.extend).run()
    assert timer.calls == prepared


@pytest.mark.parametrize("stop_at", [0, 1, 5, 60])
def test_an_interrupted_search_repeats_no_trial(tmp_path: Path, stop_at: int) -> None:
    journal, whole = tmp_path / "journal", FakeTimer()
    expected = searched(whole, tmp_path / "whole").entries()
    first = FakeTimer(stop_at)
    with pytest.raises(KeyboardInterrupt):
        TileSearch(SHAPES, first, Journal(journal)).run()
    if journal.exists():
        with journal.open("a") as file:
            file.write('{"trial": "cut off')
    second, seen = FakeTimer(), list[Trial]()
    search = TileSearch(SHAPES, second, Journal(journal))
    assert search.run(on_trial=seen.append)
    assert first.calls + second.calls == whole.calls
    assert len(seen) == search.max_trials
    assert search.entries() == expected
    third = FakeTimer()
    assert searched(third, journal).entries() == expected
    assert third.calls == []


def test_trials_of_another_context_are_made_again(tmp_path: Path) -> None:
    TileSearch([SHAPE], FakeTimer(), Journal(tmp_path / "journal", "torch 1")).run()
    timer = FakeTimer()
    TileSearch([SHAPE], timer, Journal(tmp_path / "journal", "torch 2")).run()
    assert len(timer.calls) >= len(candidates(SHAPE))


def test_a_search_out_of_time_has_tried_every_shape(tmp_path: Path) -> None:
    timer = FakeTimer()
    search = TileSearch(SHAPES, timer, Journal(tmp_path / "journal"))
    assert not search.run(is_over=lambda: len(timer.calls) >= 3)
    assert [list(trials) for trials in search.trials.values()] == [[heuristic_tiles(shape)] for shape in SHAPES]


def test_a_lost_device_ends_the_search_and_its_trial_is_not_repeated(tmp_path: Path) -> None:
    search = TileSearch([SHAPE], FakeTimer(2, DeviceLostError), Journal(tmp_path / "journal"))
    with pytest.raises(DeviceLostError):
        search.run()
    assert len(search.trials[SHAPE]) == 2
    timer = FakeTimer()
    again = searched(timer, tmp_path / "journal", [SHAPE])
    third = candidates(SHAPE)[1]  # after the two defaults
    lost = again.trials[SHAPE][third]
    assert (lost.verdict, lost.us, lost.reason) == (Verdict.FAILED, math.inf, "DeviceLostError: stopped")
    assert third not in [tiles for _, tiles in timer.calls]


# Tables


def write(path: Path, shapes: list[TuningShape], journal: Path) -> list[dict[str, Any]]:
    entries = searched(cost, journal, shapes).entries()
    write_table(path, device=DEVICE_NAME, date="2026-11-24", versions={"torch": "2"}, shape=SHAPE, entries=entries)
    return entries


def test_a_table_survives_the_round_trip_and_is_looked_up(own_tables: Path, tmp_path: Path) -> None:
    entries = write(own_tables / "a.json", SHAPES, tmp_path / "journal")
    assert read_table(own_tables / "a.json")["entries"] == entries
    assert [path.name for path in own_tables.iterdir()] == ["a.json"]
    forget_tables()
    for shape in (SHAPE, replace(SHAPE, num_slots=8, rank13=128, rank2=64)):
        tiles, heuristic = choose_tiles(shape), heuristic_tiles(shape)
        assert (tiles.block_m, tiles.gemm13.block_n) == (32, 32) != (heuristic.block_m, heuristic.gemm13.block_n)
        assert tiles.gemm13.block_l == heuristic.gemm13.block_l
        assert (tiles.shrink13, tiles.shrink2) == (heuristic.shrink13, heuristic.shrink2)
    for shape in (replace(SHAPE, num_tokens=64), replace(SHAPE, hidden_size=512)):
        assert choose_tiles(shape) == heuristic_tiles(shape)


def test_entries_for_other_tokens_stay_in_the_file(own_tables: Path, tmp_path: Path) -> None:
    path = own_tables / "a.json"
    write(path, SHAPES[1:], tmp_path / "journal")
    write(path, SHAPES[:2], tmp_path / "journal")
    assert [entry["num_tokens"] for entry in read_table(path)["entries"]] == [1, 8, 512]


def test_given_folders_go_first_until_taken_back(own_tables: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    write(given / "a.json", [SHAPE], tmp_path / "journal")
    assert choose_tiles(SHAPE) == heuristic_tiles(SHAPE)
    use_tables(given)
    assert choose_tiles(SHAPE).block_m == 32
    use_tables()
    assert choose_tiles(SHAPE) == heuristic_tiles(SHAPE)


def test_folders_that_cannot_be_used_are_refused_and_change_nothing(tmp_path: Path) -> None:
    given, bad = tmp_path / "given", tmp_path / "bad"
    given.mkdir()
    bad.mkdir()
    write(given / "a.json", [SHAPE], tmp_path / "journal")
    use_tables(given)
    (bad / "b.json").write_text('{"device": "Some GPU"}')
    with pytest.raises(TileTableError, match=r"b\.json"):
        use_tables(bad)
    with pytest.raises(TileTableError, match="nowhere"):
        use_tables(tmp_path / "nowhere")
    assert choose_tiles(SHAPE).block_m == 32


# The timer, in Triton's interpreter


def tiny_layer(**changes: Any) -> TunedLayer:
    config = MoEConfig(num_experts=3, hidden_size=32, intermediate_size=24, top_k=2, dtype=torch.float32)
    return replace(TunedLayer(config=config, rank=3, num_adapters=2), **changes)


GPT_OSS = Activation(kind=ActivationKind.SWIGLU_OAI)
UNGATED = Activation(kind=ActivationKind.RELU2, gated=False)


@pytest.mark.parametrize(
    "layer",
    [
        tiny_layer(),
        tiny_layer(num_adapters=0),
        tiny_layer(config=replace(tiny_layer().config, activation=UNGATED)),
        tiny_layer(config=replace(tiny_layer().config, activation=GPT_OSS), is_transposed=True, is_interleaved=True),
    ],
    ids=["gated", "base alone", "ungated", "transposed"],
)
def test_the_timer_measures_calls_without_and_with_adapters(layer: TunedLayer) -> None:
    outs: list[torch.Tensor] = []

    def once(call: Any, limit: float) -> float:
        outs[:] = call()
        return 7.0

    timer = TileTimer(layer, device="cpu", time_call=once)
    shape = layer.shape(5)
    assert timer(shape, heuristic_tiles(shape)) == 7.0
    assert len(outs) == (2 if layer.num_adapters else 1)
    assert all(out.shape == (5, 32) and out.isfinite().all() and out.any() for out in outs)
    if layer.num_adapters:
        assert not torch.allclose(outs[0], outs[1], rtol=0.01)


@pytest.mark.parametrize("scale", [1.001, math.nan])
def test_the_timer_refuses_wrong_results(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    layer, real = tiny_layer(), host.fused_moe_lora

    def wrong_with_adapters(*args: Any, tiles: MoETiles, lora: Any, **options: Any) -> torch.Tensor:
        is_wrong = lora is not None and tiles.block_m == 32
        return real(*args, tiles=tiles, lora=lora, **options) * (scale if is_wrong else 1.0)

    monkeypatch.setattr(host, "fused_moe_lora", wrong_with_adapters)
    timer = TileTimer(layer, device="cpu", time_call=lambda call, limit: 7.0)
    shape = layer.shape(2)
    assert timer(shape, heuristic_tiles(shape)) == 7.0
    with pytest.raises(WrongResultError):
        timer(shape, replace(heuristic_tiles(shape), block_m=32))


def test_rows_that_no_program_writes_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, real = tiny_layer(num_adapters=0), host.fused_moe_lora

    def lazy(x_TD: torch.Tensor, *args: Any, tiles: MoETiles, **options: Any) -> torch.Tensor:
        return torch.empty_like(x_TD) if tiles.block_m == 32 else real(x_TD, *args, tiles=tiles, **options)

    monkeypatch.setattr(host, "fused_moe_lora", lazy)
    shape = layer.shape(2)
    with pytest.raises(WrongResultError):
        TileTimer(layer, device="cpu", time_call=lambda call, limit: 7.0)(
            shape, replace(heuristic_tiles(shape), block_m=32)
        )


@pytest.mark.gpu
def test_the_timer_runs_on_the_gpu() -> None:
    layer = tiny_layer(config=replace(tiny_layer().config, dtype=torch.bfloat16, hidden_size=128))
    shape = layer.shape(5)
    assert 0 < TileTimer(layer, device="cuda")(shape, heuristic_tiles(shape)) < 1e5


@pytest.mark.gpu
def test_kernels_are_compiled_side_by_side() -> None:
    layer = tiny_layer(config=replace(tiny_layer().config, dtype=torch.bfloat16, hidden_size=144))
    shape = layer.shape(5)
    timer, trials = TileTimer(layer, device="cuda"), [(shape, tiles) for tiles in candidates(shape)[:4]]
    timer(*trials[0])
    with TileCompiler(2) as compiler:
        compiler.compile(layer, trials)
    compiled: list[str] = []
    triton = pytest.importorskip("triton", reason="needs triton")
    with patch.object(
        triton.knobs.compilation,
        "listener",
        lambda *, src, cache_hit, **_: compiled.extend([src.name] * (not cache_hit)),
    ):
        for trial in trials:
            assert timer(*trial) > 0
    assert compiled == []


@pytest.mark.gpu
def test_a_search_on_the_gpu_is_resumed_and_its_table_is_picked_up(
    own_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself: stopped by its deadline, then finished."""
    monkeypatch.setattr(table, "tuning_device", tuning_device)
    args = ("--shape", "8,256,128,2", "--tokens", "4,64", "--adapters", 2, "--rank", 8, "--json")
    (first,) = json.loads(run(*args, "--seconds", 0.001).stdout)
    assert not first["is_complete"]
    (result,) = json.loads(run(*args).stdout)
    assert result["is_complete"] and result["wrong"] == 0 and result["measured"] >= 20
    (entry, _) = result["entries"]
    assert 0 < entry["us"] <= entry["heuristic_us"]
    (again,) = json.loads(run(*args).stdout)
    assert again == result
    shape = replace(SHAPE, num_tokens=4, num_experts=8, top_k=2, hidden_size=256, intermediate_size=128)
    best = read_table(Path(result["table"]))["entries"][0]
    assert choose_tiles(shape).gemm13.block_n == best["gemm13"]["block_n"]


# The command


def request(output: Path | None = None, *, shapes: tuple[str, ...] = (LAYER,), tokens: str = "1,8") -> Any:
    return make_request(shapes=shapes, model=None, tokens=tokens, rank=4, num_adapters=2, output=output, seconds=None)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, args)])


def test_tune_writes_a_table_that_is_picked_up(own_tables: Path) -> None:
    (result,) = run_tune(request(), DEVICE_NAME, lambda layer: cost)
    assert result.is_complete and result.table == own_tables / f"some-gpu-{LAYER.replace(',', '-')}.json"
    assert result.wrong > 0 < result.failed
    assert [entry.num_tokens for entry in result.entries] == [1, 8]
    assert {"torch", "triton", "moegraft"} == read_table(result.table)["versions"].keys()
    assert choose_tiles(SHAPE).block_m == 32
    timer = FakeTimer()
    (again,) = run_tune(request(tokens="1,8,16"), DEVICE_NAME, lambda layer: timer)
    assert {shape.num_tokens for shape, _ in timer.calls} == {16}
    assert again.entries[:2] == result.entries


def test_tune_keeps_what_was_done_at_ctrl_c(tmp_path: Path) -> None:
    output = tmp_path / "new" / "a.json"
    (result,) = run_tune(request(output), DEVICE_NAME, lambda layer: FakeTimer(20))
    assert result.is_interrupted and not result.is_complete
    assert (result.table, result.measured + result.wrong + result.failed) == (output, 20)
    assert len(state_path(output).read_text().splitlines()) == 20
    assert [entry["num_tokens"] for entry in read_table(output)["entries"]] == [1, 8]


def test_tune_keeps_what_was_done_before_the_device_was_lost(tmp_path: Path) -> None:
    with pytest.raises(DeviceLostError):
        run_tune(request(tmp_path / "a.json"), DEVICE_NAME, lambda layer: FakeTimer(20, DeviceLostError))
    assert len(read_table(tmp_path / "a.json")["entries"]) == 2


@pytest.mark.parametrize("text", ["a note", "[]", '{"device": "Other GPU", "shape": {}, "entries": []}'])
def test_tune_leaves_a_file_that_is_no_table_of_the_layer_alone(tmp_path: Path, text: str) -> None:
    output = tmp_path / "a.json"
    output.write_text(text)
    with pytest.raises(TileTableError, match=r"a\.json"):
        run_tune(request(output), DEVICE_NAME, lambda layer: cost)
    assert output.read_text() == text


def test_tune_refuses_a_place_that_cannot_be_written_before_it_measures(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timer = FakeTimer()
    with pytest.raises(CommandError, match="cannot be written"):
        run_tune(request(tmp_path / "file" / "a.json"), DEVICE_NAME, lambda layer: timer)
    assert timer.calls == []


def test_layers_of_a_model_are_found_once(tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.save_pretrained(tmp_path)
    (layer,) = tune_module.model_layers(tmp_path, rank=4, num_adapters=2)
    assert (layer.config.num_experts, layer.config.top_k) == (
        model.config.num_local_experts,
        model.config.num_experts_per_tok,
    )
    assert (layer.config.hidden_size, layer.config.intermediate_size) == (
        model.config.hidden_size,
        model.config.intermediate_size,
    )
    assert layer.is_transposed and layer.is_interleaved
    assert layer.config.activation.kind is ActivationKind.SWIGLU_OAI
    assert layer.config.dtype is torch.bfloat16


@pytest.mark.parametrize("text", ["", "1,2,3", "8,64,32,9", "8,64,-1,2", "8,64,0,2", "8,x,32,2", "8,64,32,2,1"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--shape"):
        parse_layer(text, rank=16, num_adapters=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--shape", "--model"]),
        (["--shape", LAYER, "--tokens", "1,,2"], ["--tokens", "1,,2"]),
        (["--shape", LAYER, "--output", "table.txt"], [".json"]),
        (["--shape", LAYER, "--shape", "8,256,192,4", "--output", "a.json"], ["8,256,192,4", "--output"]),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: list[str], words: list[str]) -> None:
    result = run(*options)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, own_tables: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--shape", LAYER)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == ["error: tiles are measured on a CUDA device, torch finds none"]
    assert list(own_tables.iterdir()) == []


@pytest.mark.parametrize(("stop_at", "exit_code"), [(-1, 0), (20, 130)])
def test_the_command_shows_what_it_found(monkeypatch: pytest.MonkeyPatch, stop_at: int, exit_code: int) -> None:
    monkeypatch.setattr(
        tune_module, "run_tune", lambda request: run_tune(request, DEVICE_NAME, lambda layer: FakeTimer(stop_at))
    )
    result = run("--shape", LAYER, "--tokens", "1,8")
    assert result.exit_code == exit_code, result.stderr
    assert all(word in result.stdout for word in (LAYER, "heuristic us", "wrong", "Table: "))
    assert ("Not finished" in result.stdout) == bool(exit_code)
    (found,) = json.loads(run("--shape", LAYER, "--tokens", "1,8", "--json").stdout)
    assert [entry["num_tokens"] for entry in found["entries"]] == [1, 8]


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    """A table of their layers would be one of unquantised layers, which nothing reads for them."""
    from support.checkpoints import write_checkpoint

    checkpoint = write_checkpoint("gptq", tmp_path)
    with pytest.raises(CommandError, match="is quantised: tables are for unquantised layers"):
        tune_module.model_layers(checkpoint.path, rank=8, num_adapters=2)
