"""Language models: causal attention within samples, and rotary embedding from positions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patchpack import metadata, mrope, rope
from patchpack.integrations.transformers import _attention
from patchpack.integrations.transformers._report import Context, Edit, Left, method
from patchpack.integrations.transformers._rewire import (
    can_rewire,
    global_of,
    names_of,
    rewired,
)

_ROTARY = ("apply_rotary_pos_emb", "apply_multimodal_rotary_pos_emb")
# what code of another kind may raise when it is tried
_OTHERWISE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, StopIteration)
_CLOSE = 1e-4  # of probes at positions below 100, whose angles are right to 1e-5 in float32


def language_model(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """A decoder with layers that share one rotary embedding."""
    rotary = getattr(model, "rotary_emb", None)
    if rotary is None or not hasattr(model, "layers"):
        return
    layers = attending(path, model)
    if not layers:
        yield Left("varlen_attention", path, "its layers take no attention implementation", True)
        return
    yield from attention_of(path, model, layers, context)
    yield from _rotary_of(path, rotary, layers, context)


def attending(path: str, model: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules in ``model`` that take an attention implementation."""
    return [
        (f"{path}.{name}".removeprefix("."), module)
        for name, module in model.named_modules()
        if "ALL_ATTENTION_FUNCTIONS" in names_of(type(module).forward)
    ]


def attention_of(
    path: str, model: Any, layers: list[tuple[str, Any]], context: Context
) -> Iterator[Edit | Left]:
    """Attention of ``layers`` through the ``AttentionInterface``."""
    _, layer = layers[0]
    if reason := unfit(layer):
        yield Left("varlen_attention", path, reason)
        return
    name = _attention.name_of(context.impl)
    for _, layer in layers:
        yield Edit("varlen_attention", "", layer.config, "_attn_implementation", name, "")
    forward = type(model).forward
    for mask in ("create_causal_mask", "create_sliding_window_causal_mask"):
        if can_rewire(forward, mask):
            forward = rewired(forward, **{mask: _given_mask})
    forward = method(functools.partial(_forward, forward), model)
    what = f"attention within samples, without masks, as {name!r}"
    yield Edit("varlen_attention", path, model, "forward", forward, what)


def unfit(layer: Any) -> str | None:
    """Why ``patchpack.varlen_attention`` cannot be the attention of ``layer``."""
    dropout, head_dim = getattr(layer, "attention_dropout", 0.0), layer.head_dim
    if dropout:
        return f"attention drops out {dropout} of its weights in training"
    if head_dim > 128:
        return f"heads have {head_dim} channels, more than 128"
    return None


def _given_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """Padding alone: transformers would look into masks and positions, which are on the device."""
    return attention_mask


def _forward(forward, self, *args, **kwargs):
    """Find the bounds of samples once for all layers."""
    x = kwargs.get("inputs_embeds")
    x = kwargs.get("input_ids") if x is None else x
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    cached = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    if x is not None and plain and not args and not cached and "cu_seq_lens_q" not in kwargs:
        if position_ids is not None and position_ids.ndim == 3:  # of text first, or not at all
            position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
        batch, length = x.shape[:2]
        given = batch, length, length, mask, position_ids, x.device
        kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"] = _attention.segments(*given)
    return forward(self, *args, **kwargs)


def _rotary_of(
    path: str, rotary: Any, layers: list[tuple[str, Any]], context: Context
) -> Iterator[Edit | Left]:
    _, layer = layers[0]
    forward = type(layer).forward
    name = next((name for name in _ROTARY if can_rewire(forward, name)), None)
    if name is None:
        yield Left("mrope", path, "its layers call no rotary embedding that is known", True)
        return
    turn, what = _turn_of(rotary, layer, name, context.impl)
    if turn is None:
        yield Left("mrope", path, what, _is_plain(rotary))
        return
    tables = _positions if turn.func is _turn_by_positions else _float_tables
    where = f"{path}.rotary_emb".removeprefix(".")
    yield Edit("mrope", where, rotary, "forward", method(tables, rotary), tables.__doc__ or "")
    for where, layer in layers:
        forward = method(rewired(type(layer).forward, **{name: turn}), layer)
        yield Edit("mrope", where, layer, "forward", forward, what)


def _turn_of(
    rotary: Any, layer: Any, name: str, impl: str | None
) -> tuple[functools.partial | None, str]:
    """What turns the heads of ``layer`` as its model does, found by trying; or why nothing does."""
    stock = global_of(type(layer).forward, name)
    pairs = layer.head_dim // 2
    settings = getattr(rotary.config, "rope_parameters", None) or {}
    section = getattr(rotary, "mrope_section", settings.get("mrope_section"))
    theta = settings.get("rope_theta")
    if theta and not rotary.inv_freq.is_meta and getattr(rotary, "rope_type", "") == "default":
        options = [(list(section), True), (list(section), False)] if section else []
        for sections, interleaved in [*options, ([pairs, 0, 0], False)]:
            turn = functools.partial(
                _turn_by_positions,
                mrope_section=sections,
                mrope_interleaved=interleaved,
                base=float(theta),
                impl=impl,
            )
            if _turns_alike(rotary, layer, stock, turn, section):
                return turn, "patchpack.mrope, from positions"
    turn = functools.partial(_turn_by_table, impl=impl)
    if name == "apply_rotary_pos_emb" and turns_by_table(stock, turn, (1, 2, 3), layer.head_dim):
        return turn, "patchpack.rope, from the model's own tables"
    return None, f"{name} turns heads as no op here does"


def _is_plain(rotary: Any) -> bool:
    """Whether its frequencies are neither scaled, nor rounded, nor unknown yet."""
    inv_freq = rotary.inv_freq
    plain = getattr(rotary, "rope_type", "") == "default"
    return plain and inv_freq.dtype == torch.float32 and not inv_freq.is_meta


@torch.no_grad()
def _turns_alike(rotary, layer, stock, turn, section) -> bool:
    device = rotary.inv_freq.device
    ids = [[0, 1, 2, 3, 50], [0, 4, 1, 7, 21], [0, 2, 9, 1, 33]]
    ids = torch.tensor(ids, device=device)[:, None]  # [3, 1, L]
    ids = ids if section else ids[:1].expand(3, -1, -1)
    heads = probe((1, 2, 5), layer.head_dim, device)
    try:
        cos, sin = type(rotary).forward(rotary, heads, ids if section else ids[0])
        mixed = [section] if stock.__name__ == _ROTARY[1] else []
        want = stock(heads, heads.flip(2), cos, sin, *mixed)
        got = turn(heads, heads.flip(2), ids, ids)
    except _OTHERWISE:
        return False
    return all(torch.allclose(x, y, rtol=0, atol=_CLOSE) for x, y in zip(got, want, strict=True))


def probe(shape: tuple[int, ...], head_dim: int, device: torch.device | str) -> Tensor:
    """Heads of various values, float32 ``[*shape, D]``."""
    number = torch.arange(head_dim * torch.Size(shape).numel(), device=device)
    return (0.7 * number).sin().view(*shape, head_dim)


@torch.no_grad()
def turns_by_table(stock, turn, shape: tuple[int, ...], head_dim: int) -> bool:
    """Whether ``stock`` makes of full tables what ``turn`` does, heads after tokens or before."""
    heads = probe(shape, head_dim, "cpu")
    angles = probe(shape[:1] if len(shape) == 2 else (1, shape[-1]), head_dim // 2, "cpu")
    angles = torch.cat([angles, angles], dim=-1)
    try:
        want = stock(heads, heads.flip(0, 1), angles.cos(), angles.sin())
        got = turn(heads, heads.flip(0, 1), angles.cos(), angles.sin())
    except _OTHERWISE:
        return False
    return all(torch.allclose(x, y, rtol=0, atol=_CLOSE) for x, y in zip(got, want, strict=True))


def _positions(self, x, position_ids):
    """positions, in place of cosines and sines"""
    if position_ids.ndim == 2:
        position_ids = position_ids.expand(3, *position_ids.shape)
    return position_ids, position_ids


def _float_tables(self, x, position_ids):
    """cosines and sines in float32"""
    return type(self).forward(self, x.new_empty((), dtype=torch.float32), position_ids)


def _turn_by_positions(
    q: Tensor, k: Tensor, position_ids: Tensor, _: Tensor, *args, mrope_section, mrope_interleaved,
    base, impl, **kwargs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Turn ``[B, H, L, D]`` by ``position_ids`` ``[3, B, L]``, which come as cosines."""
    batch, length = q.shape[0], q.shape[2]
    q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))  # [T, H, D]
    turned = mrope(
        q,
        k,
        position_ids.expand(3, batch, length).flatten(1),
        mrope_section=mrope_section,
        mrope_interleaved=mrope_interleaved,
        base=base,
        impl=impl,
    )
    q, k = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in turned)
    return q, k


def _turn_by_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, impl, **kwargs
) -> tuple[Tensor, Tensor]:
    """Turn ``[B, H, L, D]`` by tables ``[B, L, D]`` whose halves are equal."""
    batch, length = q.shape[0], q.shape[2]
    half = cos.shape[-1] // 2
    cos, sin = (x[..., :half].float().expand(batch, length, half).flatten(0, 1) for x in (cos, sin))
    q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))  # [T, H, D]
    turned = rope(q, k, cos, sin, impl=impl)
    q, k = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in turned)
    return q, k


# Positions of M-RoPE -----------------------------------------------------------------------------


def rope_index(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """``get_rope_index`` of a model whose token types say where images are."""
    index = index_of(type(model), getattr(model, "config", None))
    if index is None:
        return
    if not _indexes_alike(model, index):
        yield Left("get_mrope_position_ids", path, "its positions follow another rule", True)
        return
    what = "patchpack.metadata.get_mrope_position_ids"
    value = method(functools.partial(_get_rope_index, index), model, "get_rope_index")
    yield Edit("get_mrope_position_ids", path, model, "get_rope_index", value, what)


class Index(NamedTuple):
    """The rule by which a class of models finds positions of text, images and videos.

    Attributes:
        merge_size: Side of the block of patches that is one token.
        split_frames: Whether each frame of a video stands alone, between timestamps.
        rate: Positions a second of video takes; ``None`` where frames are counted.
        whole_seconds: Whether seconds between frames are made integers first.
    """

    merge_size: int
    split_frames: bool
    rate: float | None
    whole_seconds: bool

    def __call__(
        self,
        mm_token_type_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | Sequence[float] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Positions, int64 ``[3, B, L]``, or ``[3, L]`` of packed samples; 0 where padding is."""
        types, seconds = mm_token_type_ids.long(), None
        device = types.device
        images, videos = (
            None if x is None else x.to(device) for x in (image_grid_thw, video_grid_thw)
        )
        if self.rate is not None and video_grid_thw is not None:
            given = second_per_grid_ts
            seconds = [1.0] * len(video_grid_thw) if given is None else given
            seconds = torch.as_tensor(seconds, dtype=torch.float32, device=device)
            seconds = self.rate * (seconds.trunc() if self.whole_seconds else seconds)
        position_ids, _ = metadata.get_mrope_position_ids(
            types,
            images,
            videos,
            attention_mask,
            vision_start_token_id=None,
            image_token_id=1,
            video_token_id=2,
            cu_seqlens=cu_seqlens,
            second_per_grid_ts=seconds,
            split_frames=self.split_frames,
            frames_advance=False,
            merge_size=self.merge_size,
        )
        return position_ids if attention_mask is None else position_ids * (attention_mask != 0)


def index_of(cls: Any, config: Any) -> Index | None:
    """The rule of ``cls``, as its code says; ``None`` if it has none."""
    stock = getattr(cls, "get_rope_index", None)
    vision: Any = getattr(config, "vision_config", None)
    if stock is None or not hasattr(vision, "spatial_merge_size"):
        return None
    names = names_of(stock)
    rate = vision.tokens_per_second if "tokens_per_second" in names else None
    return Index(
        vision.spatial_merge_size, "repeat_interleave" in names, rate, whole_seconds="int" in names
    )


def _get_rope_index(
    index: Index,
    self,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Positions ``[3, B, L]``, and what a decoder adds to its count of tokens, ``[B, 1]``."""
    types = mm_token_type_ids.to(input_ids.device)
    mask = None if attention_mask is None else attention_mask.to(input_ids.device)
    ids = index(types, image_grid_thw, video_grid_thw, second_per_grid_ts, mask)
    count = types.shape[1] if mask is None else (mask != 0).sum(1)
    return ids.to(input_ids.dtype), (ids.amax((0, 2)) + 1 - count)[:, None]


def _indexes_alike(model: Any, index: Index) -> bool:
    m = index.merge_size
    split = [2, 2, 0] * 3 if index.split_frames else [2] * 6
    row = [0, *[1] * 6, 0, 0, *split, 0]
    types = torch.tensor([row, [0] * len(row)], dtype=torch.int32)
    mask = torch.ones_like(types)
    mask[1, :3] = 0
    arguments = {
        "mm_token_type_ids": types,
        "image_grid_thw": torch.tensor([[1, 2 * m, 3 * m]]),
        "video_grid_thw": torch.tensor([[3, m, 2 * m]]),
        "attention_mask": mask,
    }
    if index.rate is not None:
        arguments["second_per_grid_ts"] = torch.tensor([1.7])
    ids = torch.zeros_like(types).long()
    try:
        want = type(model).get_rope_index(model, ids, **arguments)
    except _OTHERWISE:
        return False
    return all(map(torch.equal, _get_rope_index(index, model, ids, **arguments), want))
