"""Triton kernels of ``patchpack.ops.varlen_attention``; the maths is in the reference.

Segments are cut into tiles from their own first token, so what a segment gives does not depend on
what it is packed with. Tiles are numbered so that those of segment ``s`` begin at
``cu_seqlens[s] // BLOCK + s``: no two segments overlap, at most one tile each is empty, and the
launch needs the numbers of tokens and segments only. The rows past the last segment are one more
segment, whose queries have no keys and whose keys have no queries.

A head is held as a pair of tiles, channels ``[0, D0)`` and ``[D0, D0 + D1)``, because tiles have
powers of two: no product is spent on the padding of 80 to 128. With ``D1 == 0`` the second tile
stands for nothing, and the compiler removes it.
"""

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_tile(cu_seqlens_ptr, num_segments, search_steps, tile, BLOCK: tl.constexpr):
    """Segment of a tile, and the tile's first row in it."""
    low = tl.zeros_like(tile)
    high = low + num_segments
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        first = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle - 1)
    first = tl.load(cu_seqlens_ptr + low) // BLOCK + low
    return low, ((tile - first) * BLOCK).to(tl.int32)


@triton.jit
def _tile_bounds(
    first,
    last,
    length,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bounds of the tiles that rows ``first`` to ``last`` see: partly, in full, partly.

    Row ``i`` sees ``[i - left, i + right]`` within ``[0, length)``.
    """
    begin = 0
    full_begin = 0
    end = length
    full_end = length
    if HAS_LEFT:
        begin = tl.maximum(first - left, 0) // BLOCK * BLOCK
        full_begin = (tl.maximum(last - left, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(end, last + right + 1), 0)
        full_end = tl.maximum(tl.minimum(end, first + right + 1), 0)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _visible(
    i, j, length, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Whether row ``i`` sees ``j``."""
    visible = j < length
    if HAS_LEFT:
        visible = visible & (j >= i - left)
    if HAS_RIGHT:
        visible = visible & (j <= i + right)
    return visible


@triton.jit
def _load_piece(
    ptrs, mask, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    offs_d = START + tl.arange(0, SIZE)[None, :]
    if START + SIZE > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)
    return tl.load(ptrs + offs_d, mask=mask, other=0.0)


@triton.jit
def _load(ptrs, mask, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The pieces of a head's rows; ``ptrs`` and ``mask`` are ``[rows, 1]``."""
    x0 = _load_piece(ptrs, mask, 0, D0, HEAD_DIM)
    x1 = x0
    if D1 > 0:
        x1 = _load_piece(ptrs, mask, D0, D1, HEAD_DIM)
    return x0, x1


@triton.jit
def _store(ptrs, x, mask, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store the pieces of a head's rows; ``ptrs`` and ``mask`` are ``[rows, 1]``."""
    offs_d = tl.arange(0, D0)[None, :]
    tl.store(ptrs + offs_d, x[0], mask=mask & (offs_d < HEAD_DIM))
    if D1 > 0:
        offs_d = D0 + tl.arange(0, D1)[None, :]
        tl.store(ptrs + offs_d, x[1], mask=mask & (offs_d < HEAD_DIM))


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    x0 = tl.zeros((ROWS, D0), tl.float32)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros((ROWS, D1), tl.float32)
    return x0, x1


@triton.jit
def _scores(x, y, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Inner products of rows with rows, ``[rows of x, rows of y]``."""
    s = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(x[1], tl.trans(y[1]), s, input_precision=PRECISION)
    return s


@triton.jit
def _accumulate(acc, p, x, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + p @ x``, piece by piece."""
    p = p.to(x[0].dtype)
    acc0 = tl.dot(p, x[0], acc[0], input_precision=PRECISION)
    acc1 = acc[1]
    if D1 > 0:
        acc1 = tl.dot(p, x[1], acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit(
    do_not_specialize=[
        "num_segments", "search_steps", "num_tokens", "stride_q_t", "stride_q_h", "stride_k_t",
        "stride_k_h", "stride_v_t", "stride_v_h", "left", "right",
    ]
)  # fmt: skip
def _attend_fwd_kernel(
    # tensors
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hk, D]
    v_ptr,  # [Tk, Hk, D]
    out_ptr,  # [Tq, Hq, D]
    lse_ptr,  # [Hq, Tq]
    cu_seqlens_q_ptr,  # [S + 1]
    cu_seqlens_k_ptr,  # [S + 1]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_segments,
    search_steps,
    num_tokens,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    # scalars
    softmax_scale,
    left,
    right,
    # compile-time
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program attends from BLOCK_Q queries of one head to the keys of their segment."""
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    segment, first_q = _find_tile(
        cu_seqlens_q_ptr, num_segments, search_steps, tl.program_id(0).to(tl.int64), BLOCK_Q
    )
    in_segment = segment < num_segments
    begin_q = tl.load(cu_seqlens_q_ptr + segment)
    len_q = tl.load(cu_seqlens_q_ptr + segment + 1, mask=in_segment, other=num_tokens) - begin_q
    begin_k = tl.load(cu_seqlens_k_ptr + segment)
    len_k = tl.load(cu_seqlens_k_ptr + segment + 1, mask=in_segment, other=begin_k) - begin_k
    if first_q >= len_q:
        return

    offs_q = first_q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < len_q
    row_q = begin_q.to(tl.int64) + offs_q
    offs_k = tl.arange(0, BLOCK_K)
    row_k = begin_k.to(tl.int64) + offs_k
    # strides come divided by STRIDE_UNIT, so that the compiler knows they are its multiples
    q_ptrs = q_ptr + (row_q * stride_q_t + head * stride_q_h)[:, None] * STRIDE_UNIT
    k_ptrs = k_ptr + (row_k * stride_k_t + head // GROUP * stride_k_h)[:, None] * STRIDE_UNIT
    v_ptrs = v_ptr + (row_k * stride_v_t + head // GROUP * stride_v_h)[:, None] * STRIDE_UNIT
    step_k = stride_k_t.to(tl.int64) * STRIDE_UNIT
    step_v = stride_v_t.to(tl.int64) * STRIDE_UNIT

    q = _load(q_ptrs, mask_q[:, None], HEAD_DIM, D0, D1)
    acc = _zeros(BLOCK_Q, D0, D1)
    scale = softmax_scale * _LOG2_E
    # a finite start, so that a row without keys subtracts no infinities
    top = tl.full((BLOCK_Q,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)

    shift = len_k - len_q  # query i stands at key i + shift
    last_q = tl.minimum(first_q + BLOCK_Q, len_q) - 1
    bounds = _tile_bounds(
        first_q + shift, last_q + shift, len_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_K
    )
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        for first_k in range(bounds[part], bounds[part + 1], BLOCK_K):
            mask_k = offs_k < (BLOCK_K if part == 1 else len_k - first_k)
            k = _load(k_ptrs + first_k * step_k, mask_k[:, None], HEAD_DIM, D0, D1)
            s = _scores(q, k, D1, PRECISION)
            if part != 1:
                visible = _visible(
                    (offs_q + shift)[:, None], (first_k + offs_k)[None, :], len_k, left, right,
                    HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
                s = tl.where(visible, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, axis=1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            acc = acc[0] * shrink[:, None], acc[1] * shrink[:, None]
            v = _load(v_ptrs + first_k * step_v, mask_k[:, None], HEAD_DIM, D0, D1)
            acc = _accumulate(acc, p, v, D1, PRECISION)
            top = new_top

    tl.store(lse_ptr + head * num_tokens + row_q, (top + tl.log2(total)) / _LOG2_E, mask=mask_q)
    share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_ptrs = out_ptr + ((row_q * num_heads + head) * HEAD_DIM)[:, None]
    _store(out_ptrs, (acc[0] * share, acc[1] * share), mask_q[:, None], HEAD_DIM, D0, D1)


def _pieces(head_dim: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold a head of the next multiple of 16 channels."""
    width = triton.cdiv(head_dim, 16) * 16
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return (first, rest) if rest & (rest - 1) == 0 else (2 * first, 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    num_segments = cu_seqlens_q.shape[0] - 1
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_tokens), dtype=torch.float32)
    strides = [s for x in (q, k, v) for s in x.stride()[:2]]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    d0, d1 = _pieces(head_dim)
    BQ, BK, W, ST = CONFIG["fwd"]
    grid = (num_tokens // BQ + num_segments + 1, num_heads)
    _attend_fwd_kernel[grid](
        q, k, v, out, lse, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
        num_segments, num_segments.bit_length(), num_tokens,
        *(s // unit for s in strides),
        softmax_scale, left, right,
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, GROUP=num_heads // k.shape[1],
        HEAD_DIM=head_dim, D0=d0, D1=d1, STRIDE_UNIT=unit,
        PRECISION=CONFIG["precision"] if q.dtype == torch.float32 else "tf32",
        BLOCK_Q=BQ, BLOCK_K=BK, num_warps=W, num_stages=ST,
    )
    return out, lse
import torch
CONFIG={"fwd":(64,64,4,2),"precision":"tf32x3"}
