"""Triton kernels of ``patchpack.ops.patchify``; the maths is in its reference.

Images stay where they are: kernels get a table of addresses and strides. A block of programs works
on one image and the frames of a patch, so that strides and sizes are scalars, and what a column
adds to an address does not depend on the token.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpack.kernels._tiles import (
    cell_to_token,
    compiler_options,
    divide,
    find_grid,
    last_contiguous,
    on_device,
    token_to_cell,
)


@triton.jit(do_not_specialize=["num_images", "search_steps"])
def _cut_kernel(
    # tensors
    table_ptr,  # [G, 7] first block, address, frames, strides of frame, channel, row, column
    geometry_ptr,  # [G + 1, 3]
    moments_ptr,  # [2, C] mean, standard deviation
    out_ptr,  # [T, K]
    # sizes
    num_images,
    search_steps,
    # compile-time
    PIXEL: tl.constexpr,
    BYTES: tl.constexpr,
    LAYOUT: tl.constexpr,
    PATCH: tl.constexpr,
    TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program cuts BLOCK_K pixels of BLOCK_T patches, from each frame that they extend over."""
    AREA: tl.constexpr = PATCH * PATCH
    NUM_PIXELS: tl.constexpr = NUM_CHANNELS * AREA  # of a patch in one frame
    pid = tl.program_id(0).to(tl.int64)
    pid_k = (pid % tl.cdiv(NUM_PIXELS, BLOCK_K)).to(tl.int32)
    block = pid // tl.cdiv(NUM_PIXELS, BLOCK_K)
    image = find_grid(table_ptr, num_images, search_steps, block, COLUMNS=7).to(tl.int64)
    entry_ptr = table_ptr + image * 7
    pixels_ptr = tl.load(entry_ptr + 1).to(tl.pointer_type(PIXEL))
    frames = tl.load(entry_ptr + 2)
    stride_f = tl.load(entry_ptr + 3)
    stride_c = tl.load(entry_ptr + 4)
    stride_y = tl.load(entry_ptr + 5)
    stride_x = tl.load(entry_ptr + 6)
    first = tl.load(geometry_ptr + image * 3)
    rows = tl.load(geometry_ptr + image * 3 + 1).to(tl.int32)
    cols = tl.load(geometry_ptr + image * 3 + 2).to(tl.int32)

    in_image = (block - tl.load(entry_ptr)).to(tl.int32)
    blocks_in_frame = tl.cdiv(rows * cols, BLOCK_T)
    frame = in_image // blocks_in_frame
    offs_t = in_image % blocks_in_frame * BLOCK_T + tl.arange(0, BLOCK_T)  # in the frame
    row, col = token_to_cell(offs_t, cols, MERGE)
    patches = row * PATCH * stride_y + col * PATCH * stride_x

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if LAYOUT == "ctpp":
        x, y = offs_k % PATCH, offs_k // PATCH % PATCH
        channel, columns = offs_k // AREA, offs_k // AREA * (TEMPORAL * AREA) + offs_k % AREA
    else:  # of one frame
        x, y = offs_k // NUM_CHANNELS % PATCH, offs_k // (PATCH * NUM_CHANNELS)
        channel, columns = offs_k % NUM_CHANNELS, offs_k
    mask_k = offs_k < NUM_PIXELS
    mean = tl.load(moments_ptr + channel, mask=mask_k, other=0.0)[None, :]
    std = tl.load(moments_ptr + NUM_CHANNELS + channel, mask=mask_k, other=1.0)[None, :]

    mask = (offs_t < rows * cols)[:, None] & mask_k[None, :]
    pixels = channel * stride_c + y * stride_y + x * stride_x
    pixel_ptrs = pixels_ptr + (patches[:, None] + pixels[None, :])
    tokens = first + frame.to(tl.int64) * (rows * cols) + offs_t
    out_ptrs = out_ptr + tokens[:, None] * (TEMPORAL * NUM_PIXELS) + columns[None, :]
    value = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for time in range(TEMPORAL):
        source = frame * TEMPORAL + time
        if source < frames:  # the last frame is repeated
            value = tl.load(pixel_ptrs + source * stride_f, mask=mask, other=0).to(tl.float32)
            if BYTES:
                value = divide(divide(value, 255.0) - mean, std)
            else:  # infinities stay
                value = tl.div_rn(value - mean, std)
        tl.store(out_ptrs + time * AREA, value, mask=mask)


@triton.jit(do_not_specialize=["num_images", "search_steps", "stride_grad_t"])
def _cut_bwd_kernel(
    # tensors
    table_ptr,  # [G, 5] first block, first pixel of grad_images, frames, height, width
    geometry_ptr,  # [G + 1, 3]
    moments_ptr,  # [2, C] mean, standard deviation
    grad_ptr,  # [T, K]
    grad_images_ptr,  # one image after the other, [F, C, H, W]
    # sizes and strides
    num_images,
    search_steps,
    stride_grad_t,
    # compile-time
    LAYOUT: tl.constexpr,
    PATCH: tl.constexpr,
    TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program gathers the gradient of BLOCK_Y x BLOCK_X pixels of a channel of a frame."""
    block = tl.program_id(0).to(tl.int64)
    image = find_grid(table_ptr, num_images, search_steps, block, COLUMNS=5).to(tl.int64)
    entry_ptr = table_ptr + image * 5
    frames = tl.load(entry_ptr + 2)
    height = tl.load(entry_ptr + 3).to(tl.int32)
    width = tl.load(entry_ptr + 4).to(tl.int32)
    first = tl.load(geometry_ptr + image * 3)
    rows = tl.load(geometry_ptr + image * 3 + 1).to(tl.int32)
    cols = tl.load(geometry_ptr + image * 3 + 2).to(tl.int32)

    in_image = (block - tl.load(entry_ptr)).to(tl.int32)
    blocks_y, blocks_x = tl.cdiv(height, BLOCK_Y), tl.cdiv(width, BLOCK_X)
    plane = in_image // (blocks_y * blocks_x)
    frame, channel = plane // NUM_CHANNELS, plane % NUM_CHANNELS
    y = in_image // blocks_x % blocks_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = in_image % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    row, col = y // PATCH, x // PATCH
    token = cell_to_token(row[:, None], col[None, :], cols, MERGE)
    start = first + (frame // TEMPORAL).to(tl.int64) * (rows * cols)
    y_in_patch, x_in_patch = (y % PATCH)[:, None], (x % PATCH)[None, :]
    if LAYOUT == "ctpp":
        column = (channel * TEMPORAL * PATCH + y_in_patch) * PATCH + x_in_patch
    else:
        column = (y_in_patch * PATCH + x_in_patch) * NUM_CHANNELS + channel
    grad_ptrs = grad_ptr + (start + token) * stride_grad_t + column

    inside = (row < rows)[:, None] & (col < cols)[None, :]  # the rest fills no patch
    time = frame % TEMPORAL
    end = tl.where(frame == frames - 1, TEMPORAL, time + 1)  # the last frame is repeated
    acc = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for copy in range(time, end):
        acc += tl.load(grad_ptrs + copy * PATCH * PATCH, mask=inside, other=0.0).to(tl.float32)
    acc = tl.div_rn(acc, tl.load(moments_ptr + NUM_CHANNELS + channel))

    pixels = tl.load(entry_ptr + 1) + plane.to(tl.int64) * height * width
    pixels = pixels + y.to(tl.int64)[:, None] * width + x[None, :]
    tl.store(grad_images_ptr + pixels, acc, mask=(y < height)[:, None] & (x < width)[None, :])


def cut(
    geometry: Tensor,
    images: Sequence[Tensor],
    num_tokens: int,
    spatial_merge_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int,
    layout: str,
    dtype: torch.dtype,
    pin_memory: bool,
) -> Tensor:
    num_pixels = len(mean) * patch_size**2
    num_columns = temporal_patch_size * num_pixels
    out = geometry.new_empty(num_tokens, num_columns, dtype=dtype, pin_memory=pin_memory)
    if num_tokens == 0:
        return out
    block_t, block_k = 64, 128
    rows, num_blocks = [], 0
    for image in images:
        frames = image if image.ndim == 4 else image[None]
        rows.append([num_blocks, frames.data_ptr(), frames.shape[0], *frames.stride()])
        cells = (frames.shape[2] // patch_size) * (frames.shape[3] // patch_size)
        num_blocks += triton.cdiv(len(frames), temporal_patch_size) * triton.cdiv(cells, block_t)
    _cut_kernel[(num_blocks * triton.cdiv(num_pixels, block_k),)](
        on_device(torch.tensor(rows, device="cpu"), geometry.device),
        geometry,
        _moments(tuple(mean), tuple(std), geometry.device),
        out,
        len(images),
        (len(images) - 1).bit_length(),
        PIXEL=getattr(tl, str(images[0].dtype).removeprefix("torch.")),
        BYTES=images[0].dtype == torch.uint8,
        LAYOUT=layout,
        PATCH=patch_size,
        TEMPORAL=temporal_patch_size,
        MERGE=spatial_merge_size,
        NUM_CHANNELS=len(mean),
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        num_warps=16,
        **compiler_options(),
    )
    return out


def cut_bwd(
    grad: Tensor,
    geometry: Tensor,
    shapes: Sequence[int],
    spatial_merge_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """``shapes`` are frames, height and width of every image, one after the other."""
    block_y, block_x = 16, 128
    rows, num_blocks, num_pixels = [], 0, 0
    for frames, height, width in zip(*[iter(shapes)] * 3, strict=True):
        rows.append([num_blocks, num_pixels, frames, height, width])
        planes = frames * len(mean)
        num_blocks += planes * triton.cdiv(height, block_y) * triton.cdiv(width, block_x)
        num_pixels += planes * height * width
    grad_images = grad.new_empty(num_pixels, dtype=dtype)
    if num_pixels == 0:
        return grad_images
    grad = last_contiguous(grad)
    _cut_bwd_kernel[(num_blocks,)](
        on_device(torch.tensor(rows, device="cpu"), geometry.device),
        geometry,
        _moments(tuple(mean), tuple(std), geometry.device),
        grad,
        grad_images,
        len(rows),
        (len(rows) - 1).bit_length(),
        grad.stride(0),
        LAYOUT=layout,
        PATCH=patch_size,
        TEMPORAL=temporal_patch_size,
        MERGE=spatial_merge_size,
        NUM_CHANNELS=len(mean),
        BLOCK_Y=block_y,
        BLOCK_X=block_x,
        num_warps=4,
        **compiler_options(),
    )
    return grad_images


@lru_cache(maxsize=64)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor([mean, std], dtype=torch.float32, device="cpu").to(device)
