"""Triton kernels of ``patchpack.ops.add_pos_embed``; the maths is in its reference."""

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

NUM_PROGRAMS = 2048  # enough for every multiprocessor to have several at a time


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_tokens", "rows", "cols"])
def _add_kernel(
    # tensors
    x_ptr,  # [T, C]
    table_ptr,  # [rows, cols, C]
    geometry_ptr,  # [G + 1, 3]
    out_ptr,  # [T, C]
    saved_ptr,  # [T], what normalises
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_tokens,
    rows,
    cols,
    stride_x_t,
    stride_table_row,
    stride_table_col,
    # compile-time
    MODE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    MERGE: tl.constexpr,
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

    _, _, _, row, col, out_rows, out_cols = locate(
        geometry_ptr, num_grids, search_steps, offs_t, MERGE
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

    UNROLL: tl.constexpr = max(NUM_TAPS, 1)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for ky in range(num_y):
        weight_y = weight_at(distance_y + ky * unit_y, size_y, MODE, ANTIALIAS)
        tap_y = first_y + ky
        if NUM_TAPS > 0:  # what lies past a border is the border
            tap_y = tl.minimum(tl.maximum(tap_y, 0), rows - 1)
        row_ptrs = table_ptr + tap_y.to(tl.int64) * stride_table_row * STRIDE_UNIT
        if ANTIALIAS:  # many taps: row by row, so that float32 sums few numbers at a time
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
            taps = row_ptrs + tap_x.to(tl.int64) * stride_table_col * STRIDE_UNIT
            inside = mask & (weight[:, None] != 0.0)
            table = tl.load(taps[:, None] + offs_c[None, :], mask=inside, other=0.0).to(tl.float32)
            if ANTIALIAS:
                row_acc += weight_x[:, None] * table
                row_total += weight_x
            else:
                acc += weight[:, None] * table
        if ANTIALIAS:
            acc += weight_y[:, None] * row_acc
            total += weight_y * row_total
    if ANTIALIAS:
        scale = tl.div_rn(1.0, total)
        acc *= scale[:, None]
        tl.store(saved_ptr + offs_t, scale, mask=mask_t & (pid_c == 0))

    x_ptrs = x_ptr + offs_t * stride_x_t * STRIDE_UNIT
    x = tl.load(x_ptrs[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs_t[:, None] * NUM_CHANNELS + offs_c[None, :], x + acc, mask=mask)


@triton.jit(do_not_specialize=["num_grids", "grid_chunks", "frame_chunks", "rows", "cols"])
def _add_bwd_kernel(
    # tensors
    grad_ptr,  # [T, C]
    saved_ptr,  # [T], from the forward pass
    geometry_ptr,  # [G + 1, 3]
    grad_table_ptr,  # [rows, cols, C]
    partials_ptr,  # [chunks, rows, cols, C], if there is more than one
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    grid_chunks,
    frame_chunks,
    rows,
    cols,
    stride_grad_t,
    # compile-time
    MODE: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    ANTIALIAS: tl.constexpr,
    NUM_TAPS: tl.constexpr,
    MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program gathers BLOCK_C channels of BLOCK_COLS cells of a row, from a chunk of frames."""
    pid = tl.program_id(0).to(tl.int64)
    num_blocks_c = tl.cdiv(NUM_CHANNELS, BLOCK_C)
    num_blocks = tl.cdiv(cols, BLOCK_COLS) * num_blocks_c
    offs_c = pid % num_blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    col = (pid % num_blocks // num_blocks_c * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int32)
    row = (pid // num_blocks % rows).to(tl.int32)
    chunk = pid // num_blocks // rows
    mask_col = col < cols
    mask_c = (offs_c < NUM_CHANNELS)[None, :]
    borders_y = (row == 0) | (row == rows - 1)
    borders_x = tl.max(((col == 0) | (col == cols - 1)).to(tl.int32), axis=0) > 0

    # grad_table[i, j] = sum_{f, o, p} Wh[o, i] Ww[p, j] grad[f, o, p]
    acc = tl.zeros((BLOCK_COLS, BLOCK_C), tl.float32)
    lost = tl.zeros((BLOCK_COLS, BLOCK_C), tl.float32)
    for grid in range(chunk % grid_chunks, num_grids, grid_chunks):
        first = tl.load(geometry_ptr + grid * 3)
        out_rows = tl.load(geometry_ptr + grid * 3 + 1).to(tl.int32)
        out_cols = tl.load(geometry_ptr + grid * 3 + 2).to(tl.int32)
        last = tl.load(geometry_ptr + grid * 3 + 3)
        num_frames = ((last - first).to(tl.int32) // (out_rows * out_cols)).to(tl.int64)
        first_y, count_y, distance_y, slope_y, unit_y, size_y = find_readers(
            row, rows, out_rows, MODE, ALIGN_CORNERS, ANTIALIAS
        )
        if count_y > 0:  # images smaller than the table skip some of its rows
            first_x, count_x, distance_x, slope_x, unit_x, size_x = find_readers(
                col, cols, out_cols, MODE, ALIGN_CORNERS, ANTIALIAS
            )
            num_x = tl.max(count_x)
            for frame in range(chunk // grid_chunks, num_frames, frame_chunks):
                start = first + frame * (out_rows * out_cols)
                frame_acc = tl.zeros((BLOCK_COLS, BLOCK_C), tl.float32)
                for kx in range(num_x):
                    out_x = first_x + kx
                    weight_x = matrix_entry(
                        out_x, col, cols, out_cols, distance_x - kx * slope_x, unit_x, size_x,
                        MODE, ANTIALIAS, NUM_TAPS, borders_x,
                    )  # fmt: skip
                    weight_x = tl.where(mask_col & (kx < count_x), weight_x, 0.0)
                    for ky in range(count_y):
                        out_y = first_y + ky
                        weight = weight_x * matrix_entry(
                            out_y, row, rows, out_rows, distance_y - ky * slope_y, unit_y, size_y,
                            MODE, ANTIALIAS, NUM_TAPS, borders_y,
                        )  # fmt: skip
                        token = start + cell_to_token(out_y, out_x, out_cols, MERGE)
                        if ANTIALIAS:
                            scale = tl.load(saved_ptr + token, mask=weight != 0.0, other=0.0)
                            weight *= scale
                        grad_ptrs = grad_ptr + token * stride_grad_t * STRIDE_UNIT
                        mask = (weight[:, None] != 0.0) & mask_c
                        grad = tl.load(grad_ptrs[:, None] + offs_c[None, :], mask=mask, other=0.0)
                        frame_acc += weight[:, None] * grad.to(tl.float32)
                # Kahan's sum: what is lost to rounding goes into the next frame, however many
                frame_acc -= lost
                rounded = acc + frame_acc
                lost = (rounded - acc) - frame_acc
                lost = tl.where(lost == lost, lost, 0.0)  # nothing once the sum is infinite
                acc = rounded

    mask = mask_col[:, None] & mask_c
    offs = (row.to(tl.int64) * cols + col)[:, None] * NUM_CHANNELS + offs_c[None, :]
    if grid_chunks * frame_chunks == 1:
        tl.store(grad_table_ptr + offs, acc, mask=mask)
    else:
        tl.store(partials_ptr + chunk * rows * cols * NUM_CHANNELS + offs, acc, mask=mask)


def add(
    x: Tensor,
    table: Tensor,
    geometry: Tensor,
    spatial_merge_size: int,
    mode: str,
    align_corners: bool,
    antialias: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_channels = x.shape
    num_grids = geometry.shape[0] - 1
    out = x.new_empty(x.shape)
    saved = x.new_empty(num_tokens if antialias else 0, dtype=torch.float32)
    if num_tokens == 0:
        return out, saved
    x, table = last_contiguous(x), last_contiguous(table)
    unit = stride_unit(x, table)
    grid, block_t, block_c = row_tiles(num_tokens, num_channels)
    _add_kernel[grid](
        x,
        table,
        geometry,
        out,
        saved,
        num_grids,
        max(num_grids - 1, 0).bit_length(),
        num_tokens,
        table.shape[0],
        table.shape[1],
        x.stride(0) // unit,
        table.stride(0) // unit,
        table.stride(1) // unit,
        MODE=mode,
        ALIGN_CORNERS=align_corners,
        ANTIALIAS=antialias,
        NUM_TAPS=num_taps(mode, antialias),
        MERGE=spatial_merge_size,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
    return out, saved


def add_bwd(
    grad: Tensor,
    saved: Tensor,
    geometry: Tensor,
    rows: int,
    cols: int,
    table_dtype: torch.dtype,
    spatial_merge_size: int,
    mode: str,
    align_corners: bool,
    antialias: bool,
) -> Tensor:
    num_tokens, num_channels = grad.shape
    num_grids = geometry.shape[0] - 1
    grad = last_contiguous(grad)
    unit = stride_unit(grad)
    block_cols = min(triton.next_power_of_2(cols), 16)
    block_c = min(triton.next_power_of_2(num_channels), 128)
    num_blocks = rows * triton.cdiv(cols, block_cols) * triton.cdiv(num_channels, block_c)

    # a small table has few programs: several sum a part of the frames each, if that pays
    chunks = min(triton.cdiv(NUM_PROGRAMS, num_blocks), num_tokens // (4 * rows * cols))
    grid_chunks = max(min(chunks, num_grids), 1)
    frame_chunks = max(chunks // grid_chunks, 1)
    chunks = grid_chunks * frame_chunks
    grad_table = grad.new_empty(rows, cols, num_channels, dtype=table_dtype)
    partials = grad.new_empty(
        chunks if chunks > 1 else 0, rows, cols, num_channels, dtype=torch.float32
    )
    _add_bwd_kernel[(num_blocks * chunks,)](
        grad,
        saved,
        geometry,
        grad_table,
        partials,
        num_grids,
        grid_chunks,
        frame_chunks,
        rows,
        cols,
        grad.stride(0) // unit,
        MODE=mode,
        ALIGN_CORNERS=align_corners,
        ANTIALIAS=antialias,
        NUM_TAPS=num_taps(mode, antialias),
        MERGE=spatial_merge_size,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_COLS=block_cols,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
    return grad_table if chunks == 1 else grad_table.copy_(partials.sum(dim=0))
