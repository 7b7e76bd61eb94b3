"""MoonViT, the encoder of Kimi-VL and Kimi K2.5: native resolution, clips of four frames.

In the order of the model: sizes (``plan``: shrunk only where there are too many patches, and padded
to whole tokens), clips of a video (``plan_video``), patches (``preprocess``), positions learned and
rotary (``add_position``, ``rotate``), and patches merged to tokens (``Projector``: the mean over
the frames of a clip, then 2 x 2).

Source: Kimi team, "Kimi-VL Technical Report", arXiv 2504.07491, with the behaviour of the Kimi_K25
classes of transformers. Kimi-VL pads images in the same way under a limit of 4096 patches, but
refuses a side of 512 patches or more where K2.5 shrinks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from patchpack import (
    _check,
    add_pos_embed,
    interpolate_tokens,
    merge_tokens,
    rope_2d,
)
from patchpack.packing import PackedGrid
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

MEAN = STD = (0.5, 0.5, 0.5)

# most patches of an image, of a frame, and along a side
IMAGE_PATCHES = 16_384
FRAME_PATCHES = 4096
SIDE_PATCHES = 512
SAMPLED_FPS = 2.0
# frames that attend to each other and become one
CLIP_FRAMES = 4


# Native resolution -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image or video.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        resized: Height and width after resizing, in pixels.
        padded: Height and width after black was added below and on the right, in pixels.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the block of patches that becomes one language-model token.
        frame_indices: Which frames of a video are used; ``None`` for an image.
    """

    height: int
    width: int
    resized: tuple[int, int]
    padded: tuple[int, int]
    patch_size: int = 14
    merge_size: int = 2
    frame_indices: tuple[int, ...] | None = None

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """The image, or the clips of a video, of ``CLIP_FRAMES`` frames but the last."""
        rows, cols = (side // self.patch_size for side in self.padded)
        starts = range(0, self.num_frames, CLIP_FRAMES)
        return tuple((min(CLIP_FRAMES, self.num_frames - i), rows, cols) for i in starts)

    @property
    def llm_tokens(self) -> int:
        """Tokens of the language model: a clip takes as many as one frame."""
        return sum(rows * cols for _, rows, cols in self.grids) // self.merge_size**2

    @property
    def markup_tokens(self) -> int:
        """Media begin, content and end around an image or clip, without the words between them.

        Those are ``image``, or ``video`` and the time of the clip's first frame.
        """
        return 3 * len(self.grids)


def plan(
    height: int,
    width: int,
    *,
    max_patches: int = IMAGE_PATCHES,
    max_side_patches: int = SIDE_PATCHES,
    patch_size: int = 14,
    merge_size: int = 2,
) -> Plan:
    """Plan one image. It is never enlarged: 224 x 224 takes 64 tokens, 32 x 32 takes 4.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        max_patches: Most whole patches before padding: the image shrinks by the square root of the
            excess.
        max_side_patches: Most patches along a side, likewise.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the block of patches that becomes one language-model token.

    Returns:
        The plan.

    Raises:
        ValueError: A number is not positive.
        TypeError: A number is not an integer.
    """
    height, width, max_patches, max_side_patches, patch_size, merge_size = _check.whole(
        height=height,
        width=width,
        max_patches=max_patches,
        max_side_patches=max_side_patches,
        patch_size=patch_size,
        merge_size=merge_size,
    )
    patches = max(1, height // patch_size) * max(1, width // patch_size)
    longest = max_side_patches * patch_size
    scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
    h, w = (min(max(1, int(side * scale)), longest) for side in (height, width))
    factor = patch_size * merge_size
    padded = (math.ceil(h / factor) * factor, math.ceil(w / factor) * factor)
    return Plan(height, width, (h, w), padded, patch_size, merge_size)


# Video -------------------------------------------------------------------------------------------


def plan_video(
    total_frames: int,
    video_fps: float | None,
    height: int,
    width: int,
    *,
    fps: float = SAMPLED_FPS,
    max_patches: int = FRAME_PATCHES,
    max_side_patches: int = SIDE_PATCHES,
    patch_size: int = 14,
    merge_size: int = 2,
) -> Plan:
    """Plan one video: which frames, in clips of four, and one size for all of them.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video; ``None`` says that the frames were chosen
            already: all are used.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        fps: Frames per second to use.
        max_patches: Most patches of a frame: see ``plan``.
        max_side_patches: Most patches along a side.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the block of patches that becomes one language-model token.

    Returns:
        The plan; ``frame_indices`` says which frames ``preprocess`` wants.

    Raises:
        ValueError: A number is not positive, ``plan`` refuses one, or ``video_fps`` is so far below
            ``fps`` that the video has too few frames.
        TypeError: A number is none, or no integer where it counts something.
    """
    (total_frames,) = _check.whole(total_frames=total_frames)
    count = total_frames
    if video_fps is not None:
        video_fps, fps = _check.numbers(video_fps=video_fps, fps=fps)
        count = max(1, int(total_frames / video_fps * fps))
    if count > total_frames:
        raise ValueError(
            f"fps={fps} must take at most the {total_frames} frames of the video at"
            f" video_fps={video_fps}, got {count}"
        )
    frame = plan(
        height,
        width,
        max_patches=max_patches,
        max_side_patches=max_side_patches,
        patch_size=patch_size,
        merge_size=merge_size,
    )
    indices = tuple(i * total_frames // count for i in range(count))
    return replace(frame, frame_indices=indices)


# Patches -----------------------------------------------------------------------------------------


def _default_plan(num_frames: int | None, height: int, width: int) -> Plan:
    if num_frames is None:
        return plan(height, width)
    return plan_video(num_frames, None, height, width)


def preprocess(
    images: Iterable[Image | Sequence[Image]],
    plans: Iterable[Plan] | None = None,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, PackedGrid]:
    """Images and videos of different sizes to one packed sequence of normalised patches.

    Each frame becomes 8-bit RGB (transparency on white), is resized with Pillow's bicubic filter,
    padded with black, scaled to 0..1, normalised, and cut into patches. Runs on the host and needs
    Pillow, of the extra ``demo``.

    Args:
        images: Images and videos. An image is a Pillow image with 8 bits a channel, a NumPy array
            ``[height, width, channels]`` or ``[height, width]``, or a CPU tensor
            ``[channels, height, width]`` or ``[height, width]``, with 1, 3 or 4 channels, uint8, or
            floating in 0..1 and then rounded to 8 bits. A video is a sequence of images, or an
            array or tensor with the frames in front: the frames that its plan names.
        plans: What becomes of each; by default ``plan`` of an image's size, and ``plan_video`` of
            all frames of a video.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, 3 * patch_size**2]`` on the CPU, whose columns run over channel, row and
        column, and their grid, in raster order, with one attention segment an image or clip.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, plans
            differ in their patch size, or their number is not that of images, or ``mean`` or
            ``std`` does not fit.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    patch_size = _plan.shared(plans, "patch_size", 14)
    grid = PackedGrid([g for p in plans for g in p.grids], merge_temporal=True)
    padded = []
    for clip, p in zip(clips, plans, strict=True):
        below, right = (a - b for a, b in zip(p.padded, p.resized, strict=True))
        frames = F.pad(_images.resized(clip, *p.resized), (0, right, 0, below))
        padded += frames.split(CLIP_FRAMES)
    pixels = _images.patches(padded, grid, patch_size=patch_size, mean=mean, std=std, dtype=dtype)
    return pixels, grid


# Positions ---------------------------------------------------------------------------------------


def add_position(x: Tensor, table: Tensor, grid: PackedGrid, *, impl: str | None = None) -> Tensor:
    """Add the learned position of a patch, and the sinusoid of its frame in a clip of several.

    Args:
        x: Embedded patches, ``[T, C]``.
        table: Learned embeddings, ``[rows, cols, C]``, 64 x 64 in Kimi K2.5; resized to
            every image, bicubic.
        grid: Which images and clips the patches are, on the device of ``x``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The sum, ``[T, C]``, dtype of ``x``. Differentiable in ``x`` and ``table``.

    Raises:
        ValueError: A shape or a device does not fit, or a clip has more than four frames.
        TypeError: An argument has the wrong type.
    """
    x = add_pos_embed(x, table, grid, mode="bicubic", impl=impl)
    frames, rows, cols = grid.grid_thw.unbind(1)
    if (frames > CLIP_FRAMES).any():
        raise ValueError(
            f"grid must have clips of at most {CLIP_FRAMES} frames, got {frames.max()}"
        )
    if (frames == 1).all():
        return x
    # row 0 is that of a single frame
    clip = torch.repeat_interleave(frames)  # of every frame
    frame = (
        torch.arange(len(clip), device="cpu")
        - (frames.cumsum(0) - frames)[clip]
        + (frames > 1)[clip]
    )
    index = frame.repeat_interleave((rows * cols)[clip]).to(x.device, non_blocking=True)
    return x + frame_embeddings(x.shape[1], device=x.device).to(x.dtype)[index]


def frame_embeddings(channels: int, *, device: torch.device | None = None) -> Tensor:
    """Sinusoids of frames 0 to 3, float32 ``[5, channels]``: row 0 is zero, row ``i`` frame i - 1.

    The first half of the channels are sines, the second half cosines, of the same frequencies.

    Raises:
        ValueError: ``channels`` is below 1.
        TypeError: ``channels`` is not an integer.
    """
    (channels,) = _check.whole(channels=channels)
    frequency = 10_000.0 ** -(torch.arange(0, channels, 2, device=device).double() / channels)
    angle = torch.arange(CLIP_FRAMES, device=device)[:, None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, 0, 1, 0)).float()


def rotate(
    q: Tensor, k: Tensor, grid: PackedGrid, *, interleaved: bool = True, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: pairs of channels turn with the column and the row in turn.

    Args:
        q: Queries, ``[T, H, D]``: see ``patchpack.rope_2d``.
        k: Keys, likewise.
        grid: Which images and clips the tokens are.
        interleaved: Pairs are neighbouring channels, as complex numbers; false for the weights of
            transformers, which are permuted to halves.
        impl: As in ``patchpack.rope_2d``.

    Returns:
        The rotated ``q`` and ``k``.
    """
    return rope_2d(q, k, grid, axes="paired", interleaved=interleaved, impl=impl)


# Merging -----------------------------------------------------------------------------------------


def mean_of_frames(
    x: Tensor, grid: PackedGrid, *, impl: str | None = None
) -> tuple[Tensor, PackedGrid]:
    """The mean over the frames of every clip.

    Args:
        x: Patches, ``[T, C]``, in raster order.
        grid: Which images and clips they are, on the device of ``x``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The means and their grid, one frame a clip. Differentiable in ``x``.

    Raises:
        ValueError: A shape or a device does not fit, or ``grid`` is in merge-block order.
        TypeError: An argument has the wrong type.
    """
    _check.shape("x", x, None, None)
    _check.grid_of("x", x, grid)
    if grid.spatial_merge_size != 1:
        raise ValueError(f"grid must have spatial_merge_size=1, got {grid.spatial_merge_size}")
    frames, rows, cols = grid.grid_thw.unbind(1)
    one = torch.ones_like(frames)
    still = PackedGrid(torch.stack([one, rows, cols], dim=1), device=x.device)
    if (frames == 1).all():
        return x, still
    # a clip is an image of its frames as rows, of which the columns are averaged
    clips = PackedGrid(torch.stack([one, frames, rows * cols], dim=1), device=x.device)
    target_hw = torch.stack([one, rows * cols], dim=1)
    return interpolate_tokens(x, clips, target_hw, mode="area", impl=impl)[0], still


class Projector(nn.Module):
    """From the vision transformer to the language model: one token of 2 x 2 patches of a clip.

    Parameters are named as in transformers.

    Args:
        channels: ``C``, channels of a patch.
        out_channels: Channels of the language model.
        merge_size: Side of the block of patches that becomes one token.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device. An
            attribute, which may change at any time.

    Raises:
        ValueError: A size is not positive.
        TypeError: A size is not an integer.
    """

    def __init__(
        self,
        channels: int = 1152,
        out_channels: int = 7168,
        merge_size: int = 2,
        *,
        impl: str | None = None,
    ) -> None:
        channels, out_channels, merge_size = _check.whole(
            channels=channels, out_channels=out_channels, merge_size=merge_size
        )
        super().__init__()
        self.merge_size = merge_size
        self.impl = impl
        merged = channels * merge_size**2
        self.pre_norm = nn.LayerNorm(channels, eps=1e-5)
        self.in_proj = nn.Linear(merged, merged)
        self.out_proj = nn.Linear(merged, out_channels)

    def forward(self, x: Tensor, grid: PackedGrid) -> Tensor:
        """Merge and project patches.

        Args:
            x: Patches after the transformer's last norm, ``[T, channels]``, in raster order.
            grid: Which images and clips they are, on the device of ``x``.

        Returns:
            Tokens, ``[L, out_channels]``: ``Plan.llm_tokens`` of each plan, one after the other.
            Differentiable in ``x`` and the weights.

        Raises:
            ValueError: A shape or a device does not fit.
            TypeError: An argument has the wrong type.
        """
        x, grid = mean_of_frames(x, grid, impl=self.impl)
        norm = self.pre_norm
        x = merge_tokens(
            x,
            grid,
            merge_size=self.merge_size,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            impl=self.impl,
        )
        return self.out_proj(F.gelu(self.in_proj(x)))
