"""Attention of one query to the square of tokens it stands for, as Oryx compresses its maps.

The map of a frame falls into cells of ``r x r`` tokens ``x_k``, and each has a query ``q``:

    p = softmax_k(scale * q . x_k)
    y = mean_k x_k + sum_k p_k x_k

Keys and values are the tokens as they are. Oryx projects both its pooled map and its tokens to
scores of 256 channels; as scores are linear in the tokens, ``(Wk x_k) . (Wq a + bq)`` equals
``x_k . (Wk^T (Wq a + bq))``, and what ``bk`` adds to all scores of a cell changes no softmax: so the
projection of the keys belongs to the query. Source: Oryx (arXiv 2409.12961).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack.packing import PackedGrid
from patchpack.reference._blocks import blocks_of


def region_attention(
    query: Tensor,
    tokens: Tensor,
    grid: PackedGrid,
    region: int,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attend from ``query`` ``[T / r^2, C]`` to the cells of ``tokens`` ``[T, C]``."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    scale = tokens.shape[1] ** -0.5 if softmax_scale is None else softmax_scale
    cells = blocks_of(tokens.to(dtype), grid, region)  # [N, r^2, C]
    scores = (query.to(dtype)[:, None] * cells).sum(dim=2) * scale
    p = scores.softmax(dim=1)[:, :, None]
    return (cells.mean(dim=1) + (p * cells).sum(dim=1)).to(tokens.dtype)
