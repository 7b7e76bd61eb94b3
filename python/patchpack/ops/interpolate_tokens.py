"""``interpolate_tokens``: feature maps of packed images, resized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.packing import PackedGrid


def interpolate_tokens(
    x: Tensor,
    grid: PackedGrid,
    target_hw: Tensor | Sequence[int] | Sequence[Sequence[int]] | PackedGrid,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
    spatial_merge_size: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, PackedGrid]:
    """Resize the feature maps of packed images, each to its own size.

    Every frame keeps its place in the sequence and every channel is resized on its own, with the
    values of ``torch.nn.functional.interpolate`` or ``adaptive_max_pool2d`` on the frame's map.

    Args:
        x: Tokens, ``[T, C]``, float32, bfloat16 or float16. Any stride of the first dimension;
            copied only if the last one is strided.
        grid: Which maps the ``T`` tokens are, and in which order, on the device of ``x``.
        target_hw: Rows and columns of each resized map, in tokens: an integer tensor ``[G, 2]`` on
            the CPU, rows of Python integers, or one pair for all; or ``grid.resized`` of them,
            which is then not built again.
        mode: ``"bilinear"``, ``"bicubic"``, ``"area"`` (mean of the input cells under an output
            cell), ``"max"`` (their maximum) or ``"nearest"``.
        align_corners: Put the corner tokens of input and output at the same place, instead of the
            corners of their cells. For ``"bilinear"`` and ``"bicubic"``.
        antialias: Widen the filter when shrinking. For ``"bilinear"`` and ``"bicubic"``.
        spatial_merge_size: Order of the resized tokens, as in ``PackedGrid``; by default that of
            ``grid``, or of the grid that ``target_hw`` is.
        impl: ``"triton"``, ``"cuda"``, ``"native"`` or ``"reference"``; by default that of the
            device.

    Returns:
        The resized tokens, contiguous, ``[T', C]``, dtype of ``x``, and their ``PackedGrid``.
        Differentiable in ``x``, once; the gradient is gathered, so it is deterministic. The forward
        pass keeps nothing of ``x``: with ``"max"`` where each maximum was, the first one if it
        occurs twice, and else at most a float a token.

    Raises:
        ValueError: A shape, a size, a device, ``mode``, an option that ``mode`` does not have or
            ``impl`` does not fit.
        TypeError: A dtype or a type does not fit, or ``target_hw`` does not hold integers.

    Coordinates are exact, weights and sums are float32, rounded once to the dtype of ``x``. The
    index of ``"nearest"`` is rounded in float32, as torch rounds it for all inputs but float64.
    Source: ``patchpack.reference.interpolate_tokens``.
    """
    impl = _dispatch.resolve("interpolate_tokens", impl, x=x)
    _check.shape("x", x, None, None)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one channel, got {list(x.shape)}")
    _check.floating(impl, x=x)
    _check.grid_of("x", x, grid)
    _check.one_of("mode", mode, ("bilinear", "bicubic", "area", "max", "nearest"))
    _check.flags(align_corners=align_corners, antialias=antialias)
    for name, value in (("align_corners", align_corners), ("antialias", antialias)):
        if value and mode not in ("bilinear", "bicubic"):
            raise ValueError(f"{name} is for mode 'bilinear' or 'bicubic', got mode {mode!r}")
    options = {"mode": mode, "align_corners": align_corners, "antialias": antialias}
    if impl == "reference":
        with _dispatch.without_autocast(x):
            return reference.interpolate_tokens(
                x, grid, target_hw, **options, spatial_merge_size=spatial_merge_size
            )
    target = grid.resized(target_hw, spatial_merge_size)
    out, _ = _dispatch.operator("interpolate_tokens", impl)(
        x,
        grid.geometry,
        target.geometry,
        target.num_tokens,
        grid.spatial_merge_size,
        target.spatial_merge_size,
        *options.values(),
    )
    return out, target


def _fake(x, geometry, target_geometry, num_tokens, merge, target_merge, mode, corners, antialias):
    out = x.new_empty(num_tokens, x.shape[1])
    if mode == "max":
        return out, x.new_empty(out.shape, dtype=torch.int32)
    normalised = antialias or mode == "area"
    return out, x.new_empty(num_tokens if normalised else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, geometry, target_geometry, _, *ctx.options = inputs
    _, saved = output
    ctx.num_tokens = x.shape[0]
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(saved, geometry, target_geometry)


def _backward(ctx, grad, _):
    grad_x = _dispatch.operator("interpolate_tokens_backward", ctx.impl)(
        grad, *ctx.saved_tensors, ctx.num_tokens, *ctx.options
    )
    return grad_x, None, None, None, None, None, None, None, None


def _fake_backward(grad, saved, geometry, target_geometry, num_tokens, *options):
    return grad.new_empty(num_tokens, grad.shape[1])


_dispatch.define(
    "interpolate_tokens(Tensor x, Tensor geometry, Tensor target_geometry, SymInt num_tokens,"
    " int spatial_merge_size, int target_merge_size, str mode, bool align_corners,"
    " bool antialias) -> (Tensor, Tensor)",
    "interpolate_tokens:resize",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "interpolate_tokens_backward(Tensor grad, Tensor saved, Tensor geometry,"
    " Tensor target_geometry, SymInt num_tokens, int spatial_merge_size, int target_merge_size,"
    " str mode, bool align_corners, bool antialias) -> Tensor",
    "interpolate_tokens:resize_bwd",
    fake=_fake_backward,
)
