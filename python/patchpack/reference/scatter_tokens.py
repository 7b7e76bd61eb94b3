"""Rows of a sequence replaced: vision tokens take the place of placeholders among text.

    out[l] = tokens[i]                  where index[i] = l
             vectors[vector_index[l]]   where vector_index[l] >= 0, of the other rows
             embeds[l]                  elsewhere

In transformers it is ``masked_scatter`` with the mask of the placeholder's token id, which has to
count the mask first.
"""

from __future__ import annotations

from torch import Tensor


def scatter_tokens(
    embeds: Tensor,
    tokens: Tensor,
    index: Tensor,
    *,
    vectors: Tensor | None = None,
    vector_index: Tensor | None = None,
) -> Tensor:
    """Replace rows ``index`` of ``embeds`` by ``tokens``, and some by ``vectors``."""
    out = embeds.flatten(0, -2).clone()
    if vectors is not None and vector_index is not None:
        chosen = vector_index.flatten() >= 0
        out[chosen] = vectors[vector_index.flatten()[chosen].long()]
    out[index.long()] = tokens
    return out.view(embeds.shape)
