"""``rope_2d``: rotary position embedding by the row and column of a patch."""

from __future__ import annotations

from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.ops import _in_place
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
    check_options(base=base, interleaved=interleaved, axes=axes)
    check_rotation("q", q, grid)
    if impl == "reference":
        with _dispatch.without_autocast(q):
            return reference.rope_2d(q, k, grid, base=base, interleaved=interleaved, axes=axes)
    return _dispatch.operator("rope_2d", impl)(
        q, k, grid.geometry, grid.spatial_merge_size, float(base), interleaved, axes, False
    )


def rope_2d_(
    qkv: Tensor,
    grid: PackedGrid,
    *,
    num_heads: tuple[int, int] | None = None,
    base: float = 10_000.0,
    interleaved: bool = False,
    axes: str = "split",
    impl: str | None = None,
) -> Tensor:
    """Rotate the queries and the keys of a buffer where they lie: ``rope_2d`` in place.

    The values are those of ``rope_2d``, to the bit. Values of attention are neither read nor
    written, and nothing is allocated.

    Args:
        qkv: Queries, keys and values, ``[T, 3, H, D]``, or ``[T, Hq + 2 Hk, D]`` with
            ``num_heads``; float32, bfloat16 or float16. Any strides with which no two elements
            share memory and the last dimension is contiguous. ``D`` divides by 4.
        grid: Which images the ``T`` tokens are, and in which order, on the device of ``qkv``.
        num_heads: ``(Hq, Hk)`` where heads of queries come first, then those of keys, of values.
        base: As of ``rope_2d``.
        interleaved: As of ``rope_2d``.
        axes: As of ``rope_2d``.
        impl: ``"triton"``, ``"cuda"``, ``"native"`` or ``"reference"``; by default that of the
            device.

    Returns:
        ``qkv`` itself. Differentiable, as operations in place are: autograd refuses a leaf that
        requires a gradient, and the backward pass of what kept ``qkv`` before. Gradients are those
        of ``rope_2d``. Deterministic.

    Raises:
        ValueError: A shape, a stride, a device, ``axes`` or ``impl`` does not fit.
        TypeError: A dtype does not fit.
        RuntimeError: Autograd refuses. Whatever is raised, nothing was written.

    Where ``torch.compile`` traces a gradient, this is ``rope_2d`` and a copy.
    """
    impl = _dispatch.resolve("rope_2d_", impl, qkv=qkv)
    _in_place.check(impl, qkv, num_heads)
    check_options(base=base, interleaved=interleaved, axes=axes)
    check_rotation("qkv", qkv, grid)
    if _in_place.is_composed(impl, qkv):
        q, k = _in_place.heads_of(qkv, num_heads)
        options = {"base": base, "interleaved": interleaved, "axes": axes, "impl": impl}
        _in_place.copy_(q, k, rope_2d(q, k, grid, **options))
        return qkv

    def rotate(qkv: Tensor, geometry: Tensor, inverse: bool) -> None:
        heads = _in_place.heads_of(qkv, num_heads)
        options = (grid.spatial_merge_size, float(base), interleaved, axes, inverse)
        _dispatch.operator("rope_2d_", impl)(*heads, geometry, *options)

    return _in_place.turn_(qkv, rotate, grid.geometry)


def check_rotation(name: str, x: Tensor, grid: PackedGrid, called: str = "grid") -> None:
    """``x`` has heads that ``rope_2d`` can turn by ``grid``."""
    if x.shape[-1] % 4 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have a head size that divides by 4, got {x.shape[-1]}")
    _check.grid_of(name, x, grid, called)


def check_options(prefix: str = "", *, base: float, interleaved: bool, axes: str) -> None:
    """Options of ``rope_2d`` fit; ``prefix`` is what their names begin with in another op."""
    _check.positive(f"{prefix}base", base)
    _check.flags(**{f"{prefix}interleaved": interleaved})
    _check.one_of(f"{prefix}axes", axes, ("split", "even_odd", "paired"))


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
_dispatch.define(
    "rope_2d_(Tensor(a!) q, Tensor(b!) k, Tensor geometry, int spatial_merge_size, float base,"
    " bool interleaved, str axes, bool inverse) -> ()",
    "rope_2d:rotate_",
    fake=lambda *_: None,
)
