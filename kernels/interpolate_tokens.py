"""Triton kernels of ``patchpack.ops.interpolate_tokens``; the maths is in its reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._resample import (
    find_readers,
    find_taps,
    matrix_entry,
    num_taps,
    weight_at,
)
from patchpack.kernels._tiles import (
    cell_to_token,
    compiler_options,
    last_contiguous,
    locate,
    row_tiles,
    stride_unit,
)


@triton.jit
def _locate(tokens, geometry_ptr, other_geometry_ptr, num_grids, search_steps, MERGE: tl.constexpr):
    """Place of tokens in their frame, its sizes here and there, and its first token there."""
    grid, frame, in_frame, row, col, rows, cols = locate(
        geometry_ptr, num_grids, search_steps, tokens, MERGE
    )
    other_rows = tl.load(other_geometry_ptr + grid * 3 + 1).to(tl.int32)
    other_cols = tl.load(other_geometry_ptr + grid * 3 + 2).to(tl.int32)
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
    first_y, count_y, distance_y, unit_y, size_y = find_taps(
        row, rows, out_rows, MODE, ALIGN_CORNERS, ANTIALIAS, NUM_TAPS
    )
    first_x, count_x, distance_x, unit_x, size_x = find_taps(
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
        weight_y = weight_at(distance_y + ky * unit_y, size_y, MODE, ANTIALIAS)
        tap_y = first_y + ky
        if NUM_TAPS > 0:  # what lies past a border is the border
            tap_y = tl.minimum(tl.maximum(tap_y, 0), rows - 1)
        if NORMALISED:  # many taps: row by row, so that float32 sums few numbers at a time
            row_acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            row_total = tl.zeros((BLOCK_T,), tl.float32)
        for kx in tl.range(0, num_x, loop_unroll_factor=UNROLL):
            weight_x = weight_at(distance_x + kx * unit_x, size_x, MODE, ANTIALIAS)
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
    first_y, count_y, distance_y, slope_y, unit_y, size_y = find_readers(
        row, rows, out_rows, MODE, ALIGN_CORNERS, ANTIALIAS
    )
    first_x, count_x, distance_x, slope_x, unit_x, size_x = find_readers(
        col, cols, out_cols, MODE, ALIGN_CORNERS, ANTIALIAS
    )

    grad_ptrs = grad_ptr + start * stride_grad_t * STRIDE_UNIT
    saved_ptrs = saved_ptr + (start * NUM_CHANNELS if MODE == "max" else start)
    # grad_x[i, j] = sum_{o, p} Wh[o, i] Ww[p, j] grad[o, p]
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for ky in range(tl.max(count_y)):
        out_y = first_y + ky
        weight_y = matrix_entry(
            out_y, row, rows, out_rows, distance_y - ky * slope_y, unit_y, size_y, MODE, ANTIALIAS,
            NUM_TAPS,
        )  # fmt: skip
        weight_y = tl.where(mask_t & (out_y < out_rows), weight_y, 0.0)
        for kx in range(tl.max(count_x)):
            out_x = first_x + kx
            weight_x = matrix_entry(
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
    """Launch ``kernel`` on tiles of ``out``."""
    if out.numel() == 0:
        return
    num_tokens, num_channels = out.shape
    num_grids = geometry.shape[0] - 1
    x = last_contiguous(x)
    unit = stride_unit(x)
    grid, block_t, block_c = row_tiles(num_tokens, num_channels)
    kernel[grid](
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
        NUM_TAPS=num_taps(mode, antialias),
        MERGE=spatial_merge_size,
        TARGET_MERGE=target_merge_size,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
