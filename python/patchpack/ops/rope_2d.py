"""``rope_2d``: rotary position embedding by the row and column of a patch."""

from __future__ import annotations

from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.packing import PackedGrid


def rope_2d(
    q: Tensor,
    k: Tensor,
    grid: PackedGrid,
    *,
    base: float = 10_000.0,
    interleaved: bool = False,
    axes: str = "split",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate the heads of packed images by each token's row and column.

    Row and column follow from ``grid`` inside the kernel: there is no tensor of positions, cosines
    or sines. Frames of a clip share their angles.

    Args:
        q: Queries, ``[T, Hq, D]``, float32, bfloat16 or float16. Any strides; copied only if the
            last dimension is strided. ``D`` divides by 4.
        k: Keys, ``[T, Hk, D]``, dtype of ``q``. ``Hk`` need not be ``Hq``.
        grid: Which images the ``T`` tokens are, and in which order, on the device of ``q``.
        base: Wavelength base, dimensionless.
        interleaved: Pair channels ``(2 i, 2 i + 1)`` instead of ``(i, i + D / 2)``.
        axes: Which pairs turn with the row: ``"split"`` (Qwen2-VL), ``"even_odd"`` (Pixtral) or
            ``"paired"`` (MoonViT, whose layout is also interleaved).
        impl: ``"triton"``, ``"cuda"``, ``"native"`` or ``"reference"``; by default that of the
            device.

    Returns:
        The rotated ``q`` and ``k``, contiguous, same shapes and dtype. Differentiable in both; only
        ``grid`` is kept for the backward pass, which is the opposite rotation. Deterministic.

    Raises:
        ValueError: A shape, a device, ``axes`` or ``impl`` does not fit.
        TypeError: A dtype does not fit.

    The angles are those of ``patchpack.reference.rope_2d``; their cosines and sines err by 1e-7 at
    most, at any position. Source: RoFormer, arXiv 2104.09864, and the models named above.
    """
    impl = _dispatch.resolve("rope_2d", impl, q=q)
    _check.heads(impl, q, k)
    if q.shape[2] % 4 or q.shape[2] == 0:
        raise ValueError(f"q must have a head size that divides by 4, got {q.shape[2]}")
    _check.grid_of("q", q, grid)
    _check.positive("base", base)
    _check.flags(interleaved=interleaved)
    _check.one_of("axes", axes, ("split", "even_odd", "paired"))
    if impl == "reference":
        with _dispatch.without_autocast(q):
            return reference.rope_2d(q, k, grid, base=base, interleaved=interleaved, axes=axes)
    return _dispatch.operator("rope_2d", impl)(
        q, k, grid.geometry, grid.spatial_merge_size, float(base), interleaved, axes, False
    )


def _fake(q, k, geometry, spatial_merge_size, base, interleaved, axes, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, geometry, *ctx.options, ctx.inverse = inputs
    ctx.save_for_backward(geometry)


def _backward(ctx, grad_q, grad_k):
    # a rotation is orthogonal, so its adjoint is the opposite rotation
    (geometry,) = ctx.saved_tensors
    grads = _dispatch.operator("rope_2d", ctx.impl)(
        grad_q, grad_k, geometry, *ctx.options, not ctx.inverse
    )
    return *grads, None, None, None, None, None, None


_dispatch.define(
    "rope_2d(Tensor q, Tensor k, Tensor geometry, int spatial_merge_size, float base,"
    " bool interleaved, str axes, bool inverse) -> (Tensor, Tensor)",
    "rope_2d:rotate",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
