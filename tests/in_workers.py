"""What worker processes run in ``test_reliability.py``: they import it by its name."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchpack import PackedGrid, TokenLayout, assemble, interpolate_tokens, metadata, rope_2d
from patchpack.models import NativeViT

SYSTEMS = (
    "internvl",
    "llava_onevision",
    "moonvit",
    "oryx",
    "pixtral",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "siglip2",
)


def system(name: str) -> Any:
    return importlib.import_module(f"patchpack.systems.{name}")


def photo(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    height, width = random.integers(40, 120, 2)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch_of(names: list[str]) -> dict[str, Any]:
    """A ``collate_fn``: what a worker makes of a batch, one photo pair for each system."""
    batch = {}
    for i, name in enumerate(names):
        photos = [photo(2 * i), photo(2 * i + 1)]
        plans = [system(name).plan(*x.shape[:2]) for x in photos]
        pixels, grid = system(name).preprocess(photos, plans, dtype=torch.bfloat16)
        batch[name] = {
            "plans": plans,
            "pixels": pixels,
            "grid": grid,
            "position_ids": grid.position_ids,
            "cu_seqlens": metadata.get_vision_cu_seqlens(grid.grid_thw),
            "half": grid.resized((2, 2), 1),
        }
    return batch


def used(x: Any) -> list[Tensor]:
    """What ops make of ``x``; of what they do not take, nothing."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(x, PackedGrid):
        q = torch.randn(x.num_tokens, 2, 8, generator=generator)
        resized, _ = interpolate_tokens(q.flatten(1), x, (4, 2), spatial_merge_size=1)
        return [*rope_2d(q, q, x), resized, x.position_ids, x.cu_seqlens]
    if isinstance(x, TokenLayout):
        tokens = torch.randn(x.num_source_tokens, 4, generator=generator)
        return [assemble(tokens, torch.randn(x.num_vectors, 4, generator=generator), x)]
    if isinstance(x, NativeViT):
        pixels = torch.randn(24, x.config.patch_dim, generator=generator)
        return [x(pixels, PackedGrid([(4, 4), (2, 4)], x.config.spatial_merge_size)).detach()]
    if hasattr(x, "grids") and x.frame_indices is None:
        name = type(x).__module__.rpartition(".")[2]
        image = np.full((x.height, x.width, 3), 77, np.uint8)
        return [system(name).preprocess([image], [x])[0]]
    return []


def all_used(objects: list[Any]) -> tuple[list[Any], list[list[Tensor]]]:
    return objects, [used(x) for x in objects]
