"""Triton kernels of ``patchpack.ops.interpolate_tokens``; the maths is in its reference.

All modes are one formula. An axis has integers ``slope``, ``offset`` and ``unit`` such that output
``o`` looks at the coordinate ``(slope * o + offset) / unit`` of the input. Input ``i`` is then
``i * unit - (slope * o + offset)`` away from it, and its weight is a function of this distance that
is zero from some ``reach`` on. Solved for ``i``, that is what an output reads; solved for ``o``, it
is who reads an input, where its gradient comes from. Coordinates and distances are exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import (
    cell_to_token,
    compiler_options,
    divide,
    find_grid,
    token_to_cell,
)


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
def _weight(distance, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr):
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
def _taps(
    o, num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
):  # fmt: skip
    """First input that output ``o`` reads and their number; its distance, the step, filter size."""
    slope, offset, unit, size = _axis(num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS)
    center = slope.to(tl.int64) * o + offset
    if MODE == "nearest":
        center = _nearest(o, num_in, num_out).to(tl.int64) * unit
    if NUM_TAPS > 0:
        first = ((center + unit) // unit).to(tl.int32) - (NUM_TAPS + 1) // 2
        count = NUM_TAPS
    else:
        first, count = _span(center, size, unit, num_in, MODE)
    distance = first.to(tl.int64) * unit - center
    return first, count, distance.to(tl.float32), unit.to(tl.float32), size.to(tl.float32)


@triton.jit
def _readers(
    i, num_in, num_out, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):  # fmt: skip
    """First output that may read input ``i`` and their number; its distance, steps, filter size."""
    slope, offset, unit, size = _axis(num_in, num_out, MODE, ALIGN_CORNERS, ANTIALIAS)
    center = i.to(tl.int64) * unit - offset
    first, count = _span(center, size, tl.maximum(slope, 1), num_out, MODE)
    distance = (center - first.to(tl.int64) * slope).to(tl.float32)
    return first, count, distance, slope.to(tl.float32), unit.to(tl.float32), size.to(tl.float32)


@triton.jit
def _entry(
    o, i, num_in, num_out, distance, unit, size, MODE: tl.constexpr, ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
):  # fmt: skip
    """``W[o, i]`` at this distance, up to the factor that normalises row ``o``."""
    if MODE == "nearest":
        return tl.where(_nearest(o, num_in, num_out) == i, 1.0, 0.0)
    weight = _weight(distance, size, MODE, ANTIALIAS)
    for k in tl.static_range(1, NUM_TAPS // 2 + 1):  # what lies past a border counts for it
        before = _weight(distance - k * unit, size, MODE, ANTIALIAS)
        after = _weight(distance + k * unit, size, MODE, ANTIALIAS)
        weight += tl.where(i == 0, before, 0.0) + tl.where(i == num_in - 1, after, 0.0)
    return weight


@triton.jit
def _locate(tokens, geometry_ptr, other_geometry_ptr, num_grids, search_steps, MERGE: tl.constexpr):
    """Place of tokens in their frame, its sizes here and there, and its first token there."""
    grid = find_grid(geometry_ptr, num_grids, search_steps, tokens)
    rows = tl.load(geometry_ptr + grid * 3 + 1).to(tl.int32)
    cols = tl.load(geometry_ptr + grid * 3 + 2).to(tl.int32)
    other_rows = tl.load(other_geometry_ptr + grid * 3 + 1).to(tl.int32)
    other_cols = tl.load(other_geometry_ptr + grid * 3 + 2).to(tl.int32)
    in_grid = (tokens - tl.load(geometry_ptr + grid * 3)).to(tl.int32)
    frame = in_grid // (rows * cols)
    in_frame = in_grid % (rows * cols)
    row, col = token_to_cell(in_frame, cols, MERGE)
    start = tl.load(other_geometry_ptr + grid * 3) + frame * (other_rows * other_cols)
    return in_frame, row, col, rows, cols, other_rows, other_cols, start


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_tokens"])
def _resize_kernel(
    # tensors
    x_ptr,  # [T, C]
    geometry_ptr,  # [G + 1, 3]
    target_geometry_ptr,  # [G + 1, 3]
    out_ptr,  # [T', C]
    saved_ptr,  # [T', C] where the maximum is, or [T'] what normalises
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_tokens,
    stride_x_t,
    # compile-time
    MODE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    NORMALISED: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    MERGE: tl.constexpr,
    TARGET_MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_C channels of BLOCK_T tokens of ``out``."""
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % tl.cdiv(NUM_CHANNELS, BLOCK_C)
    offs_t = pid // tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_t = offs_t < num_tokens
    mask = mask_t[:, None] & (offs_c < NUM_CHANNELS)[None, :]

    _, row, col, out_rows, out_cols, rows, cols, start = _locate(
        offs_t, target_geometry_ptr, geometry_ptr, num_grids, search_steps, TARGET_MERGE
    )
    first_y, count_y, distance_y, unit_y, size_y = _taps(
        row, rows, out_rows, MODE, ALIGN_CORNERS, ANTIALIAS, NUM_TAPS
    )
    first_x, count_x, distance_x, unit_x, size_x = _taps(
        col, cols, out_cols, MODE, ALIGN_CORNERS, ANTIALIAS, NUM_TAPS
    )
    if NUM_TAPS > 0:
        num_y: tl.constexpr = NUM_TAPS
        num_x: tl.constexpr = NUM_TAPS
    else:
        num_y = tl.max(count_y)
        num_x = tl.max(count_x)

    x_ptrs = x_ptr + start * stride_x_t * STRIDE_UNIT
    UNROLL: tl.constexpr = max(NUM_TAPS, 1)
    LEAST: tl.constexpr = float("-inf") if MODE == "max" else 0.0
    acc = tl.full((BLOCK_T, BLOCK_C), LEAST, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    argmax = tl.broadcast_to(
        cell_to_token(first_y, first_x, cols, MERGE)[:, None], (BLOCK_T, BLOCK_C)
    )
    for ky in range(num_y):
        weight_y = _weight(distance_y + ky * unit_y, size_y, MODE, ANTIALIAS)
        tap_y = first_y + ky
        if NUM_TAPS > 0:  # what lies past a border is the border
            tap_y = tl.minimum(tl.maximum(tap_y, 0), rows - 1)
        if NORMALISED:  # many taps: row by row, so that float32 sums few numbers at a time
            row_acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            row_total = tl.zeros((BLOCK_T,), tl.float32)
        for kx in tl.range(0, num_x, loop_unroll_factor=UNROLL):
            weight_x = _weight(distance_x + kx * unit_x, size_x, MODE, ANTIALIAS)
            tap_x = first_x + kx
            if NUM_TAPS > 0:
                tap_x = tl.minimum(tl.maximum(tap_x, 0), cols - 1)
            else:
                weight_x = tl.where((tap_y < rows) & (tap_x < cols), weight_x, 0.0)
            weight = weight_y * weight_x
            token = cell_to_token(tap_y, tap_x, cols, MERGE)
            taps = x_ptrs + token.to(tl.int64) * stride_x_t * STRIDE_UNIT
            inside = mask & (weight[:, None] != 0.0)
            x = tl.load(taps[:, None] + offs_c[None, :], mask=inside, other=LEAST).to(tl.float32)
            if MODE == "max":  # the first one wins, and NaN wins over numbers
                wins = (x > acc) | (x != x)
                acc = tl.where(wins, x, acc)
                argmax = tl.where(wins, token[:, None], argmax)
            elif NORMALISED:
                row_acc += weight_x[:, None] * x
                row_total += weight_x
            else:
                acc += weight[:, None] * x
        if NORMALISED:
            acc += weight_y[:, None] * row_acc
            total += weight_y * row_total

    out_ptrs = offs_t[:, None] * NUM_CHANNELS + offs_c[None, :]
    if NORMALISED:
        scale = tl.div_rn(1.0, total)
        acc *= scale[:, None]
        tl.store(saved_ptr + offs_t, scale, mask=mask_t & (pid_c == 0))
    if MODE == "max":
        tl.store(saved_ptr + out_ptrs, argmax, mask=mask)
    tl.store(out_ptr + out_ptrs, acc, mask=mask)


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_tokens"])
def _resize_bwd_kernel(
    # tensors
    grad_ptr,  # [T', C]
    geometry_ptr,  # [G + 1, 3]
    target_geometry_ptr,  # [G + 1, 3]
    grad_x_ptr,  # [T, C]
    saved_ptr,  # [T', C] or [T'], from the forward pass
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_tokens,
    stride_grad_t,
    # compile-time
    MODE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    NORMALISED: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    MERGE: tl.constexpr,
    TARGET_MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program gathers BLOCK_C channels of the gradient of BLOCK_T tokens of ``x``."""
    pid = tl.program_id(0).to(tl.int64)
    pid_c = pid % tl.cdiv(NUM_CHANNELS, BLOCK_C)
    offs_t = pid // tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_t = offs_t < num_tokens
    mask_c = (offs_c < NUM_CHANNELS)[None, :]

    in_frame, row, col, rows, cols, out_rows, out_cols, start = _locate(
        offs_t, geometry_ptr, target_geometry_ptr, num_grids, search_steps, MERGE
    )
    first_y, count_y, distance_y, slope_y, unit_y, size_y = _readers(
        row, rows, out_rows, MODE, ALIGN_CORNERS, ANTIALIAS
    )
    first_x, count_x, distance_x, slope_x, unit_x, size_x = _readers(
        col, cols, out_cols, MODE, ALIGN_CORNERS, ANTIALIAS
    )

    grad_ptrs = grad_ptr + start * stride_grad_t * STRIDE_UNIT
    saved_ptrs = saved_ptr + (start * NUM_CHANNELS if MODE == "max" else start)
    # grad_x[i, j] = sum_{o, p} Wh[o, i] Ww[p, j] grad[o, p]
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for ky in range(tl.max(count_y)):
        out_y = first_y + ky
        weight_y = _entry(
            out_y, row, rows, out_rows, distance_y - ky * slope_y, unit_y, size_y, MODE, ANTIALIAS,
            NUM_TAPS,
        )  # fmt: skip
        weight_y = tl.where(mask_t & (out_y < out_rows), weight_y, 0.0)
        for kx in range(tl.max(count_x)):
            out_x = first_x + kx
            weight_x = _entry(
                out_x, col, cols, out_cols, distance_x - kx * slope_x, unit_x, size_x, MODE,
                ANTIALIAS, NUM_TAPS,
            )  # fmt: skip
            weight = tl.where(out_x < out_cols, weight_y * weight_x, 0.0)
            token = cell_to_token(out_y, out_x, out_cols, TARGET_MERGE).to(tl.int64)
            if NORMALISED:
                weight *= tl.load(saved_ptrs + token, mask=weight != 0.0, other=0.0)
            readers = grad_ptrs + token * stride_grad_t * STRIDE_UNIT
            mask = (weight[:, None] != 0.0) & mask_c
            grad = tl.load(readers[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            if MODE == "max":
                readers = saved_ptrs + token * NUM_CHANNELS
                argmax = tl.load(readers[:, None] + offs_c[None, :], mask=mask, other=-1)
                grad = tl.where(argmax == in_frame[:, None], grad, 0.0)
            acc += weight[:, None] * grad

    grad_x_ptrs = grad_x_ptr + offs_t[:, None] * NUM_CHANNELS + offs_c[None, :]
    tl.store(grad_x_ptrs, acc, mask=mask_t[:, None] & mask_c)


def resize(
    x: Tensor,
    geometry: Tensor,
    target_geometry: Tensor,
    num_tokens: int,
    spatial_merge_size: int,
    target_merge_size: int,
    mode: str,
    align_corners: bool,
    antialias: bool,
) -> tuple[Tensor, Tensor]:
    options = (spatial_merge_size, target_merge_size, mode, align_corners, antialias)
    out = x.new_empty(num_tokens, x.shape[1])
    if mode == "max":
        saved = x.new_empty(out.shape, dtype=torch.int32)
    else:
        normalised = antialias or mode == "area"
        saved = x.new_empty(num_tokens if normalised else 0, dtype=torch.float32)
    _launch(_resize_kernel, x, geometry, target_geometry, out, saved, *options)
    return out, saved


def resize_bwd(
    grad: Tensor,
    saved: Tensor,
    geometry: Tensor,
    target_geometry: Tensor,
    num_tokens: int,
    *options,
) -> Tensor:
    grad_x = grad.new_empty(num_tokens, grad.shape[1])
    _launch(_resize_bwd_kernel, grad, geometry, target_geometry, grad_x, saved, *options)
    return grad_x


def _launch(
    kernel,
    x: Tensor,
    geometry: Tensor,
    target_geometry: Tensor,
    out: Tensor,
    saved: Tensor,
    spatial_merge_size: int,
    target_merge_size: int,
    mode: str,
    align_corners: bool,
    antialias: bool,
) -> None:
    """Launch ``kernel`` on tiles of at most 4096 elements of ``out``."""
    if out.numel() == 0:
        return
    num_tokens, num_channels = out.shape
    num_grids = geometry.shape[0] - 1
    x = x if x.stride(-1) == 1 else x.contiguous()
    unit = 8 if x.stride(0) % 8 == 0 else 1
    block_c = min(triton.next_power_of_2(num_channels), 128)
    block_t = min(4096 // block_c, 128)  # one token a thread
    kernel[(triton.cdiv(num_tokens, block_t) * triton.cdiv(num_channels, block_c),)](
        x,
        geometry,
        target_geometry,
        out,
        saved,
        num_grids,
        max(num_grids - 1, 0).bit_length(),
        num_tokens,
        x.stride(0) // unit,
        MODE=mode,
        ALIGN_CORNERS=align_corners,
        ANTIALIAS=antialias,
        NORMALISED=antialias or mode == "area",
        NUM_TAPS=0 if antialias else {"nearest": 1, "bilinear": 2, "bicubic": 4}.get(mode, 0),
        MERGE=spatial_merge_size,
        TARGET_MERGE=target_merge_size,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
