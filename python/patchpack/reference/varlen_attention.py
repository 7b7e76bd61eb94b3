"""Attention of packed segments: every query sees the keys of its own segment alone.

For query ``i`` and the keys ``j`` of one segment, ``off = len_k - len_q``:

    p[i, j] = softmax_j(softmax_scale * q[i] . k[j])   over i + off - left <= j <= i + off + right
    out[i]  = sum_j p[i, j] v[j]
    lse[i]  = log(sum_j exp(softmax_scale * q[i] . k[j]))

A side of the window is unlimited where it is -1; ``causal`` is ``right = 0``. A query without keys
gives 0, and -inf for ``lse``; so do the rows past the last segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchpack.packing import PackedGrid, validate_cu_seqlens
from patchpack.reference.rope_2d import rope_2d


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    rope: PackedGrid | None = None,
    rope_base: float = 10_000.0,
    rope_interleaved: bool = False,
    rope_axes: str = "split",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend segment by segment: scores and softmax in float32, ``p`` in the dtype of ``q``.

    With ``rope``, rotated queries and keys are rounded to the dtype of ``q``.
    """
    if rope is not None:
        q, k = rope_2d(q, k, rope, base=rope_base, interleaved=rope_interleaved, axes=rope_axes)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    for cu_seqlens, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        validate_cu_seqlens(cu_seqlens, x.shape[0])
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    # the rows past the last segment are one more, without keys
    ends_q, ends_k = [*ends_q, q.shape[0]], [*ends_k, ends_k[-1]]

    outs, lses = [], []
    for begin_q, end_q, begin_k, end_k in zip(
        ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True
    ):
        queries = q[begin_q:end_q].transpose(0, 1)  # [Hq, len_q, D]
        keys, values = (
            x[begin_k:end_k].transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v)
        )  # [Hq, len_k, D] each
        visible = _visible(queries, keys, left, 0 if causal else right)  # [len_q, len_k]
        any_visible = visible.any(dim=1, keepdim=True)
        scores = queries.to(wide) @ keys.to(wide).transpose(1, 2) * scale
        scores = scores.masked_fill(~visible & any_visible, float("-inf"))
        p = scores.softmax(dim=-1).to(q.dtype)
        outs.append((p @ values).masked_fill(~any_visible, 0).transpose(0, 1))
        lses.append(scores.logsumexp(dim=-1).masked_fill(~any_visible[:, 0], float("-inf")))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def _visible(queries: Tensor, keys: Tensor, left: int, right: int) -> Tensor:
    """Which keys each query of a segment sees, ``[len_q, len_k]``, aligned at their ends."""
    len_q, len_k = queries.shape[1], keys.shape[1]
    i = torch.arange(len_k - len_q, len_k, device=queries.device)[:, None]
    j = torch.arange(len_k, device=queries.device)
    visible = torch.ones_like(j - i, dtype=torch.bool)
    if left >= 0:
        visible &= j >= i - left
    if right >= 0:
        visible &= j <= i + right
    return visible
