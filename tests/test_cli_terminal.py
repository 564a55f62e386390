"""What may reach a terminal, and what may not: names of others, widths, full disks, code of checkpoints, templates."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from support.families import build
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from moegraft.cli import console, demo, loading, tables
from moegraft.cli.app import app
from moegraft.cli.console import CommandError, printable
from moegraft.cli.structure import ModelExplanation
from moegraft.cli.train import save_base
from moegraft.core.errors import AdapterFileError
from moegraft.integrations.transformers import LayerChoice
from moegraft.lora.peft import AdapterInspection, ModuleSummary

NAMES = {
    "markup": "[red]q_proj[/red]",
    "markup without its begin": "[/bold]q_proj",
    "an emoji's code": ":skull:",
    "escape sequence": "\x1b[2J\x1b[1;1Hq_proj\x1b]0;title\x07",
    "one byte of the same": "\x9b31mq_proj",
    "lone surrogate": "q_proj\udcff\ud800",
    "line breaks": "q_proj\r\nNothing wrong in the files\u2028x\x85",
    "right to left": "\u202ejorp_q",
    "null": "a\x00b",
}


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def assert_one_line(result: Result, *words: str, code: int = 2) -> None:
    *_, line = result.stderr.splitlines() or [""]
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "unexpected" not in line
    for word in words:
        assert word in line


def assert_harmless(output: str) -> None:
    for char in "\x1b\x9b\x07\x00\r\u2028\x85\u202e":
        assert char not in output
    output.encode()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer that has learnt next to nothing."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, max_steps=1, on_step=lambda loss: None)
    return folder


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_adapter(folder: Path, name: str) -> Path:
    """An adapter whose one tensor, module, version and target are called ``name``."""
    folder.mkdir()
    header = {f"base_model.model.{name}.lora_A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}
    encoded = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name], "peft_version": name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_inspect_shows_names_and_nothing_else(name: str, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", name)
    for options in ((), ("--base", base), ("--json",)):
        result = run("inspect", folder, *options)
        assert result.exit_code == 1
        assert "Traceback" not in result.stderr
        assert_harmless(result.stdout + result.stderr)
        assert "Nothing wrong in the files" not in result.stdout.splitlines()
        if options == ("--json",):
            assert not json.loads(result.stdout)["ok"]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_tables_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleSummary(name=f"model.{name}", kind="lora", ranks={name: 1}, tensors=1, nbytes=8)
    tables.show_inspection(AdapterInspection(path=name, peft_version=name, modules=(module,), notes=(name,)), None)
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert shown.count(printable(name)) == 5
    for word in ("modules", "size"):
        assert word in shown


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_errors_show_names_as_they_are(name: str, base: Path) -> None:
    for args in (("explain", name), ("inspect", base, "--base", name), (name,), ("explain", base, f"--{name}")):
        result = run(*args)
        assert_one_line(result, code=2)
        assert_harmless(result.stderr)
    named = run("generate", base, "--prompt", "x", "--adapter", f"{name}=nowhere", "--use", "other")
    assert_one_line(named, "known: base")
    assert_harmless(named.stderr)


def test_printable_keeps_what_is_text() -> None:
    text = "naïve 日本 👩‍🔬\tx\ny"
    assert printable(text, is_text=True) == text
    assert printable(text) == text.replace("\t", "\\t").replace("\n", "\\n")
    assert printable("\x1b[0m\ud800") == "\\x1b[0m\\ud800"


@pytest.mark.parametrize("width", [1, 20, 30, 44, 60, 80, 200])
def test_tables_cut_no_word(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "stdout", console.Console(width=max(width, 20)))
    name = "model.layers.0.self_attn.some_projection"
    module = ModuleSummary(name=name, kind="linear", ranks={"lora": 4}, tensors=2, nbytes=2**20, target=name)
    tables.show_inspection(AdapterInspection(path="a", modules=(module,)), None)
    choice = LayerChoice(
        layer="model.layers.0.mlp.experts",
        format_name="dense",
        device="cpu",
        backend="TorchExperts",
        kept_by="moegraft",
        rejections=(),
    )
    tables.show_explanation(ModelExplanation(stored="", choices=(choice,)))
    shown = capsys.readouterr().out
    for word in ("model.layers.*.self_attn.some_projection", "linear", "TorchExperts", "model.layers.*.mlp.experts"):
        assert word in shown.split() or f"{word}," in shown.split()
    names = ("model.layers.*",)
    long = [line for line in shown.splitlines() if cell_len(line) > max(width, 20) and not line.startswith(names)]
    assert [line for line in long if not line.startswith(("folder", "PEFT", "rank", "tensors", "Nothing"))] == []


def test_widths_that_no_terminal_has() -> None:
    assert all(map(console.possible_width, ("20", "80", "1000")))
    assert not any(map(console.possible_width, ("0", "", "1", "19", "-3", "x", "99999999999", "²²", "8" * 5000)))


def command(*args: str, columns: str = "80", stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from moegraft.cli import main; main()", *args],
        env={**os.environ, "COLUMNS": columns},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_columns() -> None:
    for args in ([], ["explain", "--help"]):
        done = command(*args, columns="0")
        assert (done.returncode, done.stderr) == (0, "")
        assert 40 < max(map(len, done.stdout.splitlines())) <= 80


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    build("mixtral").config.save_pretrained(tmp_path)
    with open("/dev/full", "w") as full:
        done = command("explain", str(tmp_path), "--device", "cpu", stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_disk_that_fills_while_the_demo_saves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from safetensors import SafetensorError

    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(demo, "save_base", fail)
        assert_one_line(run("demo", "--keep", tmp_path / "kept"), "No space left on device", "base")


def test_a_file_in_the_place_of_the_kept_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(run("demo", "--keep", tmp_path / "file"), "file")
    assert_one_line(run("demo", "--keep", tmp_path / "file" / "below"), "below")


def test_an_interrupt_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    result = run("demo")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_what_nobody_expected_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no\nsuch number")

    monkeypatch.setattr(demo, "run_demo", fail)
    monkeypatch.delenv(console.TRACEBACK, raising=False)
    result = run("demo")
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected ZeroDivisionError: no (MOEGRAFT_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv(console.TRACEBACK, "1")
    assert "Traceback" in run("demo").stderr


def test_errors_keep_their_notes_and_codes() -> None:
    error = AdapterFileError("bad")
    error.add_note("rank 1")
    assert console.describe(error) == ("bad (rank 1)", 2)
    assert console.describe(CommandError("x", exit_code=137)) == ("x", 137)
    assert console.describe(MemoryError())[1] == 1


@pytest.mark.parametrize("how", ["unknown type", "known type"])
def test_code_of_a_checkpoint_never_runs(how: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not asked for on stdout, not run: config, model, tokenizer and generation."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (copy / "evil.py").write_text(code)
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(code + "def generate(model, **_): return None\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(copy / "config.json", auto_map=auto_map, **({"model_type": "evil"} if how == "unknown type" else {}))
    edit(
        copy / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        **({"tokenizer_class": "Tokenizer"} if how == "unknown type" else {}),
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    adapter = write_adapter(tmp_path / "adapter", "x")
    for args in (
        ("explain", copy, "--device", "cpu"),
        ("inspect", adapter, "--base", copy),
        ("generate", copy, "--prompt", "x", "--max-new-tokens", 1, "--device", "cpu"),
        ("tune", "--model", copy),
    ):
        result = CliRunner().invoke(app, [str(arg) for arg in args], input="y\ny\ny\n")
        assert not marker.exists()
        if how == "unknown type":
            assert_one_line(result, "auto_map")
        else:
            assert result.exit_code in (0, 1, 2)
    with pytest.raises(CommandError, match="auto_map") if how == "unknown type" else pytest.MonkeyPatch.context():
        loading.load_tokenizer(copy)
    assert not marker.exists()


def test_prompts_that_are_no_text(base: Path) -> None:
    assert_one_line(run("generate", base, "--prompt", "x", "--prompt", "caf\udce9"), "prompt 2", "UTF-8")
    assert_one_line(run("generate", base, "--prompt", "", "--raw"), "prompt 1 has no token")


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("", "chat template makes nothing"),
        ("{% if %}", "chat template fails"),
        ("{{ raise_exception('no\nsystem') }}", "chat template fails: no"),
        ("{{ messages[7].content }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails"),
    ],
)
def test_chat_templates_that_fail(template: str, word: str, copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = "x"
    tokenizer.save_pretrained(copy)
    (copy / "chat_template.jinja").write_text(template)
    assert_one_line(run("generate", copy, "--prompt", "x", "--device", "cpu"), word)


def test_more_ranks_than_any_machine_has(base: Path) -> None:
    assert_one_line(run("explain", base, "--tp", 10**9, "--device", "cpu"), "1000000000 ranks", "1024")
    assert_one_line(run("generate", base, "--prompt", "x", "--tp", 10**9, "--device", "cpu"), "1000000000 ranks")


def test_devices_that_hold_no_numbers(base: Path) -> None:
    assert_one_line(run("generate", base, "--prompt", "x", "--device", "meta"), "--device meta")
