"""Triton kernel of ``patchpack.ops.mrope``; the maths is in ``patchpack.reference.mrope``."""

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


@triton.jit(do_not_specialize=["stride_positions_a", "num_tokens"])
def _rotate_multimodal_kernel(
    # tensors
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hk, D]
    q_out_ptr,  # [T, Hq, D]
    k_out_ptr,  # [T, Hk, D]
    positions_ptr,  # [3, T]
    table_ptr,  # [2, R]
    # sizes and strides, of q and k in units of STRIDE_UNIT elements
    stride_positions_a,
    stride_positions_t,
    num_tokens,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    # compile-time
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

    position_ptrs = positions_ptr + offs_t * stride_positions_t
    time = tl.load(position_ptrs, mask=mask_t, other=0).to(tl.int32)
    position_ptrs += stride_positions_a
    row = tl.load(position_ptrs, mask=mask_t, other=0).to(tl.int32)
    position_ptrs += stride_positions_a
    col = tl.load(position_ptrs, mask=mask_t, other=0).to(tl.int32)

    # angle[t, i] = (time, row or col)[t] * frequency[i]
    axis, high, low = load_frequencies(
        table_ptr, offs_i[None, :], (offs_i < NUM_PAIRS)[None, :], NUM_PAIRS
    )
    position = tl.where(axis == 1, row[:, None], col[:, None])
    position = tl.where(axis == 0, time[:, None], position)
    cos, sin = cos_sin(position, high, low)
    if INVERSE:
        sin = -sin

    rotate_heads(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, stride_q_t, stride_q_h, stride_k_t, stride_k_h, offs_t,
        mask_t, cos, sin, NUM_Q_HEADS, NUM_K_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, IN_PLACE,
        STRIDE_UNIT, BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_PASS,
    )  # fmt: skip


def _pairs(sections: tuple[int, ...], interleaved: bool) -> list[tuple[int, Fraction]]:
    """Axis and exponent of each pair."""
    num_pairs = sum(sections)
    if interleaved:
        axes = [j % 3 if j < 3 * sections[j % 3] else 0 for j in range(num_pairs)]
    else:
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    return [(axis, Fraction(j, num_pairs)) for j, axis in enumerate(axes)]


@lru_cache(maxsize=64)
def _table(sections: tuple[int, ...], interleaved: bool, base: float, device: torch.device):
    return frequency_table(_pairs(sections, interleaved), base, device)


def rotate(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    mrope_section: list[int],
    mrope_interleaved: bool,
    base: float,
    inverse: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    positions = position_ids[-3:]
    table = _table(tuple(mrope_section), mrope_interleaved, base, q.device)
    return launch(
        _rotate_multimodal_kernel,
        q,
        k,
        (positions, table, positions.stride(0), positions.stride(1)),
        sum(mrope_section),
        in_place=in_place,
        INVERSE=inverse,
        INTERLEAVED=False,
    )


def rotate_(*args) -> None:
    rotate(*args, in_place=True)
