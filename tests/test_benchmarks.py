"""Benchmarks: what floors count, which rows may be compared, and that the documents print the rows that lie beside."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYER = RESULTS / "layer-h100-2026-11-28"
PEERS = ("vllm-0.26.0", "sglang-0.5.23-tuned", "sglang-0.5.23-as-served", "sglang-0.5.23-cutedsl")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("grid_report")


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("grid_problem")


@pytest.fixture
def grid(problem: ModuleType) -> ModuleType:
    return importlib.import_module("moe_lora_grid")


RUN = {"device": "some GPU", "stopwatch": "a stopwatch", "date": "2026-01-01"}


def row(shape: str = "qwen3-30b", **changes: object) -> dict[str, object]:
    """1 TB and 1 TFLOP at 1 TB/s and 1 TFLOP/s: a floor of a second, with LoRA; half of it without."""
    cell = {"shape": shape, "tokens": 8, "slots": 8, "active_adapters": 8, "rank": 16}
    work = {"bytes": 1e12, "flops": 1e11, "base_bytes": 5e11, "base_flops": 1e11, "copy_tb_s": 1.0, "matmul_tflop_s": 1}
    return {"engine": "a peer 1.0", **RUN, **cell, **work, "base_us": 2e6, "lora_us": 3e6, **changes}


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("field", ["device", "stopwatch", "date"])
def test_rows_of_another_run_are_refused(report: ModuleType, field: str, tmp_path: Path) -> None:
    assert report.read_peers([write(tmp_path / "same.jsonl", row())], RUN).keys() == {"a peer 1.0"}
    cases = {
        "another": [row(**{field: "another"})],
        "does not say": [row(**{field: None})],
        "several runs": [row(), row(**{field: "another"})],
    }
    for reason, rows in cases.items():
        with pytest.raises(report.NotComparable, match=reason) as caught:
            report.read_peers([write(tmp_path / "rows.jsonl", *rows)], RUN)
        assert "rows.jsonl" in str(caught.value)
        assert field in str(caught.value)


def test_peers_say_their_name_and_have_rows(report: ModuleType, tmp_path: Path) -> None:
    for rows, reason in (([row(engine=None)], "engine"), ([], "no row")):
        with pytest.raises(report.NotComparable, match=reason):
            report.read_peers([write(tmp_path / "rows.jsonl", *rows)], RUN)


def test_ratios_are_of_the_cells_that_both_have(report: ModuleType) -> None:
    ours = [row(), row("mixtral"), row("mixtral", format="int4")]
    peer = [row(lora_us=6e6, base_us=1e6), row("mixtral"), row("gptoss20b"), row("dsv3-tp8 padded")]
    found = json.loads(json.dumps(report.summary(ours, {"a peer 1.0": peer, "none": [row("another")]})))
    assert found["against"]["a peer 1.0"] == {"on": 1.414, "on_worst": 1, "off": 0.707, "off_worst": 0.5, "cells": 2}
    assert found["against"]["none"] == {}
    assert found["on_over_floor"] == {"8": 3.0}
    assert found["off_over_floor"] == {"8": 4.0}
    assert found["on_over_off"] == {"8": 1.5}
    wrong = row()
    del wrong["lora_us"], wrong["base_us"]
    assert report.summary([wrong], {})["wrong_cells"] == 1


def test_rows_of_a_kit_are_stamped_and_wrong_ones_left_out(
    grid: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each engine by its name; a row with too large an error, or without one, is in no ratio."""
    facts = {"device": "a card", "stopwatch": "a stopwatch", "date": "2026-01-01"}
    monkeypatch.setattr(grid, "run_facts", lambda: {**facts, "commit": "none"})
    (tmp_path / "kit").mkdir()
    rows = [
        {"engine": "one 1.0", "lora_us": 2.0, "rel_err": 0.01, "base_rel_err": 0.01},
        {"engine": "two 1.0", "lora_us": 3.0, "rel_err": 0.01, "base_rel_err": 0.01},
        {"engine": "two 1.0", "lora_us": 3.0, "rel_err": 0.03, "base_rel_err": 0.01},
        {"engine": "two 1.0", "lora_us": 3.0, "rel_err": 0.01},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "kit" / "layer.sh").write_text(f"cat > $5 <<'ROWS'\n{lines}\nROWS\necho $1 $2 $3 $4 > $0.asked\n")
    argv = ["--kits", str(tmp_path / "kit"), "--shapes", "mixtral", "--tokens", "1,8", "--cells", "1:16:1"]
    args = grid._parse([*argv, "--out", str(tmp_path / "ours.jsonl")])
    files, wrong = grid._measure_kits(args)
    assert (tmp_path / "kit" / "layer.sh.asked").read_text() == "bf16 mixtral 1,8 1:16:1\n"
    assert wrong == 2
    assert [path.name for path in files] == ["one 1.0.jsonl", "two 1.0.jsonl"]
    assert json.loads(files[0].read_text()) == {**rows[0], **facts, "format": "bf16"}


def test_the_command_prints_tables_or_the_reason(
    grid: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ours, peer = write(tmp_path / "ours.jsonl", row()), write(tmp_path / "peer.jsonl", row(lora_us=6e6))
    argv = ["moe_lora_grid.py", "--rows", str(ours), "--against", str(peer)]
    monkeypatch.setattr("sys.argv", argv)
    grid.main()
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["against"]["a peer 1.0"]["on"] == 2.0
    write(peer, row(stopwatch="cold"))
    with pytest.raises(SystemExit, match=r"peer.jsonl: stopwatch is 'cold', of our rows 'a stopwatch'"):
        grid.main()
    assert capsys.readouterr().out == ""


def test_a_run_measures_checked_cells_and_says_where(
    grid: ModuleType,
    problem: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """On the CPU (in float32: Triton's interpreter multiplies bf16 wrongly), with a stopwatch that stands still."""
    stopwatch = importlib.import_module("stopwatch")
    monkeypatch.setattr(problem, "DTYPE", torch.float32)
    monkeypatch.setitem(grid.SHAPES, "tiny", problem.LayerShape(name="tiny", E=4, D=64, F=32, K=2))
    ceilings = stopwatch.Ceilings(bytes_per_s=1e12, flops_per_s=1e12)
    for name, value in (("DEVICE", "cpu"), ("_compile", lambda args: None), ("run_facts", lambda: RUN)):
        monkeypatch.setattr(grid, name, value)
    monkeypatch.setattr(grid, "measure_ceilings", lambda format_name: ceilings)
    for name, us in (("graph_us", 5.0), ("cold_us", 7.0)):
        monkeypatch.setattr(grid, name, lambda call, us=us: call() is None or us)
    out = tmp_path / "rows.jsonl"
    argv = ["moe_lora_grid.py", "--shapes", "tiny", "--tokens", "4", "--cells", "2:16:2", "--cold", "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    grid.main()
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["cells"] == 1
    for found in map(json.loads, out.read_text().splitlines()):
        assert (
            found.items()
            >= {**RUN, "engine": "moegraft", "base_us": 5.0, "lora_cold_us": 7.0, "copy_tb_s": 1.0}.items()
        )
        assert 0 < found["rel_err"] < 0.01


def test_the_documents_print_the_rows_beside_them(report: ModuleType) -> None:
    ours = report.read_rows(LAYER / "moegraft-7f6cf18.jsonl")
    peers = report.read_peers([LAYER / f"{name}.jsonl" for name in PEERS], report.facts_of(ours, "ours"))
    first_two = dict(list(peers.items())[:2])
    h200 = {
        name: report.read_rows(RESULTS / f"moe_lora_grid-{name}.jsonl")
        for name in ("h200", "int4-h200", "mxfp4-h200", "fp8-h200")
    }
    measured, readme = (ROOT / "docs" / "measured.md").read_text(), (ROOT / "README.md").read_text()
    means = report.means_table(h200["h200"])
    assert report.peers_table(ours, peers) in measured
    assert report.times_table(ours) in measured
    for rows in h200.values():
        assert report.times_table([row for row in rows if report.cell_of(row) == "8:16:8"]) in measured
    for table in (means, report.peers_table(ours, first_two)):
        assert table in readme
    assert means in measured


def test_work_of_the_smallest_layers(problem: ModuleType) -> None:
    """Every tensor counts once, whatever the number of rows that read it."""
    shape = problem.LayerShape(name="tiny", E=4, D=16, F=8, K=1)

    def batch(ids: list[int], slots: list[int]) -> object:
        T = len(ids)
        return problem.Batch(
            x_TD=torch.zeros(T, 16, dtype=problem.DTYPE),
            topk_ids_TK=torch.tensor(ids, dtype=torch.int32)[:, None],
            topk_weights_TK=torch.ones(T, 1),
            token_slots_T=torch.tensor(slots, dtype=torch.int32),
        )

    expert, factors, token = 3 * 16 * 8 * 2, 3 * (16 + 8) * 2, 2 * 16 * 2 + 4 + 4
    one = problem.count_work(shape, batch([2], [0]), 1)
    assert (one.num_bytes, one.flops) == (expert + factors + token, 6 * (16 * 8 + 16 + 8))
    assert problem.count_work(shape, batch([2], [0]), 0).num_bytes == expert + token
    same = problem.count_work(shape, batch([2, 2], [0, 0]), 1)
    assert (same.num_bytes, same.flops) == (expert + factors + 2 * token, 2 * one.flops)
    apart = problem.count_work(shape, batch([2, 2, 3], [0, 1, 0]), 1)
    assert apart.num_bytes == 2 * expert + 3 * factors + 3 * token
    elsewhere = problem.count_work(shape, batch([-1], [0]), 1)
    assert (elsewhere.num_bytes, elsewhere.flops) == (token, 0)
    assert problem.count_work(shape, batch([2], [0]), 0, expert_bytes=5).num_bytes == 5 + token


def test_the_larger_of_bytes_and_flops_is_the_floor(problem: ModuleType) -> None:
    work = problem.Work(num_bytes=2e6, flops=3e6)
    assert work.floor_us(bytes_per_s=1e12, flops_per_s=1e12) == pytest.approx(3.0)
    assert work.floor_us(bytes_per_s=1e12, flops_per_s=1e13) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["moe_lora_grid-h200", "layer-h100-2026-11-28/moegraft-7f6cf18"])
def test_rows_count_what_their_batches_need(problem: ModuleType, report: ModuleType, name: str) -> None:
    rows = [r for r in report.read_rows(RESULTS / f"{name}.jsonl") if r["tokens"] == 128 and r["shape"] == "qwen3-30b"]
    for found in rows:
        batch = problem.make_batch(problem.SHAPES["qwen3-30b"], 128, found["active_adapters"], "cpu")
        work = problem.count_work(problem.SHAPES["qwen3-30b"], batch, found["rank"])
        assert (found["bytes"], found["flops"]) == (work.num_bytes, work.flops)
    assert rows


def test_a_wrong_tile_of_one_token_is_not_small(problem: ModuleType) -> None:
    """In the norm of 4096 tokens it would hide: each layer's check looks at every token by itself."""
    shape = problem.LayerShape(name="tiny", E=4, D=256, F=16, K=2)
    torch.manual_seed(0)
    experts = problem.make_experts(shape, "bf16", "cpu")
    adapters, batch = problem.make_adapters(shape, [4, 2], "cpu"), problem.make_batch(shape, 4096, 2, "cpu")
    base, out = problem.oracle(experts, None, batch), problem.oracle(experts, adapters, batch)
    assert problem.check_layer(out, base, experts, adapters, batch).small
    out[7, 128:] = base[7, 128:]
    errors = problem.check_layer(out, base, experts, adapters, batch)
    assert errors.delta < 0.02 < 0.3 < errors.worst_token
    assert not errors.small
