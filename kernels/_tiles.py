"""Device helpers used unchanged by two or more kernels, and how kernels are compiled."""

from typing import Any

import triton
import triton.language as tl
from triton.language.target_info import current_target


@triton.jit
def find_grid(geometry_ptr, num_grids, search_steps, tokens):
    """Index of the grid that holds each token: a binary search of ``geometry[:, 0]``."""
    low = tl.zeros_like(tokens).to(tl.int32)
    high = low + (num_grids - 1)
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        first = tl.load(geometry_ptr + middle.to(tl.int64) * 3)
        low = tl.where(first <= tokens, middle, low)
        high = tl.where(first <= tokens, high, middle - 1)
    return low


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


def compiler_options() -> dict[str, Any]:
    """What every launch asks of the compiler of its device."""
    target = current_target()
    if target is None or target.backend != "cuda":
        return {"enable_fp_fusion": True}
    # all registers a thread may have: left alone, ptxas spills some to fit one more block
    return {"enable_fp_fusion": True, "maxnreg": 255}
