"""Triton kernel of ``patchpack.ops.resize_images``; the maths is in its reference.

One launch resizes one axis of every image: the first its width, or its height, into a buffer, the
second the other one. Images stay where they are: the kernel gets a table of addresses and strides.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack._resampling import BITS, height_first, resampling_weights
from patchpack.kernels._tiles import compiler_options, find_grid, on_device


@triton.jit
def _weighted_sum(
    pixels_ptrs, weights_ptr, offs, num_in, num_out, num_taps, stride, mask, HALF: tl.constexpr
):  # fmt: skip
    """The outputs ``offs`` of an axis, of a row or a column; ``weights`` start with ``first``."""
    weights_ptrs = weights_ptr + offs
    mask_o = offs < num_out
    first = tl.load(weights_ptrs, mask=mask_o, other=0)
    total = tl.full(mask.shape, HALF, tl.int32)
    for k in range(num_taps):
        weights_ptrs += num_out
        weight = tl.load(weights_ptrs, mask=mask_o, other=0)
        tap = tl.minimum(first + k, num_in - 1).to(tl.int64)  # past the end the weight is 0
        pixel = tl.load(pixels_ptrs + tap * stride, mask=mask, other=0)
        total += pixel.to(tl.int32) * weight
    return total


@triton.jit(do_not_specialize=["num_images", "search_steps"])
def _resize_axis_kernel(
    # tensors
    table_ptr,  # [images, 14], as _resize_axis fills it
    weights_ptr,  # of each axis: first [num_out], weights [num_taps, num_out]
    out_ptr,  # one image after the other, [F, C, rows, columns]
    # sizes
    num_images,
    search_steps,
    # compile-time
    BITS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program makes BLOCK_Y x BLOCK_X pixels of a channel of a frame."""
    block = tl.program_id(0).to(tl.int64)
    image = find_grid(table_ptr, num_images, search_steps, block, COLUMNS=14).to(tl.int64)
    entry_ptr = table_ptr + image * 14
    pixels_ptr = tl.load(entry_ptr + 1).to(tl.pointer_type(tl.uint8))
    num_channels = tl.load(entry_ptr + 3).to(tl.int32)
    rows = tl.load(entry_ptr + 4).to(tl.int32)
    cols = tl.load(entry_ptr + 5).to(tl.int32)
    stride_y = tl.load(entry_ptr + 8)
    stride_x = tl.load(entry_ptr + 9)
    along_rows = tl.load(entry_ptr + 10) != 0
    num_in = tl.load(entry_ptr + 11).to(tl.int32)
    weights_ptr += tl.load(entry_ptr + 12)
    num_taps = tl.load(entry_ptr + 13).to(tl.int32)

    in_image = (block - tl.load(entry_ptr)).to(tl.int32)
    blocks_y, blocks_x = tl.cdiv(rows, BLOCK_Y), tl.cdiv(cols, BLOCK_X)
    plane = in_image // (blocks_y * blocks_x)
    y = (in_image // blocks_x % blocks_y * BLOCK_Y + tl.arange(0, BLOCK_Y))[:, None]
    x = (in_image % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    mask = (y < rows) & (x < cols)
    pixels_ptr += (plane // num_channels) * tl.load(entry_ptr + 6)
    pixels_ptr += (plane % num_channels) * tl.load(entry_ptr + 7)

    HALF: tl.constexpr = 1 << (BITS - 1)
    if along_rows:
        total = _weighted_sum(
            pixels_ptr + y * stride_y, weights_ptr, x, num_in, cols, num_taps, stride_x, mask, HALF
        )
    else:
        total = _weighted_sum(
            pixels_ptr + x * stride_x, weights_ptr, y, num_in, rows, num_taps, stride_y, mask, HALF
        )
    pixel = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
    out_ptrs = tl.load(entry_ptr + 2) + (plane.to(tl.int64) * rows + y) * cols + x
    tl.store(out_ptr + out_ptrs, pixel, mask=mask)


def resize(images: Sequence[Tensor], sizes: Sequence[int], mode: str) -> Tensor:
    """``sizes`` are height and width of every image after resizing, one after the other."""
    frames = [image if image.ndim == 4 else image[None] for image in images]
    after = list(zip(sizes[::2], sizes[1::2], strict=True))
    halfway = []
    for x, size in zip(frames, after, strict=True):
        before = x.shape[2:]
        order = height_first(before, size)
        halfway.append((size[0], before[1]) if order else (before[0], size[1]))
    parts = _resize_axis(frames, halfway, mode).split(
        [x.shape[:2].numel() * h * w for x, (h, w) in zip(frames, halfway, strict=True)]
    )
    views = [y.view(*x.shape[:2], *s) for x, y, s in zip(frames, parts, halfway, strict=True)]
    return _resize_axis(views, after, mode)


def _resize_axis(images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """Resize the height of images ``[F, C, H, W]`` where it changes, and else their width."""
    block_y, block_x = 16, 128
    table, weights, starts = [], [], {}
    num_blocks, num_pixels, num_weights = 0, 0, 0
    for image, (height, width) in zip(images, sizes, strict=True):
        along_rows = height == image.shape[2]
        axis = (image.shape[3], width) if along_rows else (image.shape[2], height)
        first, taps = resampling_weights(*axis, mode)
        if axis not in starts:
            starts[axis] = num_weights
            weights += [first, taps.flatten()]
            num_weights += first.numel() + taps.numel()
        frames, channels = image.shape[:2]
        table.append(
            [
                *(num_blocks, image.data_ptr(), num_pixels, channels, height, width),
                *(*image.stride(), along_rows, axis[0], starts[axis], len(taps)),
            ]
        )
        planes = frames * channels
        num_blocks += planes * triton.cdiv(height, block_y) * triton.cdiv(width, block_x)
        num_pixels += planes * height * width
    device = images[0].device
    out = torch.empty(num_pixels, dtype=torch.uint8, device=device)
    if num_pixels > 0:
        _resize_axis_kernel[(num_blocks,)](
            on_device(torch.tensor(table, device="cpu"), device),
            on_device(torch.cat(weights), device),
            out,
            len(images),
            (len(images) - 1).bit_length(),
            BITS=BITS,
            BLOCK_Y=block_y,
            BLOCK_X=block_x,
            num_warps=4,
            **compiler_options(),
        )
    return out
