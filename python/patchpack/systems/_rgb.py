"""What the systems take for an image, made the same for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image


def to_rgb(name: str, image: Any) -> PIL.Image.Image:
    """``image``, a Pillow image, array or tensor of one image, as 8-bit RGB on a white ground.

    Arrays have their channels last, tensors first; floats are in 0..1. ``name`` is what an error
    calls the image.
    """
    try:
        import PIL.Image  # here, because planning works without Pillow
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "images need Pillow: pip install 'patchpack[demo]'", name="PIL"
        ) from None

    came = list(image.shape) if isinstance(image, (Tensor, np.ndarray)) else None
    if isinstance(image, Tensor):
        if image.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {image.device}")
        if image.is_floating_point():  # NumPy has no bfloat16
            image = image.to(torch.promote_types(image.dtype, torch.float32))
        image = image.detach().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        channels = image.shape[2:]
        if image.ndim < 2 or channels not in ((), (1,), (3,), (4,)) or image.size == 0:
            raise ValueError(f"{name} must be one image of 1, 3 or 4 channels, got {came}")
        if np.issubdtype(image.dtype, np.floating):
            if not (image.min() >= 0 and image.max() <= 1):
                raise ValueError(
                    f"{name} must be in 0..1, got {image.min():.6g}..{image.max():.6g}"
                )
            # a float16 product is rounded once more
            wide = np.promote_types(image.dtype, np.float32)
            image = np.rint(np.multiply(image, 255, dtype=wide)).astype(np.uint8)
        if image.dtype != np.uint8:
            raise TypeError(f"{name} must be uint8 or floating, got {image.dtype}")
        image = PIL.Image.fromarray(image[..., 0] if channels == (1,) else image)
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(
            f"{name} must be a Pillow image, array or tensor, got {type(image).__name__}"
        )
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to white without a word
        raise ValueError(f"{name} must have 8 bits a channel, got Pillow mode {image.mode!r}")
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
