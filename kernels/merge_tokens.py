"""Triton kernels of ``patchpack.ops.merge_tokens``; the maths is in its reference.

A program holds whole blocks, ``[BLOCK_N, BLOCK_K, BLOCK_C]``: all tokens of a block and, where they
fit into registers, all channels. NORM says what a LayerNorm normalises: ``"token"`` or the
``"merged"`` token, or ``"none"``. Its statistics are ``[BLOCK_N, BLOCK_K]`` in either case.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import compiler_options, tokens_of_blocks


@triton.jit
def _over_row(sums, NORM: tl.constexpr):
    """What is normalised together, of ``[BLOCK_N, BLOCK_K]`` sums: ``[BLOCK_N, 1]`` if merged."""
    if NORM == "merged":
        return tl.sum(sums, axis=1)[:, None]
    return sums


@triton.jit
def _over_tokens(sums, NORM: tl.constexpr):
    """What one weight gets, of ``[BLOCK_N, BLOCK_K, BLOCK_C]`` sums."""
    sums = tl.sum(sums, axis=0)
    if NORM == "token":
        return tl.sum(sums, axis=0)[None, :]
    return sums


@triton.jit
def _stats_at(
    blocks, num_blocks, AREA: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Where the statistics of blocks are, and which of them are."""
    mask = (blocks < num_blocks)[:, None]
    if NORM == "merged":
        return blocks[:, None], mask
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    return blocks[:, None] * AREA + offs_k, mask & (offs_k < AREA)


@triton.jit
def _affine_at(
    offs_c, AREA: tl.constexpr, NORM: tl.constexpr, NUM_CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where weights are, ``[BLOCK_K, BLOCK_C]`` or one row for all tokens, and which rows are."""
    if NORM == "merged":
        offs_k = tl.arange(0, BLOCK_K)[:, None]
    else:
        offs_k = tl.zeros((1, 1), tl.int32)
    return offs_k * NUM_CHANNELS + offs_c[None, :], offs_k < AREA


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_blocks"])
def _merge_kernel(
    # tensors
    x_ptr,  # [T, C]
    weight_ptr,  # [C] or [m^2 C]
    bias_ptr,  # likewise
    geometry_ptr,  # [G + 1, 3]
    out_ptr,  # [N, m^2 C]
    mean_ptr,  # [T] or [N]
    rstd_ptr,  # likewise
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_blocks,
    stride_x_t,
    # scalars
    eps,
    # compile-time
    MERGE_SIZE: tl.constexpr,
    MERGE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_N merged tokens."""
    AREA: tl.constexpr = MERGE_SIZE * MERGE_SIZE
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_c = tl.arange(0, BLOCK_C)
    mask_k = (offs_n < num_blocks)[:, None] & (offs_k < AREA)

    token = tokens_of_blocks(
        geometry_ptr, num_grids, search_steps, offs_n, MERGE_SIZE, MERGE, BY_COLUMN, BLOCK_K
    )
    x_ptrs = (x_ptr + token * stride_x_t * STRIDE_UNIT)[:, :, None] + offs_c
    out_ptrs = out_ptr + ((offs_n[:, None] * AREA + offs_k) * NUM_CHANNELS)[:, :, None] + offs_c
    affine, is_affine = _affine_at(offs_c, AREA, NORM, NUM_CHANNELS, BLOCK_K)

    x = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), x_ptr.dtype.element_ty)
    mean = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    rstd = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if NORM != "none":
        COUNT: tl.constexpr = AREA * NUM_CHANNELS if NORM == "merged" else NUM_CHANNELS
        for c in range(0, NUM_CHANNELS, BLOCK_C):
            mask = mask_k[:, :, None] & (offs_c < NUM_CHANNELS - c)
            x = tl.load(x_ptrs + c, mask=mask, other=0.0)
            mean += tl.sum(x.to(tl.float32), axis=2)
        mean = _over_row(mean, NORM) / COUNT
        for c in range(0, NUM_CHANNELS, BLOCK_C):
            mask = mask_k[:, :, None] & (offs_c < NUM_CHANNELS - c)
            if NUM_CHANNELS > BLOCK_C:
                x = tl.load(x_ptrs + c, mask=mask, other=0.0)
            centered = tl.where(mask, x.to(tl.float32) - mean[:, :, None], 0.0)
            rstd += tl.sum(centered * centered, axis=2)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(_over_row(rstd, NORM) / COUNT + eps))
        stats, mask_stats = _stats_at(offs_n, num_blocks, AREA, NORM, BLOCK_K)
        tl.store(mean_ptr + stats, mean, mask=mask_stats)
        tl.store(rstd_ptr + stats, rstd, mask=mask_stats)

    for c in range(0, NUM_CHANNELS, BLOCK_C):
        mask_c = offs_c < NUM_CHANNELS - c
        mask = mask_k[:, :, None] & mask_c
        if NORM == "none" or NUM_CHANNELS > BLOCK_C:
            x = tl.load(x_ptrs + c, mask=mask, other=0.0)
        if NORM == "none":
            tl.store(out_ptrs + c, x, mask=mask)
        else:
            y = (x.to(tl.float32) - mean[:, :, None]) * rstd[:, :, None]
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + affine + c, mask=is_affine & mask_c, other=0.0)
                y *= weight.to(tl.float32)[None, :, :]
            if HAS_BIAS:
                bias = tl.load(bias_ptr + affine + c, mask=is_affine & mask_c, other=0.0)
                y += bias.to(tl.float32)[None, :, :]
            tl.store(out_ptrs + c, y, mask=mask)


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_blocks", "tiles_per_program"])
def _merge_bwd_kernel(
    # tensors
    grad_ptr,  # [N, m^2 C]
    x_ptr,  # [T, C]
    weight_ptr,  # [C] or [m^2 C]
    geometry_ptr,  # [G + 1, 3]
    mean_ptr,  # [T] or [N]
    rstd_ptr,  # likewise
    grad_x_ptr,  # [T, C]
    partial_weight_ptr,  # [P, C] or [P, m^2 C], a row a program
    partial_bias_ptr,  # likewise
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_blocks,
    tiles_per_program,
    stride_grad_n,
    stride_x_t,
    # compile-time
    MERGE_SIZE: tl.constexpr,
    MERGE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_C channels of the gradients of its tiles, and sums the weights'."""
    AREA: tl.constexpr = MERGE_SIZE * MERGE_SIZE
    NUM_PARTS: tl.constexpr = (NUM_CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0).to(tl.int64)
    program = pid // NUM_PARTS
    begin_c = (pid % NUM_PARTS).to(tl.int32) * BLOCK_C
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_c = tl.arange(0, BLOCK_C)
    affine, is_affine = _affine_at(offs_c, AREA, NORM, NUM_CHANNELS, BLOCK_K)
    COUNT: tl.constexpr = AREA * NUM_CHANNELS if NORM == "merged" else NUM_CHANNELS

    sum_weight = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tl.float32)
    sum_bias = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tl.float32)
    for tile in range(tiles_per_program):
        offs_n = (program * tiles_per_program + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_k = (offs_n < num_blocks)[:, None] & (offs_k < AREA)
        token = tokens_of_blocks(
            geometry_ptr, num_grids, search_steps, offs_n, MERGE_SIZE, MERGE, BY_COLUMN, BLOCK_K
        )
        in_block = (offs_k * NUM_CHANNELS)[:, :, None] + offs_c
        grad_ptrs = (grad_ptr + offs_n * stride_grad_n * STRIDE_UNIT)[:, None, None] + in_block
        x_ptrs = (x_ptr + token * stride_x_t * STRIDE_UNIT)[:, :, None] + offs_c
        grad_x_ptrs = (grad_x_ptr + token * NUM_CHANNELS)[:, :, None] + offs_c
        mask = mask_k[:, :, None] & (offs_c < NUM_CHANNELS - begin_c)

        if NORM == "none":
            grad = tl.load(grad_ptrs + begin_c, mask=mask, other=0.0)
            tl.store(grad_x_ptrs + begin_c, grad, mask=mask)
        else:
            stats, mask_stats = _stats_at(offs_n, num_blocks, AREA, NORM, BLOCK_K)
            mean = tl.load(mean_ptr + stats, mask=mask_stats, other=0.0)[:, :, None]
            rstd = tl.load(rstd_ptr + stats, mask=mask_stats, other=0.0)[:, :, None]

            # with z = (x - mean) rstd and w = weight grad, of a row
            sum_w = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            sum_wz = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            grad = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), grad_ptr.dtype.element_ty)
            x = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), x_ptr.dtype.element_ty)
            weight = tl.full(affine.shape, 1.0, tl.float32)
            for part in range(NUM_PARTS):  # the program's own channels come last
                c = (begin_c + (part + 1) * BLOCK_C) % (NUM_PARTS * BLOCK_C)
                mask_c = offs_c < NUM_CHANNELS - c
                mask = mask_k[:, :, None] & mask_c
                grad = tl.load(grad_ptrs + c, mask=mask, other=0.0)
                x = tl.load(x_ptrs + c, mask=mask, other=0.0)
                w = grad.to(tl.float32)
                if HAS_WEIGHT:
                    weight = tl.load(weight_ptr + affine + c, mask=is_affine & mask_c, other=0.0)
                    weight = weight.to(tl.float32)
                    w *= weight[None, :, :]
                sum_w += tl.sum(w, axis=2)
                sum_wz += tl.sum(w * (x.to(tl.float32) - mean) * rstd, axis=2)
            mean_w = (_over_row(sum_w, NORM) / COUNT)[:, :, None]
            mean_wz = (_over_row(sum_wz, NORM) / COUNT)[:, :, None]

            # grad_x = (w - mean(w) - z mean(w z)) rstd
            mask = mask_k[:, :, None] & (offs_c < NUM_CHANNELS - begin_c)
            z = (x.to(tl.float32) - mean) * rstd
            w = grad.to(tl.float32)  # zero where there is nothing
            sum_weight += w * z
            sum_bias += w
            w *= weight[None, :, :]
            tl.store(grad_x_ptrs + begin_c, (w - mean_w - z * mean_wz) * rstd, mask=mask)

    if NORM != "none":
        partial = program * COUNT + begin_c + affine
        mask = is_affine & (offs_c < NUM_CHANNELS - begin_c)
        if HAS_WEIGHT:
            tl.store(partial_weight_ptr + partial, _over_tokens(sum_weight, NORM), mask=mask)
        if HAS_BIAS:
            tl.store(partial_bias_ptr + partial, _over_tokens(sum_bias, NORM), mask=mask)


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
    num_channels = merge_size * merge_size * x.shape[1]
    norm, num_rows = _norm(x, weight, bias, num_blocks, num_channels)
    out = x.new_empty(num_blocks, num_channels)
    mean, rstd = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    if num_blocks == 0:
        return out, mean, rstd
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    unit = 8 if x.stride(0) % 8 == 0 else 1
    block_n, block_k, block_c = _tile(merge_size, x.shape[1], 2**15)
    _merge_kernel[(triton.cdiv(num_blocks, block_n),)](
        x,
        weight,
        bias,
        geometry,
        out,
        mean,
        rstd,
        *_search(geometry),
        num_blocks,
        x.stride(0) // unit,
        eps,
        MERGE_SIZE=merge_size,
        MERGE=spatial_merge_size,
        BY_COLUMN=by_column,
        NORM=norm,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        NUM_CHANNELS=x.shape[1],
        STRIDE_UNIT=unit,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=8 if block_k * block_c > 2**12 else 4,
        num_stages=1,  # a tile is in registers: none in shared memory
        **compiler_options(),
    )
    return out, mean, rstd


def merge_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    geometry: Tensor,
    mean: Tensor,
    rstd: Tensor,
    spatial_merge_size: int,
    merge_size: int,
    by_column: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_blocks, num_channels = grad.shape
    norm, _ = _norm(x, weight, bias, num_blocks, num_channels)
    grad_x = x.new_empty(x.shape)
    grads = [x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)]
    block_n, block_k, block_c = _tile(merge_size, x.shape[1], 2**13)
    # how tiles are shared out depends on their number alone, and so does every sum
    num_tiles = triton.cdiv(num_blocks, block_n)
    tiles_per_program = max(triton.cdiv(16, block_n), triton.cdiv(num_tiles, 256))
    if norm == "none":
        tiles_per_program = 1
    num_programs = triton.cdiv(num_tiles, tiles_per_program)
    partials = [x.new_empty(num_programs, p.numel(), dtype=torch.float32) for p in grads]
    if num_blocks > 0:
        grad, x = (y if y.stride(-1) == 1 else y.contiguous() for y in (grad, x))
        unit = 8 if grad.stride(0) % 8 == 0 and x.stride(0) % 8 == 0 else 1
        _merge_bwd_kernel[(num_programs * triton.cdiv(x.shape[1], block_c),)](
            grad,
            x,
            weight if weight is None else weight.contiguous(),
            geometry,
            mean,
            rstd,
            grad_x,
            *partials,
            *_search(geometry),
            num_blocks,
            tiles_per_program,
            grad.stride(0) // unit,
            x.stride(0) // unit,
            MERGE_SIZE=merge_size,
            MERGE=spatial_merge_size,
            BY_COLUMN=by_column,
            NORM=norm,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            NUM_CHANNELS=x.shape[1],
            STRIDE_UNIT=unit,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            num_warps=8 if block_k * block_c > 2**12 else 4,
            num_stages=1,
            **compiler_options(),
        )
    if norm != "none":
        num_weights = max(p.numel() for p in grads)
        _sum_kernel[(triton.cdiv(num_weights, 32),)](
            *partials,
            *grads,
            num_programs,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            NUM_WEIGHTS=num_weights,
            BLOCK_P=32,
            BLOCK_W=32,
            num_warps=4,
            num_stages=1,
            **compiler_options(),
        )
    return grad_x, *grads


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_blocks: int, num_channels: int
) -> tuple[str, int]:
    """What is normalised, and how many rows of it there are."""
    affine = bias if weight is None else weight
    if affine is None:
        return "none", 0
    if affine.shape[0] == x.shape[1]:
        return "token", num_blocks * (num_channels // x.shape[1])
    return "merged", num_blocks


def _tile(merge_size: int, num_channels: int, largest: int) -> tuple[int, int, int]:
    """Blocks, tokens and channels of a tile: all channels, if ``largest`` elements hold a block."""
    block_k = triton.next_power_of_2(merge_size * merge_size)
    block_c = min(triton.next_power_of_2(num_channels), max(largest // block_k, 1))
    return max(1, 4096 // (block_k * block_c)), block_k, block_c


def _search(geometry: Tensor) -> tuple[int, int]:
    """Number of grids, and steps of a binary search among them."""
    num_grids = geometry.shape[0] - 1
    return num_grids, max(num_grids - 1, 0).bit_length()
