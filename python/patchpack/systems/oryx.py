"""Oryx: native resolution twice for an image, and one compressor of every length of video.

In the order of the paper: arbitrary resolution (``plan``: a high view near the image's own size and
a low one made of it, floored to a stride), sampled frames (``plan_video``), patches
(``preprocess``), and on-demand compression by 1, 4 or 16 (``DynamicCompressor``), projected
(``SimpleMlp``) and laid out as one sequence (``layout``).

Source: Liu et al., "Oryx MLLM: On-Demand Spatial-Temporal Understanding at Arbitrary Resolution",
arXiv 2409.12961, with the behaviour of the released code, Oryx-mllm/Oryx, under the settings of its
released scripts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from patchpack import _check
from patchpack.systems import _plan

PATCH_SIZE = 16
# sides are whole multiples of it, in pixels
STRIDE = {"image": 32, "video": 64, "video_long": 128}
# side of the region of patches that becomes one token
REGION = {"image": 1, "video": 2, "video_long": 4}
# a side below SMALL becomes ENLARGED before anything else, in pixels
SMALL, ENLARGED = 32, 64
# square roots of areas, in pixels: largest and smallest of the high view, the low view's
IMAGE_SIDES = (1536, 0)
VIDEO_SIDES = (480, 288)
LOW_SIDE = 384
# most frames; of a long video the original draws 3 to 4 times 64, for each sample of training
MAX_FRAMES = {"video": 64, "video_long": 256}
# most tokens of a sequence, text included
MAX_TOKENS = 16_384


# Arbitrary resolution ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image or video.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        modality: ``"image"``, ``"video"`` or ``"video_long"``.
        enlarged: Height and width that a tiny image is resized to first, in pixels; else its own.
        high: Height and width of the high view or of a frame, in pixels.
        low: Height and width of the low view, in pixels, which is made of the resized high one;
            ``None`` for a video.
        frame_indices: Which frames of a video are used; ``None`` for an image.
    """

    height: int
    width: int
    modality: str
    enlarged: tuple[int, int]
    high: tuple[int, int]
    low: tuple[int, int] | None = None
    frame_indices: tuple[int, ...] | None = None

    @property
    def region(self) -> int:
        """Side of the region of patches that becomes one token."""
        return REGION[self.modality]

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """What the vision transformer sees: the low and the high view, or the frames."""
        views = (self.high,) if self.low is None else (self.low, self.high)
        return tuple((self.num_frames, h // PATCH_SIZE, w // PATCH_SIZE) for h, w in views)

    @property
    def maps(self) -> tuple[tuple[int, int, int], ...]:
        """The grids after compression: frames, rows and columns, in tokens."""
        return tuple((t, h // self.region, w // self.region) for t, h, w in self.grids)

    @property
    def llm_tokens(self) -> int:
        """Tokens of the language model: a newline a row, one separator after each map but the
        high view of an image, one to begin and one to end."""
        separators = 1 if self.low is not None else self.num_frames
        return 2 + separators + sum(t * h * (w + 1) for t, h, w in self.maps)

    @property
    def markup_tokens(self) -> int:
        """None: newlines, separators, begin and end are learned vectors, not text."""
        return 0

    @property
    def kept_tokens(self) -> int:
        """``llm_tokens`` that a sequence of ``MAX_TOKENS`` can hold.

        The original cuts every sequence there, once text and vision are one, whatever it cuts:
        the end of a long video and all text after it.
        """
        return min(self.llm_tokens, MAX_TOKENS)


def plan(
    height: int, width: int, *, maxres: int = 1536, minres: int = 0, lowres: int = LOW_SIDE
) -> Plan:
    """Plan one image: a high and a low view. A 640 x 480 image takes 1773 tokens.

    A tiny image is enlarged first. The high view keeps the size if its area is within limits, and
    else is scaled to the nearest limit; the low view is that, scaled to ``lowres**2``, smaller or
    larger. Both are floored to a stride of 32 pixels, so the aspect changes a little.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        maxres: Square root of the largest area of the high view, in pixels.
        minres: Square root of the smallest one, in pixels; 0 for no limit.
        lowres: Square root of the area of the low view, in pixels.

    Returns:
        The plan.

    Raises:
        ValueError: A number is out of range, or a side of a view would be floored to 0, on which
            the original fails as well.
        TypeError: A size or limit is not an integer.
    """
    height, width, maxres, lowres = _check.whole(
        height=height, width=width, maxres=maxres, lowres=lowres
    )
    (minres,) = _check.whole(0, minres=minres)
    enlarged = _enlarged(height, width)
    stride = STRIDE["image"]
    high = _floored(enlarged, _scale(enlarged, maxres, minres), stride)
    low = (0, 0) if 0 in high else _floored(high, math.sqrt(lowres**2 / math.prod(high)), stride)
    if 0 in low:
        raise ValueError(
            f"height and width must leave {stride} pixels a side of both views, got {height} x"
            f" {width}, resized to {high[0]} x {high[1]} and {low[0]} x {low[1]}"
        )
    return Plan(height, width, "image", enlarged, high, low)


def _enlarged(height: int, width: int) -> tuple[int, int]:
    if min(height, width) >= SMALL:
        return height, width
    ratio = ENLARGED / min(height, width)
    return int(height * ratio), int(width * ratio)


def _scale(size: tuple[int, int], maxres: int, minres: int) -> float:
    area = math.prod(size)
    if area > maxres**2:
        return math.sqrt(maxres**2 / area)
    if area < minres**2:
        return math.sqrt(minres**2 / area)
    return 1.0


def _floored(size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    height, width = (int(side * scale / stride) * stride for side in size)
    return height, width


# Video -------------------------------------------------------------------------------------------


def frame_indices(total_frames: int, frames_upbound: int) -> tuple[int, ...]:
    """All frames, or ``frames_upbound`` from the first to the last, evenly spaced, truncated."""
    total_frames, frames_upbound = _check.whole(
        total_frames=total_frames, frames_upbound=frames_upbound
    )
    if total_frames <= frames_upbound:
        return tuple(range(total_frames))
    return tuple(np.linspace(0, total_frames - 1, frames_upbound, dtype=int).tolist())


def plan_video(
    total_frames: int,
    video_fps: float | None,
    height: int,
    width: int,
    *,
    modality: str = "video",
    frames_upbound: int | None = None,
    maxres: int = 480,
    minres: int = 288,
) -> Plan:
    """Plan one video: which frames, and one size for all of them; there is no low view.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video, or ``None``: it changes nothing. The paper's one
            frame a second is how its videos were stored.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        modality: ``"video"``: stride 64, compression by 4; ``"video_long"``: stride 128, by 16.
        frames_upbound: Most frames; by default 64, and 256 of a long video. In training the
            original draws the latter anew for each sample, from 192 to 256.
        maxres: Square root of the largest area of a frame, in pixels.
        minres: Square root of the smallest one, in pixels; 0 for no limit.

    Returns:
        The plan; ``frame_indices`` says which frames ``preprocess`` wants.

    Raises:
        ValueError: A number is out of range, or a side of a frame would be floored to 0: a long
            video of 100 x 1000 pixels. The original fails on it as well.
        TypeError: A number is none, or no integer where it counts something.
    """
    _check.one_of("modality", modality, MAX_FRAMES)
    total_frames, height, width, maxres = _check.whole(
        total_frames=total_frames, height=height, width=width, maxres=maxres
    )
    (minres,) = _check.whole(0, minres=minres)
    if video_fps is not None:
        _check.numbers(video_fps=video_fps)
    bound = MAX_FRAMES[modality] if frames_upbound is None else frames_upbound
    indices = frame_indices(total_frames, bound)
    stride = STRIDE[modality]
    size = (height, width)
    high = _floored(size, _scale(size, maxres, minres), stride)
    if 0 in high:
        raise ValueError(
            f"height and width must leave {stride} pixels a side in modality {modality!r},"
            f" got {height} x {width}, resized to {high[0]} x {high[1]}"
        )
    return Plan(height, width, modality, size, high, frame_indices=indices)
