"""Command lines drawn at random: each ends with 0, 1 or 2, without a traceback, with at most one line of error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moegraft.cli.app import app
from moegraft.cli.train import save_adapter, save_base

SEED, LINES = 20261128, 200
NOISE = (
    "",
    "-",
    "--",
    "\x00",
    "\x1b[2J",
    "[/bold]",
    "\udcff",
    "日本",
    "a" * 5000,
    "../..",
    "~",
    "0",
    "-1",
    "1e9",
    "nan",
)
NUMBERS = ("0", "1", "2", "-1", "3", "64", "1e3", "nan", "inf", "9" * 30, "9" * 5000, "²", "0x10", "", " 1")
MEMORY = ("1MiB", "0", "-1GiB", "nan", "1e400GiB", "2GiB", "lots", "1.5 KiB", "9" * 400)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Folders by what they are: models and adapters that are right, damaged, or something else."""
    root = tmp_path_factory.mktemp("world")
    base, adapter = root / "base", root / "adapter"
    save_base(base, max_steps=1, on_step=lambda loss: None)
    from moegraft.cli.loading import load_tokenizer

    save_adapter("json", base, adapter, load_tokenizer(base), max_steps=1, on_step=lambda loss: None)
    (root / "empty").mkdir()
    (root / "file").write_text("{}")
    (root / "[red]name").mkdir()

    def damaged(source: Path, name: str, file: str, change: Callable[[bytes], bytes]) -> str:
        folder = Path(shutil.copytree(source, root / name))
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        return str(folder)

    def without(field: str) -> Callable[[bytes], bytes]:
        return lambda text: json.dumps({**json.loads(text), field: None}).encode()

    models = [
        damaged(base, "half a config", "config.json", lambda text: text[: len(text) // 2]),
        damaged(base, "a list", "config.json", lambda text: b"[]"),
        damaged(base, "no type", "config.json", without("model_type")),
        damaged(base, "no experts", "config.json", without("num_experts")),
        damaged(base, "no vocabulary", "tokenizer.json", lambda text: b"{}"),
        damaged(base, "half the weights", "model.safetensors", lambda data: data[: len(data) // 2]),
    ]
    adapters = [
        damaged(adapter, "half a file", "adapter_model.safetensors", lambda data: data[:100]),
        damaged(adapter, "no rank", "adapter_config.json", without("r")),
        damaged(adapter, "no json", "adapter_config.json", lambda text: b"\xff\xfe"),
    ]
    others = [str(root / name) for name in ("empty", "file", "[red]name", "nowhere", "no\x1bwhere")] + ["/dev/null"]
    return {
        "model": [str(base)] * 4 + models + others,
        "adapter": [str(adapter)] * 4 + adapters + others,
    }


def option(rng: random.Random, name: str, *values: str) -> list[str]:
    if rng.random() < 0.6:
        return []
    value = rng.choice(values or NUMBERS) if rng.random() < 0.8 else rng.choice(NOISE)
    return [f"--{name}={value}"] if rng.random() < 0.5 else [f"--{name}", value]


def draw(rng: random.Random, world: dict[str, list[str]]) -> list[str]:
    """A line of one command with options that it has, values that may not fit, and at times something else."""
    model, adapter = (rng.choice(world[kind]) for kind in ("model", "adapter"))
    device = ("cpu", "cpu", "cuda", "meta", "cpu:1", "nowhere", "")
    dtype = ("auto", "float32", "bfloat16", "int3", "")
    match rng.choice(("generate", "generate", "inspect", "explain", "tune", "other")):
        case "generate":
            line = ["generate", model, "--max-new-tokens", rng.choice(("1", "2", "0", "x")), "--device=cpu"]
            line += ["--prompt", rng.choice(("hello", "", "caf\udce9", "\x1b[2J", "x" * 200))]
            line += option(rng, "adapter", f"a={adapter}", f"base={adapter}", f"[/b]={adapter}", "a=", adapter)
            line += option(rng, "use", "base", "a", "a,base", ",", "[/b]")
            line += option(rng, "adapter-memory", *MEMORY) + option(rng, "dtype", *dtype)
            line += option(rng, "dispatch", "all_to_all", "x") + option(rng, "tp", "0", "-1", "9" * 12, "x")
        case "inspect":
            line = ["inspect", adapter, *option(rng, "base", *world["model"])]
        case "explain":
            line = ["explain", model, *option(rng, "device", *device), *option(rng, "dtype", *dtype)]
            line += option(rng, "tp") + option(rng, "ep")
        case "tune":
            line = ["tune", *option(rng, "shape", "8,64,32,2", "1,1,1,2", "8,64,32", "9" * 5000 + ",1,1,1", ",,,")]
            line += option(rng, "model", *world["model"]) + option(rng, "tokens", "1", "1,x", "0", "9" * 5000)
            line += option(rng, "seconds") + option(rng, "rank") + option(rng, "adapters")
            line += option(rng, "output", "/dev/null/x.json", "x.txt", "/")
        case _:
            line = [rng.choice((*NOISE, "--help", "demo", "--version")), *rng.sample(NOISE, rng.randrange(3))]
            line = ["demo", "--keep", world["model"][0]] if line[0] == "demo" else line
    if rng.random() < 0.3:
        line.insert(rng.randrange(len(line) + 1), rng.choice((*NOISE, "--json", "--help", "--raw", "--fully-sharded")))
    return line


def test_every_line_ends_in_order(world: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    rng, codes, wrong = random.Random(SEED), set(), []
    for _ in range(LINES):
        line = draw(rng, world)
        result = CliRunner().invoke(app, line, input="y\n" * 9)
        errors = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
        codes.add(result.exit_code)
        in_order = (
            result.exit_code in (0, 1, 2)
            and "Traceback" not in result.stderr
            and not any("error: unexpected" in text for text in errors)
            and len(errors) == (result.exit_code == 2 or (result.exit_code == 1 and not result.stdout))
            and not any(char in result.stdout + result.stderr for char in ("\x00", "\x1b[2J", "\x9b"))
        )
        if not in_order:
            wrong.append((line, result.exit_code, result.stderr[-2000:]))
    assert not wrong, "\n\n".join(f"{[part[:60] for part in line]}: {code}\n{err}" for line, code, err in wrong)
    assert codes == {0, 1, 2}
