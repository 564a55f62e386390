from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Where there is no GPU, Triton kernels run in Triton's interpreter. It reads the variable when a kernel is defined,
# so it is set here, before any test module imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch finds none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
