"""``rope``: rotary position embedding from any table of cosines and sines."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate heads by a table of cosines and sines.

    Args:
        q: Queries, ``[T, Hq, D]``, float32, bfloat16 or float16. Any strides; copied only if the
            last dimension is strided.
        k: Keys, ``[T, Hk, D]``, dtype of ``q``. ``Hk`` need not be ``Hq``.
        cos: Cosine of each token's angles, ``[T, R]`` with ``R <= D / 2``, float32 (or 16-bit,
            at a loss). The channels after ``2 R`` pass through. A table of more than ``D / 2``
            columns, ``[T, 2 R]``, is read as transformers builds it, its second half like its
            first. One for a part of the head cannot be told from ``R`` values, and for interleaved
            pairs transformers builds two kinds, so halve these: ``cos[:, :R]``, or ``cos[:, ::2]``
            where equal values stand side by side.
        sin: Sine of the same angles, shape and dtype of ``cos``.
        interleaved: Pair channels ``(2 i, 2 i + 1)`` instead of ``(i, i + R)``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The rotated ``q`` and ``k``, contiguous, same shapes and dtype. Differentiable in both, not
        in ``cos`` and ``sin``, which are all that is kept for the backward pass. Deterministic.

    Raises:
        ValueError: A shape, a device or ``impl`` does not fit, or ``cos`` or ``sin`` requires a
            gradient.
        TypeError: A dtype does not fit.

    Source: RoFormer, arXiv 2104.09864.
    """
    impl = _dispatch.resolve("rope", impl, q=q)
    _check.heads(impl, q, k)
    _check.flags(interleaved=interleaved)
    _check.shape("cos", cos, q.shape[0], None)
    _check.shape("sin", sin, *cos.shape)
    half, width = q.shape[2] // 2, cos.shape[1]
    if interleaved and not 1 <= width <= half:
        raise ValueError(f"cos must have 1 to {half} columns if interleaved, got {width}")
    if not 1 <= width <= 2 * half or (width > half and width % 2):
        raise ValueError(
            f"cos must have 1 to {half} columns, or an even number up to {2 * half} with every"
            f" value twice, got {width}"
        )
    _check.floating(impl, cos=cos, sin=sin)
    _check.same_device(q=q, cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient: rope gives it none")
    if impl == "reference":
        with _dispatch.without_autocast(q):
            return reference.rope(q, k, cos, sin, interleaved=interleaved)
    if width > half:
        cos, sin = cos[:, : width // 2], sin[:, : width // 2]
    return _dispatch.operator("rope", impl)(q, k, cos, sin, interleaved, False)


def _fake(q, k, cos, sin, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_q, grad_k):
    # a rotation is orthogonal, so its adjoint is the opposite rotation
    cos, sin = ctx.saved_tensors
    grads = _dispatch.operator("rope", ctx.impl)(
        grad_q, grad_k, cos, sin, ctx.interleaved, not ctx.inverse
    )
    return *grads, None, None, None, None


_dispatch.define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    "rope:rotate",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
