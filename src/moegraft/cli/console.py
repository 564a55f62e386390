"""Where output goes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moegraft.core.errors import MoegraftError

stdout = Console()
stderr = Console(stderr=True)

_Options = ParamSpec("_Options")


class CommandError(MoegraftError):
    """A command cannot do what its options ask for; ``exit_code``: what the command ends with."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reported(command: Callable[_Options, None]) -> Callable[_Options, None]:
    """Errors raised on purpose become one line on stderr and exit code 2 (or their own)."""

    @functools.wraps(command)
    def wrapper(*args: _Options.args, **kwargs: _Options.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except MoegraftError as error:
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            stderr.print(f"error: {error}{notes}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(getattr(error, "exit_code", 2)) from None
        except ModuleNotFoundError as error:
            if error.name not in ("transformers", "peft"):
                raise
            stderr.print(f"error: {error.name} is not installed: pip install 'moegraft\\[demo]'", style="red")
            raise typer.Exit(2) from None

    return wrapper


def print_json(value: object) -> None:
    """One JSON document on stdout; records become objects, paths strings."""
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def first_line(error: Exception) -> str:
    """What an error of another library says first; some go on with advice that does not apply here."""
    return str(error).strip().partition("\n")[0]


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner while something of unknown length runs."""
    with stderr.status(what):
        yield


def progress_bars() -> Progress:
    """Bars of steps done, with one number beside each (field ``note``)."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:<12}"),
        TimeElapsedColumn(),
        console=stderr,
    )
