"""Device helpers used unchanged by two or more kernels, and how kernels are compiled."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import current_target


@triton.jit
def find_grid(table_ptr, num_grids, search_steps, tokens, ROW: tl.constexpr = 3):
    """Index of the grid that holds each token, or block: a binary search of ``table[:, 0]``."""
    low = tl.zeros_like(tokens).to(tl.int32)
    high = low + (num_grids - 1)
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        first = tl.load(table_ptr + middle.to(tl.int64) * ROW)
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
def divide(a, b):
    """``a / b`` rounded to nearest, without the branch for subnormal numbers of ``tl.div_rn``."""
    inverse = tl.div_rn(1.0, b)
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A small table of the CPU on ``device``, without waiting for it."""
    pinned = table.pin_memory() if device.type == "cuda" else table
    return pinned.to(device, non_blocking=True)


def compiler_options() -> dict[str, Any]:
    """What every launch asks of the compiler of its device."""
    target = current_target()
    if target is None or target.backend != "cuda":
        return {"enable_fp_fusion": True}
    # all registers a thread may have: left alone, ptxas spills some to fit one more block
    return {"enable_fp_fusion": True, "maxnreg": 255}
