"""One packed sequence on many ranks: tokens are sharded, but for attention, where heads are.

This is the sequence parallelism of DeepSpeed-Ulysses, arXiv 2309.14509: what treats tokens one by
one (norms, projections, feed-forward layers) runs on a rank's own tokens, and an all-to-all before
and after attention gives every rank all tokens of its heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from patchpack import PackedGrid, _check, varlen_attention
from patchpack.distributed._collectives import check_group, exchange


def even_lengths(num_tokens: int, *, group: dist.ProcessGroup | None = None) -> list[int]:
    """Tokens of every rank where a sequence is cut as evenly as can be, the first ranks get more.

    Args:
        num_tokens: Length of the packed sequence.
        group: The ranks that share it; by default all.

    Raises:
        ValueError: ``num_tokens`` is negative, or there is no process group.
        TypeError: An argument has the wrong type.
    """
    (num_tokens,) = _check.whole(0, num_tokens=num_tokens)
    n = check_group(group).size()
    return [num_tokens // n + (rank < num_tokens % n) for rank in range(n)]


def shard_tokens(
    x: Tensor, lengths: Sequence[int], *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Cut this rank's tokens out of what all ranks hold: a view, nothing is communicated.

    Args:
        x: The whole sequence, ``[T, ...]``, any dtype.
        lengths: Tokens of every rank, which sum to ``T``.
        group: The ranks that share it; by default all.

    Returns:
        The tokens ``[lengths[rank], ...]``. Differentiable: the gradient of ``x`` is 0 for tokens
        of other ranks, so that a sum over ranks is the whole of it.

    Raises:
        ValueError: ``lengths`` does not fit, or there is no process group.
        TypeError: An argument has the wrong type.
    """
    group = check_group(group)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    lengths = _check_lengths(lengths, group)
    if x.ndim == 0 or x.shape[0] != sum(lengths):
        raise ValueError(f"x must have the {sum(lengths)} tokens of lengths, got {list(x.shape)}")
    return x.narrow(0, sum(lengths[: group.rank()]), lengths[group.rank()])


def gather_tokens(
    x: Tensor, lengths: Sequence[int], *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Put the tokens of all ranks together again, on every rank.

    Args:
        x: This rank's tokens, ``[lengths[rank], ...]``, any dtype; the other dimensions are the
            same on all ranks.
        lengths: Tokens of every rank.
        group: The ranks that share the sequence; by default all.

    Returns:
        The whole sequence, ``[T, ...]``. Differentiable: the gradient of ``x`` is the sum of what
        all ranks give it, in the order of the ranks, so it is deterministic.

    Raises:
        ValueError: ``lengths`` does not fit, or there is no process group.
        TypeError: An argument has the wrong type.
    """
    group = check_group(group)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    lengths = _check_lengths(lengths, group)
    _check_own("x", x, lengths, group)
    copies = x.expand(group.size(), *x.shape).flatten(0, 1)
    return exchange(copies, [x.shape[0]] * group.size(), lengths, group)


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    rope: PackedGrid | None = None,
    rope_base: float = 10_000.0,
    rope_interleaved: bool = False,
    rope_axes: str = "split",
    impl: str | None = None,
) -> Tensor:
    """``varlen_attention`` of one packed sequence whose tokens are sharded over ranks.

    One all-to-all gives every rank all tokens of its share of the heads, and another one takes what
    it computed back to the ranks of the tokens. Shards need not end where segments do. ``lengths``
    is known on the host, so nothing is waited for but the collectives.

    Args:
        q: Queries of this rank's tokens, ``[lengths[rank], Hq, D]``, float32, bfloat16 or float16.
            Ranks have the tokens in their order: rank 0 the first ``lengths[0]`` of the sequence.
            The number of ranks divides ``Hq``.
        k: Keys, ``[lengths[rank], Hk, D]``, dtype of ``q``. The number of ranks divides ``Hk``, or
            ``Hk`` divides it: then every key head is on several ranks.
        v: Values, shape and dtype of ``k``.
        cu_seqlens: Where segments begin and end, int32 ``[S + 1]``, in tokens of the whole
            sequence, the same on every rank.
        lengths: Tokens of every rank, which may differ and be 0, the same on every rank:
            ``even_lengths(grid.num_tokens)``, for one.
        group: The ranks that share the sequence; by default all.
        max_seqlen: ``max_seqlen_q`` of ``varlen_attention``.
        softmax_scale: As of ``varlen_attention``.
        causal: As of ``varlen_attention``.
        window_size: As of ``varlen_attention``.
        rope: Rotate ``q`` and ``k`` by the rows and columns of this grid, which is that of the
            whole sequence. Each rank rotates all tokens of its heads.
        rope_base: As of ``varlen_attention``.
        rope_interleaved: As of ``varlen_attention``.
        rope_axes: As of ``varlen_attention``.
        impl: As of ``varlen_attention``.

    Returns:
        The output of this rank's tokens, ``[lengths[rank], Hq, D]``, dtype of ``q``, with the bits
        of ``varlen_attention`` on one rank. Differentiable in ``q``, ``k`` and ``v``, once, with
        the bits of one rank too; but where a key head is on several ranks, their gradients of it,
        each rounded to the dtype, are summed. Deterministic.

    Raises:
        ValueError: A shape, a number of heads, ``lengths``, a device, a number or ``impl`` does not
            fit, or there is no process group. Each rank checks its own tensors and ``lengths``
            before anything is sent; the other options are the same on all ranks.
        TypeError: A dtype or a type does not fit.

    A rank sends ``(Hq + 2 max(Hk, ranks) + Hq) D`` numbers a token of its own, less what it keeps.
    Source: DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    group = check_group(group)
    n = group.size()
    lengths = _check_lengths(lengths, group)
    _check.shape("q", q, None, None, None)
    _check.shape("k", k, q.shape[0], None, q.shape[2])
    _check.shape("v", v, *k.shape)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    _check.shape("cu_seqlens", cu_seqlens, None)
    _check.same_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    _check_own("q", q, lengths, group)
    if q.shape[1] == 0 or q.shape[1] % n:
        raise ValueError(f"q must have heads that divide by the {n} ranks, got {q.shape[1]}")
    num_k_heads = k.shape[1]
    if num_k_heads == 0 or (num_k_heads % n and n % num_k_heads):
        raise ValueError(
            f"k must have heads that divide by the {n} ranks, or divide their number,"
            f" got {num_k_heads}"
        )
    if q.shape[1] % num_k_heads:
        raise ValueError(f"k must have heads that divide q's {q.shape[1]}, got {num_k_heads}")

    if num_k_heads < n:
        k, v = (x.repeat_interleave(n // num_k_heads, dim=1) for x in (k, v))
    shares = [x.unflatten(1, (n, x.shape[1] // n)).transpose(0, 1) for x in (q, k, v)]
    counts = [share.shape[2] for share in shares]  # heads of a rank
    tokens = q.shape[0]
    sent = torch.cat(shares, dim=2).flatten(0, 1)  # [ranks * tokens, hq + 2 hk, D]
    q, k, v = exchange(sent, [tokens] * n, lengths, group).split(counts, dim=1)  # [T, h, D]
    out = varlen_attention(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen_q=max_seqlen,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        rope=rope,
        rope_base=rope_base,
        rope_interleaved=rope_interleaved,
        rope_axes=rope_axes,
        impl=impl,
    )
    heads = exchange(out, lengths, [tokens] * n, group).unflatten(0, (n, tokens))
    return heads.transpose(0, 1).flatten(1, 2)


def _check_lengths(lengths: Sequence[int], group: dist.ProcessGroup) -> list[int]:
    """``lengths`` has tokens for every rank."""
    found = _check.integers("lengths", lengths)
    if len(found) != group.size() or min(found) < 0:
        raise ValueError(
            f"lengths must be 0 or more for each of {group.size()} ranks, got {lengths}"
        )
    return found


def _check_own(name: str, x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> None:
    """``x`` has this rank's tokens."""
    if x.ndim == 0 or x.shape[0] != lengths[group.rank()]:
        raise ValueError(
            f"{name} must have the {lengths[group.rank()]} tokens of rank {group.rank()},"
            f" got {list(x.shape)}"
        )
