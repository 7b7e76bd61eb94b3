"""Merging square blocks of tokens into one token of more channels, and its LayerNorm.

The ``m x m`` tokens of a block follow each other in the channels of one, row by row:

    y[i, j, (dr * m + dc) * C + c] = x[i * m + dr, j * m + dc, c]

which is InternVL's ``pixel_shuffle`` (arXiv 2404.16821) and Qwen2-VL's ``PatchMerger`` (arXiv
2409.12191). A LayerNorm, over the ``C`` channels of every ``x`` before or over all of ``y`` after,
is ``torch.nn.functional.layer_norm`` (arXiv 1607.06450).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from patchpack.packing import PackedGrid
from patchpack.reference._blocks import blocks_of


def merge_tokens(
    x: Tensor,
    grid: PackedGrid,
    *,
    order: str = "row",
    merge_size: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Merge ``x`` ``[T, C]`` to ``[T / m^2, m^2 C]``."""
    m = merge_size or (2 if grid.spatial_merge_size == 1 else grid.spatial_merge_size)
    blocks = blocks_of(x, grid, m, order)  # [N, m^2, C]
    affine = weight if weight is not None else bias
    if affine is None:
        return blocks.flatten(1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = blocks.to(dtype) if len(affine) == x.shape[1] else blocks.to(dtype).flatten(1)
    weight, bias = (p if p is None else p.to(dtype) for p in (weight, bias))
    return (
        F.layer_norm(blocks, affine.shape, weight, bias, eps)
        .reshape(len(blocks), m * m * x.shape[1])
        .to(x.dtype)
    )
