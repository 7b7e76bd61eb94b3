"""``varlen_attention``: attention within the segments of a packed sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.ops.rope_2d import check_options, check_rotation, rope_2d
from patchpack.packing import PackedGrid, is_integer

_ROTATED_TOKENS = 64  # of the segments that are rotated as they are loaded: what a program holds


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    rope: PackedGrid | None = None,
    rope_base: float = 10_000.0,
    rope_interleaved: bool = False,
    rope_axes: str = "split",
    impl: str | None = None,
) -> Any:  # a union would make every caller look which of the two it got
    """Attend from every query to the keys of its own segment.

    Segments may be empty, of any number and of any lengths. Rows past the last segment are padding:
    they give 0 and get a gradient of 0, whatever they hold. What a segment gives does not depend on
    what it is packed with, to the bit.

    Args:
        q: Queries, ``[Tq, Hq, D]``, float32, bfloat16 or float16, ``D`` up to 128. Any strides;
            copied only if the last dimension is strided or tokens are 2**25 numbers apart.
        k: Keys, ``[Tk, Hk, D]``, dtype of ``q``. ``Hk`` divides ``Hq``; query head ``h`` uses key
            head ``h // (Hq / Hk)``.
        v: Values, shape and dtype of ``k``.
        cu_seqlens_q: Where segments begin and end, int32 ``[S + 1]``, in queries, from 0 on and not
            decreasing, at most ``Tq``, on the device of ``q``. Its values are not checked here:
            ``patchpack.packing.validate_cu_seqlens`` does that.
        cu_seqlens_k: The same in keys, ``[S + 1]``; by default ``cu_seqlens_q``.
        max_seqlen_q: Not needed; accepted where other libraries want it. With ``rope`` it chooses
            the kernel, and no segment may then be longer.
        max_seqlen_k: Not needed.
        softmax_scale: Factor of the scores; by default ``D ** -0.5``.
        causal: A query sees keys up to its own position alone, where the last query and the last
            key of a segment have the same position.
        window_size: How many keys before and after its position a query sees; -1 is no limit.
        return_lse: Also return the logarithm of the softmax's denominator.
        rope: Rotate ``q`` and ``k``, which are of the same tokens, by the rows and columns of this
            grid, as ``rope_2d`` does. Values and gradients are those of ``rope_2d`` and this op,
            one after the other, up to the order of sums.
        rope_base: ``base`` of ``rope_2d``.
        rope_interleaved: ``interleaved`` of ``rope_2d``.
        rope_axes: ``axes`` of ``rope_2d``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The output ``[Tq, Hq, D]``, contiguous, dtype of ``q``; with ``return_lse`` also ``lse``,
        float32 ``[Hq, Tq]`` (float64 from a float64 reference), natural logarithm. A query that
        sees no key gives 0 and -inf. Differentiable in ``q``, ``k`` and ``v``, from both results,
        once. Deterministic: no atomics.

    Raises:
        ValueError: A shape, a device, a number or ``impl`` does not fit.
        TypeError: A dtype or a type does not fit.

    With ``rope`` and ``max_seqlen_q`` of 64 or less, Triton rotates while it loads: in the forward
    pass, in half precision, without ``causal``, ``window_size`` and ``rope_interleaved``. Rotated
    queries and keys, rounded to the dtype as ``rope_2d`` rounds them, are then never in memory,
    which halves the bytes that the two ops have to move. Longer segments are rotated first: every
    tile of queries would rotate all keys of its segment anew, which costs more instructions than
    all the rest. The backward pass rotates again.

    In half precision Triton splits the keys of a segment that has at most one tile of queries (64
    or 128) and more than 1024 keys: programs attend to 1024 keys each, and others sum what they
    give, in order.

    Products of float32 are as accurate as float32. Source: FlashAttention-2, arXiv 2307.08691; the
    meaning of ``causal`` and ``window_size`` is flash-attn's.
    """
    impl = _dispatch.resolve("varlen_attention", impl, q=q)
    _check.shape("q", q, None, None, None)
    num_q_heads, head_dim = q.shape[1:]
    _check.shape("k", k, None, None, head_dim)
    num_k_heads = k.shape[1]
    _check.shape("v", v, *k.shape)
    _check.floating(impl, q=q, k=k, v=v)
    if not 1 <= head_dim <= 128:
        raise ValueError(f"q must have a head size from 1 to 128, got {head_dim}")
    if num_k_heads == 0 or num_q_heads % num_k_heads:
        raise ValueError(f"k must have heads that divide q's {num_q_heads}, got {num_k_heads}")
    if rope is not None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k must be None with rope: keys are of the tokens of queries")
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                "cu_seqlens_k must be given where k has other tokens than q,"
                f" got {k.shape[0]} and {q.shape[0]}"
            )
        cu_seqlens_k = cu_seqlens_q
    _check.shape("cu_seqlens_q", cu_seqlens_q, None)
    _check.shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0])
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q must hold at least the 0 it starts with, got shape [0]")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check.dtype(name, cu_seqlens, torch.int32)
    _check.same_device(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        scalar = isinstance(length, torch.SymInt) or (
            isinstance(length, Tensor) and not length.ndim
        )
        if not (length is None or scalar or is_integer(length)):
            raise TypeError(f"{name} must be an int or None, got {type(length).__name__}")
        if isinstance(length, int) and length < 0:
            raise ValueError(f"{name} must not be negative, got {length}")
    if softmax_scale is not None:
        _check.positive("softmax_scale", softmax_scale)
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    left, right = _check.window("window_size", window_size)
    _check.flags(causal=causal, return_lse=return_lse)
    options = {"base": rope_base, "interleaved": rope_interleaved, "axes": rope_axes}
    check_options("rope_", **options)
    if rope is not None:
        check_rotation("q", q, rope, "rope")
        short = isinstance(max_seqlen_q, int) and max_seqlen_q <= _ROTATED_TOKENS
        plain = not (causal or rope_interleaved) and left == right == -1
        if impl == "triton" and short and plain and q.dtype != torch.float32:
            out, lse = _dispatch.operator("_varlen_attention_rotated", impl)(
                q, k, v, cu_seqlens_q, rope.geometry, rope.spatial_merge_size, float(rope_base),
                rope_axes, scale,
            )  # fmt: skip
            return (out, lse) if return_lse else out
    if impl != "reference" and rope is not None:
        q, k = rope_2d(q, k, rope, **options, impl=impl)
    if impl == "reference":
        with _dispatch.without_autocast(q):
            return reference.varlen_attention(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                softmax_scale=scale,
                causal=causal,
                window_size=(left, right),
                return_lse=return_lse,
                rope=rope,
                rope_base=rope_base,
                rope_interleaved=rope_interleaved,
                rope_axes=rope_axes,
            )
    out, lse = _dispatch.operator("varlen_attention", impl)(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, 0 if causal else right
    )
    return (out, lse) if return_lse else out


def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, right):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.softmax_scale, ctx.left, ctx.right = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    grads = _dispatch.operator("varlen_attention_backward", ctx.impl)(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        ctx.softmax_scale,
        ctx.left,
        ctx.right,
    )
    return *grads, None, None, None, None, None


def _fake_backward(grad_out, grad_lse, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_dispatch.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " float softmax_scale, int left, int right) -> (Tensor, Tensor)",
    "varlen_attention:attend",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v,"
    " Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale,"
    " int left, int right) -> (Tensor, Tensor, Tensor)",
    "varlen_attention:attend_bwd",
    fake=_fake_backward,
)


def _fake_rotated(q, k, v, *rest):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _setup_context_rotated(ctx, inputs, output):
    *tensors, merge, base, axes, ctx.softmax_scale = inputs
    ctx.rotation = merge, base, False, axes
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_rotated(ctx, grad_out, grad_lse):
    q, k, v, cu_seqlens, geometry, out, lse = ctx.saved_tensors
    turned = _dispatch.operator("rope_2d", ctx.impl)(q, k, geometry, *ctx.rotation, False)
    grad_q, grad_k, grad_v = _dispatch.operator("varlen_attention_backward", ctx.impl)(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_lse,
        *turned,
        v,
        out,
        lse,
        cu_seqlens,
        cu_seqlens,
        ctx.softmax_scale,
        -1,
        -1,
    )
    _dispatch.operator("rope_2d_", ctx.impl)(grad_q, grad_k, geometry, *ctx.rotation, True)
    return grad_q, grad_k, grad_v, *[None] * 6


_dispatch.define(
    "_varlen_attention_rotated(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor geometry,"
    " int spatial_merge_size, float base, str axes, float softmax_scale)"
    " -> (Tensor, Tensor)",
    "varlen_attention:attend_rotated",
    fake=_fake_rotated,
    setup_context=_setup_context_rotated,
    backward=_backward_rotated,
)
