"""Pixtral: images at their own resolution and aspect, with a token at the end of every row.

In the order of the paper: sizes (``plan``), patches (``preprocess``), two-dimensional rotary
position embedding (``rotate``), and break and end tokens between the rows (``vision_tokens``).

Source: Agrawal et al., "Pixtral 12B", arXiv 2410.07073, with the behaviour of the Pixtral classes
of transformers. Mistral's own processor, mistral-common, rounds a shrunk size to the nearest pixel
where transformers floors it, and resizes without antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchpack import _check, rope_2d
from patchpack.packing import PackedGrid
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

IMG = 10
IMG_BREAK = 12
IMG_END = 13

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


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
    size = [height, width]
    if ratio > 1:
        size = [math.floor(side / ratio) for side in size]
    if 0 in size:
        raise ValueError(
            f"height and width must leave at least one pixel a side within"
            f" longest_edge={longest_edge}, got {height} x {width}"
        )
    rows, cols = ((side - 1) // patch_size + 1 for side in size)
    return Plan(height, width, (rows * patch_size, cols * patch_size), patch_size)


# Patches -----------------------------------------------------------------------------------------


def _default_plan(num_frames: int | None, height: int, width: int) -> Plan:
    if num_frames is not None:
        raise ValueError(f"images must be single images, got a video of {num_frames} frames")
    return plan(height, width)


def preprocess(
    images: Iterable[Image],
    plans: Iterable[Plan] | None = None,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, PackedGrid]:
    """Images of different sizes to one packed sequence of normalised patches.

    Each image becomes 8-bit RGB (transparency on white), is resized with Pillow's bicubic filter,
    scaled to 0..1, normalised, and cut into patches. Runs on the host and needs Pillow, of the
    extra ``demo``.

    Args:
        images: Images: a Pillow image with 8 bits a channel, a NumPy array ``[height, width,
            channels]`` or ``[height, width]``, or a CPU tensor ``[channels, height, width]`` or
            ``[height, width]``, with 1, 3 or 4 channels, uint8, or floating in 0..1 and then
            rounded to 8 bits.
        plans: What becomes of each; by default ``plan`` of its size.
        mean: Mean of each channel, in 0..1; by default CLIP's.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, 3 * patch_size**2]`` on the CPU, whose columns run over channel, row and
        column, and their grid, in raster order.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, plans
            differ in their patch size, or their number is not that of images, or ``mean`` or
            ``std`` does not fit.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    patch_size = _plan.shared(plans, "patch_size", 16)
    grid = PackedGrid([g for p in plans for g in p.grids])
    pixels = _images.resized_patches(
        clips, grid, patch_size=patch_size, mean=mean, std=std, dtype=dtype
    )
    return pixels, grid


# Positions ---------------------------------------------------------------------------------------


def rotate(
    q: Tensor, k: Tensor, grid: PackedGrid, *, interleaved: bool = False, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: even frequencies turn with the row, odd ones with the column.

    Args:
        q: Queries, ``[T, H, D]``: see ``patchpack.rope_2d``.
        k: Keys, likewise.
        grid: Which images the tokens are.
        interleaved: For Mistral's weights, whose pairs are neighbouring channels; those of
            transformers are permuted to halves.
        impl: As in ``patchpack.rope_2d``.

    Returns:
        The rotated ``q`` and ``k``.
    """
    return rope_2d(q, k, grid, axes="even_odd", interleaved=interleaved, impl=impl)


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
