"""``scatter_tokens``: vision tokens into the rows of a sequence that wait for them."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference


def scatter_tokens(
    embeds: Tensor,
    tokens: Tensor,
    index: Tensor,
    *,
    vectors: Tensor | None = None,
    vector_index: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Replace rows of a sequence by tokens, and some by learned vectors.

    Args:
        embeds: The sequence, ``[L, C]``, or a batch of them, ``[B, L, C]``, float32, bfloat16 or
            float16. Any strides; copied only if the last one is strided.
        tokens: What takes their place, ``[N, C]``, dtype of ``embeds``.
        index: Which row each token replaces, int64 or int32 ``[N]``; rows of a batch are counted
            on, ``b L + l``. Values are not read by the host. They must be distinct and rows of
            ``embeds``, which ``patchpack.layout.validate_index`` checks: if a row is named twice,
            it gets one of its tokens, and a token for a row that is not there is lost.
        vectors: Learned vectors, ``[V, C]``, dtype of ``embeds``. Given with ``vector_index`` or
            not at all.
        vector_index: Which vector replaces a row, int32 or int64, ``[L]`` or ``[B, L]``; of a row
            that keeps its values, or gets a token, -1.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The new sequence, contiguous, shape and dtype of ``embeds``. Differentiable in ``embeds``,
        ``tokens`` and ``vectors``, once. Deterministic for distinct rows: gradients are gathered,
        that of a vector is summed in a fixed order. The forward pass keeps ``index`` and an integer
        a row.

    Raises:
        ValueError: A shape, a device or ``impl`` does not fit.
        TypeError: A dtype or a type does not fit.

    Rows are copied; sums are float32, rounded once. Source: ``patchpack.reference.scatter_tokens``.
    """
    impl = _dispatch.resolve("scatter_tokens", impl, embeds=embeds)
    _check.shape("embeds", embeds, *[None] * (3 if embeds.ndim == 3 else 2))
    num_channels = embeds.shape[-1]
    _check.shape("tokens", tokens, None, num_channels)
    _check.shape("index", index, tokens.shape[0])
    _check.dtype("index", index, torch.int64, torch.int32)
    floats, integers = {"embeds": embeds, "tokens": tokens}, {"index": index}
    if (vectors is None) != (vector_index is None):
        raise ValueError("vectors and vector_index must be given together")
    if vectors is not None and vector_index is not None:
        _check.shape("vectors", vectors, None, num_channels)
        _check.shape("vector_index", vector_index, *embeds.shape[:-1])
        _check.dtype("vector_index", vector_index, torch.int64, torch.int32)
        floats["vectors"], integers["vector_index"] = vectors, vector_index
    _check.floating(impl, **floats)
    _check.same_device(**floats, **integers)
    if impl == "reference":
        return reference.scatter_tokens(
            embeds, tokens, index, vectors=vectors, vector_index=vector_index
        )
    batch = embeds if embeds.ndim == 3 else embeds[None]
    out, _ = _dispatch.operator("scatter_tokens", impl)(batch, tokens, index, vectors, vector_index)
    return out.view(embeds.shape)


def _fake(embeds, tokens, index, vectors, vector_index):
    num_rows = embeds.shape[0] * embeds.shape[1]
    return embeds.new_empty(embeds.shape), embeds.new_empty(num_rows, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    _, _, index, vectors, _ = inputs
    _, sources = output
    ctx.num_vectors = None if vectors is None else vectors.shape[0]
    ctx.mark_non_differentiable(sources)
    ctx.save_for_backward(sources, index)


def _backward(ctx, grad, _):
    grad_embeds, grad_tokens, grad_vectors = _dispatch.operator(
        "scatter_tokens_backward", ctx.impl
    )(grad, *ctx.saved_tensors, ctx.num_vectors or 0)
    grad_vectors = None if ctx.num_vectors is None else grad_vectors
    return grad_embeds, grad_tokens, None, grad_vectors, None


def _fake_backward(grad, sources, index, num_vectors):
    num_channels = grad.shape[2]
    return (
        grad.new_empty(grad.shape),
        grad.new_empty(index.shape[0], num_channels),
        grad.new_empty(num_vectors, num_channels),
    )


_dispatch.define(
    "scatter_tokens(Tensor embeds, Tensor tokens, Tensor index, Tensor? vectors,"
    " Tensor? vector_index) -> (Tensor, Tensor)",
    "scatter_tokens:scatter",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "scatter_tokens_backward(Tensor grad, Tensor sources, Tensor index, SymInt num_vectors)"
    " -> (Tensor, Tensor, Tensor)",
    "scatter_tokens:scatter_bwd",
    fake=_fake_backward,
)
