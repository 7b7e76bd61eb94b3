"""MoonViT, the encoder of Kimi-VL and Kimi K2.5: native resolution, clips of four frames.

In the order of the model: sizes (``plan``: shrunk only where there are too many patches, and padded
to whole tokens), clips of a video (``plan_video``), patches (``preprocess``), positions learned and
rotary (``add_pos_embed``, ``rope_2d``), and patches merged to tokens (``merge``: the mean over the
frames of a clip, then 2 x 2).

Source: Kimi team, "Kimi-VL Technical Report", arXiv 2504.07491, with the behaviour of the Kimi_K25
classes of transformers. Kimi-VL pads images in the same way under a limit of 4096 patches, but
refuses a side of 512 patches or more where K2.5 shrinks it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from patchpack import _check
from patchpack.systems import _plan

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
