"""Two-dimensional rotary position embedding of packed images.

Half of the ``R = D / 2`` pairs of a head turn with the token's row, half with its column:

    angle[t, j] = position[t, axis(j)] * base ** -exponent(j)

``axes`` names which pair has which axis and exponent, for ``i < R / 2``:

    split      j = i: row, 2 i / R           j = i + R / 2: column, 2 i / R
    even_odd   j = i: row, 2 i / R           j = i + R / 2: column, (2 i + 1) / R
    paired     j = 2 i: column, 2 i / R      j = 2 i + 1: row, 2 i / R

Sources: "split" is Qwen2-VL (arXiv 2409.12191), "even_odd" Pixtral (arXiv 2410.07073), "paired"
MoonViT (Kimi-VL, arXiv 2504.07491).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack.packing import PackedGrid
from patchpack.reference.rope import rotate


def rope_2d(
    q: Tensor,
    k: Tensor,
    grid: PackedGrid,
    *,
    base: float = 10_000.0,
    interleaved: bool = False,
    axes: str = "split",
) -> tuple[Tensor, Tensor]:
    """Rotate ``q`` ``[T, Hq, D]`` and ``k`` ``[T, Hk, D]`` by the rows and columns of ``grid``."""
    pairs = q.shape[-1] // 2
    # float32 would turn a position of 131 072 by 7e-3 radians too much or too little
    row, col = grid.position_ids.double().unsqueeze(-1).unbind(dim=1)  # [T, 1] each
    even = torch.arange(0, pairs, 2, device=q.device, dtype=torch.float64)
    frequency = base ** -(even / pairs)  # [R / 2]
    if axes == "split":
        angle = torch.cat([row * frequency, col * frequency], dim=1)
    elif axes == "even_odd":
        angle = torch.cat([row * frequency, col * base ** -((even + 1) / pairs)], dim=1)
    else:  # paired
        angle = torch.stack([col * frequency, row * frequency], dim=-1).flatten(1)
    cos, sin = angle.cos(), angle.sin()  # [T, R]
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
