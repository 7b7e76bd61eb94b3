"""Triton kernels of ``patchpack.ops.region_attention``; the maths is in its reference.

A program holds whole cells, ``[BLOCK_N, BLOCK_K, BLOCK_C]``: all tokens of a cell and, where they
fit into registers, all channels. Otherwise it goes over the channels twice, and finds them in cache
the second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import block_to_token, compiler_options, last_contiguous, stride_unit


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_cells"])
def _attend_kernel(
    # tensors
    query_ptr,  # [N, C]
    tokens_ptr,  # [T, C]
    geometry_ptr,  # [G + 1, 3]
    out_ptr,  # [N, C]
    p_ptr,  # [N, r^2]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_cells,
    stride_query_n,
    stride_tokens_t,
    # scalars
    softmax_scale,
    # compile-time
    REGION: tl.constexpr,
    MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_N tokens of ``out``."""
    AREA: tl.constexpr = REGION * REGION
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_cells
    mask_k = mask_n[:, None] & (offs_k < AREA)

    place = offs_n[:, None] * AREA + offs_k
    token = block_to_token(
        geometry_ptr, num_grids, search_steps, place, REGION, MERGE, BY_COLUMN=False
    )
    query_ptrs = (query_ptr + offs_n * stride_query_n * STRIDE_UNIT)[:, None] + offs_c
    token_ptrs = (tokens_ptr + token * stride_tokens_t * STRIDE_UNIT)[:, :, None] + offs_c
    out_ptrs = (out_ptr + offs_n * NUM_CHANNELS)[:, None] + offs_c

    # s[k] = scale q . x[k]
    x = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tokens_ptr.dtype.element_ty)
    s = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for c in range(0, NUM_CHANNELS, BLOCK_C):
        mask_c = offs_c < NUM_CHANNELS - c
        q = tl.load(query_ptrs + c, mask=mask_n[:, None] & mask_c, other=0.0).to(tl.float32)
        x = tl.load(token_ptrs + c, mask=mask_k[:, :, None] & mask_c, other=0.0)
        s += tl.sum(q[:, None, :] * x.to(tl.float32), axis=2)

    s = tl.where(offs_k < AREA, s * softmax_scale, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    p *= tl.div_rn(1.0, tl.sum(p, axis=1))[:, None]
    tl.store(p_ptr + place, p, mask=mask_k)

    # y = sum_k (1 / r^2 + p[k]) x[k]
    weight = 1.0 / AREA + p
    for c in range(0, NUM_CHANNELS, BLOCK_C):
        mask_c = offs_c < NUM_CHANNELS - c
        if NUM_CHANNELS > BLOCK_C:
            x = tl.load(token_ptrs + c, mask=mask_k[:, :, None] & mask_c, other=0.0)
        y = tl.sum(weight[:, :, None] * x.to(tl.float32), axis=1)
        tl.store(out_ptrs + c, y, mask=mask_n[:, None] & mask_c)


@triton.jit
def _from_mean(x, AREA: tl.constexpr):
    """Tokens of cells, counted from their mean: neighbours are alike, and sums would cancel."""
    x = x.to(tl.float32)
    return x - (tl.sum(x, axis=1) * (1.0 / AREA))[:, None, :]


@triton.jit(do_not_specialize=["num_grids", "search_steps", "num_cells"])
def _attend_bwd_kernel(
    # tensors
    grad_ptr,  # [N, C]
    query_ptr,  # [N, C]
    tokens_ptr,  # [T, C]
    geometry_ptr,  # [G + 1, 3]
    p_ptr,  # [N, r^2]
    grad_query_ptr,  # [N, C]
    grad_tokens_ptr,  # [T, C]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_grids,
    search_steps,
    num_cells,
    stride_grad_n,
    stride_query_n,
    stride_tokens_t,
    # scalars
    softmax_scale,
    # compile-time
    REGION: tl.constexpr,
    MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes the gradients of BLOCK_N queries and of the tokens of their cells."""
    AREA: tl.constexpr = REGION * REGION
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_cells
    mask_k = mask_n[:, None] & (offs_k < AREA)

    place = offs_n[:, None] * AREA + offs_k
    token = block_to_token(
        geometry_ptr, num_grids, search_steps, place, REGION, MERGE, BY_COLUMN=False
    )
    grad_ptrs = (grad_ptr + offs_n * stride_grad_n * STRIDE_UNIT)[:, None] + offs_c
    query_ptrs = (query_ptr + offs_n * stride_query_n * STRIDE_UNIT)[:, None] + offs_c
    token_ptrs = (tokens_ptr + token * stride_tokens_t * STRIDE_UNIT)[:, :, None] + offs_c
    grad_query_ptrs = (grad_query_ptr + offs_n * NUM_CHANNELS)[:, None] + offs_c
    grad_token_ptrs = (grad_tokens_ptr + token * NUM_CHANNELS)[:, :, None] + offs_c
    p = tl.load(p_ptr + place, mask=mask_k, other=0.0)

    # grad_p[k] = grad . x[k], up to what all k share, which the softmax does not pass on
    x = tl.zeros((BLOCK_N, BLOCK_K, BLOCK_C), tokens_ptr.dtype.element_ty)
    grad = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    grad_p = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for c in range(0, NUM_CHANNELS, BLOCK_C):
        mask_c = offs_c < NUM_CHANNELS - c
        grad = tl.load(grad_ptrs + c, mask=mask_n[:, None] & mask_c, other=0.0).to(tl.float32)
        x = tl.load(token_ptrs + c, mask=mask_k[:, :, None] & mask_c, other=0.0)
        grad_p += tl.sum(grad[:, None, :] * _from_mean(x, AREA), axis=2)

    # grad_s[k] = p[k] (grad_p[k] - sum_j p[j] grad_p[j]), here times scale
    grad_s = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None]) * softmax_scale
    weight = 1.0 / AREA + p

    # grad_q = scale sum_k grad_s[k] x[k]; grad_x[k] = (1 / r^2 + p[k]) grad + scale grad_s[k] q
    for c in range(0, NUM_CHANNELS, BLOCK_C):
        mask_c = offs_c < NUM_CHANNELS - c
        mask = mask_n[:, None] & mask_c
        if NUM_CHANNELS > BLOCK_C:
            grad = tl.load(grad_ptrs + c, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(token_ptrs + c, mask=mask_k[:, :, None] & mask_c, other=0.0)
        q = tl.load(query_ptrs + c, mask=mask, other=0.0).to(tl.float32)
        grad_q = tl.sum(grad_s[:, :, None] * _from_mean(x, AREA), axis=1)
        grad_x = weight[:, :, None] * grad[:, None, :] + grad_s[:, :, None] * q[:, None, :]
        tl.store(grad_query_ptrs + c, grad_q, mask=mask)
        tl.store(grad_token_ptrs + c, grad_x, mask=mask_k[:, :, None] & mask_c)


def attend(
    query: Tensor,
    tokens: Tensor,
    geometry: Tensor,
    spatial_merge_size: int,
    region: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    p = query.new_empty(query.shape[0], region * region, dtype=torch.float32)
    query, tokens = last_contiguous(query), last_contiguous(tokens)
    _launch(
        _attend_kernel,
        (query, tokens, geometry, out, p),
        (query, tokens),
        geometry,
        spatial_merge_size,
        region,
        softmax_scale,
        most_elements=2**14 // query.element_size(),
        num_warps=2,
    )
    return out, p


def attend_bwd(
    grad: Tensor,
    query: Tensor,
    tokens: Tensor,
    geometry: Tensor,
    p: Tensor,
    spatial_merge_size: int,
    region: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    grad_query, grad_tokens = query.new_empty(query.shape), tokens.new_empty(tokens.shape)
    grad, query, tokens = (last_contiguous(x) for x in (grad, query, tokens))
    _launch(
        _attend_bwd_kernel,
        (grad, query, tokens, geometry, p, grad_query, grad_tokens),
        (grad, query, tokens),
        geometry,
        spatial_merge_size,
        region,
        softmax_scale,
        most_elements=2**11,
        num_warps=1,
    )
    return grad_query, grad_tokens


def _launch(
    kernel,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    geometry: Tensor,
    spatial_merge_size: int,
    region: int,
    softmax_scale: float,
    most_elements: int,
    num_warps: int,
) -> None:
    """Launch ``kernel`` on tiles of whole cells, and of all channels up to ``most_elements``.

    Sums over channels go through one or two warps: through more they take several times as long.
    """
    num_cells, num_channels = strided[0].shape
    if num_cells == 0:
        return
    num_grids = geometry.shape[0] - 1
    unit = stride_unit(*strided)
    block_k = triton.next_power_of_2(region * region)
    block_c = max(min(triton.next_power_of_2(num_channels), most_elements // block_k), 1)
    block_n = max(1, 2**10 * num_warps // (block_k * block_c))
    kernel[(triton.cdiv(num_cells, block_n),)](
        *tensors,
        num_grids,
        max(num_grids - 1, 0).bit_length(),
        num_cells,
        *(x.stride(0) // unit for x in strided),
        softmax_scale,
        REGION=region,
        MERGE=spatial_merge_size,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=1,  # a tile is in registers: none in shared memory
        **compiler_options(fp_fusion=False),
    )
