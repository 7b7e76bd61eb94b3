"""``interpolate_tokens``, as LLaVA-OneVision halves its feature maps. Memory-bound.

What follows from the sizes alone is planned before, once a batch: our grids, the peers' indices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from _harness import Bench, Floor, Provider
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs

RAGGED = [(12 + 7 * i % 29, 12 + 11 * i % 29) for i in range(32)]


def _make_inputs(dtype, device, sizes, channels) -> Inputs:
    grid = PackedGrid(sizes, device=device)
    x = torch.randn(grid.num_tokens, channels, device=device).to(dtype)
    target = grid.resized([(-(-h // 2), -(-w // 2)) for *_, h, w in sizes])
    return {"x": x, "grid": grid, "target_hw": target}


def _num_results(inputs: Inputs) -> int:
    return inputs["target_hw"].num_tokens * inputs["x"].shape[1]


def _sizes(inputs: Inputs) -> list[list[int]]:
    """Frames, rows and columns of each map, and rows and columns after resizing."""
    both = torch.cat([inputs["grid"].grid_thw, inputs["target_hw"].grid_thw[:, 1:]], dim=1)
    return both.tolist()


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read the maps, write the resized ones; the backward pass the other way round."""
    num_values = inputs["x"].numel() + _num_results(inputs)
    return (2 if backward else 1) * num_values * inputs["x"].element_size()


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for each of four neighbours."""
    return (2 if backward else 1) * 8 * _num_results(inputs)


def _loop(inputs: Inputs, copy: bool) -> Provider:
    sizes = _sizes(inputs)

    def resize(x: Tensor, **_) -> Tensor:
        resized = []
        images = x.split([t * h * w for t, h, w, *_ in sizes])
        for image, (t, h, w, *size) in zip(images, sizes, strict=True):
            maps = image.view(t, h, w, -1).permute(0, 3, 1, 2)
            maps = F.interpolate(maps.contiguous() if copy else maps, size, mode="bilinear")
            resized.append(maps.permute(0, 2, 3, 1).flatten(0, 2))
        return torch.cat(resized)

    return resize


def _taps(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The four neighbours of every result, ``[T', 4]``, and their weights."""
    indices, weights, first = [], [], 0
    for t, h, w, *size in _sizes(inputs):
        matrices = [
            F.interpolate(torch.eye(n)[None], m, mode="linear")[0].T
            for n, m in zip((h, w), size, strict=True)
        ]
        (row_weights, rows), (col_weights, cols) = (x.topk(2, dim=1) for x in matrices)
        frames = torch.arange(t)[:, None, None, None, None] * h * w + first
        index = frames + rows[:, None, :, None] * w + cols[None, :, None, :]
        weight = row_weights[:, None, :, None] * col_weights[None, :, None, :]
        indices.append(index.reshape(-1, 4))
        weights.append(weight.expand(index.shape).reshape(-1, 4))
        first += t * h * w
    x = inputs["x"]
    return torch.cat(indices).to(x.device), torch.cat(weights).to(x.device, x.dtype)


def _gather(inputs: Inputs) -> Provider:
    indices, weights = _taps(inputs)
    return lambda x, **_: (x[indices] * weights[:, :, None]).sum(dim=1)


def _embedding_bag(inputs: Inputs) -> Provider:
    indices, weights = _taps(inputs)
    return lambda x, **_: F.embedding_bag(indices, x, mode="sum", per_sample_weights=weights)


MAPS = "32 ragged maps, C1152"

BENCH = Bench(
    op="interpolate_tokens",
    shapes={
        MAPS: {"sizes": RAGGED, "channels": 1152},
        "video of 16 frames 27x27, C3584": {"sizes": [(16, 27, 27)], "channels": 3584},
    },
    tiny={"sizes": [(5, 4), (3, 6)], "channels": 8},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={
        "F.interpolate loop": lambda inputs: _loop(inputs, copy=True),
        "F.interpolate loop of views": lambda inputs: _loop(inputs, copy=False),
        "gather": _gather,
        "F.embedding_bag": _embedding_bag,
    },
    floors=(
        Floor(MAPS, "float32", "forward", "F.interpolate loop", 12),
        Floor(MAPS, "bfloat16", "forward", "F.interpolate loop", 12),
        Floor(MAPS, "float32", "forward", "copy", 1 / 1.1),
    ),
)
