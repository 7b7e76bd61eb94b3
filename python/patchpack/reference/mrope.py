"""Multimodal rotary position embedding.

Every token has a position on three axes (time, height, width), and each of the ``R`` pairs of a
head turns with one of them:

    angle[t, j] = position_ids[axis(j), t] * base ** -(j / R)

Sectioned (Qwen2-VL, arXiv 2409.12191): the first ``mrope_section[0]`` pairs have axis 0, the next
``mrope_section[1]`` axis 1, the rest axis 2. Interleaved (Qwen3-VL, arXiv 2511.21631): pair ``j``
has axis ``j % 3`` where ``j < 3 * mrope_section[j % 3]``, else axis 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpack.reference.rope import rotate


def mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    *,
    mrope_section: Sequence[int],
    mrope_interleaved: bool = False,
    base: float = 1e6,
) -> tuple[Tensor, Tensor]:
    """Rotate ``q`` ``[T, Hq, D]`` and ``k`` ``[T, Hk, D]`` by ``position_ids`` ``[3 or 4, T]``."""
    pairs = sum(mrope_section)
    j = torch.arange(pairs, device=q.device)
    if mrope_interleaved:
        end = 3 * torch.tensor(mrope_section, device=q.device)
        axis = torch.where(j < end[j % 3], j % 3, 0)
    else:
        begin = torch.tensor(mrope_section, device=q.device).cumsum(0)[:2]
        axis = torch.bucketize(j, begin, right=True)
    # float32 would turn a position of 131 072 by 7e-3 radians too much or too little
    frequency = base ** -(j.double() / pairs)  # [R]
    angle = position_ids[-3:][axis].T * frequency  # [T, R]
    cos, sin = angle.cos(), angle.sin()
    return rotate(q, cos, sin, interleaved=False), rotate(k, cos, sin, interleaved=False)
