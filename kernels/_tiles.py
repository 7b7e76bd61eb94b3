"""Device helpers used unchanged by two or more kernels, and how kernels are compiled."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import current_target


@triton.jit
def find_grid(geometry_ptr, num_grids, search_steps, tokens, COLUMNS: tl.constexpr = 3):
    """Index of the grid that holds each token: a binary search of ``geometry[:, 0]``."""
    low = tl.zeros_like(tokens).to(tl.int32)
    high = low + (num_grids - 1)
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        first = tl.load(geometry_ptr + middle.to(tl.int64) * COLUMNS)
        low = tl.where(first <= tokens, middle, low)
        high = tl.where(first <= tokens, high, middle - 1)
    return low


@triton.jit
def find_grids(geometry_ptr, num_grids, search_steps, first, COUNT: tl.constexpr):
    """The same for ``COUNT`` tokens from ``first`` on: a search for the first, then onwards."""
    low = find_grid(geometry_ptr, num_grids, search_steps, first)
    grid = tl.zeros((COUNT,), tl.int32) + low
    tokens = first + tl.arange(0, COUNT)
    following = low + 1
    begin = tl.load(geometry_ptr + following.to(tl.int64) * 3)
    while (following < num_grids) & (begin < first + COUNT):
        grid += (begin <= tokens).to(tl.int32)
        following += 1
        begin = tl.load(geometry_ptr + following.to(tl.int64) * 3)
    return grid


@triton.jit
def token_to_cell(token, num_cols, MERGE: tl.constexpr):
    """Row and column of a frame's token, counted from the frame's first, in merge-block order."""
    block = token // (MERGE * MERGE)
    in_block = token % (MERGE * MERGE)
    blocks_in_row = num_cols // MERGE
    row = block // blocks_in_row * MERGE + in_block // MERGE
    col = block % blocks_in_row * MERGE + in_block % MERGE
    return row, col


@triton.jit
def cell_to_token(row, col, num_cols, MERGE: tl.constexpr):
    """The inverse of ``token_to_cell``."""
    block = (row // MERGE) * (num_cols // MERGE) + col // MERGE
    return block * (MERGE * MERGE) + (row % MERGE) * MERGE + col % MERGE


@triton.jit
def divide(a, b):
    """``a / b`` rounded to nearest, without the branch for subnormal numbers of ``tl.div_rn``."""
    inverse = tl.div_rn(1.0, b)
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def locate(geometry_ptr, num_grids, search_steps, tokens, MERGE: tl.constexpr):
    """Grid and frame of tokens, their place, row and column in the frame, and its sizes."""
    grid = find_grid(geometry_ptr, num_grids, search_steps, tokens)
    rows = tl.load(geometry_ptr + grid * 3 + 1).to(tl.int32)
    cols = tl.load(geometry_ptr + grid * 3 + 2).to(tl.int32)
    in_grid = (tokens - tl.load(geometry_ptr + grid * 3)).to(tl.int32)
    frame = in_grid // (rows * cols)
    in_frame = in_grid % (rows * cols)
    row, col = token_to_cell(in_frame, cols, MERGE)
    return grid, frame, in_frame, row, col, rows, cols


@triton.jit
def row_ptrs(ptr, rows, num_rows, stride_batch, stride_row, STRIDE_UNIT: tl.constexpr):
    """Where rows of a batch ``[B, num_rows, C]`` begin, counted through; fewer than 2**31."""
    batch, row = rows.to(tl.int32) // num_rows, rows.to(tl.int32) % num_rows
    offsets = batch.to(tl.int64) * stride_batch + row.to(tl.int64) * stride_row
    return ptr + offsets * STRIDE_UNIT


def row_tiles(num_rows: int, num_channels: int) -> tuple[tuple[int], int, int]:
    """Tiles of at most 4096 elements: how many there are, and the rows and channels of one."""
    block_c = min(triton.next_power_of_2(num_channels), 128)
    block_r = min(4096 // block_c, 128)  # one row a thread
    return (triton.cdiv(num_rows, block_r) * triton.cdiv(num_channels, block_c),), block_r, block_c


def last_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride_unit(*tensors: Tensor, unit: int = 8) -> int:
    """What divides all strides but the last: ``unit`` elements, so that loads are wide, or 1."""
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    return unit if all(stride % unit == 0 for stride in strides) else 1


@triton.jit
def block_to_token(
    geometry_ptr, num_grids, search_steps, place, SIZE: tl.constexpr, MERGE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """The token at a place of another order: SIZE x SIZE blocks, each of them row by row.

    Blocks follow each other frame by frame, within a frame by rows or by columns.
    """
    grid = find_grid(geometry_ptr, num_grids, search_steps, place)
    first = tl.load(geometry_ptr + grid * 3)
    rows = tl.load(geometry_ptr + grid * 3 + 1).to(tl.int32)
    cols = tl.load(geometry_ptr + grid * 3 + 2).to(tl.int32)
    in_frame = (place - first).to(tl.int32) % (rows * cols)
    if BY_COLUMN:
        block = in_frame // (SIZE * SIZE)
        in_block = in_frame % (SIZE * SIZE)
        row = block % (rows // SIZE) * SIZE + in_block // SIZE
        col = block // (rows // SIZE) * SIZE + in_block % SIZE
    else:
        row, col = token_to_cell(in_frame, cols, SIZE)
    return place - in_frame + cell_to_token(row, col, cols, MERGE)


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A small table of the CPU on ``device``, without waiting for it."""
    pinned = table.pin_memory() if device.type == "cuda" else table
    return pinned.to(device, non_blocking=True)


def architecture() -> int | str | None:
    """Of the GPU that kernels are compiled for: 90 for sm_90, "gfx942", or None without one."""
    target = current_target()
    return None if target is None else target.arch


def compiler_options(*, fp_fusion: bool = True) -> dict[str, Any]:
    """What every launch asks of the compiler of its device.

    Without ``fp_fusion`` no product is fused with a sum. Of two products that are added either may
    be, and which one differs within a tile: a sum of products then has other bits elsewhere.
    """
    if not isinstance(architecture(), int):
        return {"enable_fp_fusion": fp_fusion}
    # all registers a thread may have: left alone, ptxas spills some to fit one more block
    return {"enable_fp_fusion": fp_fusion, "maxnreg": 255}
