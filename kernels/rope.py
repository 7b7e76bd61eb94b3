"""Triton kernel of ``patchpack.ops.rope``; the maths is in ``patchpack.reference.rope``."""

import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._rotary import launch, rotate_heads
from patchpack.kernels._tiles import stride_unit


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_kernel(
    # tensors
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hk, D]
    q_out_ptr,  # [T, Hq, D]
    k_out_ptr,  # [T, Hk, D]
    cos_ptr,  # [T, R]
    sin_ptr,  # [T, R]
    # sizes and strides, of rows in units of TABLE_UNIT and STRIDE_UNIT elements
    stride_cos_t,
    stride_cos_i,
    stride_sin_t,
    stride_sin_i,
    num_tokens,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    # compile-time
    TABLE_UNIT: tl.constexpr,
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
    mask = mask_t[:, None] & (offs_i < NUM_PAIRS)[None, :]

    cos_ptrs = cos_ptr + offs_t[:, None] * stride_cos_t * TABLE_UNIT + offs_i * stride_cos_i
    sin_ptrs = sin_ptr + offs_t[:, None] * stride_sin_t * TABLE_UNIT + offs_i * stride_sin_i
    cos = tl.load(cos_ptrs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin

    rotate_heads(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, stride_q_t, stride_q_h, stride_k_t, stride_k_h, offs_t,
        mask_t, cos, sin, NUM_Q_HEADS, NUM_K_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, IN_PLACE,
        STRIDE_UNIT, BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_PASS,
    )  # fmt: skip


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    unit = stride_unit(cos, sin, unit=4)
    return launch(
        _rotate_kernel,
        q,
        k,
        (cos, sin, cos.stride(0) // unit, cos.stride(1), sin.stride(0) // unit, sin.stride(1)),
        cos.shape[-1],
        TABLE_UNIT=unit,
        INVERSE=inverse,
        INTERLEAVED=interleaved,
    )
