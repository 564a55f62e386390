"""The command line: ``moegraft demo``, ``generate``, ``inspect`` and ``explain``."""

from __future__ import annotations

from moegraft.cli.app import main

__all__ = ["main"]
