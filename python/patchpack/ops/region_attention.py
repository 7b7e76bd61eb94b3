"""``region_attention``: one query attends to each square of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.packing import PackedGrid


def region_attention(
    query: Tensor,
    tokens: Tensor,
    grid: PackedGrid,
    region: int,
    *,
    softmax_scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Make one token of every ``region x region`` cell of the maps of packed images.

    It is the mean of the cell's tokens, and added to it what the cell's query attends to among
    them. The tokens are keys and values as they are; a projection of keys belongs to the query.

    Args:
        query: Queries, ``[T / region^2, C]``, float32, bfloat16 or float16, one a cell: frame by
            frame, in raster order. Any stride of the first dimension; copied only if the last one
            is strided.
        tokens: Tokens, ``[T, C]``, dtype of ``query``, strides likewise.
        grid: Which maps the ``T`` tokens are, and in which order, on the device of ``query``.
        region: Rows and columns of a cell, in tokens, from 1 to 64. With 1 the result is exactly
            twice the tokens, and queries get a gradient of 0.
        softmax_scale: Factor of the scores; by default ``C ** -0.5``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The tokens of the cells, contiguous, ``[T / region^2, C]``, dtype of ``query``, in the order
        of the queries, which is that of ``grid.merged(region)``. Differentiable in ``query`` and
        ``tokens``, once, and deterministic. The softmax is saved, float32
        ``[T / region^2, region^2]``.

    Raises:
        ValueError: Rows or columns of ``grid`` do not divide by ``region``, or a shape, a number, a
            device or ``impl`` does not fit.
        TypeError: A dtype or a type does not fit.

    Scores, softmax and sums are float32. Source: the dynamic compressor of Oryx, arXiv 2409.12961.
    """
    impl = _dispatch.resolve("region_attention", impl, query=query)
    _check.shape("query", query, None, None)
    num_channels = query.shape[1]
    _check.shape("tokens", tokens, None, num_channels)
    if num_channels == 0:
        raise ValueError(f"query must have at least one channel, got {list(query.shape)}")
    _check.floating(impl, query=query, tokens=tokens)
    _check.same_device(query=query, tokens=tokens)
    _check.grid_of("tokens", tokens, grid)
    (region,) = _check.whole(region=region)
    if region > 64:
        raise ValueError(f"region must be at most 64, got {region}")
    num_cells = grid.num_blocks(region)
    if torch.compiler.is_compiling() or isinstance(num_cells, torch.SymInt):
        torch._check(query.shape[0] == num_cells)
    elif query.shape[0] != num_cells:
        raise ValueError(f"query must have the {num_cells} cells of grid, got {list(query.shape)}")
    if softmax_scale is not None:
        _check.positive("softmax_scale", softmax_scale)
    scale = num_channels**-0.5 if softmax_scale is None else float(softmax_scale)
    if impl == "reference":
        with _dispatch.without_autocast(query):
            return reference.region_attention(query, tokens, grid, region, softmax_scale=scale)
    out, _ = _dispatch.operator("region_attention", impl)(
        query, tokens, grid.geometry, grid.spatial_merge_size, region, scale
    )
    return out


def _fake(query, tokens, geometry, spatial_merge_size, region, softmax_scale):
    p = query.new_empty(query.shape[0], region * region, dtype=torch.float32)
    return query.new_empty(query.shape), p


def _setup_context(ctx, inputs, output):
    query, tokens, geometry, *ctx.options = inputs
    _, p = output
    ctx.mark_non_differentiable(p)
    ctx.save_for_backward(query, tokens, geometry, p)


def _backward(ctx, grad, _):
    grads = _dispatch.operator("region_attention_backward", ctx.impl)(
        grad, *ctx.saved_tensors, *ctx.options
    )
    return *grads, None, None, None, None


def _fake_backward(grad, query, tokens, *_):
    return query.new_empty(query.shape), tokens.new_empty(tokens.shape)


_dispatch.define(
    "region_attention(Tensor query, Tensor tokens, Tensor geometry, int spatial_merge_size,"
    " int region, float softmax_scale) -> (Tensor, Tensor)",
    "region_attention:attend",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "region_attention_backward(Tensor grad, Tensor query, Tensor tokens, Tensor geometry, Tensor p,"
    " int spatial_merge_size, int region, float softmax_scale) -> (Tensor, Tensor)",
    "region_attention:attend_bwd",
    fake=_fake_backward,
)
