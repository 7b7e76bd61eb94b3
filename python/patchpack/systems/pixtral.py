"""Pixtral: images at their own resolution and aspect, with a token at the end of every row.

In the order of the paper: sizes (``plan``), patches (``preprocess``), two-dimensional rotary
position embedding (``rope_2d``), and break and end tokens between the rows (``vision_tokens``).

Source: Agrawal et al., "Pixtral 12B", arXiv 2410.07073, with the behaviour of the Pixtral classes
of transformers. Mistral's own processor, mistral-common, rounds a shrunk size to the nearest pixel
where transformers floors it, and resizes without antialiasing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchpack import _check
from patchpack.systems import _plan

IMG = 10
IMG_BREAK = 12
IMG_END = 13


# Resolution and aspect ---------------------------------------------------------------------------


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
        return self.vit_tokens

    @property
    def markup_tokens(self) -> int:
        """Text tokens between the rows, ``IMG_BREAK``, and after the last one, ``IMG_END``."""
        return self.resized[0] // self.patch_size


def plan(height: int, width: int, *, longest_edge: int = 1024, patch_size: int = 16) -> Plan:
    """Plan one image. A 1920 x 1080 image takes 36 rows of 64 patches, 2340 tokens with markup.

    An image longer than ``longest_edge`` shrinks to it, floored to whole pixels; then each side is
    rounded up to whole patches.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        longest_edge: Longest side, in pixels, before it is rounded up.
        patch_size: Side of a patch, in pixels.

    Returns:
        The plan.

    Raises:
        ValueError: A number is not positive, or a side would shrink to 0.
        TypeError: A number is not an integer.
    """
    height, width, longest_edge, patch_size = _check.whole(
        height=height, width=width, longest_edge=longest_edge, patch_size=patch_size
    )
    ratio = max(height / longest_edge, width / longest_edge)
    size = (
        [height, width] if ratio <= 1 else [math.floor(height / ratio), math.floor(width / ratio)]
    )
    if 0 in size:
        raise ValueError(
            f"height and width must leave at least one pixel a side within"
            f" longest_edge={longest_edge}, got {height} x {width}"
        )
    rows, cols = ((side - 1) // patch_size + 1 for side in size)
    return Plan(height, width, (rows * patch_size, cols * patch_size), patch_size)


# Rows --------------------------------------------------------------------------------------------


def vision_tokens(
    plan: Plan,
    *,
    image_token_id: int = IMG,
    image_break_token_id: int = IMG_BREAK,
    image_end_token_id: int = IMG_END,
) -> list[int]:
    """Token ids of an image in the text: a break after each row, and the end after the last.

    Where ``image_token_id`` stands, the embeddings of the patches go, row by row. The ids are those
    of the model's own tokenizer.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    image, line_break, end = _check.whole(
        0,
        image_token_id=image_token_id,
        image_break_token_id=image_break_token_id,
        image_end_token_id=image_end_token_id,
    )
    ((_, rows, cols),) = plan.grids
    ids = [*[image] * cols, line_break] * rows
    return [*ids[:-1], end]
