"""Encoders of tiles of one size, and how their tokens become the language model's."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchpack import PackedGrid, add_pos_embed, assemble, interpolate_tokens, merge_tokens
from patchpack.integrations.transformers import _attention, _text
from patchpack.integrations.transformers._report import Context, Edit, Left, method
from patchpack.integrations.transformers._rewire import names_of
from patchpack.layout import FeatureMap, TokenLayout, Vector
from patchpack.systems.llava_onevision import select_best_resolution


def dense_encoder(path: str, tower: Any, context: Context) -> Iterator[Edit | Left]:
    """An encoder of batches of images of one size, such as SigLIP's and InternViT's."""
    if not hasattr(tower, "embeddings") or not hasattr(tower, "encoder"):
        return
    layers = [
        layer
        for layer in tower.modules()
        if "ALL_ATTENTION_FUNCTIONS" in names_of(type(layer).forward)
        and getattr(layer, "is_causal", True) is False
    ]
    if not layers:
        yield Left("varlen_attention", path, "its layers take no attention implementation", True)
        return
    if reason := _text.unfit(layers[0]):
        yield Left("varlen_attention", path, reason)
        return
    name = _attention.name_of(context.impl)
    what = f"attention within each image, as {name!r}"
    for config in {id(layer.config): layer.config for layer in layers}.values():
        yield Edit("varlen_attention", path, config, "_attn_implementation", name, what)


# InternVL ----------------------------------------------------------------------------------------


def pixel_unshuffle(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """``pixel_shuffle`` of InternVL, which makes one token of a block of them."""
    config: Any = getattr(model, "config", None)
    if not hasattr(type(model), "pixel_shuffle") or not hasattr(config, "downsample_ratio"):
        return
    ratio = 1 / config.downsample_ratio
    if not ratio.is_integer():
        yield Left("merge_tokens", path, f"it merges {ratio} tokens on a side")
        return
    shuffle = method(functools.partial(_pixel_shuffle, context.impl), model, "pixel_shuffle")
    yield Edit("merge_tokens", path, model, "pixel_shuffle", shuffle, "patchpack.merge_tokens")


def _pixel_shuffle(
    impl: str | None, self, vision_features: Tensor, scale_factor: float = 0.5
) -> Tensor:
    batch, rows, cols, channels = vision_features.shape
    m = round(1 / scale_factor)
    if rows % m or cols % m:
        raise ValueError(
            f"vision_features must have rows and columns that divide by {m}, got {rows} x {cols}"
        )
    # blocks never reach into the next image, so all images are one of many rows
    grid = PackedGrid([(batch * rows, cols)], device=vision_features.device)
    merged = merge_tokens(vision_features.flatten(0, 2), grid, merge_size=m, impl=impl)
    return merged.view(batch, rows // m, cols // m, m * m * channels)


def position_table(path: str, module: Any, context: Context) -> Iterator[Edit | Left]:
    """``interpolate_pos_encoding`` of InternViT, for images of another size than its own."""
    table = getattr(module, "position_embeddings", None)
    name = "interpolate_pos_encoding"
    if not hasattr(type(module), name):
        return
    if not isinstance(table, Tensor) or "bicubic" not in _strings(type(module)):
        yield Left("add_pos_embed", path, "its position table is resized in another way", True)
        return
    interpolate = method(functools.partial(_position_table, context.impl), module, name)
    what = "patchpack.add_pos_embed, where the size is not the table's"
    yield Edit("add_pos_embed", path, module, name, interpolate, what)


def _strings(cls: type) -> set[str]:
    constants = cls.interpolate_pos_encoding.__code__.co_consts
    flat = [y for x in constants for y in (x if isinstance(x, tuple) else (x,))]
    return {x for x in flat if isinstance(x, str)}


def _position_table(impl: str | None, self, embeddings: Tensor, height: int, width: int) -> Tensor:
    """``[1, 1 + rows * cols, C]``: that of the class token, and the resized table."""
    own, table = self.position_embeddings[:, :1], self.position_embeddings[0, 1:]
    if embeddings.shape[1] == self.position_embeddings.shape[1] and height == width:
        return self.position_embeddings
    rows, cols = height // self.patch_size[0], width // self.patch_size[1]
    side = int(len(table) ** 0.5)
    grid = PackedGrid([(rows, cols)], device=table.device)
    zeros = table.new_zeros(1, table.shape[-1]).expand(rows * cols, -1)
    table = table.unflatten(0, (side, side))
    return torch.cat([own, add_pos_embed(zeros, table, grid, mode="bicubic", impl=impl)[None]], 1)


# LLaVA-OneVision ---------------------------------------------------------------------------------


def any_resolution(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """``pack_image_features`` and ``apply_pooling`` of LLaVA-OneVision."""
    cls, name = type(model), "pack_image_features"
    if not hasattr(cls, name) or not hasattr(model, "image_newline"):
        return
    if not hasattr(cls, "apply_pooling"):
        yield Left("assemble", path, "its crops become tokens by another rule", True)
        return
    pack = method(functools.partial(_pack_image_features, context.impl), model, name)
    yield Edit("assemble", path, model, name, pack, "patchpack.assemble")
    pool = method(functools.partial(_apply_pooling, context.impl), model, "apply_pooling")
    what = "patchpack.interpolate_tokens"
    yield Edit("interpolate_tokens", path, model, "apply_pooling", pool, what)


def _pack_image_features(
    impl: str | None,
    self,
    image_features: Sequence[Tensor],
    image_sizes: Tensor,
    image_newline: Tensor | None = None,
    vision_aspect_ratio: str = "anyres_max_9",
    **kwargs,
) -> tuple[list[Tensor], Tensor]:
    """Put the crops of every image together, in one pass; ``[llm tokens, C]`` of each."""
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    max_tiles = int(vision_aspect_ratio.removeprefix("anyres_max_"))
    newline = None if image_newline is None else 0
    parts, first, lengths = [], 0, []
    for crops, size in zip(image_features, sizes, strict=True):
        image = _parts_of(self.config, len(crops), size, first, newline, max_tiles)
        lengths.append(TokenLayout(image).num_tokens)
        parts += image
        first += crops.shape[0] * crops.shape[1]
    tokens = torch.cat([crops.flatten(0, 1) for crops in image_features])
    vectors = None if image_newline is None else image_newline[None].to(tokens)
    out = assemble(tokens, vectors, TokenLayout(parts, device=tokens.device), impl=impl)
    return list(out.split(lengths)), torch.tensor(lengths, device=tokens.device)


def _parts_of(
    config, num_crops: int, size: Sequence[int], first: int, newline: int | None, max_tiles: int
) -> list[FeatureMap | Vector]:
    """One image: a view of the whole, then the map of its crops without their padding."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    whole = FeatureMap(first, (side, side))
    if num_crops == 1:
        return [whole] if newline is None else [whole, Vector(newline)]
    pinpoints = [tuple(pair) for pair in config.image_grid_pinpoints]
    height, width = size
    best = select_best_resolution(height, width, pinpoints)
    tiles = best[0] // vision.image_size, best[1] // vision.image_size
    top, left, rows, cols = _unpadded(tiles[0] * side, tiles[1] * side, height, width)
    times = math.sqrt(rows * cols / (max_tiles * side**2))
    target = (int(rows // times), int(cols // times)) if times > 1.1 else (rows, cols)
    crop = top, left, rows, cols
    crops = FeatureMap(first + side**2, (side, side), tiles, crop, target, newline)
    return [whole, crops]


def _unpadded(rows: int, cols: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, rows and columns of an image in the middle of a map, as transformers rounds."""
    if width / height > cols / rows:
        padding = (rows - int(round(height * (cols / width), 7))) // 2
        return padding, 0, rows - 2 * padding, cols
    padding = (cols - int(round(width * (rows / height), 7))) // 2
    return 0, padding, rows, cols - 2 * padding


def _apply_pooling(impl: str | None, self, image_features: Tensor) -> Tensor:
    """Halve the maps of frames, ``[frames, n, C]``."""
    vision = self.config.vision_config
    side = vision.image_size // vision.patch_size
    grid = PackedGrid([(len(image_features), side, side)], device=image_features.device)
    half = math.ceil(side / 2)
    tokens, _ = interpolate_tokens(image_features.flatten(0, 1), grid, (half, half), impl=impl)
    return tokens.unflatten(0, (len(image_features), half * half))


# Batches -----------------------------------------------------------------------------------------


def tokens_of(sample: Mapping[str, Tensor], config) -> dict[str, int]:
    """How many tokens of the language model the images and videos of a sample become."""
    vision, found = config.vision_config, {}
    images, videos = sample.get("pixel_values"), sample.get("pixel_values_videos")
    if hasattr(config, "downsample_ratio"):
        found["image"] = 0
        if images is not None:
            tiles, _, height, width = images.shape
            patches = (height // vision.patch_size[0]) * (width // vision.patch_size[1])
            found["image"] = tiles * round(patches * config.downsample_ratio**2)
    elif hasattr(config, "image_grid_pinpoints") and hasattr(config, "vision_aspect_ratio"):
        found["image"] = found["video"] = 0
        if images is not None:
            sizes = sample["image_sizes"].view(-1, 2).tolist()
            several = sample.get("batch_num_images")
            several = [1] * len(sizes) if several is None else several.flatten().tolist()
            whole = [n > 1 for n in several for _ in range(n)]
            max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
            for size, alone in zip(sizes, whole, strict=True):
                parts = _parts_of(config, 1 if alone else 2, size, 0, 0, max_tiles)
                found["image"] += TokenLayout(parts).num_tokens
        if videos is not None:
            half = math.ceil(vision.image_size // vision.patch_size / 2)
            found["video"] = videos.shape[0] * (videos.shape[1] * half**2 + 1)
    return found


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of all samples one after the other; crops of images are padded to the most there."""
    if tensors[0].ndim == 5 and len({x.shape[1] for x in tensors}) > 1:
        most = max(x.shape[1] for x in tensors)
        pad = torch.nn.functional.pad
        tensors = [pad(x, (0, 0) * 3 + (0, most - x.shape[1])) for x in tensors]
    return torch.cat(list(tensors))
