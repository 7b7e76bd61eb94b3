"""Square blocks of the maps of packed images, which ops turn into one token each."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack.packing import PackedGrid


def blocks_of(tokens: Tensor, grid: PackedGrid, size: int, order: str = "row") -> Tensor:
    """The tokens ``[T, C]`` of every ``size x size`` block, row by row, ``[N, size^2, C]``.

    Blocks come frame by frame, within a frame by rows or, with ``order="column"``, by columns.
    """
    m = grid.spatial_merge_size
    sizes = grid.grid_thw.tolist()
    found = [tokens[:0].reshape(0, size * size, tokens.shape[1])]
    for image, (t, h, w) in zip(tokens.split([t * h * w for t, h, w in sizes]), sizes, strict=True):
        maps = image.reshape(t, h // m, w // m, m, m, -1).permute(0, 1, 3, 2, 4, 5)
        blocks = maps.reshape(t, h // size, size, w // size, size, -1)
        rows_first = blocks.permute(0, 1, 3, 2, 4, 5)
        blocks = rows_first if order == "row" else rows_first.transpose(1, 2)
        found.append(blocks.flatten(0, 2).flatten(1, 2))
    return torch.cat(found)
