"""``resize_images``: 8-bit images, resized to the bytes of Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack._resampling import FILTERS


def resize_images(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    mode: str = "bicubic",
    impl: str | None = None,
) -> list[Tensor]:
    """Resize 8-bit images, each to its own size.

    Args:
        images: uint8, ``[C, H, W]`` or with frames in front ``[F, C, H, W]``, in any mix of sizes,
            on one device. Any strides, as of a permuted view of ``[H, W, C]`` or a crop: not
            copied.
        sizes: Height and width of each after resizing, in pixels: pairs of integers.
        mode: ``"bicubic"`` or ``"bilinear"``; both widen their filter when shrinking.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The resized images, uint8, contiguous, in order; views of one buffer. Not differentiable.
        Deterministic.

    Raises:
        ValueError: A shape, a size, the number of ``sizes``, a device, ``mode`` or ``impl`` does
            not fit.
        TypeError: A dtype or a type does not fit.

    Source: ``patchpack.reference.resize_images``.
    """
    images = _check.images("images", images)
    if not images:
        impl = "reference" if impl is None else impl
    impl = _dispatch.resolve("resize_images", impl, images=images[0] if images else torch.empty(0))
    _check.one_of("mode", mode, FILTERS)
    for i, image in enumerate(images):
        _check.dtype(f"images[{i}]", image, torch.uint8)
        if 0 in image.shape[-2:]:
            raise ValueError(f"images[{i}] must have pixels, got {list(image.shape)}")
    pairs = [_check.integers(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    if len(pairs) != len(images):
        raise ValueError(f"sizes must be one for each of {len(images)} images, got {len(pairs)}")
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(
                f"sizes[{i}] must be a height and a width of at least 1, got {tuple(pair)}"
            )
    if impl == "reference" or not images:
        return reference.resize_images(images, pairs, mode=mode)
    raise NotImplementedError
