"""Where output goes: results to stdout, progress and errors to stderr; and what may reach a terminal."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from moegraft.core.errors import MoegraftError

TRACEBACK = "MOEGRAFT_TRACEBACK"
"""Environment variable: set, an unexpected error shows where it came from."""
INTERRUPTED = 130
MAX_ERROR = 2000
_WIDTHS = range(20, 1001)

# Control characters and lone surrogates, and what turns the direction of writing or ends a line unseen.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HIDDEN_IN_TEXT = re.compile(_HIDDEN.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def possible_width(columns: str) -> bool:
    """Whether a terminal may have this width: others would ask rich for lines without room or without end."""
    return columns.isascii() and columns.isdigit() and len(columns) < 5 and int(columns) in _WIDTHS


if not possible_width(os.environ.get("COLUMNS", "80")):
    del os.environ["COLUMNS"]  # read by rich here, and by typer for its help

stdout = Console()
stderr = Console(stderr=True)


class CommandError(MoegraftError):
    """A command cannot do what its options ask for; ``exit_code``: what the command ends with."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Commands(TyperGroup):
    """The commands. However one fails, it ends with one line on stderr and an exit code, not with a traceback."""

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Runs the command of ``args`` (by default the process's) and exits."""
        for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is shown escaped
            with suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(args, prog_name or "moegraft", **{**extra, "standalone_mode": False})
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _failed(*describe(error))
        sys.exit(code if isinstance(code, int) else 0)


def _failed(message: str, code: int) -> int:
    with suppress(OSError):
        stderr.print(Text(f"error: {printable(message)[:MAX_ERROR]}", style="red"), soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:  # nothing more can be written: what is left would be tried, and reported, once more at the exit
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def describe(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code: 2 for what can be put right, 1 for what nobody expected."""
    if isinstance(error, MoegraftError):
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        return f"{error}{notes}", getattr(error, "exit_code", 2)
    if isinstance(error, typer.Abort):
        return "aborted", 1
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # of the command line: an option, a value
        return f"{error.format_message().rstrip('.')}; see --help", error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name in ("transformers", "peft"):
        return f"{error.name} is not installed: pip install 'moegraft[demo]'", 2
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno == errno.EPIPE:
            return "nobody reads the output any more", 1
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}", 2
    if isinstance(error, MemoryError):
        return f"out of memory: {first_line(error)}".removesuffix(": "), 1
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    return f"unexpected {type(error).__name__}: {first_line(error)} ({TRACEBACK}=1 shows where)", 1


def printable(text: object, *, is_text: bool = False) -> str:
    """Text of others, with what would steer a terminal written out; ``is_text``: line breaks and tabs stay."""
    hidden = _HIDDEN_IN_TEXT if is_text else _HIDDEN
    return hidden.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def print_json(value: object) -> None:
    """One JSON document on stdout; records become objects, paths strings."""
    document = json.dumps(_plain(value), indent=2, ensure_ascii=False)
    typer.echo(_HIDDEN_IN_TEXT.sub(lambda found: f"\\u{ord(found[0]):04x}", document))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def first_line(error: object) -> str:
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
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:<12}", markup=False),
        TimeElapsedColumn(),
        console=stderr,
    )
