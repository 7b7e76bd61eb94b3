"""The table of contents: every op, its reference, its named cases and what it is differentiable in.

A case is a batch of images. ``Spec.make_images`` gives the arguments of each image alone and
``Spec.pack`` joins them, so that the contract can compare a packed batch with its images one by
one. Sizes are ``(t, h, w)`` in patches; ``(0, 0, 0)`` stands for no image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import patchpack
from patchpack import TokenLayout, reference
from patchpack.layout import FeatureMap, Vector
from patchpack.packing import PackedGrid

Inputs = dict[str, Any]
Sizes = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Spec:
    """One op and everything the contract needs to know of it.

    ``make_images(sizes, dtype, device, seed, **options)`` gives keyword arguments of ``op``, one
    dictionary an image. ``cases`` maps a name to ``sizes`` and further options. ``grads`` names the
    arguments that the op is differentiable in, where they are floating, and ``shared`` those that
    all images have in common. ``lists`` says that images come as a list, not packed.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    make_images: Callable[..., list[Inputs]]
    pack: Callable[[Sequence[Inputs]], Inputs]
    cases: dict[str, Inputs]
    grads: tuple[str, ...]
    shared: tuple[str, ...] = ()
    lists: bool = False

    def make_inputs(self, case: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
        """The packed arguments of a named case."""
        options = self.cases[case]
        return self.pack(self.make_images(dtype=dtype, device=device, seed=seed, **options))


def grid_of(size: tuple[int, int, int], merge: int, device: str) -> PackedGrid:
    """The grid of one image, or of none if it has no tokens."""
    return PackedGrid([size] if all(size) else [], merge, device=device)


def cat_grids(grids: Sequence[PackedGrid]) -> PackedGrid:
    """The grid of all the images of ``grids``, in order."""
    first = grids[0]
    return PackedGrid(
        torch.cat([grid.grid_thw for grid in grids]),
        first.spatial_merge_size,
        first.merge_temporal,
        device=first.geometry.device,
    )


def _pack(
    images: Sequence[Inputs], *, along: dict[str, int] | None = None, lists: Sequence[str] = ()
) -> Inputs:
    """Join tensors along the dimension that ``along`` names, ``lists``, grids and layouts.

    The rest is shared.
    """
    packed = dict(images[0])
    for name, dim in (along or {}).items():
        packed[name] = torch.cat([image[name] for image in images], dim=dim)
    for name in lists:
        packed[name] = [x for image in images for x in image[name]]
    for name in ("grid", "rope"):
        if isinstance(packed.get(name), PackedGrid):
            packed[name] = cat_grids([image[name] for image in images])
    if isinstance(packed.get("layout"), TokenLayout):
        packed["layout"] = TokenLayout.cat([image["layout"] for image in images])
    return packed


def _random(generator: torch.Generator, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=generator).to(device, dtype)


# ------------------------------------------------------------------------------------------- rope


def _head_images(sizes: Sizes, dtype, device, seed, heads, head_dim) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    num_q_heads, num_k_heads = heads
    images = []
    for t, h, w in sizes:
        tokens = t * h * w
        images.append(
            {
                "q": _random(generator, tokens, num_q_heads, head_dim, dtype=dtype, device=device),
                "k": _random(generator, tokens, num_k_heads, head_dim, dtype=dtype, device=device),
            }
        )
    return images


def _rope_images(
    sizes, dtype, device, seed, heads=(2, 2), head_dim=64, pairs=None, full=False, **options
) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed + 1)
    images = _head_images(sizes, dtype, device, seed, heads, head_dim)
    for image in images:
        angle = torch.randn(image["q"].shape[0], pairs or head_dim // 2, generator=generator) * 9
        if full:
            angle = angle.repeat(1, 2)
        image |= {"cos": angle.cos().to(device), "sin": angle.sin().to(device), **options}
    return images


_ROPE = Spec(
    op=patchpack.rope,
    reference=reference.rope,
    make_images=_rope_images,
    pack=lambda images: _pack(images, along={"q": 0, "k": 0, "cos": 0, "sin": 0}),
    cases={
        "one image": {"sizes": [(1, 8, 8)]},
        "ragged, GQA": {"sizes": [(1, 1, 1), (2, 3, 5), (1, 7, 4)], "heads": (4, 1)},
        "interleaved": {"sizes": [(1, 3, 5), (1, 2, 9)], "interleaved": True, "head_dim": 72},
        "partial": {"sizes": [(1, 3, 5), (1, 2, 9)], "head_dim": 80, "pairs": 20},
        "partial, interleaved": {
            "sizes": [(1, 3, 5)],
            "head_dim": 96,
            "pairs": 12,
            "interleaved": True,
        },
        "full-width table": {"sizes": [(1, 3, 5), (1, 2, 2)], "head_dim": 128, "full": True},
    },
    grads=("q", "k"),
)


# ---------------------------------------------------------------------------------------- rope_2d


def _rope_2d_images(
    sizes, dtype, device, seed, heads=(2, 2), head_dim=64, merge=1, **options
) -> list[Inputs]:
    images = _head_images(sizes, dtype, device, seed, heads, head_dim)
    for size, image in zip(sizes, images, strict=True):
        image |= {"grid": grid_of(size, merge, device), **options}
    return images


_ROPE_2D = Spec(
    op=patchpack.rope_2d,
    reference=reference.rope_2d,
    make_images=_rope_2d_images,
    pack=lambda images: _pack(images, along={"q": 0, "k": 0}),
    cases={
        "one image": {"sizes": [(1, 8, 8)]},
        "Qwen2-VL": {
            "sizes": [(1, 4, 6), (2, 6, 2), (1, 2, 2), (1, 8, 8)],
            "heads": (4, 4),
            "head_dim": 80,
            "merge": 2,
        },
        "Pixtral": {"sizes": [(1, 5, 7), (1, 1, 13)], "axes": "even_odd"},
        "MoonViT": {
            "sizes": [(1, 5, 7), (3, 2, 3)],
            "head_dim": 72,
            "axes": "paired",
            "interleaved": True,
        },
        "head size 32, GQA": {"sizes": [(1, 3, 3), (1, 9, 2)], "head_dim": 32, "heads": (6, 2)},
        "many heads": {"sizes": [(1, 3, 3), (1, 2, 5)], "head_dim": 32, "heads": (9, 6)},
        "head size 88": {"sizes": [(1, 4, 4), (1, 8, 4)], "head_dim": 88, "merge": 4},
        "head size 96": {"sizes": [(1, 4, 5)], "head_dim": 96, "interleaved": True},
        "head size 128": {"sizes": [(1, 6, 4), (1, 2, 2)], "head_dim": 128, "merge": 2},
        "many images": {"sizes": [(1, 1 + i % 3, 1 + i % 5) for i in range(33)]},
        "thin": {"sizes": [(1, 1, 97), (1, 101, 1)], "base": 100.0},
    },
    grads=("q", "k"),
)


# ------------------------------------------------------------------------------------------ mrope


def _mrope_images(
    sizes, dtype, device, seed, heads=(4, 2), head_dim=128, sections=(16, 24, 24), **options
) -> list[Inputs]:
    rows, start = options.pop("rows", 3), options.pop("start", 0)
    images = _head_images(sizes, dtype, device, seed, heads, head_dim)
    for (t, h, w), image in zip(sizes, images, strict=True):
        ids = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).reshape(-1, 3)
        ids = torch.cat([ids.new_full((rows - 3, len(ids)), -7), start + ids.T])
        image |= {"position_ids": ids.to(device), "mrope_section": sections, **options}
    return images


_MROPE = Spec(
    op=patchpack.mrope,
    reference=reference.mrope,
    make_images=_mrope_images,
    pack=lambda images: _pack(images, along={"q": 0, "k": 0, "position_ids": 1}),
    cases={
        "Qwen2-VL": {"sizes": [(1, 4, 6), (3, 2, 2)]},
        "Qwen3-VL": {
            "sizes": [(1, 4, 6), (3, 2, 2)],
            "sections": (24, 20, 20),
            "mrope_interleaved": True,
            "base": 5e6,
        },
        "text row": {"sizes": [(1, 5, 3)], "rows": 4, "heads": (7, 1)},
        "position 131k": {"sizes": [(2, 3, 3), (1, 2, 2)], "start": 131_000},
        "partial": {"sizes": [(1, 4, 4)], "sections": (8, 12, 12), "head_dim": 96},
        "partial, interleaved": {
            "sizes": [(1, 4, 4)],
            "sections": (11, 11, 10),
            "head_dim": 80,
            "mrope_interleaved": True,
        },
        "no time": {"sizes": [(1, 4, 4), (1, 3, 2)], "sections": (0, 16, 16), "head_dim": 64},
    },
    grads=("q", "k"),
)


# ------------------------------------------------------------------------------- varlen_attention


def _attention_images(
    sizes, dtype, device, seed, heads=(2, 2), head_dim=64, keys=None, more_keys=0, padding=0,
    merge=None, **options,
) -> list[Inputs]:  # fmt: skip
    """``keys`` is the ratio of keys to queries, and each segment has ``more_keys`` besides.

    The last image gets ``padding`` rows of NaN.

    With ``merge``, the tokens are those of a grid.
    """
    generator = torch.Generator().manual_seed(seed)
    num_q_heads, num_k_heads = heads
    images = []
    for t, h, w in sizes:
        queries = torch.tensor([0, *[h * w] * t], dtype=torch.int32)
        seen = queries
        if keys is not None:
            seen = (queries * keys).int()
            seen[1:] += more_keys
        shapes = {
            "q": (int(queries.sum()), num_q_heads, head_dim),
            "k": (int(seen.sum()), num_k_heads, head_dim),
            "v": (int(seen.sum()), num_k_heads, head_dim),
        }
        image: Inputs = {
            n: _random(generator, *s, dtype=dtype, device=device) for n, s in shapes.items()
        }
        image["cu_seqlens_q"] = queries.cumsum(0, dtype=torch.int32).to(device)
        if keys is not None:
            image["cu_seqlens_k"] = seen.cumsum(0, dtype=torch.int32).to(device)
        if merge is not None:
            image["rope"] = grid_of((t, h, w), merge, device)
        images.append(image | options)
    if padding:
        for name in ("q", "k", "v"):
            rows = images[-1][name].new_full((padding, *images[-1][name].shape[1:]), float("nan"))
            images[-1][name] = torch.cat([images[-1][name], rows])
    return images


def _pack_attention(images: Sequence[Inputs]) -> Inputs:
    packed = _pack(images, along={"q": 0, "k": 0, "v": 0})
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in packed:
            lengths = torch.cat([image[name].diff() for image in images])
            packed[name] = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return packed


_VARLEN_ATTENTION = Spec(
    op=patchpack.varlen_attention,
    reference=reference.varlen_attention,
    make_images=_attention_images,
    pack=_pack_attention,
    cases={
        "Qwen2-VL": {"sizes": [(1, 8, 8), (2, 3, 5), (1, 1, 1)], "head_dim": 80},
        "lse": {"sizes": [(1, 5, 5), (1, 9, 8)], "return_lse": True},
        "SigLIP": {"sizes": [(1, 10, 13), (1, 4, 4)], "head_dim": 72},
        "causal, GQA": {
            "sizes": [(1, 9, 9), (1, 2, 5)],
            "heads": (4, 1),
            "head_dim": 128,
            "causal": True,
        },
        "window": {"sizes": [(1, 11, 12), (1, 3, 3)], "window_size": (20, 9), "head_dim": 32},
        "causal window": {
            "sizes": [(1, 11, 12), (1, 3, 3)],
            "window_size": (17, 0),
            "causal": True,
            "head_dim": 96,
        },
        "more keys than queries": {
            "sizes": [(1, 6, 6), (2, 2, 3)],
            "keys": 2.5,
            "heads": (2, 1),
            "causal": True,
        },
        "fewer keys than queries": {
            "sizes": [(1, 6, 6), (1, 1, 1), (1, 7, 8)],
            "keys": 0.5,
            "causal": True,
            "return_lse": True,
            "head_dim": 48,
        },
        "few queries, many keys": {
            "sizes": [(1, 1, 3), (1, 1, 1)],
            "keys": 1,
            "more_keys": 1023,
            "heads": (1, 1),
            "return_lse": True,
            "head_dim": 16,
        },
        "rows past the end": {"sizes": [(1, 7, 9), (1, 2, 2)], "padding": 70, "return_lse": True},
        "tile bounds": {"sizes": [(1, 1, n) for n in (1, 2, 17, 127, 128, 129)], "head_dim": 16},
        "empty segments": {"sizes": [(2, 0, 1), (1, 4, 4), (1, 0, 1), (1, 1, 3), (1, 0, 1)]},
        "scale": {"sizes": [(1, 8, 5)], "softmax_scale": 0.3, "head_dim": 88},
        "many images": {"sizes": [(1, 1 + i % 3, 1 + i % 5) for i in range(40)], "head_dim": 32},
        "rotated": {
            "sizes": [(1, 8, 12), (2, 4, 6), (1, 2, 2)],
            "head_dim": 80,
            "merge": 2,
        },
        "rotated, short segments": {
            "sizes": [(1, 8, 8), (2, 4, 6), (1, 2, 2)],
            "head_dim": 80,
            "heads": (5, 5),
            "merge": 2,
            "max_seqlen_q": 64,
        },
        "rotated, MoonViT, GQA": {
            "sizes": [(1, 5, 7), (2, 2, 3), (1, 1, 1)],
            "head_dim": 72,
            "heads": (4, 2),
            "merge": 1,
            "max_seqlen_q": 64,
            "rope_axes": "paired",
            "rope_interleaved": True,
        },
        "rotated, head size 128": {
            "sizes": [(1, 8, 8), (1, 4, 4)],
            "head_dim": 128,
            "merge": 4,
            "max_seqlen_q": 64,
        },
    },
    grads=("q", "k", "v"),
)


# ----------------------------------------------------------------------------- interpolate_tokens


def _interpolate_images(
    sizes, dtype, device, seed, target_hw, channels=16, merge=1, **options
) -> list[Inputs]:
    """``target_hw`` is one pair for all, or a pair an image."""
    generator = torch.Generator().manual_seed(seed)
    single = isinstance(target_hw[0], int)
    images = []
    for i, size in enumerate(sizes):
        grid = grid_of(size, merge, device)
        images.append(
            {
                "x": _random(generator, grid.num_tokens, channels, dtype=dtype, device=device),
                "grid": grid,
                "target_hw": target_hw if single else [target_hw[i % len(target_hw)]],
                **options,
            }
        )
        if not single:
            images[-1]["target_hw"] = torch.tensor(images[-1]["target_hw"])[: grid.num_grids]
    return images


def _pack_maps(images: Sequence[Inputs]) -> Inputs:
    ragged = isinstance(images[0]["target_hw"], Tensor)
    return _pack(images, along={"x": 0, **({"target_hw": 0} if ragged else {})})


_SHRUNK = {"sizes": [(1, 9, 13), (2, 5, 4), (1, 1, 7)], "target_hw": [(4, 5), (3, 1), (1, 3)]}
_GROWN = {"sizes": [(1, 3, 5), (2, 1, 4), (1, 6, 1)], "target_hw": [(7, 8), (4, 9), (6, 3)]}

_INTERPOLATE_TOKENS = Spec(
    op=patchpack.interpolate_tokens,
    reference=reference.interpolate_tokens,
    make_images=_interpolate_images,
    pack=_pack_maps,
    cases={
        "LLaVA-OneVision": {"sizes": [(2, 27, 27)], "target_hw": (14, 14)},
        "ragged": {
            "sizes": [(1, 12, 8), (2, 4, 4), (1, 8, 20)],
            "target_hw": [(6, 4), (6, 8), (8, 12)],
            "merge": 2,
        },
        "order kept": {**_GROWN, "merge": 1, "channels": 5},
        "order changed": {
            "sizes": [(2, 4, 6), (1, 6, 2)],
            "target_hw": [(3, 5), (7, 4)],
            "merge": 2,
            "spatial_merge_size": 1,
        },
        "blocks made": {
            "sizes": [(2, 5, 7), (1, 3, 4)],
            "target_hw": (6, 3),
            "spatial_merge_size": 3,
        },
        "bilinear, corners": {**_SHRUNK, "align_corners": True},
        "bilinear, antialias": {**_SHRUNK, "antialias": True},
        "bilinear, corners, antialias": {**_SHRUNK, "align_corners": True, "antialias": True},
        "bicubic": {**_SHRUNK, "mode": "bicubic"},
        "bicubic, larger": {**_GROWN, "mode": "bicubic"},
        "bicubic, corners": {**_GROWN, "mode": "bicubic", "align_corners": True},
        "bicubic, antialias": {**_SHRUNK, "mode": "bicubic", "antialias": True},
        "bicubic, larger, antialias": {**_GROWN, "mode": "bicubic", "antialias": True},
        "one column, antialias": {
            "sizes": [(1, 6, 3), (1, 9, 1), (2, 5, 4)],
            "target_hw": [(3, 1), (4, 1), (7, 1)],
            "antialias": True,
            "channels": 1,
        },
        "far smaller, antialias": {
            "sizes": [(1, 27, 10), (1, 40, 4)],
            "target_hw": [(2, 2), (3, 1)],
            "mode": "bicubic",
            "antialias": True,
        },
        "area": {**_SHRUNK, "mode": "area"},
        "area, larger": {**_GROWN, "mode": "area"},
        "max": {**_SHRUNK, "mode": "max"},
        "max, larger": {**_GROWN, "mode": "max"},
        "nearest": {**_SHRUNK, "mode": "nearest"},
        "nearest, larger": {**_GROWN, "mode": "nearest"},
        "many channels": {"sizes": [(1, 5, 5)], "target_hw": (3, 7), "channels": 200},
        "many images": {
            "sizes": [(1, 1 + i % 3, 1 + i % 5) for i in range(33)],
            "target_hw": [(1 + i % 4, 1 + i % 3) for i in range(33)],
        },
    },
    grads=("x",),
)


# ---------------------------------------------------------------------------------- add_pos_embed


def _pos_embed_images(
    sizes, dtype, device, seed, table, channels=16, table_dtype=None, merge=1, **options
) -> list[Inputs]:
    """``table`` is its rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    table_dtype = torch.promote_types(dtype, table_dtype or dtype)
    shared = _random(generator, *table, channels, dtype=table_dtype, device=device)
    images = []
    for size in sizes:
        grid = grid_of(size, merge, device)
        x = _random(generator, grid.num_tokens, channels, dtype=dtype, device=device)
        images.append({"x": x, "table": shared, "grid": grid, **options})
    return images


_ADD_POS_EMBED = Spec(
    op=patchpack.add_pos_embed,
    reference=reference.add_pos_embed,
    make_images=_pos_embed_images,
    pack=lambda images: _pack(images, along={"x": 0}),
    cases={
        "Qwen3-VL": {
            "sizes": [(1, 4, 6), (2, 8, 2), (1, 2, 2)],
            "table": (6, 6),
            "merge": 2,
            "align_corners": True,
        },
        "SigLIP 2": {
            "sizes": [(1, 3, 9), (2, 1, 5), (1, 7, 2)],
            "table": (5, 8),
            "antialias": True,
            "channels": 5,
        },
        "MoonViT": {"sizes": [(1, 3, 7), (2, 2, 3)], "table": (3, 7), "mode": "bicubic"},
        "table in float32": {
            "sizes": [(1, 4, 4), (1, 3, 2)],
            "table": (3, 4),
            "table_dtype": torch.float32,
            "mode": "bicubic",
            "channels": 136,
        },
        "Oryx": {"sizes": [(1, 4, 3), (1, 11, 2), (1, 1, 1)], "table": (9, 20)},
        "bicubic, antialias": {
            "sizes": [(1, 2, 3), (1, 6, 4)],
            "table": (4, 5),
            "mode": "bicubic",
            "antialias": True,
        },
        "many images, small table": {
            "sizes": [(1 + 2 * (i == 3), 1 + i % 3, 2 + i % 2) for i in range(9)],
            "table": (2, 1),
        },
        "a clip, small table": {"sizes": [(5, 3, 2)], "table": (1, 2), "mode": "bicubic"},
    },
    grads=("x", "table"),
    shared=("table",),
)


# --------------------------------------------------------------------------------------- assemble


def _assemble_images(
    sizes, dtype, device, seed, parts, channels=16, vectors=2, spare=0
) -> list[Inputs]:
    """``parts(t, h, w)`` are those of an image of ``t`` tiles of ``h x w`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    learned = _random(generator, vectors, channels, dtype=dtype, device=device)
    images = []
    for size in sizes:
        layout = TokenLayout(parts(*size) if all(size) else [], device=device)
        tokens = layout.num_source_tokens + spare
        images.append(
            {
                "tokens": _random(generator, tokens, channels, dtype=dtype, device=device),
                "vectors": learned if vectors else None,
                "layout": layout,
            }
        )
    return images


def _anyres(t: int, h: int, w: int) -> list[FeatureMap]:
    """A view of the whole, and ``t`` tiles beside each other, cropped and made smaller."""
    crop = (1, 0, h - 1, t * w) if h > 1 else None
    target = (max(h - 2, 1), max(t * w - 3, 1))
    tiles = FeatureMap(h * w, (h, w), (1, t), crop, target, newline=0)
    return [FeatureMap(0, (h, w)), tiles]


def _two_views(t: int, h: int, w: int) -> list[FeatureMap | Vector]:
    """A small map and frames between learned vectors; the frames' tokens come first."""
    frames = [FeatureMap(i * h * w, (h, w), newline=0) for i in range(t)]
    small = FeatureMap(t * h * w, (2, 1), newline=0)
    return [Vector(1), small, *(x for frame in frames for x in (Vector(3), frame)), Vector(1)]


def _tall(t: int, h: int, w: int) -> list[FeatureMap]:
    """Tiles in two columns, cropped on all sides and made larger."""
    crop = (h - 1, 1, max((t - 1) * h, 1), 2 * w - 2)
    return [FeatureMap(0, (h, w), (t, 2), crop, (2 * t * h, 2 * w + 1), newline=1)]


_ASSEMBLE = Spec(
    op=patchpack.assemble,
    reference=reference.assemble,
    make_images=_assemble_images,
    pack=lambda images: _pack(images, along={"tokens": 0}),
    cases={
        "LLaVA-OneVision": {"sizes": [(3, 4, 5), (1, 5, 7)], "parts": _anyres},
        "Oryx": {"sizes": [(2, 3, 5), (1, 4, 4)], "parts": _two_views, "vectors": 4},
        "larger": {"sizes": [(2, 2, 3), (2, 1, 2)], "parts": _tall, "channels": 200},
        "maps alone": {
            "sizes": [(3, 3, 4), (1, 1, 1)],
            "parts": lambda t, h, w: [FeatureMap(0, (h, w), (t, 1))],
            "vectors": 0,
        },
        "spare tokens": {"sizes": [(2, 5, 4)], "parts": _anyres, "spare": 7},
        "vectors alone": {"sizes": [(1, 1, 1)], "parts": lambda t, h, w: [Vector(1)] * 3},
        "many images": {
            "sizes": [(1 + i % 2, 1 + i % 3, 1 + i % 5) for i in range(9)],
            "parts": _two_views,
            "vectors": 5,
        },
    },
    grads=("tokens", "vectors"),
    shared=("vectors",),
)


# --------------------------------------------------------------------------------- scatter_tokens


def _scatter_images(
    sizes, dtype, device, seed, channels=16, vectors=0, index_dtype=torch.int64, batched=False
) -> list[Inputs]:
    """Half of the rows are replaced by tokens in no order, a few by vectors."""
    generator = torch.Generator().manual_seed(seed)
    learned = _random(generator, vectors, channels, dtype=dtype, device=device)
    images = []
    for t, h, w in sizes:
        rows = t * h * w
        shape = (t, h * w) if batched else (rows,)
        order = torch.randperm(rows, generator=generator)
        index, others = order[: rows // 2], order[rows // 2 :]
        image = {
            "embeds": _random(generator, *shape, channels, dtype=dtype, device=device),
            "tokens": _random(generator, len(index), channels, dtype=dtype, device=device),
            "index": index.to(device, index_dtype),
            "vectors": None,
            "vector_index": None,
        }
        if vectors:
            which = torch.full((rows,), -1, dtype=index_dtype)
            which[others[::3]] = (torch.arange(len(others[::3])) % vectors).to(index_dtype)
            image |= {"vectors": learned, "vector_index": which.view(shape).to(device)}
        images.append(image)
    return images


def _pack_scattered(images: Sequence[Inputs]) -> Inputs:
    packed = _pack(images, along={"embeds": 0, "tokens": 0})
    if packed["vector_index"] is not None:
        packed["vector_index"] = torch.cat([image["vector_index"] for image in images])
    firsts = itertools.accumulate(image["embeds"][..., 0].numel() for image in images[:-1])
    shifted = [image["index"] + n for image, n in zip(images, (0, *firsts), strict=True)]
    packed["index"] = torch.cat(shifted)
    return packed


_SCATTER_TOKENS = Spec(
    op=patchpack.scatter_tokens,
    reference=reference.scatter_tokens,
    make_images=_scatter_images,
    pack=_pack_scattered,
    cases={
        "tokens": {"sizes": [(1, 5, 8), (2, 3, 3)]},
        "tokens and vectors": {"sizes": [(2, 5, 4), (1, 3, 3)], "vectors": 3},
        "batch": {
            "sizes": [(2, 4, 6), (1, 4, 6)],
            "vectors": 1,
            "index_dtype": torch.int32,
            "batched": True,
        },
        "many channels": {"sizes": [(1, 9, 9)], "channels": 200, "vectors": 2},
        "one row": {"sizes": [(1, 1, 1)], "vectors": 2},
    },
    grads=("embeds", "tokens", "vectors"),
    shared=("vectors",),
)


# ------------------------------------------------------------------------------- region_attention


def _region_images(
    sizes, dtype, device, seed, channels=32, region=2, merge=1, **options
) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    images = []
    for size in sizes:
        grid = grid_of(size, merge, device)
        num_cells = grid.num_tokens // region**2
        images.append(
            {
                "query": _random(generator, num_cells, channels, dtype=dtype, device=device),
                "tokens": _random(generator, grid.num_tokens, channels, dtype=dtype, device=device),
                "grid": grid,
                "region": region,
                **options,
            }
        )
    return images


_REGION_ATTENTION = Spec(
    op=patchpack.region_attention,
    reference=reference.region_attention,
    make_images=_region_images,
    pack=lambda images: _pack(images, along={"query": 0, "tokens": 0}),
    cases={
        "ragged": {"sizes": [(2, 4, 6), (1, 2, 2), (1, 8, 4)], "channels": 72},
        "blocks": {"sizes": [(1, 4, 8), (2, 8, 4)], "merge": 4, "channels": 40},
        "Oryx, image": {"sizes": [(1, 3, 5), (1, 1, 1)], "channels": 72, "region": 1},
        "Oryx, video": {"sizes": [(2, 2, 6), (1, 2, 2)], "channels": 1152},
        "Oryx, long video": {"sizes": [(1, 4, 8), (2, 8, 4)], "channels": 1152, "region": 4},
        "cells across blocks": {
            "sizes": [(1, 6, 12), (1, 6, 6)],
            "merge": 2,
            "region": 3,
            "channels": 5,
            "softmax_scale": 1.5,
        },
        "many channels": {"sizes": [(1, 4, 8), (1, 8, 4)], "channels": 3584, "region": 4},
        "many images": {"sizes": [(1, 2 + 2 * (i % 3), 2 + 2 * (i % 2)) for i in range(33)]},
    },
    grads=("query", "tokens"),
)


# ----------------------------------------------------------------------------------- merge_tokens


def _merge_images(
    sizes, dtype, device, seed, channels=32, merge=1, merge_size=None, norm="", params=None,
    **options,
) -> list[Inputs]:  # fmt: skip
    """``norm`` is what is normalised and by what, such as ``"merged weight bias"``, in words."""
    generator = torch.Generator().manual_seed(seed)
    m = merge_size or (2 if merge == 1 else merge)
    size = channels if "token" in norm else m * m * channels
    affine = {
        name: torch.randn(size, generator=generator).to(
            device, torch.promote_types(dtype, params or dtype)
        )
        if name in norm
        else None
        for name in ("weight", "bias")
    }
    images = []
    for thw in sizes:
        grid = grid_of(thw, merge, device)
        # with a mean, which a LayerNorm has to take away
        x = _random(generator, grid.num_tokens, channels, dtype=dtype, device=device) + 2
        images.append({"x": x, "grid": grid, "merge_size": merge_size, **affine, **options})
    return images


_MERGE_TOKENS = Spec(
    op=patchpack.merge_tokens,
    reference=reference.merge_tokens,
    make_images=_merge_images,
    pack=lambda images: _pack(images, along={"x": 0}),
    cases={
        "InternVL": {
            "sizes": [(2, 4, 4), (1, 8, 8)],
            "channels": 64,
            "norm": "merged weight bias",
            "eps": 1e-5,
        },
        "Qwen2-VL": {
            "sizes": [(1, 4, 6), (2, 2, 2), (1, 8, 4)],
            "channels": 80,
            "merge": 2,
            "norm": "token weight bias",
        },
        "InternVL v1": {"sizes": [(2, 4, 6), (1, 2, 2)], "order": "column", "channels": 40},
        "float32 weights": {
            "sizes": [(1, 4, 6), (1, 12, 6)],
            "channels": 1152,
            "merge": 2,
            "order": "column",
            "norm": "merged weight bias",
            "params": torch.float32,
        },
        "weight alone, across blocks": {
            "sizes": [(1, 6, 12), (1, 6, 6)],
            "channels": 5,
            "merge": 2,
            "merge_size": 3,
            "norm": "merged weight",
        },
        "bias alone, nothing merged": {
            "sizes": [(1, 3, 5), (2, 2, 3)],
            "channels": 17,
            "merge_size": 1,
            "norm": "token bias",
        },
        "more than registers hold": {
            "sizes": [(1, 3, 6), (1, 3, 3)],
            "channels": 520,
            "merge_size": 3,
            "norm": "merged weight bias",
        },
        "blocks of 4": {
            "sizes": [(1, 4, 4), (1, 4, 4)],
            "channels": 1280,
            "merge_size": 4,
            "norm": "token weight bias",
        },
        "many images": {
            "sizes": [(1, 2 + 2 * (i % 3), 2 + 2 * (i % 2)) for i in range(33)],
            "merge": 2,
        },
    },
    grads=("x", "weight", "bias"),
    shared=("weight", "bias"),
)


# --------------------------------------------------------------------------------------- patchify


def _patchify_images(
    sizes, dtype, device, seed, patch_size=4, temporal_patch_size=1, merge=1, channels=3,
    still=False, missing=0, remainder=(0, 0), bytes_=True, **options,
) -> list[Inputs]:  # fmt: skip
    """Views of ``[..., H, W, C]``; ``still`` images have no frames, clips lack ``missing``."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for size in sizes:
        t, h, w = size
        sides = (h * patch_size + remainder[0], w * patch_size + remainder[1])
        frames = () if still else (max(t * temporal_patch_size - missing, 0),)
        image = torch.randint(256, (*frames, *sides, channels), generator=generator)
        image = image.to(torch.uint8) if bytes_ else (image / 255).to(dtype)
        images.append(
            {
                "images": [image.to(device).movedim(-1, -3)] if all(size) else [],
                "grid": grid_of(size, merge, device),
                "patch_size": patch_size,
                "mean": [0.48145466, 0.4578275, 0.40821073, 0.5][:channels],
                "std": [0.26862954, 0.26130258, 0.27577711, 0.5][:channels],
                "temporal_patch_size": temporal_patch_size,
                "dtype": dtype,
                **options,
            }
        )
    return images


_PATCHIFY = Spec(
    op=patchpack.patchify,
    reference=reference.patchify,
    make_images=_patchify_images,
    pack=lambda images: _pack(images, lists=["images"]),
    cases={
        "Qwen2-VL": {
            "sizes": [(1, 4, 6), (2, 6, 2), (1, 2, 2)],
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge": 2,
        },
        "floating": {
            "sizes": [(1, 4, 8), (2, 4, 4)],
            "temporal_patch_size": 2,
            "merge": 4,
            "bytes_": False,
        },
        "SigLIP 2": {
            "sizes": [(1, 3, 5), (1, 2, 1)],
            "patch_size": 16,
            "layout": "ppc",
            "still": True,
        },
        "floating, pixels left out": {
            "sizes": [(1, 3, 5), (2, 2, 9)],
            "layout": "ppc",
            "remainder": (3, 2),
            "channels": 4,
            "bytes_": False,
        },
        "floating, last frame repeated": {
            "sizes": [(2, 2, 3), (1, 1, 1), (3, 5, 2)],
            "temporal_patch_size": 3,
            "missing": 2,
            "remainder": (0, 1),
            "bytes_": False,
        },
        "many images": {
            "sizes": [(1, 1 + i % 3, 1 + i % 5) for i in range(17)],
            "patch_size": 2,
            "still": True,
        },
    },
    grads=("images",),
    lists=True,
)


# ---------------------------------------------------------------------------------- resize_images


def _resize_images(
    sizes, dtype, device, seed, scale=(0.7, 1.4), still=False, channels=3, **options
) -> list[Inputs]:
    """``scale`` is what height and width are multiplied by, 4 pixels for each of ``sizes``."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for t, h, w in sizes:
        frames = () if still else (t,)
        image = torch.randint(256, (*frames, 4 * h, 4 * w, channels), generator=generator)
        image = image.to(device, torch.uint8).movedim(-1, -3)
        size = tuple(max(1, round(4 * n * s)) for n, s in zip((h, w), scale, strict=True))
        images.append(
            {
                "images": [image] if image.numel() else [],
                "sizes": [size] if image.numel() else [],
                **options,
            }
        )
    return images


_RESIZE_IMAGES = Spec(
    op=patchpack.resize_images,
    reference=reference.resize_images,
    make_images=_resize_images,
    pack=lambda images: _pack(images, lists=["images", "sizes"]),
    cases={
        "bicubic": {"sizes": [(1, 7, 9), (2, 3, 5), (1, 1, 1)]},
        "bilinear": {"sizes": [(1, 7, 9), (2, 3, 5)], "mode": "bilinear"},
        "smaller": {"sizes": [(1, 10, 40), (1, 3, 7)], "scale": (0.3, 0.4), "still": True},
        "far smaller": {"sizes": [(1, 10, 13)], "scale": (0.05, 0.1), "channels": 1},
        "larger": {"sizes": [(1, 3, 11), (1, 2, 2)], "scale": (3.3, 4.1), "channels": 4},
        "height alone": {"sizes": [(1, 5, 5), (1, 9, 3)], "scale": (1.8, 1.0)},
        "many images": {
            "sizes": [(1, 1 + i % 3, 1 + i % 5) for i in range(9)],
            "mode": "bilinear",
            "scale": (1.3, 0.6),
            "still": True,
        },
    },
    grads=(),
    lists=True,
)


SPECS: dict[str, Spec] = {
    "assemble": _ASSEMBLE,
    "rope": _ROPE,
    "rope_2d": _ROPE_2D,
    "mrope": _MROPE,
    "interpolate_tokens": _INTERPOLATE_TOKENS,
    "patchify": _PATCHIFY,
    "resize_images": _RESIZE_IMAGES,
    "add_pos_embed": _ADD_POS_EMBED,
    "scatter_tokens": _SCATTER_TOKENS,
    "merge_tokens": _MERGE_TOKENS,
    "region_attention": _REGION_ATTENTION,
    "varlen_attention": _VARLEN_ATTENTION,
}
