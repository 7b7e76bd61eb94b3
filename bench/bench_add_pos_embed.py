"""``add_pos_embed`` with the tables of four models, C1152. Memory-bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from _harness import PHOTOS, Bench, Provider, UnavailableError
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, side, sizes=PHOTOS, channels=1152, merge=1, **options) -> Inputs:
    grid = PackedGrid(sizes, merge, device=device)
    x = torch.randn(grid.num_tokens, channels, device=device).to(dtype)
    table = torch.randn(*side, channels, device=device).to(dtype)
    return {"x": x, "table": table, "grid": grid, **options}


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read tokens and table, write tokens; backward read their gradient, write the table's."""
    x, table = inputs["x"], inputs["table"]
    num_values = 2 * x.numel() + table.numel()
    if backward:
        num_values += x.numel() + table.numel()
    return num_values * x.element_size()


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for each neighbour, and the sum with ``x``."""
    num_taps = 16 if inputs.get("mode") == "bicubic" else 4  # with antialias, at least
    each = 2 * num_taps + 1 + (2 * num_taps if backward else 0)
    return each * inputs["x"].numel()


def _loop(inputs: Inputs) -> Provider:
    """The table resized for one image after the other, as most models do it."""
    grid = inputs["grid"]
    sizes, m = grid.grid_thw.tolist(), grid.spatial_merge_size

    def add(x: Tensor, table: Tensor, grid, mode="bilinear", **options) -> Tensor:
        maps = table.permute(2, 0, 1)[None]
        resized = []
        for t, h, w in sizes:
            frame = F.interpolate(maps, (h, w), mode=mode, **options)[0]
            frame = frame.view(-1, h // m, m, w // m, m).permute(1, 3, 2, 4, 0)
            resized.append(frame.reshape(h * w, -1).repeat(t, 1))
        return x + torch.cat(resized)

    return add


def _transformers(inputs: Inputs, fuse: bool) -> Provider:
    """Indices and weights made on the device of ``x``, as in transformers' Qwen3-VL, then a sum."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    if inputs.get("antialias"):
        raise UnavailableError("it does not antialias")
    side = inputs["table"].shape[0]
    grid = inputs["grid"]
    grid_thw = grid.grid_thw.to(inputs["x"].device)

    def add(x: Tensor, table: Tensor, grid, mode="bilinear", align_corners=False) -> Tensor:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw, side, mode, align_corners, grid.spatial_merge_size
        )
        table = table.flatten(0, 1)
        if fuse:
            weights = weights.to(table.dtype)
            return x + F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)
        return x + (F.embedding(indices, table) * weights[:, :, None]).sum(1).to(x.dtype)

    return add


BENCH = Bench(
    op="add_pos_embed",
    shapes={
        "Qwen3-VL, table 48x48": {"side": (48, 48), "merge": 2, "align_corners": True},
        "SigLIP 2, table 16x16": {"side": (16, 16), "antialias": True},
        "MoonViT, table 64x64": {"side": (64, 64), "mode": "bicubic"},
        "Oryx, table 128x128": {"side": (128, 128)},
    },
    tiny={"side": (4, 4), "sizes": [(2, 4), (4, 3)], "channels": 8},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={
        "F.interpolate loop": _loop,
        "transformers, embedding": lambda inputs: _transformers(inputs, fuse=False),
        "transformers, embedding_bag": lambda inputs: _transformers(inputs, fuse=True),
    },
)
