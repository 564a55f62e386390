from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from support.distributed import WorldPool
    from support.mixed import MixedBatch

    from moegraft import GraftedModel

# Where there is no GPU, Triton kernels run in Triton's interpreter. It reads the variable when a kernel is defined,
# so it is set here, before any test module imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.interpreter import hasten_interpreter

hasten_interpreter()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long and repeats what others show runs where it is asked for: ``-m soak``."""
    if "soak" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch finds none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: waking a second thread costs more than their products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> MixedBatch:
    """A tiny model with three adapters and their truths. Whoever attaches to its model detaches again."""
    from support.mixed import make_mixed_batch  # imports transformers and PEFT, which most tests do without

    return make_mixed_batch(tmp_path_factory.mktemp("mixed"))


@pytest.fixture
def graft(mixed: MixedBatch) -> Iterator[GraftedModel]:
    """``mixed``, attached and with its adapters loaded."""
    import moegraft

    with moegraft.attach(mixed.model, adapter_memory="4MiB") as graft:
        for name, path in mixed.adapters.items():
            graft.load_adapter(path, name=name)
        yield graft


@pytest.fixture(scope="session")
def world2() -> Iterator[WorldPool]:
    """Two ranks over gloo."""
    from support.distributed import WorldPool

    with WorldPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def world4() -> Iterator[WorldPool]:
    """Four ranks over gloo."""
    from support.distributed import WorldPool

    with WorldPool(4) as pool:
        yield pool
