"""Resizing the feature maps of packed images.

The tokens of a frame are a map of rows and columns; every channel of it is resized on its own, and
each axis on its own:

    y[o, p] = sum_{i, j} Wh[o, i] Ww[p, j] x[i, j]

``W`` is the matrix of ``torch.nn.functional.interpolate`` for ``"nearest"``, ``"area"`` (which is
``adaptive_avg_pool2d``), ``"bilinear"`` and ``"bicubic"``, the last two with or without
``align_corners`` and ``antialias``. ``"max"`` is ``adaptive_max_pool2d``. Sources: LLaVA-OneVision
(arXiv 2408.03326) resizes its maps bilinearly; the bicubic filter is R. G. Keys's, "Cubic
convolution interpolation for digital image processing", 1981.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from patchpack.packing import PackedGrid


def interpolate_tokens(
    x: Tensor,
    grid: PackedGrid,
    target_hw: Tensor | Sequence[int] | Sequence[Sequence[int]] | PackedGrid,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
    spatial_merge_size: int | None = None,
) -> tuple[Tensor, PackedGrid]:
    """Resize the maps ``x`` ``[T, C]`` of ``grid`` to ``target_hw``, image by image."""
    target = grid.resized(target_hw, spatial_merge_size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sizes = torch.cat([grid.grid_thw, target.grid_thw[:, 1:]], dim=1).tolist()
    tokens = x.split([t * h * w for t, h, w, *_ in sizes])
    resized = [x[:0]]
    for image, (t, h, w, *size) in zip(tokens, sizes, strict=True):
        maps = _to_maps(image.to(dtype), t, h, w, grid.spatial_merge_size)
        if mode == "max":
            maps = F.adaptive_max_pool2d(maps, size)
        elif mode in ("area", "nearest"):
            maps = F.interpolate(maps, size, mode=mode)
        else:
            # torch on a CPU antialiases maps that become one column wide wrongly: lay them down
            lay = antialias and size[1] == 1
            maps = F.interpolate(
                maps.mT if lay else maps,
                size[::-1] if lay else size,
                mode=mode,
                align_corners=align_corners,
                antialias=antialias,
            )
            maps = maps.mT if lay else maps
        resized.append(_to_tokens(maps, target.spatial_merge_size).to(x.dtype))
    return torch.cat(resized), target


def _to_maps(tokens: Tensor, t: int, h: int, w: int, m: int) -> Tensor:
    """Tokens in merge-block order as maps ``[t, C, h, w]``."""
    blocks = tokens.reshape(t, h // m, w // m, m, m, -1)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(t, -1, h, w)


def _to_tokens(maps: Tensor, m: int) -> Tensor:
    """The inverse of ``_to_maps``."""
    t, c, h, w = maps.shape
    blocks = maps.reshape(t, c, h // m, m, w // m, m)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(t * h * w, c)
