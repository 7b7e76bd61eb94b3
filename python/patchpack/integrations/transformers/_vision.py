"""Vision encoders: packed attention, rotary embedding by rows and columns, position tables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchpack import PackedGrid, add_pos_embed, metadata, rope, rope_2d
from patchpack.integrations.transformers import _attention, _text
from patchpack.integrations.transformers._report import Context, Edit, Left, method
from patchpack.integrations.transformers._rewire import (
    can_rewire,
    global_of,
    names_of,
    rewired,
)

_ROTARY = "apply_rotary_pos_emb_vision"
# models whose encoders order patches, windows and positions as Qwen2-VL to Qwen3-VL do
_KNOWN = {
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_omni_moe",
    "qwen3_5",
    "qwen3_5_moe",
}


def packed_encoder(path: str, tower: Any, context: Context) -> Iterator[Edit | Left]:
    """An encoder that computes what it needs of ``grid_thw`` with ``transformers.vision_utils``."""
    names = names_of(type(tower).forward)
    if "get_vision_position_ids" not in names and "get_vision_cu_seqlens" not in names:
        return
    blocks = _text.attending(path, tower)
    if not blocks:
        yield Left("varlen_attention", path, "its blocks take no attention implementation", True)
        return
    _, block = blocks[0]
    packed = False
    if "is_flash_attention_requested" not in names_of(type(block).forward):
        why = "its blocks never take a packed sequence at once"
        yield Left("varlen_attention", path, why, True)
    elif reason := _text.unfit(block):
        yield Left("varlen_attention", path, reason)
    else:
        packed = "varlen_attention" in context.ops
        name = _attention.name_of(context.impl)
        for where, block in blocks:
            what = f"attention of the packed sequence in one call, as {name!r}"
            yield Edit("varlen_attention", where, block.config, "_attn_implementation", name, what)
    if type(tower).__module__.rpartition(".modeling_")[2] not in _KNOWN:
        yield Left("metadata", path, "what it makes of grids is its own; rotary tables are, too")
        yield from _rotary_of_blocks(path, blocks, context)
        return
    yield from _tower(path, tower, blocks, packed, names, context)


@dataclass(frozen=True)
class _Tower:
    """What ``_forward`` hands to an encoder."""

    windows: tuple[int, int] | None  # their side and that of a patch, in pixels
    base: float | None  # of the rotation that attention does
    table: tuple[str, str] | None  # names of what chooses rows of the position table


def _tower(
    path: str,
    tower: Any,
    blocks: list[tuple[str, Any]],
    packed: bool,
    names: set[str],
    context: Context,
) -> Iterator[Edit | Left]:
    windows, rest = None, []  # blocks that attend to whole frames, in the order of windows
    if "get_vision_window_index" in names:
        windows = tower.window_size, tower.patch_size
        rest = [pair for i, pair in enumerate(blocks) if i in tower.fullatt_block_indexes]
        yield Left(
            "metadata",
            path,
            "tokens are put in the order of windows once and back once, at the speed of a copy;"
            " in any other order each of its windowed blocks would gather queries, keys and values",
        )
    table = next((keys for name, keys in _TABLES.items() if name in names), None)
    if table is not None and "add_pos_embed" in context.ops:
        if isinstance(getattr(tower, "pos_embed", None), nn.Embedding):
            rows = functools.partial(
                _resized_table,
                0 if table[0].startswith("bilinear") else 1,
                getattr(tower, "interpolation_mode", "bilinear"),
                getattr(tower, "interpolation_align_corners", True),
                context.impl,
            )
            where = f"{path}.pos_embed".removeprefix(".")
            forward = method(rows, tower.pos_embed)
            what = "patchpack.add_pos_embed"
            yield Edit("add_pos_embed", where, tower.pos_embed, "forward", forward, what)
        else:
            yield Left("add_pos_embed", path, "its position table is no nn.Embedding", True)
            table = None
    else:
        table = None

    base = None
    if packed and "rope_2d" in context.ops and not (rest and _unlike_tables(rest, context.impl)):
        base = _base_of(tower, blocks[0][1], context.impl)
    if base is None:
        yield from _rotary_of_blocks(path, blocks, context)
    else:
        for where, block in (pair for pair in blocks if pair not in rest):
            forward = rewired(type(block).forward, **{_ROTARY: _unturned})
            forward = functools.partial(_with_rotation, forward)
            what = "rotated by rows and columns on the way to attention"
            yield Edit("rope_2d", where, block, "forward", method(forward, block), what)
        yield from _rotary_of_blocks(path, rest, context, drop=True)
        rotary = tower.rotary_pos_emb
        if not rest and "x" in inspect.signature(type(rotary).forward).parameters:
            where = f"{path}.rotary_pos_emb".removeprefix(".")
            what = "no cosines and sines"
            yield Edit("rope_2d", where, rotary, "forward", method(_no_tables, rotary), what)
    # the others need the grid that this hands them
    needed = {"rope_2d": base is not None, "add_pos_embed": table is not None}
    op = next((op for op in needed if needed[op] and "metadata" not in context.ops), "metadata")
    what = "segments, rows and columns from a PackedGrid"
    forward = method(functools.partial(_forward, _Tower(windows, base, table)), tower)
    yield Edit(op, path, tower, "forward", forward, what)


_TABLES = {
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
    "get_vision_bilinear_indices_and_weights": ("bilinear_indices", "bilinear_weights"),
}


def _forward(spec: _Tower, self, hidden_states: Tensor, grid_thw: Tensor, **kwargs):
    """Give the encoder all that follows from the grids; what the caller gave is kept."""
    device = hidden_states.device
    grid = kwargs.pop("packed_grid", None)
    if grid is None:
        grid = PackedGrid(grid_thw, self.spatial_merge_size)
    if torch.compiler.is_compiling():
        torch._check(grid.num_tokens == hidden_states.shape[0])
    elif grid.num_tokens != hidden_states.shape[0]:
        raise ValueError(
            f"hidden_states must have the {grid.num_tokens} patches of grid_thw,"
            f" got {hidden_states.shape[0]}"
        )
    grid = grid.to(device)
    given = {
        "cu_seqlens": grid.cu_seqlens,
        "max_seqlen": grid.max_seqlen,
        "position_ids": grid.position_ids,
    }
    if spec.windows is not None:
        windows = kwargs.pop("packed_windows", None)
        if windows is None:
            windows = windows_of(grid, *spec.windows)
        if kwargs.get("window_index") is None:
            given["window_index"], _ = metadata.get_vision_window_index(
                grid.grid_thw.to(device, non_blocking=True),
                grid.spatial_merge_size,
                *spec.windows,
                num_tokens=grid.num_tokens,
                num_windows=windows.num_segments,
            )
        windows = windows.to(device)
        given["cu_window_seqlens"] = windows.cu_seqlens
        # of a whole window, whatever the batch: a length that changed would be compiled anew
        kwargs["max_window_seqlen"] = (spec.windows[0] // spec.windows[1]) ** 2
    kwargs = given | {name: x for name, x in kwargs.items() if x is not None}
    if spec.table is not None:
        indices, weights = spec.table
        kwargs |= {indices: grid, weights: torch.ones(1, 1, device=device)}
    if spec.base is not None:
        turned = grid if spec.windows is None else windows
        kwargs["rotation"] = _attention.Rotation(turned, spec.base)
    return type(self).forward(self, hidden_states, grid_thw, **kwargs)


def windows_of(grid: PackedGrid, window_size: int, patch_size: int) -> PackedGrid:
    """The windows of all frames as grids of their own, in their order.

    Distances within a window are those within its image, so attention in it may rotate by either.

    Args:
        grid: The images.
        window_size: Side of a window, in pixels.
        patch_size: Side of a patch, in pixels.
    """
    m = grid.spatial_merge_size
    side = window_size // m // patch_size * m  # in patches
    return PackedGrid(_window_sizes(grid.grid_thw, side), m)


@torch.library.custom_op("patchpack::window_sizes", mutates_args=(), device_types="cpu")
def _window_sizes(grid_thw: Tensor, side: int) -> Tensor:
    """Rows and columns of all windows of ``side`` patches, int64 ``[windows, 2]``."""
    frames, rows, cols = grid_thw.unbind(1)
    down, across = -(-rows // side), -(-cols // side)
    count = frames * down * across
    image = torch.repeat_interleave(torch.arange(len(count)), count)
    window = torch.arange(len(image)) - (count.cumsum(0) - count)[image]
    band, place = window // across[image] % down[image], window % across[image]
    height = (rows[image] - side * band).clamp(max=side)
    width = (cols[image] - side * place).clamp(max=side)
    return torch.stack([height, width], dim=1)


@_window_sizes.register_fake
def _(grid_thw: Tensor, side: int) -> Tensor:
    return grid_thw.new_empty(torch.library.get_ctx().new_dynamic_size(), 2)


def _resized_table(
    axis: int, mode: str, align_corners: bool, impl: str | None, self, grid: PackedGrid
) -> Tensor:
    """Rows of the table for every patch, ``[T, 1, C]`` or ``[1, T, C]``: of one weight, 1."""
    side = int(self.num_embeddings**0.5)
    table = self.weight.unflatten(0, (side, side))
    zeros = self.weight.new_zeros(1, table.shape[-1]).expand(grid.num_tokens, -1)
    rows = add_pos_embed(zeros, table, grid, mode=mode, align_corners=align_corners, impl=impl)
    return rows.unsqueeze(axis)


def _unturned(q: Tensor, k: Tensor, cos, sin) -> tuple[Tensor, Tensor]:
    return q, k


def _no_tables(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0)


def _turn_by_table(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: str | None
) -> tuple[Tensor, Tensor]:
    """Turn ``[T, H, D]``, or ``[1, T, H, D]``, by tables ``[T, D]`` whose halves are equal."""
    tables = (x[..., : x.shape[-1] // 2].float() for x in (cos, sin))
    shape = q.shape[:-2]
    q, k = rope(*(x.flatten(0, -3) for x in (q, k)), *tables, impl=impl)
    return q.unflatten(0, shape), k.unflatten(0, shape)


def _rotary_of_blocks(
    path: str, blocks: list[tuple[str, Any]], context: Context, drop: bool = False
) -> Iterator[Edit | Left]:
    """Rotary embedding by the encoder's own tables; ``drop`` the rotation that others are given."""
    if not blocks:
        return
    if reason := _unlike_tables(blocks, context.impl):
        yield Left("rope_2d", path, reason, True)
        return
    turn = functools.partial(_turn_by_table, impl=context.impl)
    for where, block in blocks:
        forward = rewired(type(block).forward, **{_ROTARY: turn})
        forward = functools.partial(_without_rotation, forward) if drop else forward
        what = "patchpack.rope, from the encoder's own tables"
        yield Edit("rope_2d", where, block, "forward", method(forward, block), what)


def _unlike_tables(blocks: list[tuple[str, Any]], impl: str | None) -> str | None:
    """Why ``patchpack.rope`` cannot turn the heads of ``blocks``."""
    _, block = blocks[0]
    forward = type(block).forward
    if not can_rewire(forward, _ROTARY):
        return f"its blocks do not call {_ROTARY}"
    turn = functools.partial(_turn_by_table, impl=impl)
    if not _text.turns_by_table(global_of(forward, _ROTARY), turn, (3, 2), block.head_dim):
        return f"{_ROTARY} turns heads as patchpack.rope does not"
    return None


def _with_rotation(forward, self, *args, **kwargs):
    if kwargs.get("rotation") is None:
        raise RuntimeError(f"{type(self).__name__} got no rotation: its encoder passed none on")
    return forward(self, *args, **kwargs)


def _without_rotation(forward, self, *args, rotation=None, **kwargs):
    return forward(self, *args, **kwargs)


@torch.no_grad()
def _base_of(tower: Any, block: Any, impl: str | None) -> float | None:
    """The base with which ``patchpack.rope_2d`` turns the heads of ``block`` as its model does."""
    rotary: Any = getattr(tower, "rotary_pos_emb", None)
    inv_freq, forward = getattr(rotary, "inv_freq", None), type(block).forward
    if inv_freq is None or inv_freq.is_meta or not can_rewire(forward, _ROTARY):
        return None
    settings = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    base = float(settings.get("rope_theta", getattr(rotary, "theta", 10_000.0)))
    m = tower.spatial_merge_size
    grid = PackedGrid([(3 * m, 4 * m)], m, device=inv_freq.device)
    heads = _text.probe((grid.num_tokens, 2), block.head_dim, inv_freq.device)
    try:
        if "x" in inspect.signature(type(rotary).forward).parameters:
            cos, sin = type(rotary).forward(rotary, heads, grid.position_ids)
        else:
            angles = type(rotary).forward(rotary, grid.position_ids)
            angles = torch.cat([angles, angles], dim=-1)
            cos, sin = angles.cos(), angles.sin()
        want = global_of(forward, _ROTARY)(heads, heads.flip(0), cos, sin)
        got = rope_2d(heads, heads.flip(0), grid, base=base, impl=impl)
    except (TypeError, ValueError, RuntimeError):  # turned by something else
        return None
    alike = (torch.allclose(x, y, rtol=0, atol=1e-4) for x, y in zip(got, want, strict=True))
    return base if all(alike) else None
