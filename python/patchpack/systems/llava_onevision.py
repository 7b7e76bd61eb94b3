"""LLaVA-OneVision: one image as many crops, many images as one each, a video as pooled frames.

In the order of the paper: Higher AnyRes (``select_best_resolution``, ``plan``), several images and
video (``plan``, ``plan_video``), crops as patches (``preprocess``), and what follows the vision
transformer: a projector, then one pass that joins crops into a map, cuts the padding off, resizes
what is still too large and ends rows with a learned newline (``layout``, ``merge_patches``,
``Projector``).

Source: Li et al., "LLaVA-OneVision: Easy Visual Task Transfer", arXiv 2408.03326, with the
behaviour of the released code, LLaVA-VL/LLaVA-NeXT. Its limit on tokens leaves out the base view
and the newlines, and does nothing up to 1.21 times the limit, so that an image can take 8765 tokens
where 7290 are documented. Not here are the merge types ``flat``, ``nobase`` and ``maxpool2x2``,
fast and slow frames (``add_faster_video``, which cannot run), and the blank image that the code
runs through the vision transformer for every sample of text alone.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

import patchpack
from patchpack import _check
from patchpack.layout import FeatureMap, TokenLayout, Vector
from patchpack.packing import PackedGrid, is_integer
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)

PINPOINTS = "(1x1),...,(6x6)"
MAX_TILES = 9
# a map is resized if each side is more than this times too large
SLACK = 1.1
SAMPLED_FPS = 1.0
FRAMES_UPBOUND = 32
POOLINGS = ("bilinear", "average", "max")
NEWLINES = ("one_token", "frame", "grid", "no_token")


# Higher AnyRes -----------------------------------------------------------------------------------


def resolutions_of(
    pinpoints: str | Sequence[Sequence[int]] = PINPOINTS, *, image_size: int = 384
) -> tuple[tuple[int, int], ...]:
    """The sizes that an image may be padded to.

    Args:
        pinpoints: A range of tiles, ``"(1x1),...,(6x6)"``: width and height of the first and the
            last; or sizes in pixels, ``[(384, 768), ...]`` or such a list as a string: **width**
            and height of each, as the original's configurations have them.
        image_size: Side of a crop, in pixels.

    Returns:
        Height and width of each, in pixels, in the order in which the original looks at them.

    Raises:
        ValueError: ``pinpoints`` is neither form, or a size is not positive or not whole in crops.
        TypeError: ``image_size`` is not an integer.
    """
    (image_size,) = _check.whole(image_size=image_size)
    sizes: object = pinpoints
    if isinstance(pinpoints, str):
        tiles = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if tiles:
            (first_w, first_h), (last_w, last_h) = tiles[0], tiles[-1]
            sizes = [
                (w * image_size, h * image_size)
                for w in range(first_w, last_w + 1)
                for h in range(first_h, last_h + 1)
            ]
        else:
            sizes = _literal(pinpoints)
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(_is_size, sizes)):
        raise ValueError(
            f"pinpoints must be like {PINPOINTS!r} or pairs of width and height, got {pinpoints!r}"
        )
    for width, height in sizes:
        if min(width, height) < 1 or width % image_size or height % image_size:
            raise ValueError(
                f"pinpoints must be positive multiples of image_size={image_size},"
                f" got width {width} and height {height}"
            )
    return tuple((int(height), int(width)) for width, height in sizes)


def _literal(pinpoints: str) -> object:
    try:
        return ast.literal_eval(pinpoints)
    except (ValueError, SyntaxError):
        return None


def _is_size(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_integer, pair))


def select_best_resolution(
    height: int, width: int, resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The size that keeps most of an image's pixels, and of equal ones that which wastes least.

    The image is scaled to fit, up or down; pixels that scaling up adds do not count as kept.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        resolutions: Height and width of each size to choose from: see ``resolutions_of``. Of
            equally good ones the first is taken.

    Returns:
        Height and width, in pixels.

    Raises:
        ValueError: A size is not positive or not below 2**63, or there is none to choose from.
        TypeError: A size is not an integer, or one of ``resolutions`` not a pair of them.
    """
    height, width = _check.whole(height=height, width=width)
    if not isinstance(resolutions, (list, tuple)) or not all(map(_is_size, resolutions)):
        raise TypeError(f"resolutions must be pairs of integers, got {resolutions!r}")
    if not resolutions:
        raise ValueError(f"resolutions must be at least one, got {resolutions!r}")
    for size in resolutions:
        if min(size) < 1:
            raise ValueError(f"resolutions must be at least 1 pixel on a side, got {size}")

    def kept_and_wasted(size: tuple[int, int]) -> tuple[int, int]:
        h, w = size
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - h * w

    return max(resolutions, key=kept_and_wasted)


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image or video.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        tiles: Rows and columns of crops, which a view of the whole image precedes; ``None`` for an
            image among several, which is padded to a square, and for a video.
        max_tiles: How many crops' tokens the map of the crops is shrunk to, if it has many more;
            ``None`` for no limit.
        unpad: Whether padding is cut off the map and newlines are written.
        image_size: Side of a crop, in pixels.
        patch_size: Side of a patch, in pixels.
        pooling: How the map of each frame of a video is halved; ``None`` for an image.
        newline: Where a video has newlines; ``None`` for an image.
        frame_indices: Which frames of a video are used; ``None`` for an image.
    """

    height: int
    width: int
    tiles: tuple[int, int] | None
    max_tiles: int | None = None
    unpad: bool = True
    image_size: int = 384
    patch_size: int = 14
    pooling: str | None = None
    newline: str | None = None
    frame_indices: tuple[int, ...] | None = None

    @property
    def side(self) -> int:
        """Rows and columns of patches in a crop; pixels beyond the last whole patch are unseen."""
        return self.image_size // self.patch_size

    @property
    def num_crops(self) -> int:
        """Crops and the view before them; frames of a video."""
        return self.num_frames if self.tiles is None else 1 + math.prod(self.tiles)

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        return ((1, self.side, self.side),) * self.num_crops

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of all crops together, in pixels; of an image padded to a square, it."""
        if self.tiles is None:
            side = max(self.height, self.width)
            return side, side
        return self.tiles[0] * self.image_size, self.tiles[1] * self.image_size

    @property
    def letterbox(self) -> tuple[int, int, int, int]:
        """Top, left, height and width of the image in ``canvas``, in pixels."""
        height, width = self.canvas
        down, right = height / self.height, width / self.width
        if right < down:
            h, w = min(math.ceil(self.height * right), height), width
        else:
            h, w = height, min(math.ceil(self.width * down), width)
        return (height - h) // 2, (width - w) // 2, h, w

    @property
    def crop(self) -> tuple[int, int, int, int]:
        """Top, left, height and width of what is kept of the map of the crops or a frame.

        In tokens. Cutting both sides alike can keep one more row or column than the image has. The
        average and the maximum of 2 x 2 tokens leave out an odd row or column, the last.
        """
        if self.tiles is None:
            kept = self.side // 2 * 2 if self.pooling in ("average", "max") else self.side
            return 0, 0, kept, kept
        rows, cols = self.tiles[0] * self.side, self.tiles[1] * self.side
        if not self.unpad:
            return 0, 0, rows, cols
        if self.width / self.height > cols / rows:
            padding = (rows - int(self.height * (cols / self.width))) // 2
            return padding, 0, rows - 2 * padding, cols
        padding = (cols - int(self.width * (rows / self.height))) // 2
        return 0, padding, rows, cols - 2 * padding

    @property
    def target_hw(self) -> tuple[int, int]:
        """Rows and columns of the map of the crops or a frame in the end, in tokens."""
        _, _, rows, cols = self.crop
        if self.tiles is None:
            return (rows, cols) if self.pooling is None else (-(-rows // 2), -(-cols // 2))
        if not self.unpad or self.max_tiles is None:
            return rows, cols
        times = math.sqrt(rows * cols / (self.max_tiles * self.side**2))
        return (int(rows // times), int(cols // times)) if times > SLACK else (rows, cols)

    @property
    def llm_tokens(self) -> int:
        rows, cols = self.target_hw
        if self.tiles is not None:
            return self.side**2 + rows * (cols + self.unpad)
        newlines = {
            None: self.unpad,
            "one_token": self.unpad,
            "frame": self.num_frames,
            "grid": self.num_frames * rows,
            "no_token": 0,
        }
        return self.num_frames * rows * cols + newlines[self.newline]

    @property
    def markup_tokens(self) -> int:
        """Text tokens around them: none, the prompt has a line break after them for itself."""
        return 0


def _one_crop(height: int, width: int, unpad: bool, image_size: int, patch_size: int) -> Plan:
    height, width, image_size, patch_size = _check.whole(
        height=height, width=width, image_size=image_size, patch_size=patch_size
    )
    _check.flags(unpad=unpad)
    if patch_size > image_size:
        raise ValueError(f"patch_size must be at most image_size={image_size}, got {patch_size}")
    return Plan(height, width, None, None, unpad, image_size, patch_size)


def plan(
    height: int,
    width: int,
    *,
    num_images: int = 1,
    pinpoints: str | Sequence[Sequence[int]] = PINPOINTS,
    max_tiles: int | None = MAX_TILES,
    unpad: bool = True,
    image_size: int = 384,
    patch_size: int = 14,
) -> Plan:
    """Plan one image. One of 800 x 1300 pixels takes 12 crops, a view of it all and 8073 tokens.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        num_images: Images of the same sample. Each of several is padded to a square and is one
            crop, 729 tokens and a newline; nothing else then depends on the size.
        pinpoints: The sizes that an image may be padded to: see ``resolutions_of``.
        max_tiles: N of ``anyres_max_N``. If the map of the crops, without padding, has more than
            1.21 times the tokens of N crops, it is resized to at most that of N; ``None``, plain
            ``anyres``, never.
        unpad: ``spatial_unpad``, the merge type of the released scripts: cut the padding off the
            map, resize it if it is too large, write newlines. Without it, ``spatial``, the map is
            kept as it is.
        image_size: Side of a crop, in pixels.
        patch_size: Side of a patch, in pixels.

    Returns:
        The plan.

    Raises:
        ValueError: A size or limit is not positive or not below 2**63, ``resolutions_of`` refuses
            ``pinpoints``, a crop is smaller than a patch, or the image is so thin that no row or
            column of the map is left, where the original resizes to nothing or fails.
        TypeError: A size or limit is not an integer, or ``unpad`` not a bool.
    """
    one = _one_crop(height, width, unpad, image_size, patch_size)
    (num_images,) = _check.whole(num_images=num_images)
    if max_tiles is not None:
        (max_tiles,) = _check.whole(max_tiles=max_tiles)
    resolutions = resolutions_of(pinpoints, image_size=image_size)
    if num_images > 1:
        return one
    h, w = select_best_resolution(height, width, resolutions)
    p = replace(one, tiles=(h // one.image_size, w // one.image_size), max_tiles=max_tiles)
    if min(*p.crop[2:], *p.target_hw) < 1:
        raise ValueError(
            f"height and width must leave at least one token a side, got {height} x {width},"
            f" {p.crop[2]} x {p.crop[3]} tokens without padding and {p.target_hw[0]} x"
            f" {p.target_hw[1]} after resizing"
        )
    return p


# Video -------------------------------------------------------------------------------------------


def frame_indices(
    total_frames: int,
    video_fps: float,
    *,
    fps: float = SAMPLED_FPS,
    frames_upbound: int | None = FRAMES_UPBOUND,
    force_sample: bool = False,
) -> tuple[int, ...]:
    """Which frames of a video are used: one a second, or so many from the first to the last.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video.
        fps: Frames per second to use. Every n-th frame is taken, n a whole number (halves to even).
        frames_upbound: Most frames. If there are more, this many are taken instead, evenly spaced
            and rounded down; ``None``, the original's 0, for no limit.
        force_sample: Take ``frames_upbound`` frames of every video; some twice, if it is short.

    Returns:
        Indices of frames, in order.

    Raises:
        ValueError: A number is not positive or not below 2**63, ``video_fps`` is at most half of
            ``fps``, or ``force_sample`` is given without ``frames_upbound``.
        TypeError: A number is not one, or ``force_sample`` is not a bool.
    """
    (total_frames,) = _check.whole(total_frames=total_frames)
    video_fps, fps = _check.numbers(video_fps=video_fps, fps=fps)
    _check.flags(force_sample=force_sample)
    step = round(video_fps / fps)
    if step < 1:
        raise ValueError(f"video_fps must be above half of fps={fps}, got {video_fps}")
    indices = range(0, total_frames, step)
    if frames_upbound is not None:
        (frames_upbound,) = _check.whole(frames_upbound=frames_upbound)
        if len(indices) > frames_upbound or force_sample:
            return tuple(np.linspace(0, total_frames - 1, frames_upbound, dtype=np.int64).tolist())
    elif force_sample:
        raise ValueError("frames_upbound must be given with force_sample, got None")
    return tuple(indices)


def plan_video(
    total_frames: int,
    video_fps: float | None,
    height: int,
    width: int,
    *,
    fps: float = SAMPLED_FPS,
    frames_upbound: int | None = FRAMES_UPBOUND,
    force_sample: bool = False,
    pooling: str = "bilinear",
    newline: str = "one_token",
    unpad: bool = True,
    image_size: int = 384,
    patch_size: int = 14,
) -> Plan:
    """Plan one video: which frames, each of them squashed to one crop and pooled to 196 tokens.

    Args:
        total_frames: Frames of the video.
        video_fps: Frames per second of the video. ``None`` says that the frames were chosen
            already: all are used, and ``fps``, ``frames_upbound`` and ``force_sample`` are not.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        fps: Frames per second to use: see ``frame_indices``.
        frames_upbound: Most frames.
        force_sample: Take ``frames_upbound`` frames of every video.
        pooling: How the 27 x 27 map of a frame is halved: ``"bilinear"`` resizes it to 14 x 14,
            without antialiasing; ``"average"`` and ``"max"`` take 2 x 2 tokens at a time, leave
            out the last row and column and give 13 x 13. The original's stride is always 2 too,
            whatever its configuration says.
        newline: Where newlines are: ``"one_token"`` after the video, as in transformers;
            ``"frame"`` after each frame; ``"grid"`` after each row, the default of the original's
            training code; ``"no_token"`` nowhere. A checkpoint is to be run with what it was
            trained with, its ``mm_newline_position``.
        unpad: Merge type ``spatial_unpad``. Without it there are no newlines.
        image_size: Side that frames are resized to, in pixels.
        patch_size: Side of a patch, in pixels.

    Returns:
        The plan; ``frame_indices`` says which frames ``preprocess`` wants.

    Raises:
        ValueError: ``frame_indices`` or ``plan`` refuses a number, ``pooling`` or ``newline`` is
            unknown or wants newlines that are not there without ``unpad``, or pooling leaves
            nothing.
        TypeError: A number is missing or not a number, or a flag not a bool.
    """
    _check.one_of("pooling", pooling, POOLINGS)
    _check.one_of("newline", newline, NEWLINES)
    p = plan(
        *(height, width),
        num_images=2,  # a crop for itself, like a frame
        unpad=unpad,
        image_size=image_size,
        patch_size=patch_size,
    )
    if newline in ("frame", "grid") and not unpad:
        raise ValueError(
            f"newline must be 'one_token' or 'no_token' without unpad, got {newline!r}"
        )
    if video_fps is None:
        (total_frames,) = _check.whole(total_frames=total_frames)
        indices = tuple(range(total_frames))
    else:
        indices = frame_indices(
            total_frames,
            video_fps,
            fps=fps,
            frames_upbound=frames_upbound,
            force_sample=force_sample,
        )
    p = replace(p, pooling=pooling, newline=newline, frame_indices=indices)
    if 0 in p.target_hw:
        raise ValueError(f"pooling {pooling!r} must have 2 patches a side, got {p.side}")
    return p


# Patches -----------------------------------------------------------------------------------------


def _default_plan(num_frames: int | None, height: int, width: int) -> Plan:
    if num_frames is None:
        return plan(height, width)
    return plan_video(num_frames, None, height, width)


def preprocess(
    images: Iterable[Image | Sequence[Image]],
    plans: Iterable[Plan] | None = None,
    *,
    mean: Sequence[float] = SIGLIP_MEAN,
    std: Sequence[float] = SIGLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, PackedGrid]:
    """Images and videos of different sizes to one packed sequence of normalised patches.

    Each becomes 8-bit RGB (transparency on white). An image is resized with its aspect ratio, put
    into the middle of a black canvas and cut into crops; before them comes a view of it all,
    squashed to one crop. One of several images is put on a square in the colour of ``mean`` and
    resized to one crop; a frame is squashed. Then all is scaled to 0..1, normalised and cut into
    patches; pixels beyond the last whole patch, 6 at the right and bottom of 384, are left out.
    Runs on the host and needs Pillow, of the extra ``demo``.

    Args:
        images: Images and videos. An image is a Pillow image with 8 bits a channel, a NumPy array
            ``[height, width, channels]`` or ``[height, width]``, or a CPU tensor
            ``[channels, height, width]`` or ``[height, width]``, with 1, 3 or 4 channels, uint8, or
            floating in 0..1 and then rounded to 8 bits. A video is a sequence of images, or an
            array or tensor with the frames in front: the frames that its plan names.
        plans: What becomes of each; by default ``plan`` of an image's size, alone in its sample,
            and ``plan_video`` of all frames of a video.
        mean: Mean of each channel, in 0..1; by default SigLIP's.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, 3 * patch_size**2]`` on the CPU, columns over channel, row and column,
        and their grid, which has every crop for itself: the view of all, then crops row by row, or
        frame by frame; patches of a crop in raster order.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, plans
            differ in their patch size or their number is not that of images, ``mean`` or ``std`` is
            not three numbers, or one of ``std`` is not positive.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    _images.three_numbers("mean", mean)
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    sizes = {p.patch_size for p in plans} or {14}
    if len(sizes) > 1:
        raise ValueError(f"plans must share their patch size, got {sorted(sizes)}")

    crops = []  # of bytes, [3, image_size, image_size] each
    for clip, p in zip(clips, plans, strict=True):
        size = p.image_size
        if p.tiles is None and p.pooling is None:
            clip = _on_square(clip, p, mean)
        crops += _images.resized(clip, size, size)
        if p.tiles is not None:
            top, left, height, width = p.letterbox
            (resized,) = _images.resized(clip, height, width)
            canvas = torch.zeros(3, *p.canvas, dtype=torch.uint8)
            canvas[:, top : top + height, left : left + width] = resized
            tiled = canvas.unfold(1, size, size).unfold(2, size, size)  # [3, rows, cols, ..]
            crops += tiled.flatten(1, 2).unbind(1)
    grid = PackedGrid([size for p in plans for size in p.grids])
    pixels = _images.patches(crops, grid, patch_size=sizes.pop(), mean=mean, std=std, dtype=dtype)
    return pixels, grid


def _on_square(clip: Tensor, p: Plan, mean: Sequence[float]) -> Tensor:
    top, left, _, _ = p.letterbox
    colour = torch.tensor([int(x * 255) for x in mean]).clamp(0, 255).to(torch.uint8)
    square = colour.expand(len(clip), *p.canvas, 3).contiguous()
    square[:, top : top + p.height, left : left + p.width] = clip
    return square


# From crops to language-model tokens -------------------------------------------------------------


def layout(plans: Iterable[Plan], *, device: torch.device | str | None = None) -> TokenLayout:
    """How the projected tokens of images and videos become language-model tokens.

    Args:
        plans: What becomes of each.
        device: Where the layout is used; by default the CPU.

    Returns:
        The layout for ``patchpack.assemble``, of as many tokens as the plans have ``llm_tokens``.
        Vector 0 is the newline. Tokens are those of all crops in a row, ``grids`` of every plan
        after each other. Of frames under pooling ``"max"``, which is no resizing, they are not
        read, but the pooled ones, which come behind all others.

    Raises:
        TypeError: There is something else than plans.
    """
    plans = _plan.listed(plans, Plan)
    parts, first, behind = [], 0, sum(p.vit_tokens for p in plans)
    for p in plans:
        if p.pooling == "max":
            parts += _parts(p, behind)
            behind += p.num_crops * math.prod(p.target_hw)
        else:
            parts += _parts(p, first)
        first += p.vit_tokens
    return TokenLayout(parts, device=device)


def _tile_hw(p: Plan) -> tuple[int, int]:
    return p.target_hw if p.pooling == "max" else (p.side, p.side)


def _parts(p: Plan, first: int) -> Iterator[FeatureMap | Vector]:
    tile = _tile_hw(p)
    length = math.prod(tile)
    if p.tiles is not None:
        newline = 0 if p.unpad else None
        yield FeatureMap(first, tile)
        yield FeatureMap(first + length, tile, p.tiles, p.crop, p.target_hw, newline)
        return
    crop = None if p.pooling == "max" else p.crop
    for begin in range(first, first + p.num_crops * length, length):
        newline = 0 if p.newline == "grid" else None
        yield FeatureMap(begin, tile, crop=crop, target_hw=p.target_hw, newline=newline)
        if p.newline == "frame":
            yield Vector(0)
    if p.newline in (None, "one_token") and p.unpad:
        yield Vector(0)


def merge_patches(
    tokens: Tensor, newline: Tensor | None, plans: Iterable[Plan], *, impl: str | None = None
) -> Tensor:
    """Turn the projected tokens of all crops into the language model's.

    One pass for images and videos together joins crops into maps, cuts the padding off, resizes,
    pools and writes newlines; frames under pooling ``"max"`` take a pass of their own before it.

    Args:
        tokens: Projected tokens of all crops, ``[T, C]`` or ``[crops, side**2, C]``, in the order
            of ``preprocess``.
        newline: The learned vector at the end of rows, ``[C]``; ``None`` if no plan has one.
        plans: What becomes of each image and video.
        impl: Implementation of ``patchpack.assemble`` and ``patchpack.interpolate_tokens``.

    Returns:
        ``[sum of llm_tokens, C]``. Differentiable in ``tokens`` and ``newline``.

    Raises:
        ValueError: ``tokens`` are not those of ``plans``, or ``newline`` does not fit.
        TypeError: An argument has another type, or the dtypes differ.
    """
    plans = _plan.listed(plans, Plan)
    _check.shape("tokens", tokens, *[None] * (3 if getattr(tokens, "ndim", 2) == 3 else 2))
    want = sum(p.vit_tokens for p in plans)
    if tokens.shape[:-1].numel() != want:
        raise ValueError(f"tokens must be the {want} of plans, got {list(tokens.shape)}")
    if newline is not None:
        _check.shape("newline", newline, tokens.shape[-1])
        newline = newline[None]
    if any(p.pooling == "max" for p in plans):
        tokens = torch.cat([tokens.flatten(0, -2), _max_pooled(tokens, plans, impl)])
    where = layout(plans, device=tokens.device)
    if newline is None and where.num_vectors:
        raise ValueError("newline must be a vector where plans have newlines, got None")
    return patchpack.assemble(tokens, newline, where, impl=impl)


def _max_pooled(tokens: Tensor, plans: Sequence[Plan], impl: str | None) -> Tensor:
    """The frames under pooling ``"max"``, cropped and pooled, clip by clip."""
    frames, sizes, targets, first = [], [], [], 0
    for p in plans:
        if p.pooling == "max":
            begins = range(first, first + p.vit_tokens, p.side**2)
            frames += [FeatureMap(begin, (p.side, p.side), crop=p.crop) for begin in begins]
            sizes.append((p.num_frames, *p.crop[2:]))
            targets.append(p.target_hw)
        first += p.vit_tokens
    cropped = TokenLayout(frames, device=tokens.device)
    maps = patchpack.assemble(tokens, None, cropped, impl=impl)
    grid = PackedGrid(sizes, device=tokens.device)
    return patchpack.interpolate_tokens(maps, grid, targets, mode="max", impl=impl)[0]


class Projector(nn.Module):
    """From tokens of the vision transformer to those of the language model.

    An MLP on the tokens of all crops, before any is dropped or resized, then ``merge_patches``. The
    parameters are the original's: ``mm_projector`` (``mlp2x_gelu``) and ``image_newline``.

    Args:
        vit_hidden_size: Channels of the vision transformer.
        llm_hidden_size: Channels of the language model.

    Raises:
        ValueError: A size is not positive.
        TypeError: A size is not an integer.
    """

    def __init__(self, vit_hidden_size: int, llm_hidden_size: int) -> None:
        vit, llm = _check.whole(vit_hidden_size=vit_hidden_size, llm_hidden_size=llm_hidden_size)
        super().__init__()
        self.mm_projector = nn.Sequential(nn.Linear(vit, llm), nn.GELU(), nn.Linear(llm, llm))
        self.image_newline = nn.Parameter(torch.randn(llm) / math.sqrt(llm))

    def forward(self, x: Tensor, plans: Iterable[Plan], *, impl: str | None = None) -> Tensor:
        """Project the tokens of all crops at once.

        Args:
            x: Output of the vision transformer, ``[T, C]``, in the order of ``preprocess``.
            plans: What becomes of each image and video.
            impl: As for ``merge_patches``.

        Returns:
            ``[sum of llm_tokens, llm_hidden_size]``, image by image.
        """
        tokens = self.mm_projector(x)
        return merge_patches(tokens, self.image_newline.to(tokens.dtype), plans, impl=impl)
