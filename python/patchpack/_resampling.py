"""Pillow's resampling of 8-bit images, as integers: which pixels an output sums, times what."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BITS = 22  # of a weight's fraction: 8 bits of a pixel, two for sums out of range, and a sign


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.where(x < 1, 1 - x, 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# the filter at a distance, and the distance from which on it is zero
FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
}


def height_first(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether Pillow 13 resizes the height before the width; sizes are height and width."""
    fewer_rows, fewer_columns = (a - b for a, b in zip(before, after, strict=True))
    return fewer_rows > max(2 * fewer_columns, 0)


@functools.lru_cache(maxsize=256)
def resampling_weights(num_in: int, num_out: int, mode: str) -> tuple[Tensor, Tensor]:
    """What the outputs of an axis are made of.

    Output ``o`` is ``sum_k weights[k, o] * x[first[o] + k]``, with ``2 ** BITS`` for 1. Positions
    past the input have weight 0. Computed in double precision, operation by operation as Pillow
    does, so that the rounded weights are Pillow's.

    Args:
        num_in: Pixels of the axis.
        num_out: Pixels of the axis after resizing.
        mode: A key of ``FILTERS``.

    Returns:
        ``first``, int32 ``[num_out]``, and ``weights``, int32 ``[taps, num_out]``, on the CPU.
        They are cached: not to be changed.
    """
    kernel, reach = FILTERS[mode]
    scale = num_in / num_out
    widened = max(scale, 1.0)
    support = reach * widened
    center = (np.arange(num_out) + 0.5) * scale
    first = np.maximum(center - support + 0.5, 0).astype(np.int64)
    last = np.minimum((center + support + 0.5).astype(np.int64), num_in)
    taps = np.arange((last - first).max())[:, None]  # [taps, 1]
    weights = kernel(np.abs((taps + first - center + 0.5) * (1 / widened)))
    weights = np.where(taps < last - first, weights, 0)
    total = np.zeros(num_out)
    for row in weights:  # in this order
        total += row
    fixed = weights / total * 2**BITS
    rounded = np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)
    return torch.from_numpy(first.astype(np.int32)), torch.from_numpy(rounded)
