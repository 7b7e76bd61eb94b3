"""``assemble``: one sequence of maps and learned vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack.layout import TokenLayout


def assemble(
    tokens: Tensor,
    vectors: Tensor | None,
    layout: TokenLayout,
    *,
    impl: str | None = None,
) -> Tensor:
    """Assemble maps from their tiles, crop and resize them, and put learned vectors among them.

    The whole batch is one launch: addressing of tiles, crops, resizing, newlines and separators.

    Args:
        tokens: Tokens of all maps, ``[N, C]``, or ``[tiles, n, C]`` as an encoder leaves them,
            float32, bfloat16 or float16. Any strides; copied only if the last one is strided.
            There may be more than ``layout`` needs.
        vectors: Learned vectors, such as newlines and separators, ``[V, C]``, dtype of ``tokens``;
            ``None`` if ``layout`` has none.
        layout: What the sequence consists of, on the device of ``tokens``. The layout of several
            images is ``TokenLayout.cat`` of theirs.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The sequence, contiguous, ``[num_tokens, C]``, dtype of ``tokens``. Differentiable in
        ``tokens`` and ``vectors``, once. Deterministic: the gradient of a token is gathered from
        its readers, that of a vector summed in a fixed order. The forward pass keeps an integer a
        token of the sequence.

    Raises:
        ValueError: A shape, a number of tokens or vectors, a device or ``impl`` does not fit.
        TypeError: A dtype or a type does not fit.

    What is not resized is copied. What is has the values of ``torch.nn.functional.interpolate``,
    bilinear: coordinates are exact, weights and sums float32, rounded once to the dtype of
    ``tokens``. Source: ``patchpack.reference.assemble``.
    """
    impl = _dispatch.resolve("assemble", impl, tokens=tokens)
    _check.shape("tokens", tokens, *[None] * (3 if tokens.ndim == 3 else 2))
    num_channels = tokens.shape[-1]
    if num_channels == 0:
        raise ValueError(f"tokens must have at least one channel, got {list(tokens.shape)}")
    given = {"tokens": tokens}
    if vectors is not None:
        _check.shape("vectors", vectors, None, num_channels)
        given["vectors"] = vectors
    _check.floating(impl, **given)
    _check.same_device(**given)
    _check_layout(tokens, vectors, layout)
    if impl == "reference":
        with _dispatch.without_autocast(tokens):
            return reference.assemble(tokens, vectors, layout)
    tiles = tokens if tokens.ndim == 3 else tokens[None]
    out, _ = _dispatch.operator("assemble", impl)(
        tiles, vectors, layout.table, layout.maps, layout.num_tokens
    )
    return out


def _check_layout(tokens: Tensor, vectors: Tensor | None, layout: TokenLayout) -> None:
    """``layout`` finds all its tokens and vectors, on the same device."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got {type(layout).__name__}")
    if math.prod(tokens.shape[:-1]) < layout.num_source_tokens:
        raise ValueError(
            f"tokens must have the {layout.num_source_tokens} tokens of layout,"
            f" got {list(tokens.shape)}"
        )
    num_vectors = 0 if vectors is None else vectors.shape[0]
    if num_vectors < layout.num_vectors:
        got = None if vectors is None else list(vectors.shape)
        raise ValueError(f"vectors must have the {layout.num_vectors} vectors of layout, got {got}")
    if layout.table.device != tokens.device:
        raise ValueError(
            f"layout must be on the device of tokens, {tokens.device}, got {layout.table.device};"
            " use layout.to(...)"
        )


def _fake(tokens, vectors, table, maps, num_tokens):
    labelled = 0 if vectors is None else num_tokens
    return (
        tokens.new_empty(num_tokens, tokens.shape[-1]),
        tokens.new_empty(labelled, dtype=torch.int32),
    )


def _setup_context(ctx, inputs, output):
    tokens, vectors, table, maps, _ = inputs
    _, labels = output
    ctx.num_tiles, ctx.tile_size, _ = tokens.shape
    ctx.num_vectors = None if vectors is None else vectors.shape[0]
    ctx.mark_non_differentiable(labels)
    ctx.save_for_backward(labels, table, maps)


def _backward(ctx, grad, _):
    grad_tokens, grad_vectors = _dispatch.operator("assemble_backward", ctx.impl)(
        grad, *ctx.saved_tensors, ctx.num_tiles, ctx.tile_size, ctx.num_vectors or 0
    )
    return grad_tokens, None if ctx.num_vectors is None else grad_vectors, None, None, None


def _fake_backward(grad, labels, table, maps, num_tiles, tile_size, num_vectors):
    num_channels = grad.shape[1]
    return (
        grad.new_empty(num_tiles, tile_size, num_channels),
        grad.new_empty(num_vectors, num_channels),
    )


_dispatch.define(
    "assemble(Tensor tokens, Tensor? vectors, Tensor table, Tensor maps, SymInt num_tokens)"
    " -> (Tensor, Tensor)",
    "assemble:assemble",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "assemble_backward(Tensor grad, Tensor labels, Tensor table, Tensor maps, SymInt num_tiles,"
    " SymInt tile_size, SymInt num_vectors) -> (Tensor, Tensor)",
    "assemble:assemble_bwd",
    fake=_fake_backward,
)
