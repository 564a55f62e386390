"""Makes reads of memory that nobody wrote visible: every uninitialised allocation is filled with NaN or an extreme."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_UNINITIALISED: frozenset[Callable[..., torch.Tensor]] = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_permuted,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)


@contextmanager
def poison_allocations() -> Iterator[None]:
    """Within it, ``torch.empty`` and its kin return NaN (floats), the largest value (integers) or True (bools).

    Holds for Python code of this thread; what ATen allocates inside an operator is its own affair.
    """
    with _PoisonMode():
        yield


class _PoisonMode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED:
            _fill_with_poison(result)
        return result


@torch.no_grad()
def _fill_with_poison(tensor: torch.Tensor) -> None:
    dtype = tensor.dtype
    if dtype.is_complex or dtype.is_floating_point:
        tensor.fill_(float("nan"))
    elif dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(dtype).max)
