"""``patchify``: images of different sizes to one packed sequence of normalised patches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack import _check, _dispatch, reference
from patchpack._resampling import FILTERS
from patchpack.ops.resize_images import resize_images
from patchpack.packing import PackedGrid


def patchify(
    images: Sequence[Tensor],
    grid: PackedGrid,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int = 1,
    layout: str = "ctpp",
    dtype: torch.dtype = torch.float32,
    resample: str | None = None,
    pin_memory: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Cut images and clips into patches, normalise them and pack them into one sequence.

    Pixels at the bottom and at the right that fill no patch are left out, as a convolution leaves
    them out. The last frame of a clip, or the one of an image, is repeated until the patches are
    full.

    Args:
        images: One tensor a grid, ``[C, H, W]`` or with frames in front ``[F, C, H, W]``, all uint8
            (scaled by 1 / 255) or all of one floating dtype (taken as they are), on the device of
            ``grid``. Any strides, as of a permuted view of ``[H, W, C]`` or a crop: not copied.
        grid: The patches: ``ceil(F / temporal_patch_size)`` frames, ``H // patch_size`` rows and
            ``W // patch_size`` columns of each image, and their order. With ``resample``, any rows
            and columns.
        patch_size: Side of a patch, in pixels.
        mean: Mean of each of the ``C`` channels, taken off.
        std: Standard deviation of each channel, divided by.
        temporal_patch_size: Frames to a patch.
        layout: Order of the columns: ``"ctpp"``, channel, frame, row and column of the patch, as
            the weight of a convolution; or ``"ppc"``, row, column, channel, where a patch has one
            frame.
        dtype: Dtype of the patches, float32, bfloat16 or float16.
        resample: ``"bicubic"`` or ``"bilinear"``: images, which are uint8, are first resized to
            whole patches, ``rows * patch_size`` times ``cols * patch_size`` pixels of their grid,
            to the bytes of ``resize_images``. On a CPU the resized image is never stored as a
            whole: strips of it are cut while they are in the cache.
        pin_memory: Put the patches, of a batch on the CPU, into page-locked memory, from which
            ``.to("cuda", non_blocking=True)`` copies while the host goes on.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device.

    Returns:
        The patches, contiguous, ``[T, C * temporal_patch_size * patch_size**2]``, ``dtype``.
        Differentiable in floating ``images``, once: every pixel gathers the gradients of its
        copies, so it is deterministic; pixels that are left out get 0.

    Raises:
        ValueError: A shape, a device, a number, ``layout`` or ``impl`` does not fit, or ``grid`` is
            padded or not the patches of ``images``. The last is not looked for inside
            ``torch.compile``. Or memory is to be pinned, and the batch is not on the CPU or torch
            has no accelerator.
        TypeError: A dtype or a type does not fit.

    Computed in float32 and rounded once to ``dtype``. Means and deviations are copied to a device
    when they are first used there, which waits for it. Source: ``patchpack.reference.patchify``.
    """
    if not isinstance(grid, PackedGrid):
        raise TypeError(f"grid must be a PackedGrid, got {type(grid).__name__}")
    if grid.block_size is not None:
        raise ValueError(
            "grid must have no padding: patches of the grid without are copied to where it begins"
        )
    images = _check.images("images", images)
    wide = torch.float64 in (dtype, *(image.dtype for image in images))
    impl = _dispatch.resolve("patchify", impl, wide=wide, grid=grid.geometry)
    patch_size, temporal_patch_size = _check.whole(
        patch_size=patch_size, temporal_patch_size=temporal_patch_size
    )
    mean, std = _check.finite("mean", mean), _check.finite("std", std)
    if not mean or len(mean) != len(std):
        raise ValueError(f"mean and std must be one for each channel, got {mean} and {std}")
    for value in std:
        _check.positive("std", value)
        if value < 2**-126:  # below, float32 may not hold its inverse
            raise ValueError(f"std must be at least 2**-126, got {value}")
    _check.one_of("layout", layout, ("ctpp", "ppc"))
    if layout == "ppc" and temporal_patch_size != 1:
        raise ValueError(
            f"temporal_patch_size must be 1 in layout 'ppc', got {temporal_patch_size}"
        )
    floats = (*_check.FLOATS, *((torch.float64,) if impl == "reference" else ()))
    if dtype not in floats:
        raise TypeError(f"dtype must be one of {', '.join(map(str, floats))}, got {dtype!r}")
    _check.flags(pin_memory=pin_memory)
    if pin_memory and grid.geometry.device.type != "cpu":
        raise ValueError(f"pin_memory is for a batch on the CPU, got one on {grid.geometry.device}")
    if pin_memory and not torch.accelerator.is_available():
        raise ValueError("pin_memory needs an accelerator to copy to, and torch finds none")
    named = {f"images[{i}]": image for i, image in enumerate(images)}
    if resample is not None:
        _check.one_of("resample", resample, FILTERS)
        for name, image in named.items():
            _check.dtype(f"{name} to resample", image, torch.uint8)
            if image.shape[-2] == 0 or image.shape[-1] == 0:
                raise ValueError(f"{name} must have pixels, got {list(image.shape)}")
    if images and images[0].dtype == torch.uint8:
        for name, image in named.items():
            _check.dtype(name, image, torch.uint8)
    elif images:
        _check.floating(impl, **named)
    _check.same_device(grid=grid.geometry, **named)
    sizes = []
    for name, image in named.items():
        if image.shape[-3] != len(mean):
            raise ValueError(
                f"{name} must have a channel for each of {len(mean)} means, got {list(image.shape)}"
            )
        frames = image.shape[0] if image.ndim == 4 else 1
        sizes.append(
            (
                -(-frames // temporal_patch_size),
                image.shape[-2] // patch_size,
                image.shape[-1] // patch_size,
            )
        )
    _check_sizes(sizes, grid, resample is not None)
    options = {
        "patch_size": patch_size,
        "mean": mean,
        "std": std,
        "temporal_patch_size": temporal_patch_size,
        "layout": layout,
        "dtype": dtype,
    }
    sequence = (grid.num_tokens, grid.spatial_merge_size)
    if resample is not None and impl == "native":
        return _dispatch.operator("resize_patchify", impl)(
            grid.geometry, images, *sequence, *options.values(), pin_memory, resample
        )
    if resample is not None:
        sides = [(h * patch_size, w * patch_size) for _, h, w in grid.grid_thw.tolist()]
        images = resize_images(images, sides, mode=resample, impl=impl)
    if impl == "reference":
        with _dispatch.without_autocast(grid.geometry):
            patches = reference.patchify(images, grid, **options)
        return patches.pin_memory() if pin_memory else patches
    return _dispatch.operator("patchify", impl)(
        grid.geometry, images, *sequence, *options.values(), pin_memory
    )


def _check_sizes(sizes: list[tuple[int, int, int]], grid: PackedGrid, resized: bool) -> None:
    """``grid`` has one of ``sizes`` for each image, or its frames if it will be resized."""
    if len(sizes) != grid.num_grids:
        raise ValueError(f"images must be one for each of {grid.num_grids} grids, got {len(sizes)}")
    if torch.compiler.is_compiling() or type(grid.grid_thw) is not Tensor:  # no values to read
        torch._check(resized or sum(t * h * w for t, h, w in sizes) == grid.num_tokens)
        return
    for i, (size, want) in enumerate(zip(sizes, grid.grid_thw.tolist(), strict=True)):
        if resized:
            size = (size[0], *want[1:])
        if list(size) != want:
            raise ValueError(
                f"grid must be the patches of images, {size} of images[{i}], got {tuple(want)}"
            )


def _fake(geometry, images, num_tokens, merge, size, mean, std, temporal, layout, dtype, *_):
    return geometry.new_empty(num_tokens, len(mean) * temporal * size**2, dtype=dtype)


def _setup_context(ctx, inputs, output):
    geometry, images, _, *ctx.options, _, _ = inputs
    ctx.shapes = [image.shape for image in images]
    ctx.dtype = images[0].dtype if images else None
    ctx.save_for_backward(geometry)


def _backward(ctx, grad):
    sizes = [n for s in ctx.shapes for n in (s[0] if len(s) == 4 else 1, *s[-2:])]
    flat = _dispatch.operator("patchify_backward", ctx.impl)(
        grad, *ctx.saved_tensors, sizes, *ctx.options, ctx.dtype
    )
    parts = flat.split([math.prod(shape) for shape in ctx.shapes])
    grads = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
    return None, grads, *[None] * 9


def _fake_backward(grad, geometry, sizes, merge, patch_size, mean, std, temporal, layout, dtype):
    sides = zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True)
    return grad.new_empty(len(mean) * sum(math.prod(side) for side in sides), dtype=dtype)


_dispatch.define(
    "patchify(Tensor geometry, Tensor[] images, SymInt num_tokens, int spatial_merge_size,"
    " int patch_size, float[] mean, float[] std, int temporal_patch_size, str layout,"
    " ScalarType dtype, bool pin_memory) -> Tensor",
    "patchify:cut",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "resize_patchify(Tensor geometry, Tensor[] images, SymInt num_tokens, int spatial_merge_size,"
    " int patch_size, float[] mean, float[] std, int temporal_patch_size, str layout,"
    " ScalarType dtype, bool pin_memory, str resample) -> Tensor",
    None,
    fake=_fake,
)
_dispatch.define(
    "patchify_backward(Tensor grad, Tensor geometry, SymInt[] sizes, int spatial_merge_size,"
    " int patch_size, float[] mean, float[] std, int temporal_patch_size, str layout,"
    " ScalarType dtype) -> Tensor",
    "patchify:cut_bwd",
    fake=_fake_backward,
)
