"""Triton kernels of ``patchpack.ops.assemble``; the maths is in its reference.

A learned vector in the sequence is a map of one row without columns, and the vector is what ends
the row, so that it needs no code of its own.

A program goes through all channels of its tokens, so that what the layout says of a token is read
and worked out once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._resample import find_readers, find_taps, matrix_entry, weight_at
from patchpack.kernels._sums import sum_rows
from patchpack.kernels._tiles import (
    compiler_options,
    find_grid,
    last_contiguous,
    row_ptrs,
    stride_unit,
)

_COLUMNS = tl.constexpr(13)  # of `TokenLayout.table`


@triton.jit
def _tiles_of(row_ptrs):
    """First token of a part, rows and columns of its tiles, and how many stand side by side."""
    first = tl.load(row_ptrs + 1).to(tl.int32)
    tile_rows = tl.load(row_ptrs + 2).to(tl.int32)
    tile_cols = tl.load(row_ptrs + 3).to(tl.int32)
    num_beside = tl.load(row_ptrs + 5).to(tl.int32)
    return first, tile_rows, tile_cols, num_beside


@triton.jit
def _crop_of(row_ptrs):
    """Top, left, height and width of what is kept of a part."""
    top = tl.load(row_ptrs + 6).to(tl.int32)
    left = tl.load(row_ptrs + 7).to(tl.int32)
    height = tl.load(row_ptrs + 8).to(tl.int32)
    width = tl.load(row_ptrs + 9).to(tl.int32)
    return top, left, height, width


@triton.jit
def _target_of(row_ptrs):
    """First row of a part in the sequence, its rows and columns, the vector that ends a row."""
    begin = tl.load(row_ptrs)
    rows = tl.load(row_ptrs + 10).to(tl.int32)
    cols = tl.load(row_ptrs + 11).to(tl.int32)
    newline = tl.load(row_ptrs + 12).to(tl.int32)
    return begin, rows, cols, newline


@triton.jit
def _tap(
    ky, kx, start_y, start_x, top, left, height, width, first, tile_rows, tile_cols, num_beside
):  # fmt: skip
    """The token that is one of four taps, from the first of both axes."""
    y = top + tl.minimum(tl.maximum(start_y + ky, 0), height - 1)
    x = left + tl.minimum(tl.maximum(start_x + kx, 0), width - 1)
    tile = y // tile_rows * num_beside + x // tile_cols
    in_tile = y % tile_rows * tile_cols + x % tile_cols
    return first + tile * (tile_rows * tile_cols) + in_tile


@triton.jit(
    do_not_specialize=["num_parts", "search_steps", "num_tokens", "batch_rows", "stride_tokens_b"]
)
def _assemble_kernel(
    # tensors
    tokens_ptr,  # [B, R, C]
    vectors_ptr,  # [V, C]
    table_ptr,  # [P + 1, 13]
    out_ptr,  # [T, C]
    labels_ptr,  # [T] which vector, or -1
    # sizes and strides, in units of STRIDE_UNIT elements
    num_parts,
    search_steps,
    num_tokens,
    batch_rows,
    stride_tokens_b,
    stride_tokens_r,
    stride_vectors_v,
    # compile-time
    HAS_VECTORS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_T tokens of the sequence, BLOCK_C channels at a time."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens

    part = find_grid(table_ptr, num_parts, search_steps, offs_t, _COLUMNS)
    part_ptrs = table_ptr + part.to(tl.int64) * _COLUMNS
    begin, rows, cols, newline = _target_of(part_ptrs)
    first, tile_rows, tile_cols, num_beside = _tiles_of(part_ptrs)
    top, left, height, width = _crop_of(part_ptrs)
    in_part = (offs_t - begin).to(tl.int32)
    length = cols + (newline >= 0)
    row, col = in_part // length, in_part % length
    is_vector = col == cols

    first_y, _, distance_y, unit_y, size_y = find_taps(
        row, height, rows, "bilinear", False, False, NUM_TAPS=2
    )
    first_x, _, distance_x, unit_x, size_x = find_taps(
        col, width, tl.maximum(cols, 1), "bilinear", False, False, NUM_TAPS=2
    )
    nothing = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) * -1.0  # -0.0: added, it changes no bits
    absent = nothing.to(tokens_ptr.dtype.element_ty)
    out_ptrs = (out_ptr + offs_t * NUM_CHANNELS)[:, None]
    if HAS_VECTORS:
        vector_ptrs = vectors_ptr + newline.to(tl.int64) * stride_vectors_v * STRIDE_UNIT
        tl.store(labels_ptr + offs_t, tl.where(is_vector, newline, -1), mask=mask_t)
    for first_c in range(0, NUM_CHANNELS, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)[None, :]
        mask_c = offs_c < NUM_CHANNELS
        acc = nothing
        for ky in tl.static_range(2):
            weight_y = weight_at(distance_y + ky * unit_y, size_y, "bilinear", False)
            for kx in tl.static_range(2):
                weight = weight_y * weight_at(distance_x + kx * unit_x, size_x, "bilinear", False)
                token = _tap(
                    ky, kx, first_y, first_x, top, left, height, width, first, tile_rows,
                    tile_cols, num_beside,
                )  # fmt: skip
                taps = row_ptrs(
                    tokens_ptr, token, batch_rows, stride_tokens_b, stride_tokens_r, STRIDE_UNIT
                )
                read = (mask_t & ~is_vector & (weight != 0.0))[:, None] & mask_c
                values = tl.load(taps[:, None] + offs_c, mask=read, other=absent)
                acc += weight[:, None] * values.to(tl.float32)
        if HAS_VECTORS:
            read = (mask_t & is_vector)[:, None] & mask_c
            values = tl.load(vector_ptrs[:, None] + offs_c, mask=read, other=0.0)
            acc = tl.where(is_vector[:, None], values.to(tl.float32), acc)
        tl.store(out_ptrs + offs_c, acc, mask=mask_t[:, None] & mask_c)


@triton.jit(do_not_specialize=["num_maps", "search_steps", "num_tokens"])
def _assemble_bwd_kernel(
    # tensors
    grad_ptr,  # [T, C]
    table_ptr,  # [P + 1, 13]
    maps_ptr,  # [M + 1, 3]
    grad_tokens_ptr,  # [N, C]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_maps,
    search_steps,
    num_tokens,
    stride_grad_t,
    # compile-time
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program gathers the gradient of BLOCK_T tokens of maps, BLOCK_C channels at a time."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens

    map_ptrs = maps_ptr + find_grid(maps_ptr, num_maps, search_steps, offs_t).to(tl.int64) * 3
    part_ptrs = table_ptr + tl.load(map_ptrs + 1) * _COLUMNS
    begin, out_rows, out_cols, newline = _target_of(part_ptrs)
    first, tile_rows, tile_cols, num_beside = _tiles_of(part_ptrs)
    top, left, height, width = _crop_of(part_ptrs)
    in_map = (offs_t - first).to(tl.int32)
    tile = in_map // (tile_rows * tile_cols)
    in_tile = in_map % (tile_rows * tile_cols)
    row = tile // num_beside * tile_rows + in_tile // tile_cols - top
    col = tile % num_beside * tile_cols + in_tile % tile_cols - left
    is_read = mask_t & (in_map >= 0) & (in_map < tl.load(map_ptrs + 2))
    is_read = is_read & (row >= 0) & (row < height) & (col >= 0) & (col < width)

    first_y, count_y, distance_y, slope_y, unit_y, size_y = find_readers(
        row, height, out_rows, "bilinear", False, False
    )
    first_x, count_x, distance_x, slope_x, unit_x, size_x = find_readers(
        col, width, out_cols, "bilinear", False, False
    )
    length = out_cols + (newline >= 0)
    num_y = tl.max(tl.where(is_read, count_y, 0))
    num_x = tl.max(tl.where(is_read, count_x, 0))
    grad_tokens_ptrs = (grad_tokens_ptr + offs_t * NUM_CHANNELS)[:, None]
    # grad_tokens[i, j] = sum_{o, p} Wh[o, i] Ww[p, j] grad[o, p]
    for first_c in range(0, NUM_CHANNELS, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)[None, :]
        mask_c = offs_c < NUM_CHANNELS
        acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for ky in range(num_y):
            out_y = first_y + ky
            weight_y = matrix_entry(
                out_y, row, height, out_rows, distance_y - ky * slope_y, unit_y, size_y, "bilinear",
                False, NUM_TAPS=2,
            )  # fmt: skip
            weight_y = tl.where(is_read & (out_y < out_rows), weight_y, 0.0)
            for kx in range(num_x):
                out_x = first_x + kx
                weight_x = matrix_entry(
                    out_x, col, width, out_cols, distance_x - kx * slope_x, unit_x, size_x,
                    "bilinear", False, NUM_TAPS=2,
                )  # fmt: skip
                weight = tl.where(out_x < out_cols, weight_y * weight_x, 0.0)
                readers = begin + out_y * length + out_x
                grad_ptrs = grad_ptr + readers * stride_grad_t * STRIDE_UNIT
                mask = (weight[:, None] != 0.0) & mask_c
                grad = tl.load(grad_ptrs[:, None] + offs_c, mask=mask, other=0.0)
                acc += weight[:, None] * grad.to(tl.float32)
        tl.store(grad_tokens_ptrs + offs_c, acc, mask=mask_t[:, None] & mask_c)


def _tile(x: Tensor) -> tuple[int, int]:
    """Tokens and channels of a tile: 8 KiB, at most one token a thread."""
    block_c = min(triton.next_power_of_2(x.shape[-1]), 256)
    return min(8192 // x.element_size() // block_c, 128), block_c


def assemble(
    tokens: Tensor, vectors: Tensor | None, table: Tensor, maps: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    num_channels = tokens.shape[2]
    out = tokens.new_empty(num_tokens, num_channels)
    labels = tokens.new_empty(0 if vectors is None else num_tokens, dtype=torch.int32)
    if num_tokens == 0:
        return out, labels
    num_parts = table.shape[0] - 1
    tokens = last_contiguous(tokens)
    given = tokens[0] if vectors is None else last_contiguous(vectors)
    unit = stride_unit(tokens, given)
    block_t, block_c = _tile(tokens)
    _assemble_kernel[(triton.cdiv(num_tokens, block_t),)](
        tokens,
        given,
        table,
        out,
        labels,
        num_parts,
        max(num_parts - 1, 0).bit_length(),
        num_tokens,
        max(tokens.shape[1], 1),
        tokens.stride(0) // unit,
        tokens.stride(1) // unit,
        given.stride(0) // unit,
        HAS_VECTORS=vectors is not None,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
    return out, labels


def assemble_bwd(
    grad: Tensor,
    labels: Tensor,
    table: Tensor,
    maps: Tensor,
    num_tiles: int,
    tile_size: int,
    num_vectors: int,
) -> tuple[Tensor, Tensor]:
    num_channels = grad.shape[1]
    grad_tokens = grad.new_empty(num_tiles, tile_size, num_channels)
    grad = last_contiguous(grad)
    if grad_tokens.numel() > 0:
        num_tokens, num_maps = num_tiles * tile_size, maps.shape[0] - 1
        unit = stride_unit(grad)
        block_t, block_c = _tile(grad)
        _assemble_bwd_kernel[(triton.cdiv(num_tokens, block_t),)](
            grad,
            table,
            maps,
            grad_tokens,
            num_maps,
            max(num_maps - 1, 0).bit_length(),
            num_tokens,
            grad.stride(0) // unit,
            NUM_CHANNELS=num_channels,
            STRIDE_UNIT=unit,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            num_warps=4,
            **compiler_options(),
        )
    return grad_tokens, sum_rows(grad[None], labels, num_vectors)
