"""Tries every Mixture-of-Experts model of the installed transformers and writes docs/models.md's tables anew.

PYTHONPATH=src python scripts/models_table.py [MODEL_TYPE ...]     with model types: prints their part only
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.sweep import BEGIN, END, sweep, table  # noqa: E402  # the tests' own models


def main() -> None:
    """Some minutes of CPU."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    verdicts = []
    for one in sweep(sys.argv[1:]):
        verdicts.append(one)
        print(one, file=sys.stderr)
    tables = table(verdicts)
    if sys.argv[1:]:
        print(tables)
        return
    page = ROOT / "docs" / "models.md"
    text = page.read_text()
    page.write_text(text[: text.index(BEGIN)] + tables + text[text.index(END) + len(END) :])


if __name__ == "__main__":
    main()
