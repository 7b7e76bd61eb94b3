"""Triton kernels of ``patchpack.ops.scatter_tokens``; the maths is in its reference.

``sources`` says where a row comes from: -1 is its own place, ``0`` to ``V - 1`` a vector, ``V + i``
token ``i``. It is all that both directions need to know of the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._sums import sum_rows
from patchpack.kernels._tiles import (
    compiler_options,
    last_contiguous,
    row_ptrs,
    row_tiles,
    stride_unit,
)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_vectors"])
def _invert_kernel(
    # tensors
    index_ptr,  # [N]
    sources_ptr,  # [L]
    # sizes
    num_tokens,
    num_rows,
    num_vectors,
    # compile-time
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK tokens into ``sources``."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_tokens
    rows = tl.load(index_ptr + offs, mask=mask, other=-1).to(tl.int64)
    mask = mask & (rows >= 0) & (rows < num_rows)
    tl.store(sources_ptr + rows, (offs + num_vectors).to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["batch_rows", "num_rows", "num_vectors", "stride_embeds_b"])
def _scatter_kernel(
    # tensors
    embeds_ptr,  # [B, L, C]
    tokens_ptr,  # [N, C]
    vectors_ptr,  # [V, C]
    sources_ptr,  # [B L]
    out_ptr,  # [B, L, C]
    # sizes and strides, in units of STRIDE_UNIT elements
    batch_rows,
    num_rows,
    num_vectors,
    stride_embeds_b,
    stride_embeds_l,
    stride_tokens_n,
    stride_vectors_v,
    # compile-time
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program copies BLOCK_C channels of BLOCK_R rows, each from where it comes from."""
    pid = tl.program_id(0).to(tl.int64)
    offs_c = pid % tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid // tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    mask = mask_r[:, None] & (offs_c < NUM_CHANNELS)[None, :]

    source = tl.load(sources_ptr + offs_r, mask=mask_r, other=-1).to(tl.int64)
    token = source - num_vectors
    # three loads of which each row takes one: AMD's compiler takes no pointers of several tensors
    ptrs = row_ptrs(embeds_ptr, offs_r, batch_rows, stride_embeds_b, stride_embeds_l, STRIDE_UNIT)
    kept = mask & (source < 0)[:, None]
    x = tl.load(ptrs[:, None] + offs_c[None, :], mask=kept, other=0.0)
    ptrs = vectors_ptr + source * stride_vectors_v * STRIDE_UNIT
    of_vector = mask & ((source >= 0) & (token < 0))[:, None]
    x = tl.load(ptrs[:, None] + offs_c[None, :], mask=of_vector, other=x)
    ptrs = tokens_ptr + token * stride_tokens_n * STRIDE_UNIT
    x = tl.load(ptrs[:, None] + offs_c[None, :], mask=mask & (token >= 0)[:, None], other=x)
    tl.store(out_ptr + offs_r[:, None] * NUM_CHANNELS + offs_c[None, :], x, mask=mask)


@triton.jit(
    do_not_specialize=["batch_rows", "num_rows", "num_tokens", "num_vectors", "stride_grad_b"]
)
def _scatter_bwd_kernel(
    # tensors
    grad_ptr,  # [B, L, C]
    sources_ptr,  # [B L]
    index_ptr,  # [N]
    grad_embeds_ptr,  # [B, L, C]
    grad_tokens_ptr,  # [N, C]
    # sizes and strides, in units of STRIDE_UNIT elements
    batch_rows,
    num_rows,
    num_tokens,
    num_vectors,
    stride_grad_b,
    stride_grad_l,
    # compile-time
    NUM_CHANNELS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program copies BLOCK_C channels of BLOCK_R gradients: of rows, and then of tokens."""
    pid = tl.program_id(0).to(tl.int64)
    offs_c = pid % tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid // tl.cdiv(NUM_CHANNELS, BLOCK_C) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = offs_r - num_rows
    of_token = token >= 0
    mask_r = token < num_tokens
    mask_c = (offs_c < NUM_CHANNELS)[None, :]

    row = tl.load(index_ptr + token, mask=of_token & mask_r, other=-1).to(tl.int64)
    row = tl.where(of_token, row, offs_r)
    inside = mask_r & (row >= 0) & (row < num_rows)
    source = tl.load(sources_ptr + row, mask=inside, other=-1).to(tl.int64)
    passes = inside & tl.where(of_token, source == token + num_vectors, source < 0)
    grad_ptrs = row_ptrs(grad_ptr, row, batch_rows, stride_grad_b, stride_grad_l, STRIDE_UNIT)
    grad = tl.load(grad_ptrs[:, None] + offs_c[None, :], mask=passes[:, None] & mask_c, other=0.0)
    mask_t = (mask_r & of_token)[:, None] & mask_c
    mask_e = (mask_r & ~of_token)[:, None] & mask_c
    out = token[:, None] * NUM_CHANNELS + offs_c[None, :]
    tl.store(grad_tokens_ptr + out, grad, mask=mask_t)
    out = offs_r[:, None] * NUM_CHANNELS + offs_c[None, :]
    tl.store(grad_embeds_ptr + out, grad, mask=mask_e)


def scatter(
    embeds: Tensor,
    tokens: Tensor,
    index: Tensor,
    vectors: Tensor | None,
    vector_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, batch_rows, num_channels = embeds.shape
    num_rows = batch * batch_rows
    out = embeds.new_empty(embeds.shape)
    if vectors is None or vector_index is None:
        vectors = tokens[:0]
        sources = index.new_full((num_rows,), -1, dtype=torch.int32)
    else:
        sources = vector_index.flatten().clamp(-1, vectors.shape[0] - 1).to(torch.int32)
    if out.numel() == 0:
        return out, sources
    num_tokens, num_vectors = tokens.shape[0], vectors.shape[0]
    if num_tokens > 0:
        _invert_kernel[(triton.cdiv(num_tokens, 512),)](
            index.contiguous(), sources, num_tokens, num_rows, num_vectors, BLOCK=512, num_warps=4
        )
    embeds, tokens, vectors = map(last_contiguous, (embeds, tokens, vectors))
    unit = stride_unit(embeds, tokens, vectors)
    grid, block_r, block_c = row_tiles(num_rows, num_channels)
    _scatter_kernel[grid](
        embeds,
        tokens,
        vectors,
        sources,
        out,
        batch_rows,
        num_rows,
        num_vectors,
        embeds.stride(0) // unit,
        embeds.stride(1) // unit,
        tokens.stride(0) // unit,
        vectors.stride(0) // unit,
        NUM_CHANNELS=num_channels,
        STRIDE_UNIT=unit,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
        **compiler_options(),
    )
    return out, sources


def scatter_bwd(
    grad: Tensor, sources: Tensor, index: Tensor, num_vectors: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_channels = grad.shape[2]
    num_rows, num_tokens = sources.shape[0], index.shape[0]
    grad_embeds = grad.new_empty(grad.shape)
    grad_tokens = grad.new_empty(num_tokens, num_channels)
    grad = last_contiguous(grad)
    if (num_rows + num_tokens) * num_channels > 0:
        unit = stride_unit(grad)
        grid, block_r, block_c = row_tiles(num_rows + num_tokens, num_channels)
        _scatter_bwd_kernel[grid](
            grad,
            sources,
            index.contiguous(),
            grad_embeds,
            grad_tokens,
            max(grad.shape[1], 1),
            num_rows,
            num_tokens,
            num_vectors,
            grad.stride(0) // unit,
            grad.stride(1) // unit,
            NUM_CHANNELS=num_channels,
            STRIDE_UNIT=unit,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
            **compiler_options(),
        )
    return grad_embeds, grad_tokens, sum_rows(grad, sources, num_vectors)
