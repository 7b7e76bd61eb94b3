"""Oryx: native resolution twice for an image, and one compressor of every length of video.

In the order of the paper: arbitrary resolution (``plan``: a high view near the image's own size and
a low one made of it, floored to a stride), sampled frames (``plan_video``), patches and their
positions (``preprocess``, ``add_position``), on-demand compression by 1, 4 or 16
(``DynamicCompressor``), and projection into one sequence (``SimpleMlp``, in the order of
``layout``). The transformer's own last norm is skipped, as in the original.

Source: Liu et al., "Oryx MLLM: On-Demand Spatial-Temporal Understanding at Arbitrary Resolution",
arXiv 2409.12961, with the behaviour of the released code, Oryx-mllm/Oryx, under the settings of its
released scripts. Not here are images padded to the stride in grey (``PAD2STRIDE``, off in them), a
random bound on the frames of a long video, and scores of the compressor that are no numbers: the
original takes 0 for them, here they spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from patchpack import (
    _check,
    add_pos_embed,
    assemble,
    interpolate_tokens,
    region_attention,
)
from patchpack.layout import FeatureMap, TokenLayout, Vector
from patchpack.packing import PackedGrid
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

MEAN = STD = (0.5, 0.5, 0.5)
PATCH_SIZE = 16
# sides are whole multiples of it, in pixels
STRIDE = {"image": 32, "video": 64, "video_long": 128}
# side of the region of patches that becomes one token
REGION = {"image": 1, "video": 2, "video_long": 4}
# a side below SMALL becomes ENLARGED before anything else, in pixels
SMALL, ENLARGED = 32, 64
# most frames; of a long video the original draws 3 to 4 times 64, for each sample of training
MAX_FRAMES = {"video": 64, "video_long": 256}
# most tokens of a sequence, text included
MAX_TOKENS = 16_384
# side of the learned table of positions, in patches
TABLE_SIDE = 128
# channels in which a query and a key are compared
SCORE_CHANNELS = 256
# where the learned vectors are among those that layout() names
NEWLINE, BEGIN, END, SEPARATOR = range(4)


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
        """Tokens of the language model.

        A newline a row, a separator between two views or after each frame, and one to begin and one
        to end.
        """
        return 2 + self.num_frames + sum(t * h * (w + 1) for t, h, w in self.maps)

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
    height: int, width: int, *, maxres: int = 1536, minres: int = 0, lowres: int = 384
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
        video_fps: Frames per second of the video, or ``None``: it changes nothing, the original
            takes the frames of a file as they come.
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


# Patches -----------------------------------------------------------------------------------------


def _default_plan(num_frames: int | None, height: int, width: int) -> Plan:
    if num_frames is None:
        return plan(height, width)
    return plan_video(num_frames, None, height, width, frames_upbound=num_frames)


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
    scaled to 0..1, normalised, and cut into patches; all views of all images are one sequence,
    where the original packs the low views alone and encodes the high ones one by one. Runs on the
    host and needs Pillow, of the extra ``demo``.

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
        The patches, ``[T, 3 * 16**2]`` on the CPU, whose columns run over channel, row and column,
        and their grid, in raster order with one attention segment a view or frame: of an image the
        low view, then the high one.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, their
            number is not that of images, or ``mean`` or ``std`` does not fit.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    grid = PackedGrid([g for p in plans for g in p.grids])
    views = []
    for clip, p in zip(clips, plans, strict=True):
        if p.low is not None:
            for size in (p.enlarged, p.high):  # a step at a time, in bytes
                clip = _images.resized(clip, *size).permute(0, 2, 3, 1)
            views.append(_images.resized(clip, *p.low))
        views.append(_images.resized(clip, *p.high))
    pixels = _images.patches(views, grid, patch_size=PATCH_SIZE, mean=mean, std=std, dtype=dtype)
    return pixels, grid


def add_position(x: Tensor, table: Tensor, grid: PackedGrid, *, impl: str | None = None) -> Tensor:
    """Add the learned position of every patch, from one table resized to every view or frame.

    Args:
        x: Embedded patches, ``[T, C]``.
        table: Learned embeddings of 128 x 128 patches, ``[128, 128, C]``, or ``[1, 16384, C]`` as
            the original stores it; resized bilinearly, without antialiasing.
        grid: Which views and frames the patches are, on the device of ``x``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The sum, ``[T, C]``, dtype of ``x``. Differentiable in ``x`` and ``table``.

    Raises:
        ValueError: A shape or a device does not fit.
        TypeError: An argument has the wrong type.
    """
    if not isinstance(table, Tensor):
        raise TypeError(f"table must be a tensor, got {type(table).__name__}")
    if table.ndim != 3 or table.shape[:2].numel() != TABLE_SIDE**2:
        raise ValueError(
            f"table must have shape [{TABLE_SIDE}, {TABLE_SIDE}, C] or [1, {TABLE_SIDE**2}, C],"
            f" got {list(table.shape)}"
        )
    table = table.reshape(TABLE_SIDE, TABLE_SIDE, -1)
    return add_pos_embed(x, table, grid, impl=impl)


# On-demand compression ---------------------------------------------------------------------------


class DynamicCompressor(nn.Module):
    """Makes one token of every region of patches: their mean, plus what it attends to among them.

    The mean is the query, the patches of the region are keys and, as they are, values. A region of
    one patch is therefore twice that patch, exactly, and none of the weights matters. Parameters
    are named as in the original. What the bias of the keys adds to all scores of a region changes
    no softmax: it is there for the checkpoint alone and gets no gradient, where the original's is
    zero.

    Scores are linear in the patches, so the query is projected to their channels, instead of every
    patch to the query's: for 4 or 16 patches a token that is less to compute by as much.

    Args:
        channels: ``C``, channels of a patch.
        impl: How its ops run: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the
            device. An attribute, which may change at any time.

    Raises:
        ValueError: ``channels`` is below 1.
        TypeError: ``channels`` is not an integer.
    """

    def __init__(self, channels: int = 1152, *, impl: str | None = None) -> None:
        (channels,) = _check.whole(channels=channels)
        super().__init__()
        self.impl = impl
        self.vlm_query_projector = nn.Linear(channels, SCORE_CHANNELS)
        self.vlm_key_projector = nn.Linear(channels, SCORE_CHANNELS)

    def forward(self, x: Tensor, grid: PackedGrid, region: int) -> tuple[Tensor, PackedGrid]:
        """Compress the maps of packed images or frames.

        Args:
            x: Patches as the vision transformer leaves them, ``[T, C]``.
            grid: Which maps they are, on the device of ``x``.
            region: Side of the region that becomes one token: 1, 2 or 4 in Oryx.

        Returns:
            Tokens ``[T / region^2, C]`` and their grid. Differentiable in ``x`` and the weights.

        Raises:
            ValueError: ``region`` divides not all rows and columns, or a shape or device does not
                fit.
            TypeError: An argument has the wrong type.
        """
        (region,) = _check.whole(region=region)
        _check.grid_of("x", x, grid)
        if region == 1:
            return 2 * x, grid
        sides = grid.grid_thw[:, 1:]
        for rows, cols in sides[(sides % region).any(dim=1)][:1].tolist():
            raise ValueError(
                f"grid must have rows and columns that divide by region={region},"
                f" got {rows} x {cols}"
            )
        pooled, merged = interpolate_tokens(
            x, grid, sides // region, mode="area", impl=self.impl
        )  # [T / region^2, C]
        query = self.vlm_query_projector(pooled) @ self.vlm_key_projector.weight
        scale = SCORE_CHANNELS**-0.5
        query = query.to(x.dtype)  # which autocast made narrower
        out = region_attention(query, x, grid, region, softmax_scale=scale, impl=self.impl)
        return out, merged


# The sequence ------------------------------------------------------------------------------------


def layout(plans: Iterable[Plan], *, device: torch.device | str | None = None) -> TokenLayout:
    """The order of compressed maps, newlines and separators in the language model's sequence.

    Every row ends with a newline. An image is begin, low view, separator, high view, end; a video
    is begin, then every frame with a separator after it, then end.

    Args:
        plans: What the images and videos became; the sequence has all of them, in this order.
        device: Where the layout lives; by default the CPU.

    Returns:
        The layout for ``patchpack.assemble``. Its tokens are the maps of ``Plan.maps``, one after
        the other, its vectors those of ``SimpleMlp``.

    Raises:
        TypeError: There is something else than plans.
    """
    parts, first = [], 0
    for p in _plan.listed(plans, Plan):
        parts.append(Vector(BEGIN))
        for i, (h, w) in enumerate((h, w) for t, h, w in p.maps for _ in range(t)):
            parts.append(FeatureMap(first, (h, w), newline=NEWLINE))
            first += h * w
            if p.modality != "image" or i == 0:
                parts.append(Vector(SEPARATOR))
        parts.append(Vector(END))
    return TokenLayout(parts, device=device)


class SimpleMlp(nn.Module):
    """Projects tokens to the language model's channels and puts them in sequence.

    The original's ``simple_mlp_twoview``, with its names of parameters, for a batch of any images
    and videos. The original also adds 0 times a projected black image to every video, which is how
    it uses all parameters in every step; that is left out.

    Args:
        in_channels: Channels of a compressed token.
        out_channels: Channels of the language model.
        impl: As in ``DynamicCompressor``.

    Raises:
        ValueError: A size is not positive.
        TypeError: A size is not an integer.
    """

    def __init__(
        self, in_channels: int = 1152, out_channels: int = 3584, *, impl: str | None = None
    ) -> None:
        in_channels, out_channels = _check.whole(in_channels=in_channels, out_channels=out_channels)
        super().__init__()
        self.impl = impl
        self.proj = nn.Sequential(
            nn.Linear(in_channels, out_channels),
            nn.GELU(),
            nn.Linear(out_channels, out_channels),
        )
        std = out_channels**-0.5
        self.image_newline = nn.Parameter(torch.randn(out_channels) * std)
        self.image_begin = nn.Parameter(torch.randn(out_channels) * std)
        self.image_end = nn.Parameter(torch.randn(out_channels) * std)
        self.image_sep = nn.Parameter(torch.randn(out_channels) * std)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Project ``x`` ``[N, in_channels]`` and follow ``layout``: ``[L, out_channels]``.

        Args:
            x: Compressed tokens, those of ``Plan.maps``.
            layout: What ``layout`` gives, on the device of ``x``.

        Returns:
            The sequence. Differentiable in ``x`` and the weights.

        Raises:
            ValueError: A shape or a device does not fit.
            TypeError: An argument has the wrong type.
        """
        x = self.proj(x)
        # in the order of NEWLINE, BEGIN, END, SEPARATOR
        vectors = (self.image_newline, self.image_begin, self.image_end, self.image_sep)
        return assemble(x, torch.stack(vectors).to(x.dtype), layout, impl=self.impl)


class TokenPath(nn.Module):
    """All of Oryx between the vision transformer and the language model.

    Parameters are named as in the original's model.

    Args:
        in_channels: Channels of the vision transformer.
        out_channels: Channels of the language model.
        impl: As in ``DynamicCompressor``, of both its parts.

    Raises:
        ValueError: A size is not positive.
        TypeError: A size is not an integer.
    """

    def __init__(
        self, in_channels: int = 1152, out_channels: int = 3584, *, impl: str | None = None
    ) -> None:
        _check.whole(in_channels=in_channels, out_channels=out_channels)
        super().__init__()
        self.vision_resampler = DynamicCompressor(in_channels, impl=impl)
        self.mm_projector = SimpleMlp(in_channels, out_channels, impl=impl)

    def forward(self, x: Tensor, plans: Sequence[Plan]) -> Tensor:
        """From packed patches to the sequence of the language model.

        Args:
            x: Patches as the vision transformer leaves them, ``[T, in_channels]``, those of
                ``Plan.grids`` one after the other.
            plans: What the images and videos became.

        Returns:
            Tokens, ``[L, out_channels]``: ``Plan.llm_tokens`` of each plan, one after the other.
            Where a sequence would be longer than ``MAX_TOKENS`` nothing is cut.

        Raises:
            ValueError: ``x`` has not the patches of ``plans``.
            TypeError: An argument has the wrong type.
        """
        plans = _plan.listed(plans, Plan)
        sizes = [p.vit_tokens for p in plans]
        _check.shape("x", x, sum(sizes), self.vision_resampler.vlm_query_projector.in_features)
        regions = {p.region for p in plans}
        if len(regions) == 1:
            grid = PackedGrid([g for p in plans for g in p.grids], device=x.device)
            x, _ = self.vision_resampler(x, grid, *regions)
        else:
            pieces = list(x.split(sizes))
            for region in regions:  # a launch for all of a region
                of = [i for i, p in enumerate(plans) if p.region == region]
                grid = PackedGrid([g for i in of for g in plans[i].grids], device=x.device)
                same, _ = self.vision_resampler(torch.cat([pieces[i] for i in of]), grid, region)
                lengths = [sizes[i] // region**2 for i in of]
                for i, piece in zip(of, same.split(lengths), strict=True):
                    pieces[i] = piece
            x = torch.cat([x[:0], *pieces])
        return self.mm_projector(x, layout(plans, device=x.device))
