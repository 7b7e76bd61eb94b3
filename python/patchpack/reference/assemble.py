"""One sequence of maps and learned vectors.

The tokens of a map come tile by tile. They are put in their place, cropped and resized, and read
row by row, each row followed by a learned vector if the layout says so. With tiles of ``h x w``
tokens, ``a`` of them side by side, row ``y`` and column ``x`` of the map hold token

    ((y // h) a + x // w) h w + (y mod h) w + x mod w

of it. Resizing is ``torch.nn.functional.interpolate``, bilinear, without ``align_corners`` and
``antialias``. Source: LLaVA-OneVision (arXiv 2408.03326) assembles its tiles so, Oryx (arXiv
2409.12961) its two views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from patchpack.layout import FeatureMap, TokenLayout


def assemble(tokens: Tensor, vectors: Tensor | None, layout: TokenLayout) -> Tensor:
    """Write the parts of ``layout`` one after the other: ``[num_tokens, C]``."""
    tokens = tokens.flatten(0, -2)
    vectors = tokens[:0] if vectors is None else vectors
    parts = [tokens[:0], vectors[:0]]
    for part in layout.parts:
        if isinstance(part, FeatureMap):
            rows = _rows_of(tokens, part)
            if part.newline is not None:
                newline = vectors[part.newline].expand(len(rows), 1, -1)
                rows = torch.cat([rows, newline], dim=1)
            parts.append(rows.flatten(0, 1))
        else:
            parts.append(vectors[part.index][None])
    return torch.cat(parts)


def _rows_of(tokens: Tensor, part: FeatureMap) -> Tensor:
    """A map, cropped and resized: ``[rows, columns, C]``."""
    (h, w), (rows, cols) = part.tile_hw, part.tiles_hw
    tiles = tokens[part.first :][: rows * cols * h * w].reshape(rows, cols, h, w, -1)
    whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    top, left, height, width = part.crop or (0, 0, *whole.shape[:2])
    kept = whole[top : top + height, left : left + width]
    size = tuple(part.target_hw or (height, width))
    if size == (height, width):
        return kept
    maps = kept.permute(2, 0, 1)[None].to(torch.promote_types(kept.dtype, torch.float32))
    return F.interpolate(maps, size, mode="bilinear")[0].permute(1, 2, 0).to(kept.dtype)
