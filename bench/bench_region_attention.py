"""``region_attention``, as Oryx compresses 64 frames of a video to 1/4 and 1/16. Memory-bound."""

from __future__ import annotations

import torch
from torch import Tensor

from _harness import Bench, Provider
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, sizes, channels, region) -> Inputs:
    grid = PackedGrid(sizes, device=device)
    tokens = torch.randn(grid.num_tokens, channels, device=device).to(dtype)
    query = torch.randn(grid.num_blocks(region), channels, device=device).to(dtype)
    return {"query": query, "tokens": tokens, "grid": grid, "region": region}


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read queries and tokens, write a result a query; then read these and write two gradients."""
    num_queries, num_tokens = inputs["query"].numel(), inputs["tokens"].numel()
    forward = 2 * num_queries + num_tokens
    values = forward + (3 * num_queries + 2 * num_tokens if backward else 0)
    return values * inputs["query"].element_size()


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for a score and for the result; backward twice of both."""
    return (3 if backward else 1) * 4 * inputs["tokens"].numel()


def _places(inputs: Inputs) -> Tensor:
    """The tokens of every cell, ``[N, r^2]``."""
    r, first, cells = inputs["region"], 0, []
    for t, h, w in inputs["grid"].grid_thw.tolist():
        maps = torch.arange(first, first + t * h * w).reshape(t, h // r, r, w // r, r)
        cells.append(maps.transpose(2, 3).reshape(-1, r * r))
        first += t * h * w
    return torch.cat(cells).to(inputs["tokens"].device)


def _gather(inputs: Inputs) -> Provider:
    """As the original: tokens copied cell by cell, pooled, and two batched products."""
    places = _places(inputs)
    scale = inputs["tokens"].shape[1] ** -0.5

    def attend(query: Tensor, tokens: Tensor, **_) -> Tensor:
        cells = tokens[places]
        p = (torch.bmm(query[:, None], cells.mT) * scale).softmax(dim=2)
        return cells.mean(dim=1) + torch.bmm(p, cells)[:, 0]

    return attend


def _permute(inputs: Inputs) -> Provider:
    """The same for frames of one size, which a view cuts into cells."""
    (t, h, w), *others = inputs["grid"].grid_thw.tolist()
    if others:
        raise ValueError("it takes frames of one size")
    r, scale = inputs["region"], inputs["tokens"].shape[1] ** -0.5

    def attend(query: Tensor, tokens: Tensor, **_) -> Tensor:
        maps = tokens.view(t, h // r, r, w // r, r, -1).transpose(2, 3)
        cells = maps.reshape(len(query), r * r, -1)
        p = (torch.bmm(query[:, None], cells.mT) * scale).softmax(dim=2)
        return cells.mean(dim=1) + torch.bmm(p, cells)[:, 0]

    return attend


BENCH = Bench(
    op="region_attention",
    shapes={
        "Oryx, 64 frames 24x32 to 1/4": {
            "sizes": [(64, 24, 32)],
            "channels": 1152,
            "region": 2,
        },
        "Oryx, 64 frames 24x32 to 1/16": {
            "sizes": [(64, 24, 32)],
            "channels": 1152,
            "region": 4,
        },
    },
    tiny={"sizes": [(2, 4, 6)], "channels": 8, "region": 2},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={"gather, bmm": _gather, "permute, bmm": _permute},
)
