"""Qwen2.5-VL: Qwen2-VL with windows in its vision encoder and seconds on its time axis.

What did not change comes from ``qwen2_vl``: ``plan``, ``preprocess`` and ``vision_tokens``. New are
window attention in all but four blocks (``windows``), and positions of a video's frames that follow
the seconds between them (``plan_video``, ``mrope_position_ids``).

Source: Bai et al., "Qwen2.5-VL Technical Report", arXiv 2502.13923, with the behaviour of the
released code: the Qwen2.5-VL classes of transformers 4.49, and qwen-vl-utils.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchpack import _check, metadata
from patchpack.packing import PackedGrid
from patchpack.systems import qwen2_vl
from patchpack.systems.qwen2_vl import (
    IMAGE_PAD,
    SAMPLED_FPS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    plan,
    preprocess,
    validate_vision_tokens,
    vision_tokens,
)

__all__ = [
    "FULL_ATTENTION_BLOCKS",
    "IMAGE_PAD",
    "TOKENS_PER_SECOND",
    "VIDEO_PAD",
    "VISION_END",
    "VISION_START",
    "WINDOW_SIZE",
    "Plan",
    "mrope_position_ids",
    "plan",
    "plan_video",
    "preprocess",
    "validate_vision_tokens",
    "vision_tokens",
    "windows",
]

WINDOW_SIZE = 112
# blocks of the vision encoder in which a frame attends to all of itself
FULL_ATTENTION_BLOCKS = (7, 15, 23, 31)
# of Qwen's code for finetuning; the configuration class of transformers has 4 by default
TOKENS_PER_SECOND = 2


# Windows -----------------------------------------------------------------------------------------


def windows(
    grid: PackedGrid, *, window_size: int = WINDOW_SIZE, patch_size: int = 14
) -> tuple[Tensor, Tensor]:
    """The order of tokens in which windows are contiguous, and where they begin and end.

    Args:
        grid: Which images or clips are packed, in merge-block order.
        window_size: Side of a window, in pixels. Windows at the right and bottom of an image are
            what remains; none crosses frames.
        patch_size: Side of a patch, in pixels.

    Returns:
        ``window_index`` and ``cu_window_seqlens``, on the device of ``grid``, without a wait for
        it: see ``patchpack.metadata.get_vision_window_index``. The blocks outside
        ``FULL_ATTENTION_BLOCKS`` attend within the latter, the others within ``grid.cu_seqlens``:
        frames stay together in both orders.

    Raises:
        ValueError: A window is smaller than a block of ``grid``, or a size is not positive.
        TypeError: ``grid`` is no ``PackedGrid``, or a size is not an integer.
    """
    if not isinstance(grid, PackedGrid):
        raise TypeError(f"grid must be a PackedGrid, got {type(grid).__name__}")
    m = grid.spatial_merge_size
    window_size, patch_size = _check.whole(window_size=window_size, patch_size=patch_size)
    side = max(window_size // m // patch_size, 1)
    num_windows = sum(
        t * -(-h // m // side) * -(-w // m // side) for t, h, w in grid.grid_thw.tolist()
    )
    return metadata.get_vision_window_index(
        grid.grid_thw.to(grid.device, non_blocking=True),
        m,
        window_size,
        patch_size,
        num_tokens=grid.num_tokens,
        num_windows=num_windows,
    )


# Seconds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan(qwen2_vl.Plan):
    """What becomes of one video; an image's plan is that of ``qwen2_vl``.

    Attributes:
        second_per_grid: Seconds from one frame of the grid to the next, which is a temporal patch.
    """

    second_per_grid: float = 1.0


def plan_video(
    total_frames: int, video_fps: float | None, height: int, width: int, **options: Any
) -> Plan:
    """Plan one video as ``qwen2_vl.plan_video``, with the seconds between its frames.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video. If it is ``None``, the frames that are used are
            taken to be two a second, as qwen-vl-utils does with frames that were chosen already.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        options: What else ``qwen2_vl.plan_video`` takes.

    Returns:
        The plan. Its ``second_per_grid`` is that of the frames which are used: twice as many of the
        same video make it half as long.

    Raises:
        ValueError: ``qwen2_vl.plan_video`` refuses a number, or ``video_fps`` is not positive.
        TypeError: A number is missing or not a number.
    """
    plan = qwen2_vl.plan_video(total_frames, video_fps, height, width, **options)
    sampled_fps = SAMPLED_FPS
    if video_fps is not None:
        (video_fps,) = _check.numbers(video_fps=video_fps)
        sampled_fps = plan.num_frames / int(total_frames) * video_fps
    return Plan(**vars(plan), second_per_grid=plan.temporal_patch_size / sampled_fps)


def mrope_position_ids(
    input_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    second_per_grid_ts: Tensor | None = None,
    tokens_per_second: float = TOKENS_PER_SECOND,
    cu_seqlens: Tensor | None = None,
    merge_size: int = 2,
    vision_start_token_id: int = VISION_START,
    image_token_id: int = IMAGE_PAD,
    video_token_id: int = VIDEO_PAD,
) -> tuple[Tensor, Tensor]:
    """Position of every token on the axes time, height and width, time in seconds.

    ``patchpack.metadata.get_mrope_position_ids`` with the token ids of Qwen2.5-VL.

    Args:
        input_ids: Token ids ``[B, L]`` or ``[L]``: see there, as for all of these.
        image_grid_thw: Frames, rows and columns of each image, ``[images, 3]``.
        video_grid_thw: The same of each video, ``[videos, 3]``.
        attention_mask: Zero where padding is.
        second_per_grid_ts: ``second_per_grid`` of each video's plan, float32 ``[videos]``; by
            default one.
        tokens_per_second: Positions that a second takes.
        cu_seqlens: Where packed samples begin and end, int32 ``[S + 1]``.
        merge_size: Side of the block of patches that is one token.
        vision_start_token_id: The token before an image or video.
        image_token_id: The token of an image.
        video_token_id: The token of a video.

    Returns:
        Position ids, int64 ``[3, B, L]`` or ``[3, L]``, and for each sample what a decoder adds to
        its count of tokens, int64 ``[B, 1]`` or ``[S, 1]``. Not differentiable.

    Raises:
        ValueError: A shape, a device or a number does not fit.
        TypeError: A dtype does not fit, or a number is none.
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
        second_per_grid_ts=second_per_grid_ts,
        tokens_per_second=tokens_per_second,
        merge_size=merge_size,
    )
