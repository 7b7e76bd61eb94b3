"""The arithmetic of Triton's interpreter, made that of a GPU.

The interpreter keeps bfloat16 as bit patterns in ``uint16`` arrays, and Triton up to 3.9 calculates
with the bit patterns: products, comparisons and sums are wrong without a word, and casts truncate.
Here each operation widens to float32, which is exact, and rounds its result to nearest even.
"""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpreterBuilder,
    ReduceOps,
    ReduceScanOpInterface,
    ScanOps,
    TensorHandle,
)

from patchpack._interpreter import execute, replaced


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Within this context the interpreter calculates rightly; a Triton that does is left alone."""
    if _stock_is_right():
        yield
        return
    with (
        replaced(interpreter.interpreter_builder, "__class__", Builder),
        replaced(interpreter, "ReduceOps", Reduce),
        replaced(interpreter, "ScanOps", Scan),
    ):
        yield


@functools.cache
def _stock_is_right() -> bool:
    """Whether the installed interpreter, asked to calculate with bfloat16, gets it right."""
    a, b = (
        torch.arange(-128, 384, device="cpu")
        .mul(3)
        .remainder(31)
        .sub(15)
        .div(8)
        .bfloat16()
        .view(2, 16, 16)
    )
    expected = torch.stack(
        [
            (a.float() @ b.float()).bfloat16(),
            a * b - a,
            torch.where(a < b, a, b),
            (a.float() / 3).bfloat16(),
            a.sum(1, keepdim=True).expand_as(a),
            torch.addcmul(a.double(), a.double(), b.double()).bfloat16(),
        ]
    )
    out = torch.empty_like(expected)
    try:
        execute(_probe_kernel, (1,), (a, b, out), {})
    except interpreter.InterpreterError:
        return False
    return torch.equal(out, expected)


@triton.jit
def _probe_kernel(a_ptr, b_ptr, out_ptr):
    tile = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(a_ptr + tile)
    b = tl.load(b_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(a, b))
    tl.store(out_ptr + 256 + tile, a * b - a)
    tl.store(out_ptr + 512 + tile, tl.where(a < b, a, b))
    tl.store(out_ptr + 768 + tile, a.to(tl.float32) / 3)
    tl.store(out_ptr + 1024 + tile, tl.sum(a, axis=1)[:, None] + tl.zeros_like(a))
    one = tl.program_id(0) == 0
    tl.store(out_ptr + 1280 + tile, tl.fma(a, b, a), mask=(tile < 256) & one)


class Builder(InterpreterBuilder):
    """The interpreter's operations."""

    def get_bf16(self, value):
        return _rounded(self.get_fp32(value).data)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return _rounded(_widened(src).data)
        return super().cast_impl(_widened(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar not in (tl.float16, tl.bfloat16) or src.dtype.primitive_bitwidth < 32:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        result = self.cast_impl(src, dst_type)
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            away = np.abs(_widened(result).data) > np.abs(src.data)
            bits = result.data.view(np.uint16) - away  # one unit in the last place nearer to zero
            result.data = bits.astype(np.uint16).view(result.data.dtype)
        return result

    def unary_op(self, arg, op):
        result = super().unary_op(_widened(arg), op)
        return _rounded(result.data) if arg.dtype.scalar == tl.bfloat16 else result

    def binary_op(self, lhs, rhs, op):
        result = super().binary_op(_widened(lhs), _widened(rhs), op)
        if result.data.dtype == np.bool_:  # else a mask of one would be cast to what was compared
            return TensorHandle(result.data, tl.int1)
        return _rounded(result.data) if lhs.dtype.scalar == tl.bfloat16 else result

    # A number beats NaN, unless the caller asks for propagation.
    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_umulhi(self, lhs, rhs):
        bits = [TensorHandle(h.data.view(f"u{h.data.itemsize}"), h.dtype) for h in (lhs, rhs)]
        result = super().create_umulhi(*bits)
        return TensorHandle(result.data.view(lhs.data.dtype), lhs.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return super().create_dot(
            _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc
        )

    def create_fma(self, x, y, z):
        if z.dtype.scalar == tl.float64:
            return super().create_fma(x, y, z)
        x, y, addend = (_widened(h).data.astype(np.float64) for h in (x, y, z))
        product = x * y  # exact
        total = product + addend
        shifted = total - product
        error = (product - (total - shifted)) + (addend - shifted)
        return self.cast_impl(TensorHandle(_to_odd(total, error), tl.float64), z.dtype)


class _Widened(ReduceScanOpInterface):
    """A reduction or scan of bfloat16 that runs in float32 and rounds its results once."""

    def apply_impl(self, inputs):
        cast = interpreter.interpreter_semantic.cast
        wide = tuple(cast(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in inputs)
        results = super().apply_impl(wide)
        results = results if isinstance(results, list | tuple) else [results]
        return [cast(result, x.dtype) for result, x in zip(results, inputs, strict=False)]


class Reduce(_Widened, ReduceOps):
    """The interpreter's reductions."""

    def min_max(self, inputs, val_reduce_op, idx_reduce_op=None):
        # the same values, without a warning where all are NaN
        quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
        return super().min_max(inputs, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)


class Scan(_Widened, ScanOps):
    """The interpreter's scans."""


def _widened(handle: TensorHandle) -> TensorHandle:
    """A handle of float32 values for one of bfloat16; any other handle as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> TensorHandle:
    """A handle of bfloat16 for numbers of any type, rounded to nearest even."""
    single = np.asarray(values, dtype=np.float32)
    if values.dtype == np.float64:
        single = _to_odd(single, values - single)
    bits = single.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(single), 0x7FFF, nearest).astype(np.uint16), tl.bfloat16)


def _to_odd(values: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Round to odd: the rounded ``values``, whose exact values are ``values + error``.

    Rounding the result once more, to a type with fewer bits, gives what one rounding of the exact
    value gives (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
    """
    even = values.view(f"u{values.itemsize}") & 1 == 0
    neighbour = np.nextafter(values, np.copysign(np.inf, error).astype(values.dtype))
    return np.where(even & (np.abs(error) > 0), neighbour, values)
