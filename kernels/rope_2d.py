"""Triton kernel of ``patchpack.ops.rope_2d``; the maths is in ``patchpack.reference.rope_2d``."""

from fractions import Fraction
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._rotary import (
    cos_sin,
    frequency_table,
    launch,
    load_frequencies,
    rotate_heads,
)
from patchpack.kernels._tiles import find_grids, token_to_cell


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_tokens"])
def _rotate_2d_kernel(
    # tensors
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hk, D]
    q_out_ptr,  # [T, Hq, D]
    k_out_ptr,  # [T, Hk, D]
    geometry_ptr,  # [G + 1, 3]
    table_ptr,  # [2, R]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_tokens,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    # compile-time
    MERGE: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):
    """One program turns all heads of BLOCK_T tokens. INVERSE: back (the adjoint)."""
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    offs_t = first_t + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    offs_i = tl.arange(0, BLOCK_I)

    # row and column of each token, from the sizes of the images alone
    grid = find_grids(geometry_ptr, num_grids, search_steps, first_t, BLOCK_T)
    first = tl.load(geometry_ptr + grid * 3)
    num_rows = tl.load(geometry_ptr + grid * 3 + 1).to(tl.int32)
    num_cols = tl.load(geometry_ptr + grid * 3 + 2).to(tl.int32)
    in_frame = (offs_t - first).to(tl.int32) % (num_rows * num_cols)
    row, col = token_to_cell(in_frame, num_cols, MERGE)

    # angle[t, i] = (row or col)[t] * frequency[i]
    axis, high, low = load_frequencies(
        table_ptr, offs_i[None, :], (offs_i < NUM_PAIRS)[None, :], NUM_PAIRS
    )
    cos, sin = cos_sin(tl.where(axis == 0, row[:, None], col[:, None]), high, low)
    if INVERSE:
        sin = -sin

    rotate_heads(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, stride_q_t, stride_q_h, stride_k_t, stride_k_h, offs_t,
        mask_t, cos, sin, NUM_Q_HEADS, NUM_K_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, IN_PLACE,
        STRIDE_UNIT, BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_PASS,
    )  # fmt: skip


def _pairs(num_pairs: int, axes: str) -> list[tuple[int, Fraction]]:
    """Axis (0 is the row, 1 the column) and exponent of each pair."""
    even = [Fraction(2 * i, num_pairs) for i in range(num_pairs // 2)]
    if axes == "paired":
        return [pair for exponent in even for pair in ((1, exponent), (0, exponent))]
    shift = Fraction(1, num_pairs) if axes == "even_odd" else 0
    return [(0, e) for e in even] + [(1, e + shift) for e in even]


@lru_cache(maxsize=64)
def angle_table(num_pairs: int, axes: str, base: float, device: torch.device) -> Tensor:
    return frequency_table(_pairs(num_pairs, axes), base, device)


def rotate(
    q: Tensor,
    k: Tensor,
    geometry: Tensor,
    spatial_merge_size: int,
    base: float,
    interleaved: bool,
    axes: str,
    inverse: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    num_pairs = q.shape[-1] // 2
    num_grids = geometry.shape[0] - 1
    table = angle_table(num_pairs, axes, base, q.device)
    return launch(
        _rotate_2d_kernel,
        q,
        k,
        (geometry, table, num_grids, max(num_grids - 1, 0).bit_length()),
        num_pairs,
        MERGE=spatial_merge_size,
        in_place=in_place,
        INVERSE=inverse,
        INTERLEAVED=interleaved,
    )


def rotate_(*args) -> None:
    rotate(*args, in_place=True)
