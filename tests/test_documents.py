"""Documents that print numbers of the code print those that are there."""

from __future__ import annotations

from pathlib import Path

from moegraft.files import limits

DOCS = Path(__file__).parent.parent / "docs"


def test_security_prints_every_limit() -> None:
    text = (DOCS / "security.md").read_text()
    names = [name for name in vars(limits) if name.startswith("MAX_")]
    assert len(names) > 20
    assert [name for name in names if f"| `{name}` | {getattr(limits, name):,} |" not in text] == []
