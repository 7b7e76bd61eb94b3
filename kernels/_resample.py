"""Weights of resized maps, used by kernels that resize; the maths is in the references.

All modes are one formula. An axis has integers ``slope``, ``offset`` and ``unit`` such that output
``o`` looks at the coordinate ``(slope * o + offset) / unit`` of the input. Input ``i`` is then
``i * unit - (slope * o + offset)`` away from it, and its weight is a function of this distance that
is zero from some ``reach`` on. Solved for ``i``, that is what an output reads; solved for ``o``, it
is who reads an input, where its gradient comes from. Coordinates and distances are exact.
"""

import triton
import triton.language as tl

from patchpack.kernels._tiles import divide


@triton.jit
def _axis(
    num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):  # fmt: skip
    """Slope, offset and unit of an axis, and the distance that counts as 1 in its filter."""
    slope, offset, unit = 2 * num_in, num_in - num_out, 2 * num_out
    if ALIGN_CORNERS:
        single = num_out == 1
        slope = tl.where(single, 0, slope - 2)
        unit = tl.where(single, 2, unit - 2)
        if ANTIALIAS:  # torch looks half a step ahead even so
            offset = tl.where(single, -1, offset)
        else:
            offset = tl.zeros_like(offset)
    size = unit
    if ANTIALIAS:
        size = tl.maximum(slope, unit)
    elif MODE != "bilinear" and MODE != "bicubic":
        size = (slope + unit) // 2  # cells overlap
    return slope, offset, unit, size


@triton.jit
def _nearest(o, num_in, num_out):
    """The input that output ``o`` copies, rounded as torch rounds it, in float32."""
    scale = tl.div_rn(num_in.to(tl.float32), num_out.to(tl.float32))
    return tl.minimum((o.to(tl.float32) * scale).to(tl.int32), num_in - 1)


@triton.jit
def weight_at(distance, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Weight at a distance; up to a factor where weights are to be normalised."""
    distance = tl.abs(distance)
    if MODE == "bilinear":
        return divide(tl.maximum(size - distance, 0.0), size)
    if MODE == "bicubic":
        A: tl.constexpr = -0.5 if ANTIALIAS else -0.75
        z = divide(distance, size)
        near = 1.0 - z * z * ((A + 3) - (A + 2) * z)
        far = A * (z - 1.0) * (z - 2.0) * (z - 2.0)
        return tl.where(z < 1.0, near, tl.where(z < 2.0, far, 0.0))
    return tl.where(distance < size, 1.0, 0.0)


@triton.jit
def _span(center, size, step, count, MODE: tl.constexpr):
    """First multiple of ``step`` within reach of ``center``, and how many of ``count`` are."""
    reach = size
    if MODE == "bicubic":
        reach = 2 * size
    if MODE == "nearest":  # float32 may round to the neighbour
        reach = size + step
    first = tl.maximum(center - reach + step, 0) // step
    last = tl.minimum(tl.maximum(center + reach - 1, 0) // step, count - 1)
    return first.to(tl.int32), (last - first).to(tl.int32) + 1


@triton.jit
def _fits(num_in, num_out):
    """Whether 32 bits hold the coordinates of an axis, or of all axes of a tile."""
    cells = num_in.to(tl.float32) * num_out.to(tl.float32)
    return tl.max(cells + tl.zeros((1,), tl.float32), axis=0) < 2.0**26


@triton.jit
def _taps(
    o, num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    slope, offset, unit, size = _axis(num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS)
    center = slope.to(WORD) * o + offset
    if MODE == "nearest":
        center = _nearest(o, num_in, num_out).to(WORD) * unit
    if NUM_TAPS > 0:
        first = ((center + unit) // unit).to(tl.int32) - (NUM_TAPS + 1) // 2
        count = first  # of no use: it is NUM_TAPS
    else:
        first, count = _span(center, size, unit, num_in, MODE)
    distance = (first.to(WORD) * unit - center).to(tl.float32)
    return first, count, distance


@triton.jit
def find_taps(
    o, num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
):  # fmt: skip
    """First input that output ``o`` reads and their number; its distance, the step, filter size.

    The number is for filters whose taps are not ``NUM_TAPS``.
    """
    _, _, unit, size = _axis(num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS)
    if _fits(num_in, num_out):  # integers of 64 bits are divided in ten times as many instructions
        first, count, distance = _taps(
            o, num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS, NUM_TAPS, tl.int32
        )
    else:
        first, count, distance = _taps(
            o, num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS, NUM_TAPS, tl.int64
        )
    return first, count, distance, unit.to(tl.float32), size.to(tl.float32)


@triton.jit
def _readers(
    i, num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    slope, offset, unit, size = _axis(num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS)
    center = i.to(WORD) * unit - offset
    first, count = _span(center, size, tl.maximum(slope, 1), num_out, MODE)
    return first, count, (center - first.to(WORD) * slope).to(tl.float32)


@triton.jit
def find_readers(
    i, num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):  # fmt: skip
    """First output that may read input ``i`` and their number; its distance, steps, filter size."""
    slope, _, unit, size = _axis(num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS)
    if _fits(num_in, num_out):
        first, count, distance = _readers(
            i, num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS, tl.int32
        )
    else:
        first, count, distance = _readers(
            i, num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS, tl.int64
        )
    return first, count, distance, slope.to(tl.float32), unit.to(tl.float32), size.to(tl.float32)


@triton.jit
def matrix_entry(
    o, i, num_in, num_out, distance, unit, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr, borders=True,
):  # fmt: skip
    """``W[o, i]`` at this distance, up to the factor that normalises row ``o``.

    ``borders`` tells whether any ``i`` may be the first or the last input.
    """
    if MODE == "nearest":
        return tl.where(_nearest(o, num_in, num_out) == i, 1.0, 0.0)
    weight = weight_at(distance, size, MODE, ANTIALIAS)
    if borders:
        for k in tl.static_range(1, NUM_TAPS // 2 + 1):  # what lies past a border counts for it
            before = weight_at(distance - k * unit, size, MODE, ANTIALIAS)
            after = weight_at(distance + k * unit, size, MODE, ANTIALIAS)
            weight += tl.where(i == 0, before, 0.0) + tl.where(i == num_in - 1, after, 0.0)
    return weight


def num_taps(mode: str, antialias: bool) -> int:
    """Inputs on an axis that every output reads, or 0 where their number depends on the sizes."""
    return 0 if antialias else {"nearest": 1, "bilinear": 2, "bicubic": 4}.get(mode, 0)
