"""SigLIP 2 NaFlex: one encoder at any resolution and aspect, within a budget of patches.

In the order of the model: the largest size that fits the budget (``image_size``, ``plan``), patches
(``preprocess``) and a table of positions resized to each image (``add_pos_embed``).

transformers pads every image to the budget and masks the rest; here images are packed one after the
other, and nothing is padded.

Source: Tschannen et al., "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic
Understanding, Localization, and Dense Features", arXiv 2502.14786, with the behaviour of the
Siglip2 classes of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchpack import _check
from patchpack.systems import _plan

# scales that the search tries, and how near it comes
LEAST_SCALE, MOST_SCALE, SCALE_STEP = 1e-6, 100.0, 1e-5


# Resolution and aspect ---------------------------------------------------------------------------


def image_size(
    height: int, width: int, *, patch_size: int = 16, max_num_patches: int = 256
) -> tuple[int, int]:
    """The size an image is resized to: as many patches as the budget allows, about its aspect.

    Both sides are scaled by one factor of at most 100 and rounded up to whole patches. The factor
    is found by bisection, whose end is the original's to the bit.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        patch_size: Side of a patch, in pixels.
        max_num_patches: Most patches.

    Returns:
        Height and width after resizing, in pixels, multiples of ``patch_size``.

    Raises:
        ValueError: A number is not positive, or the sides are too long for any scale.
        TypeError: A number is not an integer.
    """
    height, width, patch_size, max_num_patches = _check.whole(
        height=height, width=width, patch_size=patch_size, max_num_patches=max_num_patches
    )

    def patches(scale: float) -> tuple[int, int]:
        rows, cols = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, cols

    low, high = LEAST_SCALE, MOST_SCALE
    while high - low >= SCALE_STEP:
        scale = (low + high) / 2
        if math.prod(patches(scale)) <= max_num_patches:
            low = scale
        else:
            high = scale
    rows, cols = patches(low)
    if rows * cols > max_num_patches:
        raise ValueError(
            f"height and width must fit into max_num_patches={max_num_patches} at a scale of"
            f" {LEAST_SCALE}, got {height} x {width}"
        )
    return rows * patch_size, cols * patch_size


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        resized: Height and width after resizing, in pixels.
        patch_size: Side of a patch, in pixels.
        frame_indices: Always ``None``: the model takes no video.
    """

    height: int
    width: int
    resized: tuple[int, int]
    patch_size: int = 16
    frame_indices: None = None

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        rows, cols = (side // self.patch_size for side in self.resized)
        return ((1, rows, cols),)

    @property
    def llm_tokens(self) -> int:
        """Tokens that the encoder gives, one a patch; it has no language model of its own."""
        return self.vit_tokens

    @property
    def markup_tokens(self) -> int:
        """None."""
        return 0


def plan(height: int, width: int, *, patch_size: int = 16, max_num_patches: int = 256) -> Plan:
    """Plan one image. A 640 x 480 image takes 252 of 256 patches.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        patch_size: Side of a patch, in pixels.
        max_num_patches: Most patches.

    Returns:
        The plan.

    Raises:
        ValueError: ``image_size`` refuses a number.
        TypeError: A number is not an integer.
    """
    height, width, patch_size = _check.whole(height=height, width=width, patch_size=patch_size)
    resized = image_size(height, width, patch_size=patch_size, max_num_patches=max_num_patches)
    return Plan(height, width, resized, patch_size)
