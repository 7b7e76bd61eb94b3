"""InternVL 1.5: an image as tiles of 448 x 448 pixels in the best of many arrangements.

In the order of the paper: dynamic high resolution (``target_ratios``, ``select_tiles``, ``plan``,
``plan_video``), tiles and thumbnail as patches (``preprocess``), and the pixel-unshuffle and MLP
that make 256 language-model tokens of a tile's 1024 (``Projector``).

Source: Chen et al., "How Far Are We to GPT-4V? Closing the Gap to Commercial Multimodal Models with
Open-Source Suites", arXiv 2404.16821, with the behaviour of the released code, OpenGVLab/InternVL.
Three things of that code are not here. In training it degrades images as JPEG at random and picks
random frames of videos. It runs a blank white tile through the vision transformer for every sample
of text alone, and drops the result. And where images and their places in the text do not match in
number, it uses as many tokens as fit and multiplies the loss by 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

import patchpack
from patchpack import _check
from patchpack.packing import PackedGrid
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_TILES = 12
NUM_SEGMENTS = 32
# order of the merged tokens; "v1", of InternVL 1.2, transposes every tile
PIXEL_SHUFFLE = {"v1": "column", "v2": "row"}


# Dynamic high resolution -------------------------------------------------------------------------


@functools.lru_cache
def _target_ratios(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    ratios = [
        (rows, cols)
        for rows in range(1, max_tiles + 1)
        for cols in range(-(-min_tiles // rows), max_tiles // rows + 1)
    ]
    return tuple(sorted(ratios, key=lambda tiles: tiles[0] * tiles[1]))


def target_ratios(min_tiles: int = 1, max_tiles: int = MAX_TILES) -> tuple[tuple[int, int], ...]:
    """All arrangements of ``min_tiles`` to ``max_tiles`` tiles, few tiles first.

    There are 35 up to 12 tiles, the limit of the released scripts for training, and 158 up to 40.

    Args:
        min_tiles: Fewest tiles.
        max_tiles: Most tiles.

    Returns:
        Rows and columns of each.

    Raises:
        ValueError: A limit is not positive, or ``max_tiles`` is below ``min_tiles``.
        TypeError: A limit is not an integer.
    """
    min_tiles, max_tiles = _check.whole(min_tiles=min_tiles, max_tiles=max_tiles)
    if max_tiles < min_tiles:
        raise ValueError(f"max_tiles must be at least min_tiles={min_tiles}, got {max_tiles}")
    return _target_ratios(min_tiles, max_tiles)


def select_tiles(
    height: int,
    width: int,
    *,
    min_tiles: int = 1,
    max_tiles: int = MAX_TILES,
    image_size: int = 448,
) -> tuple[int, int]:
    """The arrangement of tiles whose aspect ratio is nearest to the image's.

    Of two that are equally near, in float64, the one with more tiles is taken if the image has more
    than half of their pixels. That is the only look at the size: an image of 512 x 384 becomes
    4 x 3 tiles, 14 times its pixels, because no other arrangement has its aspect ratio. Both 1 x 3
    and 1 x 4 are equally near to an image 3.5 times as wide as it is high.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        min_tiles: Fewest tiles.
        max_tiles: Most tiles.
        image_size: Side of a tile, in pixels.

    Returns:
        Rows and columns of tiles.

    Raises:
        ValueError: A size or limit is not positive or not below 2**63, or ``max_tiles`` is below
            ``min_tiles``.
        TypeError: A size or limit is not an integer.
    """
    height, width, image_size = _check.whole(height=height, width=width, image_size=image_size)
    nearest, best = float("inf"), (1, 1)
    for rows, cols in target_ratios(min_tiles, max_tiles):
        distance = abs(width / height - cols / rows)
        large_enough = height * width > 0.5 * image_size**2 * rows * cols
        if distance < nearest or (distance == nearest and large_enough):
            nearest, best = distance, (rows, cols)
    return best


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image or video.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        tiles: Rows and columns of tiles, in an image or in each frame.
        thumbnail: Whether the whole image follows its tiles, as one more.
        image_size: Side of a tile, in pixels.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the block of patches that becomes one language-model token.
        frame_indices: Which frames of a video are used; ``None`` for an image.
    """

    height: int
    width: int
    tiles: tuple[int, int]
    thumbnail: bool = False
    image_size: int = 448
    patch_size: int = 14
    merge_size: int = 2
    frame_indices: tuple[int, ...] | None = None

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width of all tiles together, in pixels; the aspect ratio may change."""
        rows, cols = self.tiles
        return rows * self.image_size, cols * self.image_size

    @property
    def boxes(self) -> tuple[tuple[int, int], ...]:
        """Top and left of each tile in the resized image, in pixels, row by row."""
        height, width = self.resized
        size = self.image_size
        return tuple((y, x) for y in range(0, height, size) for x in range(0, width, size))

    @property
    def num_tiles(self) -> int:
        """Tiles of the image or of all frames, thumbnails included."""
        return self.num_frames * (len(self.boxes) + self.thumbnail)

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        side = self.image_size // self.patch_size
        return ((1, side, side),) * self.num_tiles

    @property
    def llm_tokens(self) -> int:
        return self.vit_tokens // self.merge_size**2

    @property
    def markup_tokens(self) -> int:
        """Text tokens around the image or every frame: ``<img>`` and ``</img>``.

        What the original's prompts write before them, ``Image-1: `` or ``Frame-1: ``, is text.
        """
        return 2 * self.num_frames


def plan(
    height: int,
    width: int,
    *,
    num_images: int = 1,
    min_tiles: int = 1,
    max_tiles: int = MAX_TILES,
    use_thumbnail: bool = True,
    image_size: int = 448,
    patch_size: int = 14,
    merge_size: int = 2,
) -> Plan:
    """Plan one image. One of 800 x 1300 pixels takes 6 tiles, a thumbnail and 1792 tokens.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        num_images: Images of the same sample, which share ``max_tiles``: each gets an equal part,
            rounded down, but at least 1. So it is in training; the released code for inference
            gives every image all of ``max_tiles``.
        min_tiles: Fewest tiles.
        max_tiles: Most tiles: 12 in the released scripts for training; inference may take more.
        use_thumbnail: Let the whole image, resized to one tile, follow more tiles than one.
        image_size: Side of a tile, in pixels.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the block of patches that becomes one language-model token.

    Returns:
        The plan.

    Raises:
        ValueError: A size or limit is not positive or not below 2**63, the image's part of
            ``max_tiles`` is below ``min_tiles``, or a tile does not divide into tokens.
        TypeError: A size or limit is not an integer, or ``use_thumbnail`` not a bool.
    """
    height, width, num_images, max_tiles, image_size, patch_size, merge_size = _check.whole(
        height=height,
        width=width,
        num_images=num_images,
        max_tiles=max_tiles,
        image_size=image_size,
        patch_size=patch_size,
        merge_size=merge_size,
    )
    _check.flags(use_thumbnail=use_thumbnail)
    if image_size % (patch_size * merge_size):
        raise ValueError(
            f"image_size must divide by patch_size * merge_size = {patch_size * merge_size},"
            f" got {image_size}"
        )
    tiles = select_tiles(
        height,
        width,
        min_tiles=min_tiles,
        max_tiles=max(1, max_tiles // num_images),
        image_size=image_size,
    )
    thumbnail = use_thumbnail and tiles != (1, 1)
    return Plan(height, width, tiles, thumbnail, image_size, patch_size, merge_size)


# Video -------------------------------------------------------------------------------------------


def frame_indices(
    total_frames: int,
    video_fps: float | None = None,
    *,
    num_segments: int = NUM_SEGMENTS,
    bound: tuple[float, float] | None = None,
) -> tuple[int, ...]:
    """One frame from within each of ``num_segments`` equal segments of a video.

    A video of fewer frames than segments gives some of them several times.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video, for ``bound``.
        num_segments: Frames to use.
        bound: Where the part of the video to use begins and ends, in seconds; by default all.

    Returns:
        Indices of frames, in order.

    Raises:
        ValueError: A number is not positive or not below 2**63, ``bound`` is not two finite numbers
            or has no part of the video, or ``video_fps`` is missing.
        TypeError: A number is not one.
    """
    total_frames, num_segments = _check.whole(total_frames=total_frames, num_segments=num_segments)
    if video_fps is not None:
        (video_fps,) = _check.numbers(video_fps=video_fps)
    first, last = 0, total_frames - 1
    if bound is not None:
        if video_fps is None:
            raise ValueError("video_fps must be given with bound, got None")
        start, end = _seconds(bound)
        first, last = max(0, round(start * video_fps)), min(round(end * video_fps), last)
        if first > last:
            raise ValueError(
                f"bound must have a part of the video's {total_frames} frames at"
                f" {video_fps} a second, got {bound}"
            )
    segment = (last - first) / num_segments
    return tuple(int(first + segment / 2 + round(segment * i)) for i in range(num_segments))


def _seconds(bound: tuple[float, float]) -> tuple[float, float]:
    try:
        start, end = map(float, bound)
    except (TypeError, ValueError):
        raise TypeError(f"bound must be two numbers of seconds, got {bound!r}") from None
    if not -math.inf < start <= end < math.inf:
        raise ValueError(f"bound must be finite and in order, got {bound}")
    return start, end


def plan_video(
    total_frames: int,
    video_fps: float | None,
    height: int,
    width: int,
    *,
    num_segments: int | None = None,
    bound: tuple[float, float] | None = None,
    max_tiles: int = 1,
    use_thumbnail: bool = True,
    image_size: int = 448,
    patch_size: int = 14,
    merge_size: int = 2,
) -> Plan:
    """Plan one video: which frames, each of them an image of one tile.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video. ``None``, with neither ``num_segments`` nor
            ``bound``, says that the frames were chosen already: all are used.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        num_segments: Frames to use, by default 32: see ``frame_indices``. Training uses a random
            number of 8 to 32, and takes each at random from its segment.
        bound: Where the part of the video to use begins and ends, in seconds; by default all.
        max_tiles: Most tiles of a frame.
        use_thumbnail: As for ``plan``, if a frame has more tiles than one.
        image_size: Side of a tile, in pixels.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the block of patches that becomes one language-model token.

    Returns:
        The plan; ``frame_indices`` says which frames ``preprocess`` wants.

    Raises:
        ValueError: ``frame_indices`` or ``plan`` refuses a number.
        TypeError: A number is missing or not a number.
    """
    frame = plan(
        height,
        width,
        max_tiles=max_tiles,
        use_thumbnail=use_thumbnail,
        image_size=image_size,
        patch_size=patch_size,
        merge_size=merge_size,
    )
    if video_fps is None and num_segments is None and bound is None:
        (total_frames,) = _check.whole(total_frames=total_frames)
        return replace(frame, frame_indices=tuple(range(total_frames)))
    num_segments = NUM_SEGMENTS if num_segments is None else num_segments
    indices = frame_indices(total_frames, video_fps, num_segments=num_segments, bound=bound)
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
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, PackedGrid]:
    """Images and videos of different sizes to one packed sequence of normalised patches.

    Each frame becomes 8-bit RGB (transparency on white), is resized to all its tiles together,
    whatever its aspect ratio, and once more to a thumbnail; then it is scaled to 0..1, normalised
    and cut into patches. Runs on the host and needs Pillow, of the extra ``demo``.

    Args:
        images: Images and videos. An image is a Pillow image with 8 bits a channel, a NumPy array
            ``[height, width, channels]`` or ``[height, width]``, or a CPU tensor
            ``[channels, height, width]`` or ``[height, width]``, with 1, 3 or 4 channels, uint8, or
            floating in 0..1 and then rounded to 8 bits. A video is a sequence of images, or an
            array or tensor with the frames in front: the frames that its plan names.
        plans: What becomes of each; by default ``plan`` of an image's size, alone in its sample,
            and ``plan_video`` of all frames of a video.
        mean: Mean of each channel, in 0..1; by default ImageNet's.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, 3 * patch_size**2]`` on the CPU, columns over channel, row and column,
        and their grid, which has every tile for itself: frame by frame, tiles row by row, then the
        thumbnail; patches of a tile in raster order.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, plans
            differ in their patch size or their number is not that of images, ``mean`` or ``std`` is
            not three numbers, or one of ``std`` is not positive.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    sizes = {p.patch_size for p in plans} or {14}
    if len(sizes) > 1:
        raise ValueError(f"plans must share their patch size, got {sorted(sizes)}")

    tiles = []  # of bytes, [3, image_size, image_size] each: views of the resized frames
    for clip, p in zip(clips, plans, strict=True):
        size = p.image_size
        frames = _images.resized(clip, *p.resized)
        thumbnails = _images.resized(clip, size, size) if p.thumbnail else [None] * len(clip)
        for frame, thumbnail in zip(frames, thumbnails, strict=True):
            tiles += [frame[:, y : y + size, x : x + size] for y, x in p.boxes]
            tiles += [] if thumbnail is None else [thumbnail]
    grid = PackedGrid([size for p in plans for size in p.grids])
    pixels = _images.patches(tiles, grid, patch_size=sizes.pop(), mean=mean, std=std, dtype=dtype)
    return pixels, grid


# Pixel-unshuffle and MLP -------------------------------------------------------------------------


class Projector(nn.Sequential):
    """From tokens of the vision transformer to a quarter as many of the language model.

    Every 2 x 2 block of tokens becomes one (pixel-unshuffle; the original calls it pixel shuffle),
    which is normalised in the same pass, and goes through an MLP. The parameters are those of the
    original's ``mlp1``, whose state dict this module loads.

    Args:
        vit_hidden_size: Channels of the vision transformer.
        llm_hidden_size: Channels of the language model.
        merge_size: Side of the block of tokens that becomes one.
        ps_version: ``"v2"`` keeps tokens in raster order, ``"v1"`` writes them column by column, as
            InternVL 1.2 and before do.

    Raises:
        ValueError: A size is not positive, or ``ps_version`` is unknown.
        TypeError: A size is not an integer.
    """

    def __init__(
        self,
        vit_hidden_size: int,
        llm_hidden_size: int,
        *,
        merge_size: int = 2,
        ps_version: str = "v2",
    ) -> None:
        vit, llm, m = _check.whole(
            vit_hidden_size=vit_hidden_size, llm_hidden_size=llm_hidden_size, merge_size=merge_size
        )
        _check.one_of("ps_version", ps_version, PIXEL_SHUFFLE)
        super().__init__(
            nn.LayerNorm(vit * m**2), nn.Linear(vit * m**2, llm), nn.GELU(), nn.Linear(llm, llm)
        )
        self.merge_size = m
        self.ps_version = ps_version

    def forward(self, x: Tensor, grid: PackedGrid, *, impl: str | None = None) -> Tensor:
        """Project the tokens of all tiles at once.

        Args:
            x: Output of the vision transformer without its class tokens, ``[T, C]``.
            grid: Which tiles they are: what ``preprocess`` returned, on the device of ``x``.
            impl: Implementation of ``patchpack.merge_tokens``.

        Returns:
            ``[T / merge_size**2, llm_hidden_size]``, tile by tile.
        """
        first, *mlp = self
        norm = cast("nn.LayerNorm", first)
        x = patchpack.merge_tokens(
            x,
            grid,
            order=PIXEL_SHUFFLE[self.ps_version],
            merge_size=self.merge_size,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            impl=impl,
        )
        for layer in mlp:
            x = layer(x)
        return x
