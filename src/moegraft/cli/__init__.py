"""The command line: ``moegraft demo``, ``generate``, ``inspect``, ``explain`` and ``tune``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point of the ``moegraft`` command."""
    try:
        from moegraft.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"error: {error.name} is not installed: pip install 'moegraft[cli]'")
    app()
