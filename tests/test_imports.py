from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = ("accelerate", "peft", "transformers", "triton")


def import_without(module: str, absent: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Imports a module in a fresh interpreter where ``absent`` look not installed (None in sys.modules does that)."""
    code = f"import sys, importlib; sys.modules |= dict.fromkeys({absent!r}); importlib.import_module({module!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("module", ["moegraft", "moegraft.cli"])
def test_import_needs_no_optional_package(module: str) -> None:
    result = import_without(module, OPTIONAL)
    assert result.returncode == 0, result.stderr


def test_import_needs_no_cli_package() -> None:
    result = import_without("moegraft", ("rich", "typer"))
    assert result.returncode == 0, result.stderr


def test_absent_package_cannot_be_imported() -> None:
    result = import_without("moegraft.core.config", ("torch",))
    assert result.returncode != 0
    assert "torch" in result.stderr
