"""``assemble``, as LLaVA-OneVision assembles the tiles of its images. Memory-bound."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from _harness import Bench, Provider
from patchpack import TokenLayout
from patchpack.layout import FeatureMap
from patchpack.testing.catalogue import Inputs

SIDE = 27  # tokens of a tile of 384 pixels

# tiles, crop and size of images of 384x384, 640x480, 1024x768, 800x1300, 1344x896, 1920x1080,
# 2000x1500 and 2304x2304 pixels under anyres_max_9
IMAGES = [
    ((1, 1), (0, 0, 27, 27), (27, 27)),
    ((2, 2), (7, 0, 40, 54), (40, 54)),
    ((2, 3), (0, 4, 54, 73), (54, 73)),
    ((4, 3), (0, 7, 108, 67), (108, 67)),
    ((3, 4), (4, 0, 73, 108), (73, 108)),
    ((3, 5), (3, 0, 75, 135), (60, 108)),
    ((4, 6), (0, 9, 108, 144), (70, 93)),
    ((6, 6), (0, 0, 162, 162), (81, 81)),
]


def _make_inputs(dtype, device, images, side, channels) -> Inputs:
    layouts = []
    for tiles, crop, size in images:
        base = FeatureMap(0, (side, side))
        tiled = FeatureMap(side * side, (side, side), tiles, crop, size, newline=0)
        layouts.append(TokenLayout([base, tiled], device=device))
    layout = TokenLayout.cat(layouts)
    num_tiles = layout.num_source_tokens // (side * side)
    return {
        "tokens": torch.randn(num_tiles, side * side, channels, device=device).to(dtype),
        "vectors": torch.randn(1, channels, device=device).to(dtype),
        "layout": layout,
    }


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read what is kept of the maps, write the sequence; read its gradient, write the tokens'."""
    layout, tokens = inputs["layout"], inputs["tokens"]
    kept = sum(math.prod(part.crop[2:] if part.crop else part.tile_hw) for part in layout.parts)
    num_tokens = kept + layout.num_tokens
    if backward:
        num_tokens += layout.num_tokens + layout.num_source_tokens
    return num_tokens * tokens.shape[-1] * tokens.element_size()


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for each of four neighbours, where maps are resized."""
    resized = [part for part in inputs["layout"].parts if part.crop and part.target_hw]
    num_tokens = sum(math.prod(p.target_hw) for p in resized if p.target_hw != p.crop[2:])
    return (2 if backward else 1) * 8 * num_tokens * inputs["tokens"].shape[-1]


def _chain(inputs: Inputs) -> Provider:
    """Image by image as the original does it, channels first."""
    images = inputs["layout"].parts[1::2]

    def assemble(tokens: Tensor, vectors: Tensor, **_) -> Tensor:
        sequences, first = [], 0
        for tiled in images:
            (side, _), (rows, cols) = tiled.tile_hw, tiled.tiles_hw
            top, left, height, width = tiled.crop
            whole, tiles = tokens[first], tokens[first + 1 : first + 1 + rows * cols]
            tiles = tiles.view(rows, cols, side, side, -1)
            maps = tiles.permute(4, 0, 2, 1, 3).contiguous().flatten(1, 2).flatten(2, 3)
            maps = maps[:, top : top + height, left : left + width]
            if tiled.target_hw != (height, width):
                maps = F.interpolate(maps[None], tiled.target_hw, mode="bilinear")[0]
            newline = vectors[0][:, None, None].expand(*maps.shape[:2], 1)
            sequence = torch.cat([maps, newline], dim=2).flatten(1, 2).transpose(0, 1)
            sequences.append(torch.cat([whole, sequence]))
            first += 1 + rows * cols
        return torch.cat(sequences)

    return assemble


BENCH = Bench(
    op="assemble",
    shapes={
        "8 images of LLaVA-OneVision-0.5B, C896": {
            "images": IMAGES,
            "side": SIDE,
            "channels": 896,
        },
        "4 images of LLaVA-OneVision-7B, C3584": {
            "images": IMAGES[:4],
            "side": SIDE,
            "channels": 3584,
        },
    },
    tiny={
        "images": [((1, 2), (0, 1, 3, 4), (3, 4)), ((2, 1), (0, 0, 6, 3), (3, 2))],
        "side": 3,
        "channels": 8,
    },
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={"the original's chain": _chain},
)
