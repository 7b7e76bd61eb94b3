"""Rotary position embedding from a table of cosines and sines.

The first ``2 R`` channels of a head are ``R`` pairs, and pair ``i`` of token ``t`` turns by the
angle whose cosine and sine are ``cos[t, i]`` and ``sin[t, i]``:

    y[a] = x[a] cos - x[b] sin        y[b] = x[b] cos + x[a] sin

with ``(a, b) = (i, i + R)``, or ``(2 i, 2 i + 1)`` if the pairs are interleaved. The other
channels pass through. Source: RoFormer, arXiv 2104.09864; the two layouts are GPT-NeoX's and
GPT-J's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate ``q`` ``[T, Hq, D]`` and ``k`` ``[T, Hk, D]`` by ``cos, sin`` ``[T, R or 2 R]``."""
    if cos.shape[-1] > q.shape[-1] // 2:  # transformers writes all angles, then all again
        cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of ``x`` ``[T, H, D]`` by ``cos, sin`` ``[T, R]``, in float32 or better."""
    pairs = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    turned, passed = x[..., : 2 * pairs].to(dtype), x[..., 2 * pairs :]
    cos, sin = cos.to(dtype)[:, None, :], sin.to(dtype)[:, None, :]  # [T, 1, R]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), passed], dim=-1)
