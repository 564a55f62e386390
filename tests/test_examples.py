"""The examples run as a reader would run them, and print what they promise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moegraft import layers

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *flags: str, launcher: tuple[str, ...] = ()) -> str:
    """Standard output of an example, on one thread, with nothing to be downloaded."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *flags],
        env=os.environ | offline,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    tested = {"engine_layers.py", "parallel_generate.py", "transformers_mixed_batch.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_engine_layers_imports_one_module_of_moegraft() -> None:
    tree = ast.parse((EXAMPLES / "engine_layers.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "moegraft.layers"}
    assert [node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)] == ["torch"]


def test_the_module_for_engines_has_what_it_names() -> None:
    assert layers.__all__ == sorted(layers.__all__)
    assert all(getattr(layers, name).__name__ == name for name in layers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attach'"):
        layers.attach  # noqa: B018


def test_engine_layers() -> None:
    out = run("engine_layers.py")
    assert "backend: TorchExperts" in out
    changes = {int(row): (name, float(by)) for row, name, by in re.findall(r"^ +(\d)  (\w+) +(\d\.\d+)$", out, re.M)}
    assert [changes[row][0] for row in range(5)] == ["sql", "base", "chat", "sql", "base"]
    assert changes[1][1] == changes[4][1] == 0
    assert all(changes[row][1] > 0.01 for row in (0, 2, 3))


def test_engine_layers_needs_no_transformers() -> None:
    source = (EXAMPLES / "engine_layers.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) (transformers|peft)|moegraft\.integrations", source, re.M)


def test_transformers_mixed_batch() -> None:
    out = run("transformers_mixed_batch.py")
    assert "sql: 8 of 8 tensors applied" in out
    assert "chat: 12 of 12 tensors applied" in out
    assert out.count("same as alone: True") == 3
    answers = re.findall(r"^(?:sql|base|chat) +(\[.*\])", out, re.M)
    assert len(set(answers)) == 3
    assert "model.layers.1.mlp.experts: TorchExperts" in out


@pytest.mark.parametrize("flags", [("--ep", "2", "--data-parallel"), ("--plan",)], ids=" ".join)
def test_parallel_generate(flags: tuple[str, ...]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run("parallel_generate.py", "--device", "cpu", *flags, launcher=torchrun)
    assert out.count("same as one process: True") == 2
    answers = re.findall(r"^(?:sql|base|chat) +(\[.*\])", out, re.M)
    assert len(answers) == (2 if "--data-parallel" in flags else 4)
    assert len(set(answers)) == (2 if "--data-parallel" in flags else 3)
