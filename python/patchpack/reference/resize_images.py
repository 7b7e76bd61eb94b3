"""Resizing 8-bit images as Pillow does, to the same bytes.

Each axis is resized on its own, first the width, then the height, or the other way round where
that loses rows, and more than twice as many of them as columns:

    y[o] = clip(floor((sum_i W[o, i] x[i]) / 2**22 + 1 / 2), 0, 255)

``W[o, i]`` is ``2**22 f((i + 1/2 - (o + 1/2) s) / max(s, 1))``, with the sum of a row normalised to
``2**22`` and every entry rounded; ``s`` is the input's length over the output's. ``f`` is
R. G. Keys's cubic with a = -1/2 ("Cubic convolution interpolation for digital image processing",
1981) for ``"bicubic"``, and the triangle ``1 - |x|`` for ``"bilinear"``; widened by ``max(s, 1)``,
both suppress what the output cannot show. The integers are those of Pillow's ``Resample.c``, the
order is that of Pillow 13.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack._resampling import BITS, height_first, resampling_weights


def resize_images(
    images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], *, mode: str = "bicubic"
) -> list[Tensor]:
    """Resize each of ``images``, uint8 ``[..., H, W]``, to its height and width of ``sizes``."""
    resized = []
    for image, size in zip(images, sizes, strict=True):
        order = (-2, -1) if height_first(image.shape[-2:], size) else (-1, -2)
        for axis in order:
            image = _resize_axis(image.movedim(axis, -1), size[axis], mode).movedim(-1, axis)
        resized.append(image.contiguous())
    return resized


def _resize_axis(x: Tensor, num_out: int, mode: str) -> Tensor:
    first, weights = resampling_weights(x.shape[-1], num_out, mode)
    first, weights = first.to(x.device), weights.to(x.device)
    shape = (*x.shape[:-1], num_out)
    total = torch.full(shape, 2 ** (BITS - 1), dtype=torch.int32, device=x.device)
    for k, weight in enumerate(weights):
        index = (first + k).clamp(max=x.shape[-1] - 1)  # the weight past the end is 0
        total = total + x.index_select(-1, index).int() * weight
    return (total >> BITS).clamp(0, 255).to(torch.uint8)
