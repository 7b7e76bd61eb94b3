"""``add_pos_embed``: a learned table of position embeddings, resized to packed images and added."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.packing import PackedGrid


def add_pos_embed(
    x: Tensor,
    table: Tensor,
    grid: PackedGrid,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Add learned position embeddings to packed images, resized to the grid of each.

    Every frame gets the whole table, resized to its rows and columns with the values of
    ``torch.nn.functional.interpolate`` (as it is if they are equal), in the order of its tokens.
    Oryx has the defaults; Qwen3-VL has ``align_corners``, SigLIP 2 ``antialias``, MoonViT
    ``mode="bicubic"``.

    Args:
        x: Tokens, ``[T, C]``, float32, bfloat16 or float16. Any stride of the first dimension;
            copied only if the last one is strided.
        table: Position embeddings, ``[rows, cols, C]``, in one of these dtypes, not necessarily
            that of ``x``; an embedding's weight ``[rows * cols, C]`` is viewed as such. Any strides
            of the first two dimensions; copied only if the last one is strided.
        grid: Which images the ``T`` tokens are, and in which order, on the device of ``x``.
        mode: ``"bilinear"`` or ``"bicubic"``.
        align_corners: Put the corner cells of the table on the corner tokens, instead of the
            table's corners on those of the image.
        antialias: Widen the filter where the table shrinks.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The tokens with their embeddings added, contiguous, ``[T, C]``, dtype of ``x``.
        Differentiable in ``x`` and ``table``, once; the gradient of the table has its dtype and is
        gathered, so it is deterministic. The forward pass keeps nothing but, with ``antialias``, a
        float a token.

    Raises:
        ValueError: A shape, a device, ``mode`` or ``impl`` does not fit.
        TypeError: A dtype or a type does not fit.

    Coordinates are exact, weights and sums are float32, rounded once to the dtype of the result.
    Source: ``patchpack.reference.add_pos_embed``.
    """
    impl = _dispatch.resolve("add_pos_embed", impl, x=x)
    _check.shape("x", x, None, None)
    _check.shape("table", table, None, None, x.shape[1])
    if 0 in table.shape:
        raise ValueError(
            f"table must have at least one row, column and channel, got {list(table.shape)}"
        )
    _check.floating(impl, x=x)
    _check.floating(impl, table=table)
    _check.same_device(x=x, table=table)
    _check.grid_of("x", x, grid)
    _check.one_of("mode", mode, ("bilinear", "bicubic"))
    _check.flags(align_corners=align_corners, antialias=antialias)
    options = {"mode": mode, "align_corners": align_corners, "antialias": antialias}
    if impl == "reference":
        return reference.add_pos_embed(x, table, grid, **options)
    out, _ = _dispatch.operator("add_pos_embed", impl)(
        x, table, grid.geometry, grid.spatial_merge_size, *options.values()
    )
    return out


def _fake(x, table, geometry, merge, mode, align_corners, antialias):
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if antialias else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    _, table, geometry, *ctx.options = inputs
    _, saved = output
    ctx.table = table.shape[0], table.shape[1], table.dtype
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(saved, geometry)


def _backward(ctx, grad, _):
    grad_table = None
    if ctx.needs_input_grad[1]:
        grad_table = _dispatch.operator("add_pos_embed_backward", ctx.impl)(
            grad, *ctx.saved_tensors, *ctx.table, *ctx.options
        )
    return grad, grad_table, None, None, None, None, None


def _fake_backward(grad, saved, geometry, rows, cols, table_dtype, *options):
    return grad.new_empty(rows, cols, grad.shape[1], dtype=table_dtype)


_dispatch.define(
    "add_pos_embed(Tensor x, Tensor table, Tensor geometry, int spatial_merge_size, str mode,"
    " bool align_corners, bool antialias) -> (Tensor, Tensor)",
    "add_pos_embed:add",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "add_pos_embed_backward(Tensor grad, Tensor saved, Tensor geometry, SymInt rows, SymInt cols,"
    " ScalarType table_dtype, int spatial_merge_size, str mode, bool align_corners,"
    " bool antialias) -> Tensor",
    "add_pos_embed:add_bwd",
    fake=_fake_backward,
)
