"""Adding a learned table of position embeddings to the patches of packed images.

The table is a feature map of rows and columns. It is resized to the rows and columns of each image
as ``interpolate_tokens`` resizes any map, and added to every frame:

    y[f, o, p] = x[f, o, p] + sum_{i, j} Wh[o, i] Ww[p, j] table[i, j]

An image of the table's own size gets the table as it is. Sources: Oryx (arXiv 2409.12961) resizes
bilinearly, Qwen3-VL (arXiv 2511.21631) with ``align_corners``, SigLIP 2 (arXiv 2502.14786) with
``antialias``, MoonViT (Kimi-VL, arXiv 2504.07491) bicubically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack.packing import PackedGrid
from patchpack.reference.interpolate_tokens import interpolate_tokens


def add_pos_embed(
    x: Tensor,
    table: Tensor,
    grid: PackedGrid,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
) -> Tensor:
    """Add ``table`` ``[rows, cols, C]``, resized to each image of ``grid``, to ``x`` ``[T, C]``."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, table.dtype), torch.float32)
    table_grid = PackedGrid([table.shape[:2]], device=table.device)
    table = table.to(dtype).flatten(0, 1)
    sizes = grid.grid_thw.tolist()
    tokens = x.to(dtype).split([t * h * w for t, h, w in sizes])
    added = [x[:0].to(dtype) + table[:0]]
    for image, (t, *size) in zip(tokens, sizes, strict=True):
        frame, _ = interpolate_tokens(
            table,
            table_grid,
            size,
            mode=mode,
            align_corners=align_corners,
            antialias=antialias,
            spatial_merge_size=grid.spatial_merge_size,
        )
        added.append(image + frame.repeat(t, 1))
    return torch.cat(added).to(x.dtype)
