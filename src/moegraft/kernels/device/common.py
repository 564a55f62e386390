"""What every kernel starts with: constants, programmatic launch, sums, the activation."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Constant(tl.constexpr):
    """A constant of a module. Triton compares each with a copy at every launch; by value that takes a microsecond."""

    def __copy__(self) -> Constant:
        return self

    def __ne__(self, other: object) -> bool:
        return self is not other and bool(super().__ne__(other))


# Codes of ActivationKind.
SILU = Constant(0)
GELU = Constant(1)
GELU_TANH = Constant(2)
RELU2 = Constant(3)
SWIGLU_OAI = Constant(4)
SILU_CLAMPED = Constant(5)
SILU_SOFTCAPPED = Constant(6)
CLAMPED_SILU = Constant(7)


@triton.jit
def await_prior_kernel(PDL: tl.constexpr):
    """From here on, what the kernel before this one wrote can be read (and what it reads can be overwritten)."""
    if PDL:
        gdc_wait()


@triton.jit
def release_next_kernel(PDL: tl.constexpr):
    """Lets the next kernel start its prologue.

    Always called after ``await_prior_kernel``: so a running kernel knows that every kernel but the last one before it
    has completed, and may read their results without waiting.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def scaled(acc, scale):
    """acc * scale, rounded before anything is added to it.

    The compiler would make one instruction of a product and the bias behind it, but not where the lanes of LoRA come
    between the two: rows without adapter would have other bits in a batch with adapters.
    """
    return tl.fma(acc, scale, 0.0)


@triton.jit
def zero_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr):
    """Sums of BLOCK_M rows and BLOCK_N columns; ``SWAPPED``: of BLOCK_N rows."""
    if SWAPPED:
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return zeros


@triton.jit
def add_product(x, w, acc, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x [m, k] times w [n, k]; ``SWAPPED``: w is the left operand."""
    if SWAPPED:
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def activate(gate, up, KIND: tl.constexpr, GATED: tl.constexpr, alpha, limit):
    """h = kind(gate) * up in float32; ungated: kind(gate). The reference: core/activation.py."""
    if KIND == SILU_SOFTCAPPED:
        capped = alpha * tanh(gate / alpha) / (1.0 + tl.exp(-gate))
        return capped * limit * tanh(up / limit)
    if KIND == CLAMPED_SILU:
        return tl.minimum(gate / (1.0 + tl.exp(-gate)), limit) * tl.minimum(tl.maximum(up, -limit), limit)
    if (KIND == SWIGLU_OAI) | (KIND == SILU_CLAMPED):
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if KIND == SWIGLU_OAI:
        return (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate))
    if (KIND == SILU) | (KIND == SILU_CLAMPED):
        h = gate / (1.0 + tl.exp(-gate))
    elif KIND == GELU:
        h = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == GELU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        h = gate * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * inner)))
    else:
        positive = tl.maximum(gate, 0.0)
        h = positive * positive
    if GATED:
        h = h * up
    return h
