"""Triton kernels of ``patchpack.ops.varlen_attention``; the maths is in the reference.

Segments are cut into tiles from their own first token, so what a segment gives does not depend on
what it is packed with. Tiles are numbered so that those of segment ``s`` begin at
``cu_seqlens[s] // BLOCK + s``: no two segments overlap, at most one tile each is empty, and the
launch needs the numbers of tokens and segments only. The rows past the last segment are one more
segment, whose queries have no keys and whose keys have no queries.

A segment of at most one tile of queries would keep one program a head busy with all of its keys.
In half precision more than ``_CHUNK`` keys are split into chunks of so many, counted from the
segment's own first; each chunk gives a part in float32, and parts are summed in order. Whether and
where a segment is split depends on its own lengths alone. Its chunks are numbered from
``2 * cu_seqlens_k[s] // _CHUNK`` on: a split segment has at least as many numbers as chunks, so no
two overlap. SPLIT says what a launch is for: all segments where "none" can be split, else chunks or
the "others".

A head is held as a pair of tiles, channels ``[0, D0)`` and ``[D0, D0 + D1)``, because tiles have
powers of two: no product is spent on the padding of 80 to 128. With ``D1 == 0`` the second tile
stands for nothing, and the compiler removes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._attention_tiles import attention_tiles, head_pieces
from patchpack.kernels._rotary import cos_sin, load_frequencies
from patchpack.kernels._tiles import (
    architecture,
    compiler_options,
    last_contiguous,
    locate,
    stride_unit,
)
from patchpack.kernels.rope_2d import angle_table

_LOG2_E = tl.constexpr(1.4426950408889634)
_CHUNK = 1024  # keys, a multiple of all tiles


@triton.jit
def _find_tile(
    cu_seqlens_ptr, num_segments, search_steps, tile, BLOCK: tl.constexpr, EACH: tl.constexpr = 1
):  # fmt: skip
    """Segment of a tile, and the tile's first row in it. A segment has EACH more tiles' numbers."""
    low = tl.zeros_like(tile)
    high = low + num_segments
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        first = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle * EACH
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle - 1)
    first = tl.load(cu_seqlens_ptr + low) // BLOCK + low * EACH
    return low, (tl.maximum(tile - first, 0) * BLOCK).to(tl.int32)


@triton.jit
def _find_chunk(cu_seqlens_ptr, num_segments, search_steps, number, CHUNK: tl.constexpr):
    """Segment of a chunk of keys, and the chunk's first key in it."""
    segment, half = _find_tile(
        cu_seqlens_ptr, num_segments, search_steps, number, CHUNK // 2, EACH=0
    )
    return segment, 2 * half


@triton.jit
def _is_split(len_q, len_k, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr):
    """Whether a segment's keys are split, which its own lengths decide."""
    return (len_q > 0) & (len_q <= BLOCK_Q) & (len_k > CHUNK)


@triton.jit
def _tile_and_head(NUM_HEADS: tl.constexpr):
    """What a program works on. Heads follow each other, so that long tiles do not come last."""
    pid = tl.program_id(0).to(tl.int64)
    return pid // NUM_HEADS, pid % NUM_HEADS


@triton.jit
def _rows_of(cu_seqlens_ptr, segment, num_segments, num_tokens, PADDING: tl.constexpr):
    """First row of a segment and its number of rows; with PADDING the one past the last has some.

    Whatever ``cu_seqlens`` holds, these are rows of the tensor.
    """
    begin = tl.maximum(tl.load(cu_seqlens_ptr + segment), 0)
    end = tl.load(
        cu_seqlens_ptr + segment + 1,
        mask=segment < num_segments,
        other=num_tokens if PADDING else 0,
    )
    return begin, tl.maximum(tl.minimum(end, num_tokens) - begin, 0)


@triton.jit
def _find_queries(
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_segments, search_steps, num_q_tokens, num_k_tokens,
    tile, BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Whether a program is idle, its first query and key, and the rows of queries and of keys."""
    if SPLIT == "chunks":
        segment, first_k = _find_chunk(cu_seqlens_k_ptr, num_segments, search_steps, tile, CHUNK)
        first_q = tl.zeros_like(first_k)
    else:
        segment, first_q = _find_tile(cu_seqlens_q_ptr, num_segments, search_steps, tile, BLOCK_Q)
        first_k = tl.zeros_like(first_q)
    begin_q, len_q = _rows_of(cu_seqlens_q_ptr, segment, num_segments, num_q_tokens, True)
    begin_k, len_k = _rows_of(cu_seqlens_k_ptr, segment, num_segments, num_k_tokens, False)
    idle = first_q >= len_q
    if SPLIT == "others":
        idle = idle | _is_split(len_q, len_k, BLOCK_Q, CHUNK)
    if SPLIT == "chunks":
        idle = (first_k >= len_k) | ~_is_split(len_q, len_k, BLOCK_Q, CHUNK)
    return idle, first_q, first_k, begin_q, len_q, begin_k, len_k


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
def _within(bounds, first, last):
    """``bounds`` cut to ``[first, last]``."""
    b0 = tl.minimum(tl.maximum(bounds[0], first), last)
    b1 = tl.minimum(tl.maximum(bounds[1], first), last)
    b2 = tl.minimum(tl.maximum(bounds[2], first), last)
    b3 = tl.minimum(tl.maximum(bounds[3], first), last)
    return b0, b1, b2, b3


@triton.jit
def _visible(i, j, length, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether row ``i`` sees ``j``."""
    visible = j < length
    if HAS_LEFT:
        visible = visible & (j >= i - left)
    if HAS_RIGHT:
        visible = visible & (j <= i + right)
    return visible


@triton.jit
def _head_of(ptr, row, stride_t, head, stride_h, STRIDE_UNIT: tl.constexpr):
    # strides come divided by STRIDE_UNIT, so that the compiler knows they are its multiples
    return ptr + (row.to(tl.int64) * stride_t + head * stride_h) * STRIDE_UNIT


@triton.jit
def _result_of(
    ptr, row_ptr, row, head, num_tokens, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Where a program's rows of a result begin, and of one number a row; the stride of rows."""
    if SPLIT == "chunks":
        first = tl.program_id(0).to(tl.int64) * BLOCK_Q
        return ptr + first * HEAD_DIM, row_ptr + first, tl.full((), HEAD_DIM, tl.int32)
    stride = tl.full((), NUM_HEADS * HEAD_DIM, tl.int32)
    return (
        _head_of(ptr, row, stride, head, HEAD_DIM, 1), row_ptr + head * num_tokens + row, stride,
    )  # fmt: skip


@triton.jit
def _rows_from(ptr, first, stride_t, STRIDE_UNIT: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to the first channels of a tile's rows, ``[ROWS, 1]``."""
    # within a tile 32 bits reach far enough, and take half the registers
    near = (tl.arange(0, ROWS) * stride_t)[:, None].to(tl.int64)
    return ptr + first * stride_t.to(tl.int64) * STRIDE_UNIT + near * STRIDE_UNIT


@triton.jit
def _load_piece(ptrs, mask, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    offs_d = START + tl.arange(0, SIZE)[None, :]
    if START + SIZE > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)
    return tl.load(ptrs + offs_d, mask=mask, other=0.0)


@triton.jit
def _load(ptrs, mask, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The pieces of a head's rows; ``ptrs`` is ``[rows, 1]``, ``mask`` ``[rows]``."""
    x0 = _load_piece(ptrs, mask[:, None], 0, D0, HEAD_DIM)
    x1 = x0
    if D1 > 0:
        x1 = _load_piece(ptrs, mask[:, None], D0, D1, HEAD_DIM)
    return x0, x1


@triton.jit
def _store(ptrs, x, mask, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store the pieces of a head's rows; ``ptrs`` is ``[rows, 1]``, ``mask`` ``[rows]``."""
    offs_d = tl.arange(0, D0)[None, :]
    tl.store(ptrs + offs_d, x[0], mask=mask[:, None] & (offs_d < HEAD_DIM))
    if D1 > 0:
        offs_d = D0 + tl.arange(0, D1)[None, :]
        tl.store(ptrs + offs_d, x[1], mask=mask[:, None] & (offs_d < HEAD_DIM))


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
        "num_segments", "search_steps", "num_q_tokens", "num_k_tokens", "stride_q_t", "stride_q_h",
        "stride_k_t", "stride_k_h", "stride_v_t", "stride_v_h", "left", "right",
    ]
)  # fmt: skip
def _attend_fwd_kernel(
    # tensors
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hk, D]
    v_ptr,  # [Tk, Hk, D]
    out_ptr,  # [Tq, Hq, D], or parts [N, Hq, BLOCK_Q, D] of chunks
    lse_ptr,  # [Hq, Tq], or [N, Hq, BLOCK_Q]
    cu_seqlens_q_ptr,  # [S + 1]
    cu_seqlens_k_ptr,  # [S + 1]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_segments,
    search_steps,
    num_q_tokens,
    num_k_tokens,
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
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program attends from BLOCK_Q queries of one head to the keys of their segment."""
    tile, head = _tile_and_head(NUM_HEADS)
    idle, first_q, chunk, begin_q, len_q, begin_k, len_k = _find_queries(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_segments, search_steps, num_q_tokens, num_k_tokens,
        tile, BLOCK_Q, SPLIT, CHUNK,
    )  # fmt: skip
    if idle:
        return

    q_ptr = _head_of(q_ptr, begin_q, stride_q_t, head, stride_q_h, STRIDE_UNIT)
    k_ptr = _head_of(k_ptr, begin_k, stride_k_t, head // GROUP, stride_k_h, STRIDE_UNIT)
    v_ptr = _head_of(v_ptr, begin_k, stride_v_t, head // GROUP, stride_v_h, STRIDE_UNIT)
    out_ptr, lse_ptr, stride_out_t = _result_of(
        out_ptr, lse_ptr, begin_q, head, num_q_tokens, NUM_HEADS, HEAD_DIM, BLOCK_Q, SPLIT
    )

    offs_q = first_q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    mask_q = offs_q < len_q
    q_ptrs = _rows_from(q_ptr, first_q, stride_q_t, STRIDE_UNIT, BLOCK_Q)
    q = _load(q_ptrs, mask_q, HEAD_DIM, D0, D1)
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
    if SPLIT == "chunks":
        bounds = _within(bounds, chunk, chunk + CHUNK)
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        for first_k in range(bounds[part], bounds[part + 1], BLOCK_K):
            mask_k = offs_k < (BLOCK_K if part == 1 else len_k - first_k)
            k_ptrs = _rows_from(k_ptr, first_k, stride_k_t, STRIDE_UNIT, BLOCK_K)
            v_ptrs = _rows_from(v_ptr, first_k, stride_v_t, STRIDE_UNIT, BLOCK_K)
            k = _load(k_ptrs, mask_k, HEAD_DIM, D0, D1)
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
            v = _load(v_ptrs, mask_k, HEAD_DIM, D0, D1)
            acc = _accumulate(acc, p, v, D1, PRECISION)
            top = new_top

    lse = (top + tl.log2(total)) / _LOG2_E
    tl.store(lse_ptr + offs_q, lse, mask=mask_q)
    share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_ptrs = _rows_from(out_ptr, first_q, stride_out_t, 1, BLOCK_Q)
    _store(out_ptrs, (acc[0] * share, acc[1] * share), mask_q, HEAD_DIM, D0, D1)


@triton.jit(
    do_not_specialize=[
        "num_segments", "search_steps", "num_q_tokens", "num_k_tokens", "stride_q_t", "stride_q_h",
        "stride_k_t", "stride_k_h", "stride_v_t", "stride_v_h", "left", "right",
    ]
)  # fmt: skip
def _attend_bwd_dq_kernel(
    # tensors
    grad_out_ptr,  # [Tq, Hq, D]
    grad_lse_ptr,  # [Hq, Tq], or anything without HAS_GRAD_LSE
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hk, D]
    v_ptr,  # [Tk, Hk, D]
    out_ptr,  # [Tq, Hq, D]
    lse_ptr,  # [Hq, Tq]
    delta_ptr,  # [Hq, Tq]
    norm_ptr,  # [Hq, Tq], or anything without COMPENSATED
    grad_q_ptr,  # [Tq, Hq, D], or parts [N, Hq, BLOCK_Q, D] of chunks
    cu_seqlens_q_ptr,  # [S + 1]
    cu_seqlens_k_ptr,  # [S + 1]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_segments,
    search_steps,
    num_q_tokens,
    num_k_tokens,
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
    HAS_GRAD_LSE: tl.constexpr,
    COMPENSATED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program makes the gradient of BLOCK_Q queries of one head, and their ``delta``."""
    tile, head = _tile_and_head(NUM_HEADS)
    idle, first_q, chunk, begin_q, len_q, begin_k, len_k = _find_queries(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_segments, search_steps, num_q_tokens, num_k_tokens,
        tile, BLOCK_Q, SPLIT, CHUNK,
    )  # fmt: skip
    if idle:
        return

    stride_out_t = NUM_HEADS * HEAD_DIM
    q_ptr = _head_of(q_ptr, begin_q, stride_q_t, head, stride_q_h, STRIDE_UNIT)
    k_ptr = _head_of(k_ptr, begin_k, stride_k_t, head // GROUP, stride_k_h, STRIDE_UNIT)
    v_ptr = _head_of(v_ptr, begin_k, stride_v_t, head // GROUP, stride_v_h, STRIDE_UNIT)
    out_ptr = _head_of(out_ptr, begin_q, stride_out_t, head, HEAD_DIM, 1)
    grad_out_ptr = _head_of(grad_out_ptr, begin_q, stride_out_t, head, HEAD_DIM, 1)
    grad_q_ptr, _, stride_grad_t = _result_of(
        grad_q_ptr, lse_ptr, begin_q, head, num_q_tokens, NUM_HEADS, HEAD_DIM, BLOCK_Q, SPLIT
    )

    offs_q = first_q + tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    mask_q = offs_q < len_q
    offs_row = head * num_q_tokens + begin_q + offs_q
    q_ptrs = _rows_from(q_ptr, first_q, stride_q_t, STRIDE_UNIT, BLOCK_Q)
    out_ptrs = _rows_from(out_ptr, first_q, stride_out_t, 1, BLOCK_Q)
    grad_out_ptrs = _rows_from(grad_out_ptr, first_q, stride_out_t, 1, BLOCK_Q)
    q = _load(q_ptrs, mask_q, HEAD_DIM, D0, D1)
    out = _load(out_ptrs, mask_q, HEAD_DIM, D0, D1)
    lse = tl.load(lse_ptr + offs_row, mask=mask_q, other=0.0) * _LOG2_E
    sees = mask_q & (lse != float("-inf"))  # a query without keys passes no gradient on, not NaN
    grad_out = _load(grad_out_ptrs, sees, HEAD_DIM, D0, D1)

    # delta[i] = grad_out[i] . out[i] - grad_lse[i]
    delta = tl.sum(out[0].to(tl.float32) * grad_out[0].to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(out[1].to(tl.float32) * grad_out[1].to(tl.float32), axis=1)
    grad_lse = tl.zeros_like(delta)
    if HAS_GRAD_LSE:
        grad_lse = tl.load(grad_lse_ptr + offs_row, mask=sees, other=0.0)
    delta -= grad_lse

    acc = _zeros(BLOCK_Q, D0, D1)
    key_sum = _zeros(BLOCK_Q, D0, D1)
    p_sum = tl.zeros_like(delta)
    grad_sum = tl.zeros_like(delta)
    scale = softmax_scale * _LOG2_E
    shift = len_k - len_q
    last_q = tl.minimum(first_q + BLOCK_Q, len_q) - 1
    bounds = _tile_bounds(
        first_q + shift, last_q + shift, len_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_K
    )
    if SPLIT == "chunks":
        bounds = _within(bounds, chunk, chunk + CHUNK)
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        for first_k in range(bounds[part], bounds[part + 1], BLOCK_K):
            mask_k = offs_k < (BLOCK_K if part == 1 else len_k - first_k)
            k_ptrs = _rows_from(k_ptr, first_k, stride_k_t, STRIDE_UNIT, BLOCK_K)
            v_ptrs = _rows_from(v_ptr, first_k, stride_v_t, STRIDE_UNIT, BLOCK_K)
            k = _load(k_ptrs, mask_k, HEAD_DIM, D0, D1)
            v = _load(v_ptrs, mask_k, HEAD_DIM, D0, D1)
            p = tl.exp2(_scores(q, k, D1, PRECISION) * scale - lse[:, None])
            if part != 1:
                visible = _visible(
                    (offs_q + shift)[:, None], (first_k + offs_k)[None, :], len_k, left, right,
                    HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
                p = tl.where(visible, p, 0.0)
            grad_s = p * (_scores(grad_out, v, D1, PRECISION) - delta[:, None])
            acc = _accumulate(acc, grad_s, k, D1, PRECISION)
            if COMPENSATED:
                p_sum += tl.sum(p, axis=1)
                grad_sum += tl.sum(grad_s, axis=1)
                key_sum = _accumulate(key_sum, p, k, D1, PRECISION)

    if COMPENSATED:
        # p must sum to 1 and grad_s to grad_lse; float32 sees that lse and delta were rounded
        norm = 1.0 / tl.where(p_sum == 0.0, 1.0, p_sum)
        excess = tl.where(p_sum == 0.0, 0.0, grad_sum * norm - grad_lse)
        delta += excess
        tl.store(norm_ptr + offs_row, norm, mask=mask_q)
        acc0 = (acc[0] - excess[:, None] * key_sum[0]) * norm[:, None]
        acc = acc0, (acc[1] - excess[:, None] * key_sum[1]) * norm[:, None]
    if SPLIT == "chunks":
        mask_row = mask_q & (chunk == 0)  # every chunk has them
    else:
        mask_row = mask_q
    tl.store(delta_ptr + offs_row, delta, mask=mask_row)
    acc = acc[0] * softmax_scale, acc[1] * softmax_scale
    grad_q_ptrs = _rows_from(grad_q_ptr, first_q, stride_grad_t, 1, BLOCK_Q)
    _store(grad_q_ptrs, acc, mask_q, HEAD_DIM, D0, D1)


@triton.jit(
    do_not_specialize=["num_segments", "search_steps", "num_q_tokens", "num_k_tokens"],
)
def _sum_chunks_kernel(
    # tensors
    parts_ptr,  # [N, Hq, BLOCK_Q, D]
    part_lse_ptr,  # [N, Hq, BLOCK_Q], or anything without HAS_LSE
    out_ptr,  # [Tq, Hq, D]
    lse_ptr,  # [Hq, Tq], or anything without HAS_LSE
    cu_seqlens_q_ptr,  # [S + 1]
    cu_seqlens_k_ptr,  # [S + 1]
    # sizes
    num_segments,
    search_steps,
    num_q_tokens,
    num_k_tokens,
    # compile-time
    HAS_LSE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Those programs that a segment's first chunk has sum the parts of all, weighted by ``lse``."""
    number, head = _tile_and_head(NUM_HEADS)
    segment, chunk = _find_chunk(cu_seqlens_k_ptr, num_segments, search_steps, number, CHUNK)
    begin_q, len_q = _rows_of(cu_seqlens_q_ptr, segment, num_segments, num_q_tokens, True)
    _, len_k = _rows_of(cu_seqlens_k_ptr, segment, num_segments, num_k_tokens, False)
    if (chunk > 0) | ~_is_split(len_q, len_k, BLOCK_Q, CHUNK):
        return

    offs_q = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_q = offs_q < len_q
    mask = mask_q[:, None] & (offs_d < HEAD_DIM)
    # whatever cu_seqlens holds, these are parts
    count = tl.minimum(tl.cdiv(len_k, CHUNK), tl.num_programs(0) // NUM_HEADS - number.to(tl.int32))
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + offs_q
    top = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if HAS_LSE:
        for i in range(count):
            part_lse = tl.load(part_lse_ptr + rows + i * (NUM_HEADS * BLOCK_Q), mask=mask_q)
            top = tl.maximum(top, part_lse)
    for i in range(count):
        row = rows + i * (NUM_HEADS * BLOCK_Q)
        part = tl.load(parts_ptr + row[:, None] * HEAD_DIM + offs_d, mask=mask, other=0.0)
        if HAS_LSE:
            weight = tl.exp(tl.load(part_lse_ptr + row, mask=mask_q, other=0.0) - top)
            total += weight
            part *= weight[:, None]
        acc += part
    if HAS_LSE:
        tl.store(lse_ptr + head * num_q_tokens + begin_q + offs_q, top + tl.log(total), mask=mask_q)
        acc *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    out_ptrs = out_ptr + (begin_q.to(tl.int64) + offs_q) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
    tl.store(out_ptrs[:, None] + offs_d, acc, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_segments", "search_steps", "num_q_tokens", "num_k_tokens", "stride_q_t", "stride_q_h",
        "stride_k_t", "stride_k_h", "stride_v_t", "stride_v_h", "left", "right",
    ]
)  # fmt: skip
def _attend_bwd_dkv_kernel(
    # tensors
    grad_out_ptr,  # [Tq, Hq, D]
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hk, D]
    v_ptr,  # [Tk, Hk, D]
    lse_ptr,  # [Hq, Tq]
    delta_ptr,  # [Hq, Tq]
    norm_ptr,  # [Hq, Tq], or anything without COMPENSATED
    grad_k_ptr,  # [Tk, Hk, D]
    grad_v_ptr,  # [Tk, Hk, D]
    cu_seqlens_q_ptr,  # [S + 1]
    cu_seqlens_k_ptr,  # [S + 1]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_segments,
    search_steps,
    num_q_tokens,
    num_k_tokens,
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
    COMPENSATED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program makes the gradients of BLOCK_K keys and values of one head, over its queries."""
    NUM_K_HEADS: tl.constexpr = NUM_HEADS // GROUP
    tile, head_k = _tile_and_head(NUM_K_HEADS)
    segment, first_k = _find_tile(cu_seqlens_k_ptr, num_segments, search_steps, tile, BLOCK_K)
    begin_k, len_k = _rows_of(cu_seqlens_k_ptr, segment, num_segments, num_k_tokens, True)
    begin_q, len_q = _rows_of(cu_seqlens_q_ptr, segment, num_segments, num_q_tokens, False)
    if first_k >= len_k:
        return

    stride_out_t = NUM_HEADS * HEAD_DIM
    stride_grad_t = NUM_K_HEADS * HEAD_DIM
    k_ptr = _head_of(k_ptr, begin_k, stride_k_t, head_k, stride_k_h, STRIDE_UNIT)
    v_ptr = _head_of(v_ptr, begin_k, stride_v_t, head_k, stride_v_h, STRIDE_UNIT)
    grad_k_ptr = _head_of(grad_k_ptr, begin_k, stride_grad_t, head_k, HEAD_DIM, 1)
    grad_v_ptr = _head_of(grad_v_ptr, begin_k, stride_grad_t, head_k, HEAD_DIM, 1)

    offs_q = tl.arange(0, BLOCK_Q)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < len_k
    k_ptrs = _rows_from(k_ptr, first_k, stride_k_t, STRIDE_UNIT, BLOCK_K)
    v_ptrs = _rows_from(v_ptr, first_k, stride_v_t, STRIDE_UNIT, BLOCK_K)
    k = _load(k_ptrs, mask_k, HEAD_DIM, D0, D1)
    v = _load(v_ptrs, mask_k, HEAD_DIM, D0, D1)

    acc_k = _zeros(BLOCK_K, D0, D1)
    acc_v = _zeros(BLOCK_K, D0, D1)
    scale = softmax_scale * _LOG2_E
    # key j is seen by the queries [j - shift - right, j - shift + left]
    shift = len_k - len_q
    # queries without keys are left out: they pass nothing on, and what they hold may be NaN
    if HAS_LEFT:
        len_q = tl.maximum(tl.minimum(len_q, len_k - shift + left), 0)
    if HAS_RIGHT:
        without = tl.minimum(tl.maximum(-shift - right, 0), len_q)
        begin_q += without
        len_q -= without
        shift += without
    last_k = tl.minimum(first_k + BLOCK_K, len_k) - 1
    bounds = _tile_bounds(
        first_k - shift, last_k - shift, len_q, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_Q
    )
    # full tiles apart are faster, but take registers that masks and heads that share keys need
    ONE_LOOP: tl.constexpr = HAS_LEFT or HAS_RIGHT or GROUP > 1
    for in_group in range(GROUP):
        head_q = head_k * GROUP + in_group
        of_q_ptr = _head_of(q_ptr, begin_q, stride_q_t, head_q, stride_q_h, STRIDE_UNIT)
        of_grad_out_ptr = _head_of(grad_out_ptr, begin_q, stride_out_t, head_q, HEAD_DIM, 1)
        row = head_q * num_q_tokens + begin_q
        for part in tl.static_range(2 if ONE_LOOP else 1, 3):
            for first_q in range(bounds[0 if ONE_LOOP else part], bounds[part + 1], BLOCK_Q):
                mask_q = offs_q < (BLOCK_Q if part == 1 else len_q - first_q)
                q_ptrs = _rows_from(of_q_ptr, first_q, stride_q_t, STRIDE_UNIT, BLOCK_Q)
                grad_out_ptrs = _rows_from(of_grad_out_ptr, first_q, stride_out_t, 1, BLOCK_Q)
                q = _load(q_ptrs, mask_q, HEAD_DIM, D0, D1)
                grad_out = _load(grad_out_ptrs, mask_q, HEAD_DIM, D0, D1)
                lse = tl.load(lse_ptr + row + first_q + offs_q, mask=mask_q, other=0.0) * _LOG2_E
                delta = tl.load(delta_ptr + row + first_q + offs_q, mask=mask_q, other=0.0)

                # transposed, keys by queries
                if COMPENSATED:  # with the bits that the other pass made up for
                    s = tl.trans(_scores(q, k, D1, PRECISION))
                    grad_p = tl.trans(_scores(grad_out, v, D1, PRECISION))
                    norm = tl.load(norm_ptr + row + first_q + offs_q, mask=mask_q, other=0.0)
                    p = tl.exp2(s * scale - lse[None, :]) * norm[None, :]
                else:
                    grad_p = _scores(v, grad_out, D1, PRECISION)
                    p = tl.exp2(_scores(k, q, D1, PRECISION) * scale - lse[None, :])
                if part != 1:
                    visible = _visible(
                        (offs_k - shift)[:, None], (first_q + offs_q)[None, :], len_q, right, left,
                        HAS_RIGHT, HAS_LEFT,
                    )  # fmt: skip
                    p = tl.where(visible, p, 0.0)
                acc_v = _accumulate(acc_v, p, grad_out, D1, PRECISION)
                grad_s = p * (grad_p - delta[None, :])
                acc_k = _accumulate(acc_k, grad_s, q, D1, PRECISION)

    acc_k = acc_k[0] * softmax_scale, acc_k[1] * softmax_scale
    grad_k_ptrs = _rows_from(grad_k_ptr, first_k, stride_grad_t, 1, BLOCK_K)
    grad_v_ptrs = _rows_from(grad_v_ptr, first_k, stride_grad_t, 1, BLOCK_K)
    _store(grad_k_ptrs, acc_k, mask_k, HEAD_DIM, D0, D1)
    _store(grad_v_ptrs, acc_v, mask_k, HEAD_DIM, D0, D1)


@triton.jit
def _angles_of_piece(
    row, col, table_ptr, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Cosine and sine of each channel's angle."""
    channel = START + tl.arange(0, SIZE)[None, :]
    mask = channel < HEAD_DIM
    NUM_PAIRS: tl.constexpr = HEAD_DIM // 2
    pair = channel % NUM_PAIRS
    axis, high, low = load_frequencies(table_ptr, pair, mask, NUM_PAIRS)
    return cos_sin(tl.where(axis == 0, row[:, None], col[:, None]), high, low)


@triton.jit
def _load_turned_piece(
    ptrs, mask, cos, sin, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    # the partners are the same cache lines, read in another order
    channel = START + tl.arange(0, SIZE)[None, :]
    partner = (channel + HEAD_DIM // 2) % HEAD_DIM
    mask = mask[:, None] & (channel < HEAD_DIM)
    x = tl.load(ptrs + channel, mask=mask, other=0.0)
    y = tl.load(ptrs + partner, mask=mask, other=0.0).to(tl.float32)
    y = tl.where(channel < HEAD_DIM // 2, -y, y)
    # rounded as the op that only rotates rounds it
    return tl.fma(x.to(tl.float32), cos, y * sin).to(x.dtype)


@triton.jit
def _load_turned(
    ptrs, mask, cos, sin, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    """The pieces of a head's rows, rotated; ``ptrs`` is ``[rows, 1]``, ``mask`` ``[rows]``."""
    x0 = _load_turned_piece(ptrs, mask, cos[0], sin[0], 0, D0, HEAD_DIM)
    x1 = x0
    if D1 > 0:
        x1 = _load_turned_piece(ptrs, mask, cos[1], sin[1], D0, D1, HEAD_DIM)
    return x0, x1


@triton.jit(
    do_not_specialize=[
        "num_segments", "search_steps", "num_grids", "grid_steps", "num_tokens", "stride_q_t",
        "stride_q_h", "stride_k_t", "stride_k_h", "stride_v_t", "stride_v_h",
    ]
)  # fmt: skip
def _attend_rotated_kernel(
    # tensors
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hk, D]
    v_ptr,  # [T, Hk, D]
    out_ptr,  # [T, Hq, D]
    lse_ptr,  # [Hq, T]
    cu_seqlens_ptr,  # [S + 1]
    geometry_ptr,  # [G + 1, 3]
    table_ptr,  # [2, D / 2]
    # sizes and strides, in units of STRIDE_UNIT elements
    num_segments,
    search_steps,
    num_grids,
    grid_steps,
    num_tokens,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    # scalars
    softmax_scale,
    # compile-time
    MERGE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_A_PART: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program rotates queries and keys of a tile and attends, a few heads by the same angles.

    A tile is a whole segment: what is longer would attend tile by tile.
    """
    first_head = tl.program_id(1).to(tl.int64) * HEADS_A_PART
    segment, first = _find_tile(
        cu_seqlens_ptr, num_segments, search_steps, tl.program_id(0).to(tl.int64), BLOCK
    )
    begin, length = _rows_of(cu_seqlens_ptr, segment, num_segments, num_tokens, True)
    if first >= length:
        return
    offs = first + tl.arange(0, BLOCK)
    mask = offs < length
    mask_k = offs < tl.where(segment < num_segments, length, 0)

    tokens = begin.to(tl.int64) + offs
    _, _, _, row, col, _, _ = locate(geometry_ptr, num_grids, grid_steps, tokens, MERGE)
    cos0, sin0 = _angles_of_piece(row, col, table_ptr, 0, D0, HEAD_DIM)
    cos1, sin1 = cos0, sin0
    if D1 > 0:
        cos1, sin1 = _angles_of_piece(row, col, table_ptr, D0, D1, HEAD_DIM)
    cos, sin = (cos0, cos1), (sin0, sin1)

    scale = softmax_scale * _LOG2_E
    stride_out_t = NUM_HEADS * HEAD_DIM
    for head in range(first_head, tl.minimum(first_head + HEADS_A_PART, NUM_HEADS)):
        of_q_ptr = _head_of(q_ptr, begin, stride_q_t, head, stride_q_h, STRIDE_UNIT)
        of_k_ptr = _head_of(k_ptr, begin, stride_k_t, head // GROUP, stride_k_h, STRIDE_UNIT)
        of_v_ptr = _head_of(v_ptr, begin, stride_v_t, head // GROUP, stride_v_h, STRIDE_UNIT)
        of_out_ptr = _head_of(out_ptr, begin, stride_out_t, head, HEAD_DIM, 1)
        q_ptrs = _rows_from(of_q_ptr, first, stride_q_t, STRIDE_UNIT, BLOCK)
        k_ptrs = _rows_from(of_k_ptr, first, stride_k_t, STRIDE_UNIT, BLOCK)
        v_ptrs = _rows_from(of_v_ptr, first, stride_v_t, STRIDE_UNIT, BLOCK)
        q = _load_turned(q_ptrs, mask, cos, sin, HEAD_DIM, D0, D1)
        k = _load_turned(k_ptrs, mask_k, cos, sin, HEAD_DIM, D0, D1)
        s = tl.where(mask_k[None, :], _scores(q, k, D1, "ieee"), float("-inf"))
        # finite, so that a row without keys subtracts no infinities
        top = tl.maximum(tl.max(s, axis=1) * scale, -3.0e38)
        p = tl.exp2(s * scale - top[:, None])
        total = tl.sum(p, axis=1)
        v = _load(v_ptrs, mask_k, HEAD_DIM, D0, D1)
        acc = _accumulate(_zeros(BLOCK, D0, D1), p, v, D1, "ieee")

        lse = (top + tl.log2(total)) / _LOG2_E
        tl.store(lse_ptr + head * num_tokens + begin + offs, lse, mask=mask)
        share = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        out_ptrs = _rows_from(of_out_ptr, first, stride_out_t, 1, BLOCK)
        _store(out_ptrs, (acc[0] * share, acc[1] * share), mask, HEAD_DIM, D0, D1)


def _addressable(x: Tensor) -> Tensor:
    """``x``, or a copy if its last dimension is strided or a tile of its rows exceeds 32 bits."""
    return last_contiguous(x) if x.stride(0) < 2**25 else x.contiguous()


def _arguments(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> tuple[list[int], dict]:
    """Strides of q, k and v in units that the compiler can align to, and compile-time arguments."""
    unit = stride_unit(q, k, v)
    return [stride // unit for x in (q, k, v) for stride in x.stride()[:2]], {
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "NUM_HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[2],
        "STRIDE_UNIT": unit,
        "PRECISION": "ieee",  # of float32; tf32x3 on tensor cores would spill at these tiles
        **compiler_options(),
    }


def _num_chunks(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """Numbers of chunks that segments may have, or 0 if none can be split."""
    num_k_tokens = k.shape[0]
    same = cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr()  # as many queries as keys
    same = same and cu_seqlens_q.stride() == cu_seqlens_k.stride()
    if same or q.dtype == torch.float32 or num_k_tokens <= _CHUNK:
        return 0
    return 2 * num_k_tokens // _CHUNK + 1


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
    num_q_tokens, num_heads, head_dim = q.shape
    num_segments = cu_seqlens_q.shape[0] - 1
    num_chunks = _num_chunks(q, k, cu_seqlens_q, cu_seqlens_k)
    q, k, v = (_addressable(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_q_tokens), dtype=torch.float32)
    if num_q_tokens == 0:
        return out, lse
    strides, constants = _arguments(q, k, v, left, right)
    masked = constants["HAS_LEFT"] or constants["HAS_RIGHT"] or constants["GROUP"] > 1
    tiles = attention_tiles("fwd", head_dim, masked, q.dtype, architecture())
    num_tiles = num_q_tokens // tiles["BLOCK_Q"] + num_segments + 1
    segments = (
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        num_segments,
        num_segments.bit_length(),
        num_q_tokens,
        k.shape[0],
    )

    def launch(num_programs: int, out: Tensor, lse: Tensor, split: str) -> None:
        _attend_fwd_kernel[(num_programs * num_heads,)](
            q,
            k,
            v,
            out,
            lse,
            *segments,
            *strides,
            softmax_scale,
            left,
            right,
            SPLIT=split,
            CHUNK=_CHUNK,
            **constants,
            **tiles,
        )

    launch(num_tiles, out, lse, "others" if num_chunks else "none")
    if num_chunks:
        shape = num_chunks, num_heads, tiles["BLOCK_Q"]
        parts = q.new_empty((*shape, head_dim), dtype=torch.float32)
        part_lse = q.new_empty(shape, dtype=torch.float32)
        launch(num_chunks, parts, part_lse, "chunks")
        _sum_chunks(parts, part_lse, out, lse, segments)
    return out, lse


def _sum_chunks(
    parts: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None, segments: tuple
) -> None:
    num_chunks, num_heads, block_q, head_dim = parts.shape
    rows = 16
    _sum_chunks_kernel[(num_chunks * num_heads, block_q // rows)](
        parts,
        parts if part_lse is None else part_lse,
        out,
        out if lse is None else lse,
        *segments,
        HAS_LSE=part_lse is not None,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_Q=block_q,
        BLOCK_D=triton.next_power_of_2(head_dim),
        ROWS=rows,
        CHUNK=_CHUNK,
        num_warps=4,
        **compiler_options(),
    )


def attend_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_q_tokens, num_q_heads, head_dim = q.shape
    num_k_tokens, num_k_heads, _ = k.shape
    num_segments = cu_seqlens_q.shape[0] - 1
    num_chunks = _num_chunks(q, k, cu_seqlens_q, cu_seqlens_k)
    q, k, v = (_addressable(x) for x in (q, k, v))
    grad_out = grad_out.contiguous()
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    compensated = q.dtype == torch.float32
    norm = torch.empty_like(lse) if compensated else delta
    strides, constants = _arguments(q, k, v, left, right)
    masked = constants["HAS_LEFT"] or constants["HAS_RIGHT"] or constants["GROUP"] > 1
    kind = head_dim, masked, q.dtype, architecture()
    scalars = (softmax_scale, left, right)
    segments = (
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        num_segments,
        num_segments.bit_length(),
        num_q_tokens,
        num_k_tokens,
    )
    if num_q_tokens:
        tiles = attention_tiles("dq", *kind)
        num_tiles = num_q_tokens // tiles["BLOCK_Q"] + num_segments + 1

        def launch(num_programs: int, grad_q: Tensor, split: str) -> None:
            _attend_bwd_dq_kernel[(num_programs * num_q_heads,)](
                grad_out,
                lse if grad_lse is None else grad_lse.contiguous(),
                q,
                k,
                v,
                out,
                lse,
                delta,
                norm,
                grad_q,
                *segments,
                *strides,
                *scalars,
                HAS_GRAD_LSE=grad_lse is not None,
                COMPENSATED=compensated,
                SPLIT=split,
                CHUNK=_CHUNK,
                **constants,
                **tiles,
            )

        launch(num_tiles, grad_q, "others" if num_chunks else "none")
        if num_chunks:
            shape = num_chunks, num_q_heads, tiles["BLOCK_Q"], head_dim
            parts = q.new_empty(shape, dtype=torch.float32)
            launch(num_chunks, parts, "chunks")
            _sum_chunks(parts, None, grad_q, None, segments)
    if num_k_tokens:
        tiles = attention_tiles("dkv", *kind)
        num_tiles = num_k_tokens // tiles["BLOCK_K"] + num_segments + 1
        _attend_bwd_dkv_kernel[(num_tiles * num_k_heads,)](
            grad_out,
            q,
            k,
            v,
            lse,
            delta,
            norm,
            grad_k,
            grad_v,
            *segments,
            *strides,
            *scalars,
            COMPENSATED=compensated,
            **constants,
            **tiles,
        )
    return grad_q, grad_k, grad_v


def attend_rotated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    geometry: Tensor,
    spatial_merge_size: int,
    base: float,
    axes: str,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    num_segments, num_grids = cu_seqlens.shape[0] - 1, geometry.shape[0] - 1
    q, k, v = (_addressable(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_tokens), dtype=torch.float32)
    if num_tokens == 0:
        return out, lse
    unit = stride_unit(q, k, v)
    d0, d1 = head_pieces(head_dim)
    block, heads_a_part = 64, 4
    tiles = num_tokens // block + num_segments + 1
    _attend_rotated_kernel[(tiles, triton.cdiv(num_heads, heads_a_part))](
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens.contiguous(),
        geometry,
        angle_table(head_dim // 2, axes, base, q.device),
        num_segments,
        num_segments.bit_length(),
        num_grids,
        max(num_grids - 1, 0).bit_length(),
        num_tokens,
        *(stride // unit for x in (q, k, v) for stride in x.stride()[:2]),
        softmax_scale,
        MERGE=spatial_merge_size,
        NUM_HEADS=num_heads,
        HEADS_A_PART=heads_a_part,
        GROUP=num_heads // k.shape[1],
        HEAD_DIM=head_dim,
        D0=d0,
        D1=d1,
        STRIDE_UNIT=unit,
        BLOCK=block,
        num_warps=8,
        num_stages=1,
        **compiler_options(),
    )
    return out, lse
