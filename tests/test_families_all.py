"""The whole sweep, a few minutes long: ``pytest -m families_all``. docs/models.md holds what it found last."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sweep import BEGIN, END, sweep, table

MODELS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.families_all
@pytest.mark.usefixtures("one_thread")
def test_every_moe_model_of_transformers() -> None:
    verdicts = list(sweep())
    assert len(verdicts) > 80
    for one in verdicts:
        assert not one.stray, f"{one.model_type}: {one.stray}"
        assert all(error < 1e-4 for error in one.errors), f"{one.model_type}: {one.errors}"
    text = MODELS.read_text()
    assert table(verdicts) == text[text.index(BEGIN) : text.index(END) + len(END)], "run scripts/models_table.py"
