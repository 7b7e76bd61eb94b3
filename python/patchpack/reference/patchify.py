"""Cutting images of different sizes into one packed sequence of normalised patches.

A patch is ``p x p`` pixels of ``tp`` consecutive frames. Its value at channel c, frame t, row y and
column x of the patch is ``(pixel / 255 - mean[c]) / std[c]``, or ``(pixel - mean[c]) / std[c]``
where pixels are floating.

    ctpp   columns run over c, t, y, x: a convolution's weight, flattened, multiplies them
    ppc    columns run over y, x, c

Rows are the grid's: frame of patches, then raster or merge-block order. Sources: "ctpp" in
merge-block order is Qwen2-VL (arXiv 2409.12191), "ppc" in raster order SigLIP 2 NaFlex
(arXiv 2502.14786).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack.packing import PackedGrid


def patchify(
    images: Sequence[Tensor],
    grid: PackedGrid,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int = 1,
    layout: str = "ctpp",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Patches ``[T, C * tp * p * p]`` of ``images``, ``[C, H, W]`` or ``[F, C, H, W]``."""
    p, tp, m = patch_size, temporal_patch_size, grid.spatial_merge_size
    channels = len(mean)
    device = grid.geometry.device
    packed = [torch.empty(0, channels * tp * p * p, dtype=dtype, device=device)]
    for image, (t, h, w) in zip(images, grid.grid_thw.tolist(), strict=True):
        precision = torch.promote_types(torch.promote_types(image.dtype, dtype), torch.float32)
        center, scale = (
            torch.tensor(list(map(float, x)), dtype=precision, device=device).view(-1, 1, 1)
            for x in (mean, std)
        )
        frames = image.reshape(-1, *image.shape[-3:])[..., : h * p, : w * p]
        pixels = frames.to(precision) / (1 if image.is_floating_point() else 255)
        values = (pixels - center) / scale
        missing = t * tp - len(values)
        values = torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
        cut = values.view(t, tp, channels, h // m, m, p, w // m, m, p)
        columns = (2, 1, 5, 8) if layout == "ctpp" else (1, 5, 8, 2)
        patches = cut.permute(0, 3, 6, 4, 7, *columns)
        packed.append(patches.reshape(t * h * w, -1).to(dtype))
    return torch.cat(packed)
