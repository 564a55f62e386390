"""The command line: ``moegraft demo``, ``generate``, ``inspect``, ``explain`` and ``tune``. Needs ``moegraft[cli]``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point of the ``moegraft`` command."""
    try:
        from moegraft.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"error: {missing} is not installed: pip install 'moegraft[cli]'")
    app()
