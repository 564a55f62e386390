"""The one error metric of the project: the relative error in the Frobenius norm, ``||out - ref|| / ||ref||``."""

from __future__ import annotations

import math

import torch


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """``||out - ref|| / ||ref||`` over all elements, in float64. Both of one shape, any dtypes and devices.

    0.0 for empty tensors and where both are zero; inf where only ``ref`` is zero, or where ``out`` is not finite:
    NaN never passes a ``<=``. Raises ValueError for unequal shapes and for a reference that is not finite.
    """
    if out.shape != ref.shape:
        raise ValueError(f"expected the shape of the reference, {tuple(ref.shape)}, found {tuple(out.shape)}")
    out64, ref64 = (tensor.detach().to(device="cpu", dtype=torch.float64) for tensor in (out, ref))
    if not ref64.isfinite().all():
        raise ValueError("expected a finite reference, found NaN or infinity in it")
    if not out64.isfinite().all():
        return math.inf
    difference, scale = (out64 - ref64).norm().item(), ref64.norm().item()
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else math.inf


def assert_close(out: torch.Tensor, ref: torch.Tensor, tol: float, *, what: str = "output") -> None:
    """Raises AssertionError unless ``relative_error(out, ref) <= tol``; the message shows the worst element."""
    error = relative_error(out, ref)
    if error <= tol:
        return
    out64, ref64 = (tensor.detach().to(device="cpu", dtype=torch.float64) for tensor in (out, ref))
    worst = int((out64 - ref64).abs().nan_to_num(nan=math.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ref64.shape))
    raise AssertionError(
        f"{what}: relative error {error:.3e} > {tol:.3e}; worst at {index}: found {out64.flatten()[worst].item():.6g}, "
        f"expected {ref64.flatten()[worst].item():.6g}"
    )


def assert_close_delta(
    out_with: torch.Tensor, out_without: torch.Tensor, ref_with: torch.Tensor, ref_without: torch.Tensor, tol: float
) -> None:
    """Compares what the adapters add: ``out_with - out_without`` against ``ref_with - ref_without``, as assert_close.

    A tolerance on outputs can hide a delta that is missing altogether; here that is an error of 1. Where the reference
    has no delta, the outputs must agree bit for bit. ``tol`` must leave room for the rounding of two outputs to their
    dtype: about ``eps * ||out|| / ||delta||``.
    """
    out_delta = out_with.detach().double() - out_without.detach().double()
    ref_delta = ref_with.detach().double() - ref_without.detach().double()
    assert_close(out_delta, ref_delta, tol, what="delta")
