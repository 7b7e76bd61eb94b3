"""Sums of rows by label, in an order that lengths alone decide: gradients of learned vectors.

Rows are few among many, so a program looks for those of its label in a piece of the sequence and
reads no others; a second launch adds up the pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import compiler_options, last_contiguous, row_ptrs, stride_unit

_ROWS_A_PIECE = 256
_MOST_PIECES = 128


@triton.jit(do_not_specialize=["batch_rows", "num_rows", "piece_rows", "num_pieces", "stride_x_b"])
def _sum_pieces_kernel(
    # tensors
    x_ptr,  # [B, R, C]
    labels_ptr,  # [B R]
    pieces_ptr,  # [V, P, C] float32
    # sizes and strides, in units of STRIDE_UNIT elements
    batch_rows,
    num_rows,
    piece_rows,
    num_pieces,
    stride_x_b,
    stride_x_r,
    # compile-time
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program sums BLOCK_C channels of the rows of one label in one piece."""
    pid = tl.program_id(0).to(tl.int64)
    offs_c = pid % tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    label_piece = pid // tl.cdiv(NUM_CHANNELS, BLOCK_C)
    label, piece = label_piece // num_pieces, label_piece % num_pieces
    begin = piece * piece_rows
    end = tl.minimum(begin + piece_rows, num_rows)
    mask_c = offs_c < NUM_CHANNELS

    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(begin, end, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        found = tl.load(labels_ptr + offs_r, mask=offs_r < end, other=-1) == label
        x_ptrs = row_ptrs(x_ptr, offs_r, batch_rows, stride_x_b, stride_x_r, STRIDE_UNIT)
        mask = found[:, None] & mask_c[None, :]
        acc += tl.load(x_ptrs[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(pieces_ptr + label_piece * NUM_CHANNELS + offs_c, tl.sum(acc, axis=0), mask=mask_c)


@triton.jit(do_not_specialize=["num_pieces"])
def _add_pieces_kernel(
    # tensors
    pieces_ptr,  # [V, P, C] float32
    out_ptr,  # [V, C]
    # sizes
    num_pieces,
    # compile-time
    NUM_CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds up BLOCK_C channels of the pieces of one label."""
    pid = tl.program_id(0).to(tl.int64)
    offs_c = pid % tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    label = pid // tl.cdiv(NUM_CHANNELS, BLOCK_C)
    mask_c = offs_c < NUM_CHANNELS

    pieces_ptrs = pieces_ptr + label * num_pieces * NUM_CHANNELS + offs_c[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, num_pieces, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_pieces)[:, None] & mask_c[None, :]
        acc += tl.load(pieces_ptrs + offs_p[:, None] * NUM_CHANNELS, mask=mask, other=0.0)
    tl.store(out_ptr + label * NUM_CHANNELS + offs_c, tl.sum(acc, axis=0), mask=mask_c)


def sum_rows(x: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Of each label the sum of its rows of ``x`` ``[B, R, C]``: ``[num_labels, C]``."""
    num_channels = x.shape[2]
    out = x.new_empty(num_labels, num_channels)
    if out.numel() == 0:
        return out
    num_rows = labels.shape[0]
    num_pieces = min(max(triton.cdiv(num_rows, _ROWS_A_PIECE), 1), _MOST_PIECES)
    pieces = x.new_empty(num_labels, num_pieces, num_channels, dtype=torch.float32)
    x = last_contiguous(x)
    unit = stride_unit(x)
    block_c = min(triton.next_power_of_2(num_channels), 128)
    num_blocks = num_labels * triton.cdiv(num_channels, block_c)
    _sum_pieces_kernel[(num_blocks * num_pieces,)](
        x,
        labels,
        pieces,
        x.shape[1],
        num_rows,
        triton.cdiv(num_rows, num_pieces),
        num_pieces,
        x.stride(0) // unit,
        x.stride(1) // unit,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_R=32,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
    _add_pieces_kernel[(num_blocks,)](
        pieces,
        out,
        num_pieces,
        NUM_CHANNELS=num_channels,
        BLOCK_P=16,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
    return out
