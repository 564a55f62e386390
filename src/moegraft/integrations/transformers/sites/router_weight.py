"""A router's weight whose every product is followed by the LoRA delta of the batch in flight.

Routers keep their weight as a Parameter and multiply with it as they like: the weight itself is the one place that
sees each product. What it cannot follow is an error, never a lost delta.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional

from moegraft.core.errors import UnsupportedModelError

_T: Any = torch.Tensor
# The same matrix in another dtype, on another device, in other memory.
_COPIES = frozenset(
    {
        _T.to, _T.type, _T.float, _T.double, _T.half, _T.bfloat16, _T.type_as, _T.cuda, _T.cpu,
        _T.contiguous, _T.clone, torch.clone, _T.detach, torch.detach, _T.data.__get__,
    }
)  # fmt: skip
_TRANSPOSES = frozenset({_T.t, torch.t, _T.T.__get__, _T.mT.__get__, torch.adjoint, _T.adjoint})
_SWAPS = frozenset({_T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes, _T.swapdims, torch.swapdims})
_PERMUTES = frozenset({_T.permute, torch.permute})
# The same matrix with dimensions before it, of size 1 or expanded.
_LEADING = frozenset({_T.unsqueeze, torch.unsqueeze, _T.expand, _T.view, _T.reshape, torch.reshape, _T.squeeze})
_MATMULS = frozenset({torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm, torch.bmm, _T.bmm, torch.mv, _T.mv})
_ADDED_MATMULS = frozenset({torch.addmm, _T.addmm, torch.baddbmm, _T.baddbmm})
_INNERS = frozenset({torch.inner, _T.inner})
_EQUATION = re.compile(r"(?P<first>[a-zA-Z.]+),(?P<second>[a-zA-Z.]+)->(?P<out>[a-zA-Z.]+)", re.ASCII)


class Delta(Protocol):
    """What follows a product: ``y [..., out] += delta of x [..., in]`` in place, ``bias_O`` being part of y already."""

    name: str

    @property
    def is_wanted(self) -> bool:
        """Whether the batch in flight has LoRA on this weight; without it the weight is a plain tensor."""
        ...

    def __call__(self, y: torch.Tensor, x: torch.Tensor, bias_O: torch.Tensor | None) -> None: ...


class _Product(NamedTuple):
    """One product with the weight, seen as y [..., out] = x [..., in] @ weight^T + bias: views of what the op read and
    wrote. ``scale``: where y also holds something that is no bias, the product is computed anew and y gets
    scale * delta."""

    y: torch.Tensor
    x: torch.Tensor
    bias_O: torch.Tensor | None = None
    scale: float | None = None


class SeamTensor(torch.Tensor):
    """The weight [out, in], a cast or a transpose of it. ``_flipped``: the last two dimensions are [in, out]."""

    _delta: Delta
    _flipped: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        seams = [value for value in (*args, *kwargs.values()) if isinstance(value, SeamTensor)]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if not _has_tensor(result):
                return result  # a size, a dtype, a device
            if not seams:
                seams = [value for value in _operands(args) if isinstance(value, SeamTensor)]
            if not seams or not seams[0]._delta.is_wanted:
                return result
            seam = seams[0]
            flipped = _flipped(func, args, kwargs, seam, result)
            if flipped is None:
                with torch.no_grad():
                    _follow(func, args, kwargs, seam, result)
                return result
        return _seam_of(result, seam._delta, flipped)


class RouterWeight(SeamTensor, nn.Parameter):
    """The Parameter form of the seam; shares the storage of the Parameter it stands for."""

    @classmethod
    def over(cls, original: nn.Parameter, delta: Delta) -> RouterWeight:
        weight: RouterWeight = torch.Tensor._make_subclass(cls, original.data, original.requires_grad)
        weight._delta, weight._flipped = delta, False
        return weight


def _seam_of(tensor: torch.Tensor, delta: Delta, flipped: bool) -> SeamTensor:
    seam = tensor.as_subclass(SeamTensor)
    seam._delta, seam._flipped = delta, flipped
    return seam


def _flipped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seam: SeamTensor, result: Any) -> bool | None:
    """How the result stands where it is still the weight; None where it is something else."""
    if not args or args[0] is not seam or not isinstance(result, torch.Tensor):
        return None
    if func in _COPIES:
        return seam._flipped
    if func in _TRANSPOSES:
        return not seam._flipped
    last_two = {seam.dim() - 1, seam.dim() - 2}
    if func in _SWAPS:
        dims = [dim % seam.dim() for dim in (*args[1:], *kwargs.values())]
        return not seam._flipped if set(dims) == last_two else None
    if func in _PERMUTES:
        order = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
        order = [dim % seam.dim() for dim in (order or kwargs["dims"])]
        if order[:-2] == list(range(seam.dim() - 2)) and set(order[-2:]) == last_two:
            return seam._flipped != (order[-2] > order[-1])
        return None
    is_same_matrix = result.dim() >= 2 and result.shape[-2:] == seam.shape[-2:]
    if func in _LEADING and is_same_matrix:
        return seam._flipped
    if func is _T.__getitem__ and is_same_matrix:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if all(part is None or part is Ellipsis or part == slice(None) for part in index):
            return seam._flipped
    return None


def _follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seam: SeamTensor, result: torch.Tensor) -> None:
    """Add the delta to the result of a product. Raises UnsupportedModelError for an op that is no known product."""
    product = _product(func, args, kwargs, seam, result)
    if product is None:
        op = getattr(func, "__name__", func)
        raise UnsupportedModelError(
            f"router {seam._delta.name!r} uses its weight in {op}, where its LoRA would be lost; "
            "known are products of the weight with rows (linear, mm, matmul, bmm, addmm, einsum)"
        )
    y, x, bias_O, scale = product
    if scale is not None:
        weight = seam.as_subclass(torch.Tensor)
        before = x.to(weight.dtype) @ (weight if seam._flipped else weight.mT)
        after = before.clone()
        seam._delta(after, x, None)
        y.add_((after - before).view(y.shape).to(y.dtype), alpha=scale)
        return
    rows = y.contiguous()
    seam._delta(rows, x, bias_O)
    if rows is not y:
        y.copy_(rows)


def _product(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seam: SeamTensor, result: torch.Tensor
) -> _Product | None:
    if func is functional.linear:
        x, weight, bias_O = _named(args, kwargs, ("input", "weight", "bias"))
        return _Product(result, x, bias_O) if weight is seam and not seam._flipped else None
    if func in _INNERS:
        first, second = _named(args, kwargs, ("input", "other"))
        return _Product(result, first) if second is seam and not seam._flipped and seam.dim() == 2 else None
    if func in _MATMULS:
        first, second = _named(args, kwargs, ("input", ("other", "mat2", "vec")))
        return _matmul(first, second, seam, result)
    if func in _ADDED_MATMULS:
        added, first, second = _named(args, kwargs, ("input", ("mat1", "batch1"), ("mat2", "batch2")))
        product = None if added is seam else _matmul(first, second, seam, result)
        if product is None:
            return None
        alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
        if alpha == beta == 1 and added.dim() == 1 and second is seam:
            return product._replace(bias_O=added)
        return product._replace(scale=float(alpha))
    if func is torch.einsum:
        return _einsum(args, seam, result)
    return None


def _matmul(first: torch.Tensor, second: torch.Tensor, seam: SeamTensor, result: torch.Tensor) -> _Product | None:
    """x @ weight^T, or weight @ x^T, which is the transpose of the former."""
    if second is seam and seam._flipped:
        product = _Product(result, first)
    elif first is seam and not seam._flipped:
        product = _Product(result, second) if second.dim() == 1 else _Product(result.mT, second.mT)
    else:
        return None
    # Not where the weight's leading dimensions have spread the rows.
    return product if product.y.shape[:-1] == product.x.shape[:-1] else None


def _einsum(args: tuple[Any, ...], seam: SeamTensor, result: torch.Tensor) -> _Product | None:
    """Two operands, an output that is written down: the inner index of the weight is summed over, the outer is not."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    match = _EQUATION.fullmatch(args[0].replace(" ", "")) if isinstance(args[0], str) else None
    if match is None or len(operands) != 2:
        return None
    terms = dict(zip(("first", "second"), operands, strict=True))
    mine = next(key for key, value in terms.items() if value is seam)
    other = "second" if mine == "first" else "first"
    x, weight_term = terms[other], match[mine]
    if len(weight_term) != 2 or "." in weight_term or seam.dim() != 2:
        return None
    outer, inner = (weight_term[1], weight_term[0]) if seam._flipped else (weight_term[0], weight_term[1])
    spread = "".join(chr(0x100 + i) for i in range(x.dim() + 3 - len(match[other])))  # what "..." stands for
    x_term, out_term = match[other].replace("...", spread), match["out"].replace("...", spread)
    lead = [letter for letter in out_term if letter != outer]
    fits = len(set(x_term)) == len(x_term) == x.dim() and set(x_term) == {*lead, inner} and outer in out_term
    if not fits or inner in out_term or len(out_term) != x.dim():
        return None
    y = result.permute([out_term.index(letter) for letter in (*lead, outer)])
    return _Product(y, x.permute([x_term.index(letter) for letter in (*lead, inner)]))


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str | tuple[str, ...], ...]) -> list[Any]:
    """Arguments by place or by one of their names; None for one that was not given."""
    found = []
    for place, name in enumerate(names):
        keys = (name,) if isinstance(name, str) else name
        found.append(args[place] if place < len(args) else next((kwargs[k] for k in keys if k in kwargs), None))
    return found


def _has_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensor, value)))


def _operands(args: tuple[Any, ...]) -> list[Any]:
    """What stands in lists among the arguments."""
    return [item for value in args if isinstance(value, (list, tuple)) for item in value]
