"""``merge_tokens``: square blocks of tokens become one token of more channels."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.packing import PackedGrid


def merge_tokens(
    x: Tensor,
    grid: PackedGrid,
    *,
    order: str = "row",
    merge_size: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """Merge every ``m x m`` block of tokens of packed images into one, optionally normalised.

    Args:
        x: Tokens, ``[T, C]``, float32, bfloat16 or float16. Any stride of the first dimension;
            copied only if the last one is strided.
        grid: Which maps the ``T`` tokens are, and in which order, on the device of ``x``.
        order: ``"row"`` for merged tokens in raster order, frame by frame; ``"column"`` for those
            of a frame by columns.
        merge_size: ``m``, from 1 to 64; by default ``grid.spatial_merge_size``, or 2 if the tokens
            are in raster order. The order of ``x`` may be any other: every block is found in it.
        weight: Factors of a LayerNorm, ``[C]`` to normalise every token before it is merged, or
            ``[m^2 C]`` to normalise it afterwards. Any of the dtypes, on the device of ``x``.
        bias: What the LayerNorm adds, ``[C]`` or ``[m^2 C]``, of the size of ``weight`` if there is
            one. Without both nothing is normalised.
        eps: What the LayerNorm adds to variances.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The merged tokens, contiguous, ``[T / m^2, m^2 C]``, dtype of ``x``. Channel
        ``(dr * m + dc) * C + c`` is channel ``c`` of the token at row ``dr`` and column ``dc`` of
        the block. With ``order="row"`` their grid is ``grid.merged(m)``. Differentiable in ``x``,
        ``weight`` and ``bias``, once. Deterministic: gradients of weights are summed in float32, in
        an order that the number of tokens fixes. A LayerNorm saves ``x`` and the mean and inverse
        deviation of what it normalised; without one nothing is saved.

    Raises:
        ValueError: Rows or columns of ``grid`` do not divide by ``m``, or a shape, a number, a
            device, ``order`` or ``impl`` does not fit.
        TypeError: A dtype or a type does not fit.

    Without a LayerNorm the values are copied. With it, means and variances are float32, of the
    values less their mean, and the result is rounded once. Sources: InternVL (arXiv 2404.16821),
    whose ``pixel_shuffle`` v2 and v1 are ``order="row"`` and ``"column"``; Qwen2-VL (arXiv
    2409.12191), which normalises before it merges.
    """
    impl = _dispatch.resolve("merge_tokens", impl, x=x)
    _check.shape("x", x, None, None)
    num_channels = x.shape[1]
    if num_channels == 0:
        raise ValueError(f"x must have at least one channel, got {list(x.shape)}")
    _check.floating(impl, x=x)
    _check.grid_of("x", x, grid)
    _check.one_of("order", order, ("row", "column"))
    if merge_size is None:
        merge_size = 2 if grid.spatial_merge_size == 1 else grid.spatial_merge_size
    (merge_size,) = _check.whole(merge_size=merge_size)
    if merge_size > 64:
        raise ValueError(f"merge_size must be at most 64, got {merge_size}")
    _check.positive("eps", eps)
    size = None
    for name, param in (("weight", weight), ("bias", bias)):
        if param is None:
            continue
        _check.shape(name, param, size)
        _check.floating(impl, **{name: param})
        _check.same_device(x=x, **{name: param})
        size = param.shape[0]
        if size not in (num_channels, merge_size**2 * num_channels):
            raise ValueError(
                f"{name} must have the {num_channels} channels of x or the"
                f" {merge_size**2 * num_channels} of a merged token, got {size}"
            )
    num_blocks = grid.num_blocks(merge_size)
    if impl == "reference":
        with _dispatch.without_autocast(x):
            return reference.merge_tokens(
                x, grid, order=order, merge_size=merge_size, weight=weight, bias=bias, eps=eps
            )
    out, _, _ = _dispatch.operator("merge_tokens", impl)(
        x,
        weight,
        bias,
        grid.geometry,
        num_blocks,
        grid.spatial_merge_size,
        merge_size,
        order == "column",
        float(eps),
    )
    return out


def _fake(x, weight, bias, geometry, num_blocks, spatial_merge_size, merge_size, by_column, eps):
    num_channels = merge_size * merge_size * x.shape[1]
    affine = bias if weight is None else weight
    num_rows = 0 if affine is None else num_blocks * (num_channels // affine.shape[0])
    mean, rstd = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(num_blocks, num_channels), mean, rstd


def _setup_context(ctx, inputs, output):
    x, weight, bias, geometry, _, *ctx.options, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    copied = weight is None and bias is None
    ctx.save_for_backward(None if copied else x, weight, bias, geometry, mean, rstd)


def _backward(ctx, grad, *_):
    _, weight, bias, *_ = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _dispatch.operator("merge_tokens_backward", ctx.impl)(
        grad, *ctx.saved_tensors, *ctx.options
    )
    grad_weight = None if weight is None else grad_weight
    grad_bias = None if bias is None else grad_bias
    return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def _fake_backward(grad, x, weight, bias, geometry, mean, rstd, order, merge_size, by_column):
    area = merge_size * merge_size
    grad_x = grad.new_empty(grad.shape[0] * area, grad.shape[1] // area)
    return grad_x, *(
        grad.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias)
    )


_dispatch.define(
    "merge_tokens(Tensor x, Tensor? weight, Tensor? bias, Tensor geometry, SymInt num_blocks,"
    " int spatial_merge_size, int merge_size, bool by_column, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "merge_tokens:merge",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "merge_tokens_backward(Tensor grad, Tensor? x, Tensor? weight, Tensor? bias, Tensor geometry,"
    " Tensor mean, Tensor rstd, int spatial_merge_size, int merge_size, bool by_column)"
    " -> (Tensor, Tensor, Tensor)",
    "merge_tokens:merge_bwd",
    fake=_fake_backward,
)
