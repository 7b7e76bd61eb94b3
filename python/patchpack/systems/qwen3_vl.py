"""Qwen3-VL: patches of 16 pixels, videos as frames between timestamps, interleaved M-RoPE.

Images are Qwen2-VL's with other numbers (``plan``, ``preprocess``). A video has one budget of
pixels for all of its frames (``video_smart_resize``, ``plan_video``), and the language model reads
it as one run of tokens a temporal patch, each after the text of its time (``vision_text``), so that
positions no longer tell time (``mrope_position_ids``). They are applied by ``patchpack.mrope`` with
``MROPE_SECTION``, ``mrope_interleaved=True`` and ``MROPE_BASE``. The vision encoder adds a position
table of ``POSITION_TABLE`` rows and columns, bilinear with ``align_corners=True``, to its patches,
and its tokens after ``DEEPSTACK_LAYERS`` also enter the first layers of the language model.

Source: Bai et al., "Qwen3-VL Technical Report", arXiv 2511.21631, with the behaviour of the
released code: the Qwen3-VL classes of transformers, which sample and resize by themselves, without
qwen-vl-utils.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchpack import _check, metadata
from patchpack.packing import PackedGrid
from patchpack.systems import _images, qwen2_vl
from patchpack.systems.qwen2_vl import (
    IMAGE_PAD,
    MAX_ASPECT,
    MAX_FRAMES,
    MIN_FRAMES,
    SAMPLED_FPS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

if TYPE_CHECKING:
    from patchpack.systems._images import Image

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

# smallest and largest area of an image, and of all frames of a video, in pixels: those of the
# released models; the processor classes of transformers have others
IMAGE_PIXELS = (65_536, 16_777_216)
VIDEO_PIXELS = (4_096, 25_165_824)
# most tokens of a frame where frames are capped one by one
FRAME_TOKENS = 768
# what transformers takes a video for that does not say its own
DEFAULT_FPS = 24.0

POSITION_TABLE = (48, 48)
DEEPSTACK_LAYERS = (8, 16, 24)
MROPE_SECTION = (24, 20, 20)
MROPE_BASE = 5e6


# Images ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan(qwen2_vl.Plan):
    """What becomes of one image or video.

    Attributes:
        timestamps: Seconds into the video of each frame of the grid; none for an image.
    """

    timestamps: tuple[float, ...] = ()

    @property
    def markup_tokens(self) -> int:
        """Text tokens around the vision tokens: of each run, its time, and start and end.

        The tokenizer of Qwen has a token for each digit and sign, and one for `` seconds``. Text
        right before a video may share a token with its first sign.
        """
        if self.frame_indices is None:
            return 2
        stamps = [len(_stamp(seconds).replace(" seconds", " ")) for seconds in self.timestamps]
        return sum(stamps) + 2 * len(stamps)


def plan(
    height: int,
    width: int,
    *,
    min_pixels: float = IMAGE_PIXELS[0],
    max_pixels: float = IMAGE_PIXELS[1],
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    variant: str = "transformers",
) -> Plan:
    """Plan one image. A 256 x 256 image takes 66 tokens: 64 and two of markup.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        min_pixels: Smallest area after resizing.
        max_pixels: Largest area after resizing.
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch.
        merge_size: Side of the block of patches that becomes one language-model token.
        variant: Whose rules for thin images: see ``qwen2_vl.smart_resize``.

    Returns:
        The plan.

    Raises:
        ValueError: ``qwen2_vl.smart_resize`` refuses the size, or it returns an empty one.
        TypeError: A size or limit is not a number.
    """
    image = qwen2_vl.plan(
        height,
        width,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        variant=variant,
    )
    return Plan(**vars(image))


# Video -------------------------------------------------------------------------------------------


def video_smart_resize(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int = 32,
    temporal_factor: int = 2,
    min_pixels: float = 128 * 128,
    max_pixels: float = 12_582_912,
    variant: str = "transformers_4_57",
) -> tuple[int, int]:
    """The size of a video's frames: near their own, whole in tokens, within a budget for all.

    Each side becomes the nearest multiple of ``factor`` (halves to even). If frames, rounded to
    ``temporal_factor`` likewise, times height times width leave the budget, both sides are scaled
    by one ratio and rounded, down where there are too many pixels, to ``factor`` at least, and up
    where there are too few.

    Args:
        num_frames: Frames that are used.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        factor: Side of one language-model token, in pixels: patch size times merge size.
        temporal_factor: Frames to a patch.
        min_pixels: Smallest area of all frames together.
        max_pixels: Largest.
        variant: Whose rules for frames with a side below ``factor``. ``"transformers_4_57"``
            refuses them; ``"transformers"``, of version 5, first enlarges them until they have
            none.

    Returns:
        Height and width after resizing, in pixels, multiples of ``factor``.

    Raises:
        ValueError: A size or limit is not positive or not below 2**63, there are fewer frames than
            ``temporal_factor``, one side is over 200 times the other, or a side is below ``factor``
            in ``"transformers_4_57"``.
        TypeError: A size or limit is not a number.
    """
    _check.one_of("variant", variant, ("transformers_4_57", "transformers"))
    num_frames, height, width, factor, temporal_factor = _check.whole(
        num_frames=num_frames,
        height=height,
        width=width,
        factor=factor,
        temporal_factor=temporal_factor,
    )
    min_pixels, max_pixels = _check.numbers(min_pixels=min_pixels, max_pixels=max_pixels)
    if num_frames < temporal_factor:
        raise ValueError(
            f"num_frames must be at least temporal_factor={temporal_factor}, got {num_frames}"
        )
    if min(height, width) < factor:
        if variant == "transformers_4_57":
            raise ValueError(
                f"height and width must be at least factor={factor} in variant {variant!r},"
                f" got {height} x {width}"
            )
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"height and width must be within a ratio of {MAX_ASPECT}, got {height} x {width}"
        )

    h, w = (round(side / factor) * factor for side in (height, width))
    pixels = round(num_frames / temporal_factor) * temporal_factor * h * w
    if pixels > max_pixels:
        ratio = math.sqrt(num_frames * height * width / max_pixels)
        h, w = (max(factor, math.floor(n / ratio / factor) * factor) for n in (height, width))
    elif pixels < min_pixels:
        ratio = math.sqrt(min_pixels / (num_frames * height * width))
        h, w = (math.ceil(side * ratio / factor) * factor for side in (height, width))
    return h, w


def sample_frames(
    total_frames: int,
    video_fps: float | None,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int = MIN_FRAMES,
    max_frames: int = MAX_FRAMES,
) -> tuple[int, ...]:
    """Which frames of a video are used: two a second, within limits, evenly spaced.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video. ``None``, with neither ``fps`` nor ``nframes``,
            says that the frames were chosen already: all are used.
        fps: Frames per second to use; by default 2. The count is rounded down, and may be odd.
        nframes: Frames to use, instead of ``fps``. The limits do not apply to it.
        min_frames: Fewest frames, if the video has as many.
        max_frames: Most frames.

    Returns:
        Indices from the first frame to the last, rounded (halves to even).

    Raises:
        ValueError: ``fps`` and ``nframes`` are both given, ``nframes`` is above ``total_frames``,
            or a number is not positive or not below 2**63.
        TypeError: A number is missing or not a number.
    """
    (total_frames,) = _check.whole(total_frames=total_frames)
    if video_fps is None and fps is None and nframes is None:
        return tuple(range(total_frames))
    if nframes is not None:
        (nframes,) = _check.whole(nframes=nframes)
        if fps is not None:
            raise ValueError(f"fps must be None where nframes={nframes} is given, got {fps}")
        if nframes > total_frames:
            raise ValueError(f"nframes must be at most total_frames={total_frames}, got {nframes}")
    else:
        if video_fps is None:
            raise ValueError("video_fps or nframes must be given, got neither")
        fps = SAMPLED_FPS if fps is None else fps
        video_fps, fps = _check.numbers(video_fps=video_fps, fps=fps)
        min_frames, max_frames = _check.whole(min_frames=min_frames, max_frames=max_frames)
        nframes = min(max(int(total_frames / video_fps * fps), min_frames), max_frames)
        nframes = min(nframes, total_frames)
    return tuple(np.linspace(0, total_frames - 1, nframes).round().astype(int).tolist())


def plan_video(
    total_frames: int,
    video_fps: float | None,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int = MIN_FRAMES,
    max_frames: int = MAX_FRAMES,
    min_pixels: float = VIDEO_PIXELS[0],
    max_pixels: float = VIDEO_PIXELS[1],
    cap_pixels_per_frame: bool = False,
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    variant: str = "transformers_4_57",
) -> Plan:
    """Plan one video: which frames, one size for all of them, and their times.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video; times count 24 where it is ``None``, as
            transformers does. For frames chosen already, give the rate at which they were, and
            their number as ``nframes``.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        fps: Frames per second to use: see ``sample_frames``.
        nframes: Frames to use, instead of ``fps``.
        min_frames: Fewest frames.
        max_frames: Most frames.
        min_pixels: Smallest area of all frames together.
        max_pixels: Largest.
        cap_pixels_per_frame: Whether a frame is also kept within 768 tokens' worth and an even
            share of ``max_pixels``, or 1.05 times ``min_pixels`` where that is more. Without it a
            few frames take the whole budget. transformers 5 has it as an option.
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch; the last frame is repeated where one is missing.
        merge_size: Side of the block of patches that becomes one language-model token.
        variant: Whose rules for small frames: see ``video_smart_resize``.

    Returns:
        The plan; ``frame_indices`` says which frames ``preprocess`` wants, ``timestamps`` the mean
        time of the first and last frame of each temporal patch.

    Raises:
        ValueError: ``sample_frames`` or ``video_smart_resize`` refuses a number.
        TypeError: A number is missing or not a number.
    """
    height, width, patch_size, temporal_patch_size, merge_size = _check.whole(
        height=height,
        width=width,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
    )
    _check.flags(cap_pixels_per_frame=cap_pixels_per_frame)
    min_pixels, max_pixels = _check.numbers(min_pixels=min_pixels, max_pixels=max_pixels)
    (rate,) = _check.numbers(video_fps=DEFAULT_FPS if video_fps is None else video_fps)
    indices = sample_frames(
        total_frames,
        video_fps,
        fps=fps,
        nframes=nframes,
        min_frames=min_frames,
        max_frames=max_frames,
    )
    factor = patch_size * merge_size
    if cap_pixels_per_frame:
        share = min(FRAME_TOKENS * factor**2, max_pixels // len(indices))
        max_pixels = max(share, int(min_pixels * 1.05)) * len(indices)
    resized = video_smart_resize(
        len(indices),
        height,
        width,
        factor=factor,
        temporal_factor=temporal_patch_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        variant=variant,
    )
    missing = -len(indices) % temporal_patch_size
    times = [index / rate for index in (*indices, *[indices[-1]] * missing)]
    patches = zip(
        times[::temporal_patch_size],
        times[temporal_patch_size - 1 :: temporal_patch_size],
        strict=True,
    )
    timestamps = tuple((first + last) / 2 for first, last in patches)
    grid_thw = (len(timestamps), resized[0] // patch_size, resized[1] // patch_size)
    return Plan(
        height,
        width,
        resized,
        grid_thw,
        patch_size,
        temporal_patch_size,
        merge_size,
        indices,
        timestamps,
    )


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

    Args:
        images: Images and videos, as ``qwen2_vl.preprocess`` takes them.
        plans: What becomes of each; by default ``plan`` of an image's size, and ``plan_video`` of
            all frames of a video.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, 3 * temporal_patch_size * patch_size**2]`` on the CPU, and their grid, in
        merge-block order with one attention segment a temporal patch.

    Raises:
        ValueError: What ``qwen2_vl.preprocess`` refuses.
        TypeError: Likewise.
    """
    if plans is None:
        clips, plans = _images.clips_of(images, None, Plan, _default_plan)
        images = [clip.movedim(-1, -3) for clip in clips]
    pixels, grid = qwen2_vl.preprocess(images, plans, mean=mean, std=std, dtype=dtype)
    if grid.num_grids == 0:  # no plan says how large a patch is
        pixels = pixels.new_empty(0, 3 * 2 * 16**2)
    return pixels, grid


# Text and positions ------------------------------------------------------------------------------


def _stamp(seconds: float) -> str:
    return f"<{seconds:.1f} seconds>"


def vision_text(plan: Plan) -> str:
    """An image or video as the prompt has it, one pad a token; it replaces all of its markup.

    That is the text of transformers 4.57; version 5 leaves the ``<|vision_start|>`` and
    ``<|vision_end|>`` of the chat template around that of a video.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    if plan.frame_indices is None:
        return f"<|vision_start|>{'<|image_pad|>' * plan.llm_tokens}<|vision_end|>"
    pads = "<|video_pad|>" * (plan.llm_tokens // len(plan.timestamps))
    run = f"<|vision_start|>{pads}<|vision_end|>"
    return "".join(_stamp(seconds) + run for seconds in plan.timestamps)


def vision_tokens(plan: Plan, tokenize: Callable[[str], Iterable[int]]) -> list[int]:
    """Token ids of an image or video in the text, ``vision_text`` as a tokenizer has it.

    Args:
        plan: Its plan.
        tokenize: Token ids of the text of a time, such as ``"<0.3 seconds>"``.

    Raises:
        TypeError: ``plan`` is of another kind, or ``tokenize`` no function.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    if not callable(tokenize):
        raise TypeError(f"tokenize must be a function, got {tokenize!r}")
    if plan.frame_indices is None:
        return qwen2_vl.vision_tokens(plan)
    run = [VISION_START, *[VIDEO_PAD] * (plan.llm_tokens // len(plan.timestamps)), VISION_END]
    return [token for s in plan.timestamps for token in (*tokenize(_stamp(s)), *run)]


def mrope_position_ids(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    merge_size: int = 2,
    vision_start_token_id: int = VISION_START,
    image_token_id: int = IMAGE_PAD,
    video_token_id: int = VIDEO_PAD,
) -> tuple[Tensor, Tensor]:
    """Position of every token on the axes time, height and width; each frame has one time.

    ``patchpack.metadata.get_mrope_position_ids`` with the token ids of Qwen3-VL, and each temporal
    patch of a video a run of its own.

    Args:
        input_ids: Token ids ``[B, L]`` or ``[L]``: see there, as for all of these.
        image_grid_thw: Frames, rows and columns of each image, ``[images, 3]``.
        video_grid_thw: The same of each video, whole, ``[videos, 3]``.
        attention_mask: Zero where padding is.
        cu_seqlens: Where packed samples begin and end, int32 ``[S + 1]``.
        merge_size: Side of the block of patches that is one token.
        vision_start_token_id: The token before an image or frame.
        image_token_id: The token of an image.
        video_token_id: The token of a video.

    Returns:
        Position ids, int64 ``[3, B, L]`` or ``[3, L]``, and for each sample what a decoder adds to
        its count of tokens, int64 ``[B, 1]`` or ``[S, 1]``. Not differentiable.

    Raises:
        ValueError: A shape, a device, ``merge_size`` or a token id does not fit.
        TypeError: A dtype does not fit, or a number is not an integer.
    """
    return metadata.get_mrope_position_ids(
        input_ids,
        image_grid_thw,
        video_grid_thw,
        attention_mask,
        vision_start_token_id=vision_start_token_id,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        cu_seqlens=cu_seqlens,
        split_frames=True,
        merge_size=merge_size,
    )


def validate_vision_tokens(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    merge_size: int = 2,
    vision_start_token_id: int = VISION_START,
    image_token_id: int = IMAGE_PAD,
    video_token_id: int = VIDEO_PAD,
) -> None:
    """Check the values that ``mrope_position_ids`` does not read. Waits for the device.

    Args:
        input_ids: As ``mrope_position_ids`` takes it.
        image_grid_thw: Likewise.
        video_grid_thw: Likewise.
        attention_mask: Likewise.
        cu_seqlens: Likewise.
        merge_size: Likewise.
        vision_start_token_id: Likewise.
        image_token_id: Likewise.
        video_token_id: Likewise.

    Raises:
        ValueError: What ``patchpack.metadata.validate_vision_tokens`` finds.
        TypeError: A dtype does not fit, or a number is not an integer.
    """
    metadata.validate_vision_tokens(
        input_ids,
        image_grid_thw,
        video_grid_thw,
        attention_mask,
        vision_start_token_id=vision_start_token_id,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        cu_seqlens=cu_seqlens,
        split_frames=True,
        merge_size=merge_size,
    )
