from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

OPTIONAL = ("accelerate", "peft", "rich", "safetensors", "transformers", "triton", "typer")
LIBRARY = ("moegraft", "moegraft.build", "moegraft.layers", "moegraft.testing")


def import_without(
    modules: Sequence[str], absent: Sequence[str], *, then: str = ""
) -> subprocess.CompletedProcess[str]:
    """Imports modules in a fresh interpreter where ``absent`` look not installed (None in sys.modules does that)."""
    code = (
        f"import sys, importlib; sys.modules |= dict.fromkeys({absent!r})\n"
        f"for name in {modules!r}: importlib.import_module(name)\n{then}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_the_library_needs_torch_alone() -> None:
    result = import_without(LIBRARY, OPTIONAL)
    assert result.returncode == 0, result.stderr


def test_the_commands_need_neither_transformers_nor_triton() -> None:
    result = import_without(["moegraft.cli.app"], ("accelerate", "peft", "safetensors", "transformers", "triton"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("absent", ["rich", "typer"])
def test_the_command_says_what_it_needs(absent: str) -> None:
    result = import_without(["moegraft.cli"], (absent,), then="sys.modules['moegraft.cli'].main()")
    assert result.returncode == 1
    assert result.stderr.strip() == f"error: {absent} is not installed: pip install 'moegraft[cli]'"


def test_absent_package_cannot_be_imported() -> None:
    result = import_without(["moegraft.core.config"], ("torch",))
    assert result.returncode != 0
    assert "torch" in result.stderr
