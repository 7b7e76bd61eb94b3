"""Qwen2-VL: every image at its own resolution, one position scheme for text, images and video.

In the order of the paper: naive dynamic resolution (``smart_resize``, ``plan``), images and videos
understood in one way (``plan_video``, two frames to a patch), patches (``preprocess``), and
multimodal rotary position embedding (``mrope_position_ids``, applied by ``patchpack.mrope``).

Source: Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any
Resolution", arXiv 2409.12191, with the behaviour of the released code: the Qwen2-VL classes of
transformers, and qwen-vl-utils. The original pipeline resizes twice, once in each of the two, and
their limits differ; here one plan decides. Not here are sizes given outright (``resized_height``,
``resized_width``), parts of a video (``video_start``, ``video_end``), and the positions of
transformers 5, where text after a video may overlap it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchpack import _check, metadata
from patchpack.packing import PackedGrid
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

VISION_START = 151652
VISION_END = 151653
IMAGE_PAD = 151655
VIDEO_PAD = 151656

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT = 200
# fewest and most language-model tokens of an image
IMAGE_TOKENS = {
    "transformers": (4, 1280),
    "transformers_4_45": (4, 1280),
    "qwen_vl_utils": (4, 16384),
}
# fewest and most language-model tokens that a frame would take if it were an image
FRAME_TOKENS = (128, 768)
# most language-model tokens of a video; not kept where the fewest per frame add up to more
VIDEO_TOKENS = {"qwen_vl_utils_0_0_8": 24_576, "qwen_vl_utils_0_0_14": 115_200}
SAMPLED_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768


# Naive dynamic resolution ------------------------------------------------------------------------


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    variant: str = "transformers",
) -> tuple[int, int]:
    """The size an image is resized to: near its own, whole in tokens, within a budget of pixels.

    Each side becomes the nearest multiple of ``factor`` (halves to even). If the product leaves the
    budget, both sides are scaled by one ratio and rounded, down where there are too many pixels, up
    where there are too few. The area can stay above ``max_pixels`` only where a side is already
    ``factor``, or where rounding up passes a budget narrower than that. Where the limits cross,
    too many pixels are looked for first: what is above ``max_pixels`` shrinks to it, below
    ``min_pixels`` or not, and only what is below both grows.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        factor: Side of one language-model token, in pixels: patch size times merge size.
        min_pixels: Smallest area; by default 4 tokens.
        max_pixels: Largest area; by default 1280 tokens, and 16384 in ``"qwen_vl_utils"``.
        variant: Whose rules for thin images. ``"transformers"`` keeps a side of at least ``factor``
            when it shrinks. ``"transformers_4_45"`` refuses sides below ``factor``, and
            ``"qwen_vl_utils"`` lifts them to ``factor`` before it looks at the budget; neither
            looks again, so a thin image over the budget gets a side of **0**. ``plan`` refuses
            that.

    Returns:
        Height and width after resizing, in pixels, multiples of ``factor``.

    Raises:
        ValueError: A size or limit is not positive or not below 2**63, or one side is over 200
            times the other, or is below ``factor`` in ``"transformers_4_45"``.
        TypeError: A size or limit is not a number.
    """
    _check.one_of("variant", variant, IMAGE_TOKENS)
    height, width, factor = _check.whole(height=height, width=width, factor=factor)
    min_tokens, max_tokens = IMAGE_TOKENS[variant]
    min_pixels, max_pixels = _check.numbers(
        min_pixels=min_tokens * factor**2 if min_pixels is None else min_pixels,
        max_pixels=max_tokens * factor**2 if max_pixels is None else max_pixels,
    )
    if variant == "transformers_4_45" and min(height, width) < factor:
        raise ValueError(
            f"height and width must be at least factor={factor} in variant {variant!r},"
            f" got {height} x {width}"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"height and width must be within a ratio of {MAX_ASPECT}, got {height} x {width}"
        )

    h, w = (round(side / factor) * factor for side in (height, width))
    if variant == "qwen_vl_utils":
        h, w = max(h, factor), max(w, factor)
    if h * w > max_pixels:
        ratio = math.sqrt(height * width / max_pixels)
        h, w = (math.floor(side / ratio / factor) * factor for side in (height, width))
        if variant == "transformers":
            h, w = max(h, factor), max(w, factor)
    elif h * w < min_pixels:
        ratio = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * ratio / factor) * factor for side in (height, width))
    return h, w


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image or video.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        resized: Height and width after resizing, in pixels.
        grid_thw: Frames, rows and columns, in patches.
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch.
        merge_size: Side of the block of patches that becomes one language-model token.
        frame_indices: Which frames of a video are used; ``None`` for an image.
    """

    height: int
    width: int
    resized: tuple[int, int]
    grid_thw: tuple[int, int, int]
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    frame_indices: tuple[int, ...] | None = None

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        return (self.grid_thw,)

    @property
    def llm_tokens(self) -> int:
        return self.vit_tokens // self.merge_size**2

    @property
    def markup_tokens(self) -> int:
        """Text tokens around the vision tokens: ``VISION_START`` and ``VISION_END``."""
        return 2


def plan(
    height: int,
    width: int,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    variant: str = "transformers",
) -> Plan:
    """Plan one image. A 224 x 224 image takes 66 tokens: 64 and two of markup.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        min_pixels: Smallest area after resizing; ``smart_resize`` has the default.
        max_pixels: Largest area after resizing, likewise.
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch.
        merge_size: Side of the block of patches that becomes one language-model token.
        variant: Whose rules for thin images: see ``smart_resize``.

    Returns:
        The plan.

    Raises:
        ValueError: ``smart_resize`` refuses the size, or it returns an empty one.
        TypeError: A size or limit is not a number.
    """
    height, width, patch_size, temporal_patch_size, merge_size = _check.whole(
        height=height,
        width=width,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
    )
    resized = smart_resize(
        height,
        width,
        factor=patch_size * merge_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        variant=variant,
    )
    if 0 in resized:
        raise ValueError(
            f"height and width must leave at least one token a side in variant {variant!r},"
            f" got {height} x {width}, resized to {resized[0]} x {resized[1]}"
        )
    grid_thw = (1, resized[0] // patch_size, resized[1] // patch_size)
    return Plan(height, width, resized, grid_thw, patch_size, temporal_patch_size, merge_size)


# Video -------------------------------------------------------------------------------------------


def smart_nframes(
    total_frames: int,
    video_fps: float | None,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int = MIN_FRAMES,
    max_frames: int | None = None,
    frame_factor: int = 2,
    variant: str = "qwen_vl_utils_0_0_8",
) -> int:
    """How many frames of a video are used: two a second, within limits, whole in patches.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video; may be ``None`` if ``nframes`` is given.
        fps: Frames per second to use; by default 2.
        nframes: Frames to use, instead of ``fps``; rounded to a multiple of ``frame_factor``,
            halves to even. The limits do not apply to it.
        min_frames: Fewest frames, rounded up to a multiple of ``frame_factor``.
        max_frames: Most frames, rounded down likewise; by default 768 or all of the video.
        frame_factor: Frames to a patch.
        variant: ``"qwen_vl_utils_0_0_8"`` rounds the count to the nearest multiple of
            ``frame_factor``, ``"qwen_vl_utils_0_0_14"`` down, after a limit of ``total_frames``.

    Returns:
        The number of frames.

    Raises:
        ValueError: ``fps`` and ``nframes`` are both given, a number is not positive or not below
            2**63, or the count is not between ``frame_factor`` and ``total_frames``.
        TypeError: A number is missing or not a number.
    """
    _check.one_of("variant", variant, VIDEO_TOKENS)
    total_frames, frame_factor = _check.whole(total_frames=total_frames, frame_factor=frame_factor)
    if nframes is not None:
        (nframes,) = _check.whole(nframes=nframes)
        if fps is not None:
            raise ValueError(f"fps must be None where nframes={nframes} is given, got {fps}")
        count = round(nframes / frame_factor) * frame_factor
    else:
        fps = SAMPLED_FPS if fps is None else fps
        max_frames = min(MAX_FRAMES, total_frames) if max_frames is None else max_frames
        if video_fps is None:
            raise ValueError("video_fps or nframes must be given, got neither")
        video_fps, fps = _check.numbers(video_fps=video_fps, fps=fps)
        min_frames, max_frames = _check.whole(min_frames=min_frames, max_frames=max_frames)
        fewest = math.ceil(min_frames / frame_factor) * frame_factor
        most = math.floor(max_frames / frame_factor) * frame_factor
        wanted = min(max(total_frames / video_fps * fps, fewest), most)
        if variant == "qwen_vl_utils_0_0_8":
            count = round(wanted / frame_factor) * frame_factor
        else:
            count = math.floor(min(wanted, total_frames) / frame_factor) * frame_factor
    if not frame_factor <= count <= total_frames:
        raise ValueError(
            f"the number of frames must be from frame_factor={frame_factor} to"
            f" total_frames={total_frames}, got {count}"
        )
    return count


def frame_indices(total_frames: int, nframes: int) -> tuple[int, ...]:
    """``nframes`` frames from the first to the last, evenly spaced, rounded (halves to even)."""
    total_frames, nframes = _check.whole(total_frames=total_frames, nframes=nframes)
    # in float32, as the original does: for long videos the rounding shows
    indices = torch.linspace(0, total_frames - 1, nframes, dtype=torch.float32, device="cpu")
    return tuple(indices.round().long().clamp(max=total_frames - 1).tolist())


def max_frame_pixels(
    nframes: int,
    *,
    min_pixels: float | None = None,
    total_pixels: float | None = None,
    factor: int = 28,
    temporal_patch_size: int = 2,
    variant: str = "qwen_vl_utils_0_0_8",
) -> float:
    """The largest area of a frame that keeps a video within ``total_pixels``.

    It is at most 768 tokens' worth and at least 1.05 times ``min_pixels``, even where that many
    frames then exceed ``total_pixels``: 768 frames of 1280 x 720 take 46080 tokens of a budget of
    24576 by default.

    Args:
        nframes: Frames that are used.
        min_pixels: Smallest area of a frame; by default 128 tokens' worth.
        total_pixels: Area of the video, counted once for the frames of a temporal patch; by default
            24576 tokens' worth, and 115200 in ``"qwen_vl_utils_0_0_14"``. For a budget of 16384
            tokens give ``16384 * factor**2``.
        factor: Side of one language-model token, in pixels.
        temporal_patch_size: Frames to a patch.
        variant: Whose default for ``total_pixels``.

    Returns:
        The area, in pixels; not always whole.

    Raises:
        ValueError: A number is not positive or not below 2**63, or ``variant`` is unknown.
        TypeError: A number is not one.
    """
    _check.one_of("variant", variant, VIDEO_TOKENS)
    nframes, factor, temporal_patch_size = _check.whole(
        nframes=nframes, factor=factor, temporal_patch_size=temporal_patch_size
    )
    min_pixels, total_pixels = _check.numbers(
        min_pixels=FRAME_TOKENS[0] * factor**2 if min_pixels is None else min_pixels,
        total_pixels=VIDEO_TOKENS[variant] * factor**2 if total_pixels is None else total_pixels,
    )
    share = total_pixels / nframes * temporal_patch_size
    return max(min(FRAME_TOKENS[1] * factor**2, share), int(min_pixels * 1.05))


def plan_video(
    total_frames: int,
    video_fps: float | None,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    nframes: int | None = None,
    min_frames: int = MIN_FRAMES,
    max_frames: int | None = None,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    total_pixels: float | None = None,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    variant: str = "qwen_vl_utils_0_0_8",
) -> Plan:
    """Plan one video: which frames, and one size for all of them.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video. ``None``, with neither ``fps`` nor ``nframes``,
            says that the frames were chosen already: all are used. They share the budget of any
            video, where qwen-vl-utils sizes such a list by rules of its own.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        fps: Frames per second to use: see ``smart_nframes``.
        nframes: Frames to use, instead of ``fps``.
        min_frames: Fewest frames.
        max_frames: Most frames.
        min_pixels: Smallest area of a frame; by default 128 tokens' worth.
        max_pixels: Largest area of a frame; by default, and in ``"qwen_vl_utils_0_0_14"`` at most,
            that of ``max_frame_pixels``. Where it is below ``min_pixels``, see ``smart_resize``.
        total_pixels: Area of the video: see ``max_frame_pixels``.
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch.
        merge_size: Side of the block of patches that becomes one language-model token.
        variant: Whose rules: ``"qwen_vl_utils_0_0_8"`` or ``"qwen_vl_utils_0_0_14"``.

    Returns:
        The plan; ``frame_indices`` says which frames ``preprocess`` wants.

    Raises:
        ValueError: ``smart_nframes`` or ``smart_resize`` refuses a number, a side would be 0,
            ``max_pixels`` is below ``min_pixels`` in ``"qwen_vl_utils_0_0_14"``, or
            ``min_frames`` or ``max_frames`` is given for frames that were chosen already.
        TypeError: A number is missing or not a number.
    """
    _check.one_of("variant", variant, VIDEO_TOKENS)
    total_frames, height, width, patch_size, temporal_patch_size, merge_size = _check.whole(
        total_frames=total_frames,
        height=height,
        width=width,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
    )
    if video_fps is None and fps is None and nframes is None:
        if (min_frames, max_frames) != (MIN_FRAMES, None):
            raise ValueError(
                "min_frames and max_frames must be left out where all frames are used,"
                f" got {min_frames} and {max_frames}"
            )
        indices = tuple(range(total_frames))
    else:
        count = smart_nframes(
            total_frames,
            video_fps,
            fps=fps,
            nframes=nframes,
            min_frames=min_frames,
            max_frames=max_frames,
            frame_factor=temporal_patch_size,
            variant=variant,
        )
        indices = frame_indices(total_frames, count)

    factor = patch_size * merge_size
    min_pixels = FRAME_TOKENS[0] * factor**2 if min_pixels is None else min_pixels
    num_frames = math.ceil(len(indices) / temporal_patch_size) * temporal_patch_size
    limit = max_frame_pixels(
        num_frames,
        min_pixels=min_pixels,
        total_pixels=total_pixels,
        factor=factor,
        temporal_patch_size=temporal_patch_size,
        variant=variant,
    )
    max_pixels = limit if max_pixels is None else max_pixels
    min_pixels, max_pixels = _check.numbers(min_pixels=min_pixels, max_pixels=max_pixels)
    if variant == "qwen_vl_utils_0_0_14":
        max_pixels = min(max_pixels, limit)
        if max_pixels < min_pixels:
            raise ValueError(
                f"max_pixels must be at least min_pixels={min_pixels} in variant {variant!r},"
                f" got {max_pixels}"
            )
    frame = plan(
        height,
        width,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        variant="qwen_vl_utils",
    )
    grid_thw = (num_frames // temporal_patch_size, *frame.grid_thw[1:])
    return replace(frame, grid_thw=grid_thw, frame_indices=indices)


# Patches -----------------------------------------------------------------------------------------


def _default_plan(num_frames: int | None, height: int, width: int) -> Plan:
    if num_frames is None:
        return plan(height, width)
    return plan_video(num_frames, None, height, width)


def preprocess(
    images: Iterable[Image | Sequence[Image]],
    plans: Iterable[Plan] | None = None,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, PackedGrid]:
    """Images and videos of different sizes to one packed sequence of normalised patches.

    Each frame becomes 8-bit RGB (transparency on white, also that of RGBA palettes, which
    transformers drops), is resized with Pillow's bicubic filter, scaled to 0..1, normalised, and
    cut into patches. Runs on the host and needs Pillow, of the extra ``demo``.

    Args:
        images: Images and videos. An image is a Pillow image with 8 bits a channel, a NumPy array
            ``[height, width, channels]`` or ``[height, width]``, or a CPU tensor
            ``[channels, height, width]`` or ``[height, width]``, with 1, 3 or 4 channels, uint8, or
            floating in 0..1 and then rounded to 8 bits. A video is a sequence of images, or an
            array or tensor with the frames in front: the frames that its plan names.
        plans: What becomes of each; by default ``plan`` of an image's size, and ``plan_video`` of
            all frames of a video.
        mean: Mean of each channel, in 0..1; by default CLIP's.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, 3 * temporal_patch_size * patch_size**2]`` on the CPU, with the columns
        of ``patchpack.patchify``'s layout ``"ctpp"``, and their grid, in merge-block order with one
        attention segment a frame.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, plans
            differ in their patch, temporal or merge size, or their number is not that of images,
            ``mean`` or ``std`` is not three numbers, or one of ``std`` is not positive.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    sizes = {(p.patch_size, p.temporal_patch_size, p.merge_size) for p in plans} or {(14, 2, 2)}
    if len(sizes) > 1:
        raise ValueError(f"plans must share patch, temporal and merge size, got {sorted(sizes)}")
    ((patch_size, temporal_patch_size, merge_size),) = sizes

    grid = PackedGrid([p.grid_thw for p in plans], merge_size)
    pixels = _images.resized_patches(
        clips,
        grid,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        mean=mean,
        std=std,
        dtype=dtype,
    )
    return pixels, grid


# Multimodal rotary position embedding ------------------------------------------------------------


def vision_tokens(
    plan: Plan,
    *,
    vision_start_token_id: int = VISION_START,
    vision_end_token_id: int = VISION_END,
    image_token_id: int = IMAGE_PAD,
    video_token_id: int = VIDEO_PAD,
) -> list[int]:
    """Token ids of an image or video in the text, its embeddings' places between the markup."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    start, end, image, video = _check.whole(
        0,
        vision_start_token_id=vision_start_token_id,
        vision_end_token_id=vision_end_token_id,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    pad = image if plan.frame_indices is None else video
    return [start, *[pad] * plan.llm_tokens, end]


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
    """Position of every token on the axes time, height and width.

    ``patchpack.metadata.get_mrope_position_ids`` with the token ids of Qwen2-VL; a frame of a
    video counts one in time.

    Args:
        input_ids: Token ids ``[B, L]`` or ``[L]``: see there, as for all of these.
        image_grid_thw: Frames, rows and columns of each image, ``[images, 3]``.
        video_grid_thw: The same of each video, ``[videos, 3]``.
        attention_mask: Zero where padding is.
        cu_seqlens: Where packed samples begin and end, int32 ``[S + 1]``.
        merge_size: Side of the block of patches that is one token.
        vision_start_token_id: The token before an image or video.
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
        merge_size=merge_size,
    )
