"""Triton kernels of ``patchpack.ops.merge_tokens``; the maths is in its reference.

Merging only changes the order of tokens: those of a block come to lie side by side. A row is what
belongs together in a LayerNorm, TOGETHER tokens in that order: all of a block if merged tokens are
normalised, else one. A program holds whole rows, ``[BLOCK_N, BLOCK_K, BLOCK_C]``, and all their
channels if they fit into registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import block_to_token, compiler_options, last_contiguous, stride_unit


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_rows"])
def _merge_kernel(
    # tensors
    x_ptr,  # [T, C]
    weight_ptr,  # [TOGETHER C]
    bias_ptr,  # [TOGETHER C]
    geometry_ptr,  # [G + 1, 3]
    out_ptr,  # [N, m^2 C]
    mean_ptr,  # [T / TOGETHER]
    rstd_ptr,  # [T / TOGETHER]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_rows,
    stride_x_t,
    # scalars
    eps,
    # compile-time
    MERGE_SIZE: tl.constexpr,
    MERGE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TOGETHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_N rows of ``out``."""
    NORMALISED: tl.constexpr = HAS_WEIGHT or HAS_BIAS
    COUNT: tl.constexpr = TOGETHER * NUM_CHANNELS
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_rows
    mask_k = mask_n[:, None] & (offs_k < TOGETHER)

    place = offs_n[:, None] * TOGETHER + offs_k
    token = block_to_token(
        geometry_ptr, num_grids, search_steps, place, MERGE_SIZE, MERGE, BY_COLUMN
    )
    x_ptrs = (x_ptr + token * stride_x_t * STRIDE_UNIT)[:, :, None] + offs_c
    out_ptrs = (out_ptr + place * NUM_CHANNELS)[:, :, None] + offs_c
    affine = (offs_k * NUM_CHANNELS)[:, None] + offs_c
    mask_affine = (offs_k < TOGETHER)[:, None]

    if NORMALISED:
        x = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), x_ptr.dtype.element_ty)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for c in range(0, NUM_CHANNELS, BLOCK_C):
            mask = mask_k[:, :, None] & (offs_c < NUM_CHANNELS - c)
            x = tl.load(x_ptrs + c, mask=mask, other=0.0)
            total += tl.sum(tl.sum(x.to(tl.float32), axis=2), axis=1)
        mean = total / COUNT
        squares = tl.zeros((BLOCK_N,), tl.float32)
        rest = tl.zeros((BLOCK_N,), tl.float32)  # what the first sum lost to rounding
        for c in range(0, NUM_CHANNELS, BLOCK_C):
            mask = mask_k[:, :, None] & (offs_c < NUM_CHANNELS - c)
            if NUM_CHANNELS > BLOCK_C:
                x = tl.load(x_ptrs + c, mask=mask, other=0.0)
            centered = tl.where(mask, x.to(tl.float32) - mean[:, None, None], 0.0)
            squares += tl.sum(tl.sum(centered * centered, axis=2), axis=1)
            rest += tl.sum(tl.sum(centered, axis=2), axis=1)
        mean += rest / COUNT
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / COUNT + eps))
        tl.store(mean_ptr + offs_n, mean, mask=mask_n)
        tl.store(rstd_ptr + offs_n, rstd, mask=mask_n)

    for c in range(0, NUM_CHANNELS, BLOCK_C):
        mask_c = offs_c < NUM_CHANNELS - c
        mask = mask_k[:, :, None] & mask_c
        if not NORMALISED or NUM_CHANNELS > BLOCK_C:
            x = tl.load(x_ptrs + c, mask=mask, other=0.0)
        y = x
        if NORMALISED:
            y = (x.to(tl.float32) - mean[:, None, None]) * rstd[:, None, None]
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + affine + c, mask=mask_affine & mask_c, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + affine + c, mask=mask_affine & mask_c, other=0.0)
        tl.store(out_ptrs + c, y, mask=mask)


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_rows", "tiles_per_program"])
def _merge_bwd_kernel(
    # tensors
    grad_ptr,  # [N, m^2 C]
    x_ptr,  # [T, C], of a LayerNorm
    weight_ptr,  # [TOGETHER C]
    geometry_ptr,  # [G + 1, 3]
    mean_ptr,  # [T / TOGETHER]
    rstd_ptr,  # [T / TOGETHER]
    grad_x_ptr,  # [T, C]
    partial_weight_ptr,  # [P, TOGETHER C]
    partial_bias_ptr,  # [P, TOGETHER C]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_rows,
    tiles_per_program,
    stride_grad_n,
    stride_x_t,
    # compile-time
    MERGE_SIZE: tl.constexpr,
    MERGE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TOGETHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_C channels of ``grad_x`` for its rows, and their sums of weights."""
    AREA: tl.constexpr = MERGE_SIZE * MERGE_SIZE
    COUNT: tl.constexpr = TOGETHER * NUM_CHANNELS
    NUM_PARTS: tl.constexpr = (NUM_CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0).to(tl.int64)
    pid_c = (pid % NUM_PARTS).to(tl.int32)
    pid_p = pid // NUM_PARTS
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    affine = (offs_k * NUM_CHANNELS)[:, None] + offs_c
    mask_affine = (offs_k < TOGETHER)[:, None]
    own_c = pid_c * BLOCK_C
    mask_own = offs_c < NUM_CHANNELS - own_c

    sum_weight = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tl.float32)
    sum_bias = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tl.float32)
    for tile in range(tiles_per_program):
        offs_n = (pid_p * tiles_per_program + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_rows
        mask_k = mask_n[:, None] & (offs_k < TOGETHER)
        place = offs_n[:, None] * TOGETHER + offs_k
        token = block_to_token(
            geometry_ptr, num_grids, search_steps, place, MERGE_SIZE, MERGE, BY_COLUMN
        )
        grads = grad_ptr + place // AREA * stride_grad_n * STRIDE_UNIT + place % AREA * NUM_CHANNELS
        grad_ptrs = grads[:, :, None] + offs_c
        grad_x_ptrs = (grad_x_ptr + token * NUM_CHANNELS)[:, :, None] + offs_c
        mask_x = mask_k[:, :, None] & mask_own

        if HAS_WEIGHT or HAS_BIAS:
            x_ptrs = (x_ptr + token * stride_x_t * STRIDE_UNIT)[:, :, None] + offs_c
            mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)[:, None, None]
            rstd = tl.load(rstd_ptr + offs_n, mask=mask_n, other=0.0)[:, None, None]

            # sums over a row, with z = (x - mean) rstd and w = weight grad; its own part comes last
            grad = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tl.float32)
            w = grad
            z = grad
            total_w = tl.zeros((BLOCK_N,), tl.float32)
            total_wz = tl.zeros((BLOCK_N,), tl.float32)
            for part in range(1, NUM_PARTS + 1):
                c = (pid_c + part) % NUM_PARTS * BLOCK_C
                mask_c = offs_c < NUM_CHANNELS - c
                mask = mask_k[:, :, None] & mask_c
                grad = tl.load(grad_ptrs + c, mask=mask, other=0.0).to(tl.float32)
                z = (tl.load(x_ptrs + c, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
                w = grad
                if HAS_WEIGHT:
                    w *= tl.load(weight_ptr + affine + c, mask=mask_affine & mask_c, other=0.0)
                total_w += tl.sum(tl.sum(w, axis=2), axis=1)
                total_wz += tl.sum(tl.sum(w * z, axis=2), axis=1)

            # grad_x = (w - mean(w) - z mean(w z)) rstd
            mean_w = (total_w / COUNT)[:, None, None]
            mean_wz = (total_wz / COUNT)[:, None, None]
            tl.store(grad_x_ptrs + own_c, (w - mean_w - z * mean_wz) * rstd, mask=mask_x)
            sum_weight += grad * z  # zero where there is no token or no channel
            sum_bias += grad
        else:
            grad = tl.load(grad_ptrs + own_c, mask=mask_x, other=0.0)
            tl.store(grad_x_ptrs + own_c, grad, mask=mask_x)

    partial = pid_p * COUNT + affine + own_c
    if HAS_WEIGHT:
        sums = tl.sum(sum_weight, axis=0)
        tl.store(partial_weight_ptr + partial, sums, mask=mask_affine & mask_own)
    if HAS_BIAS:
        sums = tl.sum(sum_bias, axis=0)
        tl.store(partial_bias_ptr + partial, sums, mask=mask_affine & mask_own)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_kernel(
    # tensors
    partial_weight_ptr,  # [P, W]
    partial_bias_ptr,  # [P, W]
    grad_weight_ptr,  # [W]
    grad_bias_ptr,  # [W]
    # sizes
    num_partials,
    # compile-time
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program sums BLOCK_W columns of both, always in the same order."""
    offs_p = tl.arange(0, BLOCK_P)[:, None]
    offs_w = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < NUM_WEIGHTS
    at = offs_p * NUM_WEIGHTS + offs_w[None, :]
    sum_weight = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    sum_bias = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for first in range(0, num_partials, BLOCK_P):
        mask = (offs_p < num_partials - first) & mask_w
        if HAS_WEIGHT:
            sum_weight += tl.load(partial_weight_ptr + at, mask=mask, other=0.0)
        if HAS_BIAS:
            sum_bias += tl.load(partial_bias_ptr + at, mask=mask, other=0.0)
        at += BLOCK_P * NUM_WEIGHTS
    if HAS_WEIGHT:
        tl.store(grad_weight_ptr + offs_w, tl.sum(sum_weight, axis=0), mask=mask_w)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + offs_w, tl.sum(sum_bias, axis=0), mask=mask_w)


def merge(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    geometry: Tensor,
    num_blocks: int,
    spatial_merge_size: int,
    merge_size: int,
    by_column: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_channels, area = x.shape[1], merge_size * merge_size
    together, normalised = _together(num_channels, weight, bias)
    num_rows = num_blocks * area // together
    out = x.new_empty(num_blocks, area * num_channels)
    mean, rstd = (x.new_empty(num_rows if normalised else 0, dtype=torch.float32) for _ in range(2))
    if num_blocks == 0:
        return out, mean, rstd
    x = last_contiguous(x)
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    unit = stride_unit(x)
    block_n, block_k, block_c = _tile(together, num_channels)
    _merge_kernel[(triton.cdiv(num_rows, block_n),)](
        x,
        weight,
        bias,
        geometry,
        out,
        mean,
        rstd,
        *_search(geometry),
        num_rows,
        x.stride(0) // unit,
        eps,
        MERGE_SIZE=merge_size,
        MERGE=spatial_merge_size,
        BY_COLUMN=by_column,
        TOGETHER=together,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=max(block_k * block_c // 2**11, 1) if normalised else 4,
        num_stages=1,  # a tile is in registers: none in shared memory
        **compiler_options(fp_fusion=False),
    )
    return out, mean, rstd


def merge_bwd(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    geometry: Tensor,
    mean: Tensor,
    rstd: Tensor,
    spatial_merge_size: int,
    merge_size: int,
    by_column: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    area = merge_size * merge_size
    num_tokens, num_channels = grad.shape[0] * area, grad.shape[1] // area
    together, normalised = _together(num_channels, weight, bias)
    num_rows = num_tokens // together
    block_n, block_k, block_c = _tile(together, num_channels)
    # tiles are shared out by their number alone, and with them every sum
    num_tiles = triton.cdiv(num_rows, block_n)
    share = max(4, triton.cdiv(num_tiles, 512)) if normalised else 1
    num_shares = triton.cdiv(num_tiles, share)

    grad_x = grad.new_empty(num_tokens, num_channels)
    grads = [grad.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)]
    partials = [grad.new_empty(num_shares, p.numel(), dtype=torch.float32) for p in grads]
    if num_rows > 0:
        grad, x = (y if y is None else last_contiguous(y) for y in (grad, x))
        unit = stride_unit(*(y for y in (grad, x) if y is not None))
        _merge_bwd_kernel[(num_shares * triton.cdiv(num_channels, block_c),)](
            grad,
            x,
            weight if weight is None else weight.contiguous(),
            geometry,
            mean,
            rstd,
            grad_x,
            *partials,
            *_search(geometry),
            num_rows,
            share,
            grad.stride(0) // unit,
            0 if x is None else x.stride(0) // unit,
            MERGE_SIZE=merge_size,
            MERGE=spatial_merge_size,
            BY_COLUMN=by_column,
            TOGETHER=together,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            NUM_CHANNELS=num_channels,
            STRIDE_UNIT=unit,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            num_warps=8 if block_k * block_c * grad.element_size() > 2**13 else 4,
            num_stages=1,
            **compiler_options(fp_fusion=False),
        )
    if normalised:
        _sum_kernel[(triton.cdiv(together * num_channels, 16),)](
            *partials,
            *grads,
            num_shares,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            NUM_WEIGHTS=together * num_channels,
            BLOCK_P=128,
            BLOCK_W=16,
            num_warps=4,
            num_stages=1,
            **compiler_options(),
        )
    return grad_x, *grads


def _together(num_channels: int, weight: Tensor | None, bias: Tensor | None) -> tuple[int, bool]:
    """How many tokens are normalised together, and whether any are."""
    affine = bias if weight is None else weight
    return (1, False) if affine is None else (affine.shape[0] // num_channels, True)


def _tile(together: int, num_channels: int) -> tuple[int, int, int]:
    """Rows, tokens and channels of a tile: whole rows, up to 2**13 elements."""
    block_k = triton.next_power_of_2(together)
    block_c = triton.next_power_of_2(num_channels)
    if block_k * block_c > 2**13:
        block_c = 2**12 // block_k
    return max(1, 2**11 // (block_k * block_c)), block_k, block_c


def _search(geometry: Tensor) -> tuple[int, int]:
    """Number of grids, and steps of a binary search among them."""
    num_grids = geometry.shape[0] - 1
    return num_grids, max(num_grids - 1, 0).bit_length()
