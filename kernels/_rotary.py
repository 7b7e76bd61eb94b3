"""What ``rope``, ``rope_2d`` and ``mrope`` share: exact angles, and the rotation of all heads.

An angle is kept in turns as a 64-bit fixed-point fraction: positions are integers, so the product
with a frequency wraps around exactly where the angle does, and no range reduction is needed. Sine
and cosine are as accurate at position 4 million as at 4.
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import compiler_options, last_contiguous, stride_unit

_TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021")


def frequency_table(
    pairs: Sequence[tuple[int, Fraction]], base: float, device: torch.device
) -> Tensor:
    """Axis and frequency of each pair as int32 ``[2, R]``: high word, low word.

    A pair is (axis, exponent); its frequency is ``base ** -exponent`` radians a position, kept as
    ``2 ** 64`` times its turns. The axis takes the place of the two lowest bits.
    """
    with localcontext() as context:
        context.prec = 50
        log_base = Decimal(base).ln()
        words = []
        for axis, exponent in pairs:
            power = log_base * exponent.numerator / exponent.denominator
            turns = int(((-power).exp() / _TWO_PI * 2**64).to_integral_value()) % 2**64
            words.append((_signed(turns >> 32), _signed(turns & 0xFFFFFFFC | axis)))
    return torch.tensor(words, dtype=torch.int32, device="cpu").T.contiguous().to(device)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def cos_sin(positions, high, low):
    """Cosine and sine of ``positions`` (int32) times fixed-point frequencies (int32 words)."""
    distance = tl.abs(positions).to(tl.uint32)
    high = high.to(tl.uint32, bitcast=True)
    low = low.to(tl.uint32, bitcast=True)
    turns = distance * high + tl.umulhi(distance, low)  # 2**32 is one turn

    # the nearest quarter turn, and what is left of it: an eighth of a turn at most, signed
    quarter = (turns + 0x20000000) >> 30
    rest = (turns - (quarter << 30)).to(tl.int32, bitcast=True)
    # times 2 pi / 2**32, rounded once: 30 bits and a constant of 48
    few = rest & 0xFF
    many = (rest - few).to(tl.float32)
    x = tl.fma(many, -4.070940268e-17, few.to(tl.float32) * 1.462918120e-09)
    x = tl.fma(many, 1.462918120e-09, x)
    z = x * x
    sin = x + x * z * (-0.1666665493668579 + z * (0.008332177686051519 - z * 0.0001951723464803119))
    cos = 1.0 + z * (
        -0.5 + z * (0.041666646854584335 + z * (-0.0013887366909231464 + z * 2.44383793988e-05))
    )

    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where(((quarter & 2) != 0) != (positions < 0), -sin, sin)
    return cos, sin


@triton.jit
def load_frequencies(table_ptr, pair, mask, NUM_PAIRS: tl.constexpr):
    """Axis, high word and low word of pairs."""
    high = tl.load(table_ptr + pair, mask=mask, other=0)
    low = tl.load(table_ptr + NUM_PAIRS + pair, mask=mask, other=0)
    return low & 3, high, low & -4


@triton.jit
def _rotate(a, b, cos, sin):
    # left to the compiler, either product is fused with the sum, and bits differ within a tile
    return tl.fma(a, cos, -b * sin), tl.fma(b, cos, a * sin)


@triton.jit
def _rotate_tensor(
    x_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D], contiguous
    stride_x_t,
    stride_x_h,
    offs_t,
    mask_t,
    cos,  # [BLOCK_T, 1, BLOCK_I]
    sin,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):
    # strides come divided by STRIDE_UNIT, so that the compiler knows they are its multiples
    offs_t = offs_t[:, None, None]
    offs_h = tl.arange(0, BLOCK_H)[None, :, None]
    x_ptrs = x_ptr + (offs_t * stride_x_t + offs_h.to(tl.int64) * stride_x_h) * STRIDE_UNIT
    out_ptrs = x_ptrs  # in place: both of a pair are read before one is written, and read once
    if not IN_PLACE:
        out_ptrs = out_ptr + offs_t * (NUM_HEADS * HEAD_DIM) + offs_h * HEAD_DIM
    offs_i = tl.arange(0, BLOCK_I)[None, None, :]
    offs_pair = tl.arange(0, 2 * BLOCK_I)[None, None, :]
    offs_pass = 2 * NUM_PAIRS + tl.arange(0, BLOCK_PASS)[None, None, :]

    for _ in range(0, NUM_HEADS, BLOCK_H):
        mask_th = mask_t[:, None, None] & (offs_h < NUM_HEADS)
        mask = mask_th & (offs_i < NUM_PAIRS)
        if INTERLEAVED:
            mask_pair = mask_th & (offs_pair < 2 * NUM_PAIRS)
            x = tl.load(x_ptrs + offs_pair, mask=mask_pair, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (BLOCK_T, BLOCK_H, BLOCK_I, 2)))
            a, b = _rotate(a, b, cos, sin)
            y = tl.reshape(tl.join(a, b), (BLOCK_T, BLOCK_H, 2 * BLOCK_I))
            tl.store(out_ptrs + offs_pair, y, mask=mask_pair)
        else:
            a = tl.load(x_ptrs + offs_i, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x_ptrs + NUM_PAIRS + offs_i, mask=mask, other=0.0).to(tl.float32)
            a, b = _rotate(a, b, cos, sin)
            tl.store(out_ptrs + offs_i, a, mask=mask)
            tl.store(out_ptrs + NUM_PAIRS + offs_i, b, mask=mask)
        if HEAD_DIM > 2 * NUM_PAIRS and not IN_PLACE:
            mask_pass = mask_th & (offs_pass < HEAD_DIM)
            passed = tl.load(x_ptrs + offs_pass, mask=mask_pass, other=0.0)
            tl.store(out_ptrs + offs_pass, passed, mask=mask_pass)
        offs_h += BLOCK_H
        step = stride_x_h.to(tl.int64) * (BLOCK_H * STRIDE_UNIT)
        x_ptrs += step
        out_ptrs += step if IN_PLACE else BLOCK_H * HEAD_DIM


@triton.jit
def rotate_heads(
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [T, Hk, D]
    q_out_ptr,  # [T, Hq, D], contiguous
    k_out_ptr,  # [T, Hk, D], contiguous
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    offs_t,
    mask_t,
    cos,  # [BLOCK_T, BLOCK_I]
    sin,
    NUM_Q_HEADS: tl.constexpr,
    NUM_K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
):
    """Turn all heads of BLOCK_T tokens by the same angles, BLOCK_H at a time."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    _rotate_tensor(
        q_ptr, q_out_ptr, stride_q_t, stride_q_h, offs_t, mask_t, cos, sin, NUM_Q_HEADS, HEAD_DIM,
        NUM_PAIRS, INTERLEAVED, IN_PLACE, STRIDE_UNIT, BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_PASS,
    )  # fmt: skip
    _rotate_tensor(
        k_ptr, k_out_ptr, stride_k_t, stride_k_h, offs_t, mask_t, cos, sin, NUM_K_HEADS, HEAD_DIM,
        NUM_PAIRS, INTERLEAVED, IN_PLACE, STRIDE_UNIT, BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_PASS,
    )  # fmt: skip


def launch(
    kernel,
    q: Tensor,
    k: Tensor,
    angle_args: tuple,
    num_pairs: int,
    *,
    in_place: bool = False,
    **constants,
):
    """Launch ``kernel`` once for ``q`` and ``k``, and return them rotated: fresh, or in place.

    ``angle_args`` are the kernel's own arguments, which say where its angles come from.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    q, k = last_contiguous(q), last_contiguous(k)
    q_out, k_out = (q, k) if in_place else (q.new_empty(q.shape), k.new_empty(k.shape))
    if num_tokens == 0:
        return q_out, k_out
    unit = stride_unit(q, k)
    block_i = triton.next_power_of_2(num_pairs)
    # a token a program, or a few: what their angles take is shared by all heads
    block_h = min(triton.next_power_of_2(max(num_q_heads, k.shape[1], 1)), 8)
    block_t = max(1, 512 // (block_i * block_h))
    kernel[(triton.cdiv(num_tokens, block_t),)](
        q,
        k,
        q_out,
        k_out,
        *angle_args,
        num_tokens,
        *(stride // unit for x in (q, k) for stride in x.stride()[:2]),
        NUM_Q_HEADS=num_q_heads,
        NUM_K_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        NUM_PAIRS=num_pairs,
        IN_PLACE=in_place,
        STRIDE_UNIT=unit,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_I=block_i,
        BLOCK_PASS=triton.next_power_of_2(max(head_dim - 2 * num_pairs, 1)),
        num_warps=1,
        **compiler_options(),
        **constants,
    )
    return q_out, k_out
