"""``mrope``: rotary position embedding over time, height and width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.ops import _in_place


def mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    *,
    mrope_section: Sequence[int],
    mrope_interleaved: bool = False,
    base: float = 1e6,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate heads by positions on three axes: time, height and width.

    Args:
        q: Queries, ``[T, Hq, D]``, float32, bfloat16 or float16. Any strides; copied only if the
            last dimension is strided.
        k: Keys, ``[T, Hk, D]``, dtype of ``q``. ``Hk`` need not be ``Hq``.
        position_ids: Position of each token on each axis, ``[3, T]``, int32 or int64, below 2**31
            in magnitude; or ``[4, T]`` with the text positions first, which are ignored.
        mrope_section: How many of the ``R`` turning pairs belong to time, height and width. Their
            sum ``R`` is at most ``D / 2``; the channels after ``2 R`` pass through.
        mrope_interleaved: Deal the pairs out in turn (Qwen3-VL) instead of in three sections
            (Qwen2-VL). A section that is too long to be dealt out gives its rest to time.
        base: Wavelength base, dimensionless.
        impl: ``"triton"``, ``"cuda"``, ``"native"`` or ``"reference"``; by default that of the
            device.

    Returns:
        The rotated ``q`` and ``k``, contiguous, same shapes and dtype. Differentiable in both; only
        ``position_ids`` is kept for the backward pass, which is the opposite rotation.
        Deterministic.

    Raises:
        ValueError: A shape, a device, ``mrope_section`` or ``impl`` does not fit.
        TypeError: A dtype does not fit.

    The angles are those of ``patchpack.reference.mrope``; their cosines and sines err by 1e-7 at
    most, at any position. Source: Qwen2-VL, arXiv 2409.12191; the interleaved form is Qwen3-VL's.
    """
    impl = _dispatch.resolve("mrope", impl, q=q)
    _check.heads(impl, q, k)
    sections = _check_rotation("q", q, position_ids, mrope_section, mrope_interleaved, base)
    if impl == "reference":
        with _dispatch.without_autocast(q):
            return reference.mrope(
                q,
                k,
                position_ids,
                mrope_section=sections,
                mrope_interleaved=mrope_interleaved,
                base=base,
            )
    return _dispatch.operator("mrope", impl)(
        q, k, position_ids, sections, mrope_interleaved, float(base), False
    )


def mrope_(
    qkv: Tensor,
    position_ids: Tensor,
    *,
    num_heads: tuple[int, int] | None = None,
    mrope_section: Sequence[int],
    mrope_interleaved: bool = False,
    base: float = 1e6,
    impl: str | None = None,
) -> Tensor:
    """Rotate the queries and the keys of a buffer where they lie: ``mrope`` in place.

    The values are those of ``mrope``, to the bit. Values of attention are neither read nor
    written, and nothing is allocated.

    Args:
        qkv: Queries, keys and values, ``[T, 3, H, D]``, or ``[T, Hq + 2 Hk, D]`` with
            ``num_heads``; float32, bfloat16 or float16. Any strides with which no two elements
            share memory and the last dimension is contiguous.
        position_ids: As of ``mrope``.
        num_heads: ``(Hq, Hk)`` where heads of queries come first, then those of keys, of values.
        mrope_section: As of ``mrope``.
        mrope_interleaved: As of ``mrope``.
        base: As of ``mrope``.
        impl: ``"triton"``, ``"cuda"``, ``"native"`` or ``"reference"``; by default that of the
            device.

    Returns:
        ``qkv`` itself. Differentiable, as operations in place are: autograd refuses a leaf that
        requires a gradient, and the backward pass of what kept ``qkv`` before. Gradients are those
        of ``mrope``. Deterministic.

    Raises:
        ValueError: A shape, a stride, a device, ``mrope_section`` or ``impl`` does not fit.
        TypeError: A dtype does not fit.
        RuntimeError: Autograd refuses. Whatever is raised, nothing was written.

    Where ``torch.compile`` traces a gradient, this is ``mrope`` and a copy.
    """
    impl = _dispatch.resolve("mrope_", impl, qkv=qkv)
    _in_place.check(impl, qkv, num_heads)
    sections = _check_rotation("qkv", qkv, position_ids, mrope_section, mrope_interleaved, base)
    if _in_place.is_composed(impl, qkv):
        q, k = _in_place.heads_of(qkv, num_heads)
        options = {"mrope_section": sections, "mrope_interleaved": mrope_interleaved}
        _in_place.copy_(q, k, mrope(q, k, position_ids, base=base, impl=impl, **options))
        return qkv

    def rotate(qkv: Tensor, position_ids: Tensor, inverse: bool) -> None:
        heads = _in_place.heads_of(qkv, num_heads)
        options = (sections, mrope_interleaved, float(base), inverse)
        _dispatch.operator("mrope_", impl)(*heads, position_ids, *options)

    return _in_place.turn_(qkv, rotate, position_ids)


def _check_rotation(
    name: str,
    x: Tensor,
    position_ids: Tensor,
    mrope_section: Sequence[int],
    mrope_interleaved: bool,
    base: float,
) -> list[int]:
    """Check what ``x`` is turned by, and return the sections."""
    _check.shape("position_ids", position_ids, None, x.shape[0])
    if position_ids.shape[0] not in (3, 4):
        raise ValueError(f"position_ids must have 3 or 4 rows, got {position_ids.shape[0]}")
    _check.dtype("position_ids", position_ids, torch.int32, torch.int64)
    _check.same_device(**{name: x}, position_ids=position_ids)
    sections = _check.integers("mrope_section", mrope_section)
    if len(sections) != 3 or min(sections) < 0 or not 0 < 2 * sum(sections) <= x.shape[-1]:
        raise ValueError(
            "mrope_section must be three counts that sum to 1 or more and at most half the head"
            f" size, {x.shape[-1] // 2}, got {sections}"
        )
    _check.positive("base", base)
    _check.flags(mrope_interleaved=mrope_interleaved)
    return sections


def _fake(q, k, position_ids, mrope_section, mrope_interleaved, base, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, position_ids, *ctx.options, ctx.inverse = inputs
    ctx.save_for_backward(position_ids)


def _backward(ctx, grad_q, grad_k):
    # a rotation is orthogonal, so its adjoint is the opposite rotation
    (position_ids,) = ctx.saved_tensors
    grads = _dispatch.operator("mrope", ctx.impl)(
        grad_q, grad_k, position_ids, *ctx.options, not ctx.inverse
    )
    return *grads, None, None, None, None, None


_dispatch.define(
    "mrope(Tensor q, Tensor k, Tensor position_ids, int[] mrope_section, bool mrope_interleaved,"
    " float base, bool inverse) -> (Tensor, Tensor)",
    "mrope:rotate",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "mrope_(Tensor(a!) q, Tensor(b!) k, Tensor position_ids, int[] mrope_section,"
    " bool mrope_interleaved, float base, bool inverse) -> ()",
    "mrope:rotate_",
    fake=lambda *_: None,
)
