"""Packed attention as an implementation of transformers' ``AttentionInterface``.

Importing this registers ``patchpack_flash``, and ``patchpack_flash_triton``, ``_native`` and
``_reference`` for an explicit ``impl``. Any model that takes an attention implementation takes
them: ``model.set_attn_implementation("patchpack_flash")``. The vision encoders of transformers hand
a packed sequence over in one call only to a name with "flash" in it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from patchpack import varlen_attention
from patchpack.packing import PackedGrid


class Rotation(NamedTuple):
    """By what a vision encoder's queries and keys are turned, on their way to attention."""

    grid: PackedGrid
    base: float


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    impl: str | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    rotation: Rotation | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within the samples of a batch, or within the segments of a packed sequence.

    Padding gives 0.

    What a sample is follows from the first of these that is given: ``cu_seq_lens_q``;
    ``attention_mask``, whose zeros may be before and after the tokens of a row but not among them;
    ``position_ids``, which restart where a sample does; else every row is one. Nothing is read from
    the device: where the number of samples is unknown, there are empty ones.

    Args:
        module: The layer; its ``is_causal`` holds where the argument is not given.
        query: ``[B, Hq, Lq, D]``, as a view of ``[B, Lq, Hq, D]`` best: others are copied.
        key: ``[B, Hk, Lk, D]``, the same.
        value: ``[B, Hk, Lk, D]``, the same.
        attention_mask: Zero where padding is, bool or integer ``[B, Lk]``, or ``None``.
        impl: As of ``patchpack.varlen_attention``.
        scaling: Factor of the scores; by default ``D ** -0.5``.
        dropout: Must be 0.
        is_causal: Whether a query sees no later key.
        sliding_window: How many keys a causal query sees, its own among them.
        softcap: Must be ``None``.
        s_aux: Must be ``None``.
        position_ids: Of text, integer ``[B, Lq]`` or ``[1, Lq]``; used without a cache alone.
        cu_seq_lens_q: Where samples begin and end, int32 ``[S + 1]``, in queries of all rows.
        cu_seq_lens_k: The same in keys.
        max_length_q: Tokens of the longest sample.
        rotation: Turn queries and keys by rows and columns first, as ``patchpack.rope_2d`` does.
        **kwargs: What other implementations take.

    Returns:
        ``[B, Lq, Hq, D]``, and ``None`` for the weights, which never exist.

    Raises:
        ValueError: An argument asks for what ``patchpack.varlen_attention`` does not do.
    """
    for name, given in (("dropout", dropout), ("softcap", softcap), ("s_aux", s_aux)):
        if given is not None and not (isinstance(given, (int, float)) and given == 0):
            raise ValueError(f"{name} must be unset for patchpack's attention, got {given}")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [T, H, D]
    if cu_seq_lens_q is None:
        cu_seq_lens_q, cu_seq_lens_k = segments(
            query.shape[0], query.shape[2], key.shape[2], attention_mask, position_ids, query.device
        )
    if cu_seq_lens_k is cu_seq_lens_q:
        cu_seq_lens_k = None
    causal = module.is_causal if is_causal is None else is_causal
    left = -1 if sliding_window is None else sliding_window - 1
    turned = {} if rotation is None else {"rope": rotation.grid, "rope_base": rotation.base}
    out = varlen_attention(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q if turned else None,
        softmax_scale=scaling,
        causal=causal,
        window_size=(left, -1 if causal else left),
        impl=impl,
        **turned,
    )
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def segments(
    batch: int,
    length_q: int,
    length_k: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Bounds of samples in queries and in keys, int32 ``[S + 1]`` each; no device is waited for."""
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must have shape [B, L], got {list(attention_mask.shape)}: what a"
                " query sees is patchpack's to say"
            )
        mask = attention_mask[:, -length_k:]
        if mask.shape[1] != length_k:
            raise ValueError(
                f"attention_mask must be of the {length_k} keys, got {list(attention_mask.shape)}:"
                " caches with room for more are not supported"
            )
        return _bounds_of_rows(mask[:, -length_q:])[0], _bounds_of_rows(mask)[1]
    if position_ids is not None and length_q == length_k:
        bounds = _bounds_of_positions(position_ids.expand(batch, length_q))
        return bounds, bounds
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return rows * length_q, rows * length_k


def _bounds_of_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds ``[5 B + 1]`` of segments of queries, and of keys.

    Of each row: queries of padding, which see no key and give 0, as in torch's own attention; keys
    of padding, which no query sees; its tokens; and the same padding after them.
    """
    batch, length = mask.shape
    valid = (mask != 0).int()
    row = torch.arange(batch, device=mask.device) * length
    begin = row + valid.argmax(1)
    end = begin + valid.sum(1)
    queries = torch.stack([row, begin, begin, end, row + length], dim=1)
    keys = torch.stack([row, row, begin, end, end], dim=1)
    pad = torch.nn.functional.pad
    queries, keys = (pad(x.flatten(), (0, 1), value=batch * length) for x in (queries, keys))
    return queries.int(), keys.int()


def _bounds_of_positions(position_ids: Tensor) -> Tensor:
    """Samples begin where rows do, and where positions do not go on: ``[T + 1]``, most empty."""
    num_tokens = position_ids.numel()
    begins = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten()
    token = torch.arange(num_tokens, device=position_ids.device)
    place = torch.where(begins, begins.cumsum(0) - 1, num_tokens)
    bounds = torch.full((num_tokens + 1,), num_tokens, device=position_ids.device)
    # all that begin nothing write the end to the end
    return bounds.scatter_(0, place, torch.where(begins, token, num_tokens)).int()


def padding_mask(
    *args, kv_length: int, attention_mask: Tensor | None = None, **kwargs
) -> Tensor | None:
    """The padding of the keys; unlike transformers' own, it is not looked into for the device."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def name_of(impl: str | None) -> str:
    """The name under which ``impl`` is registered."""
    return "patchpack_flash" if impl is None else f"patchpack_flash_{impl}"


IMPLS = (None, "triton", "native", "reference")
for _impl in IMPLS:
    AttentionInterface.register(name_of(_impl), functools.partial(attention, impl=_impl))
    AttentionMaskInterface.register(name_of(_impl), padding_mask)
