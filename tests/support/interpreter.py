"""Triton's interpreter, several times as quick, with the same results: what it works out anew for every operation and
every call of a function is worked out once. Versions that look otherwise inside are left as they are."""

from __future__ import annotations

import builtins
import importlib.util
import os
from typing import Any


def hasten_interpreter() -> None:
    """For this process, where it interprets. May be called again."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if interpreter._patch_lang.__module__ == interpreter.__name__:
        _patch_once(interpreter, tl)
        _remember_dtypes(interpreter, tl)
        _remember_shapes(tl)
        _skip_idle_checks(interpreter)


class _Kept:
    """Instead of taking the interpreter's functions out of ``triton.language``: the next launch needs them."""

    def restore(self) -> None:
        """Nothing."""


def _patch_once(interpreter: Any, tl: Any) -> None:
    """All of ``triton.language`` is looked through once, and not at every launch and call of a device function."""
    patch_lang, known = interpreter._patch_lang, dict[int, Any]()

    def patch(fn: Any) -> _Kept:
        names = fn.__globals__
        if id(names) not in known:
            langs = frozenset(each.__name__ for each in names.values() if each is tl or each is tl.core)
            if langs not in known.values():
                patch_lang(fn)
            known[id(names)] = langs
        return _Kept()

    interpreter._patch_lang = patch


def _remember_dtypes(interpreter: Any, tl: Any) -> None:
    of, known = interpreter._get_np_dtype, dict[Any, Any]()

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(scalar, tl.pointer_type):
            return of(dtype)
        if scalar not in known:
            known[scalar] = of(scalar)
        return known[scalar]

    interpreter._get_np_dtype = np_dtype


def _remember_shapes(tl: Any) -> None:
    """Shapes of types and values: tuples of constants, which nobody changes."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types, tensors = dict[Any, Any](), dict[Any, Any]()

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = builtins.tuple([getattr(size, "value", size) for size in shape])
        if sizes in types:
            self.element_ty = element_ty
            self.shape, self.numel, prefix = types[sizes]
            self.name = f"{prefix}{element_ty}>"
            return
        make_type(self, element_ty, shape)
        if vars(self).keys() == {"element_ty", "shape", "numel", "name"} and self.name.endswith(f"{element_ty}>"):
            types[sizes] = (self.shape, self.numel, self.name.removesuffix(f"{element_ty}>"))

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = builtins.tuple(type.shape) if type.is_block() else ()
        if sizes in tensors:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = tensors[sizes]
            return
        make_tensor(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            tensors[sizes] = (self.shape, self.numel)

    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor


def _skip_idle_checks(interpreter: Any) -> None:
    """Every sum and product of integers is computed once more in 64 bits, for a check that only debugging makes."""
    semantic = interpreter.interpreter_semantic
    if not semantic.builder.options.debug:
        semantic.binary_op_sanitize_overflow_impl = lambda lhs, rhs, binary_op: None
