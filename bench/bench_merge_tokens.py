"""``merge_tokens`` before the projectors of InternVL and Qwen2-VL. Memory-bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from _harness import PHOTOS, Bench, Provider
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, sizes, channels, merge=1, normalised=0) -> Inputs:
    """``normalised`` is how many tokens a LayerNorm takes together, or 0 without one."""
    grid = PackedGrid(sizes, merge, device=device)
    x = torch.randn(grid.num_tokens, channels, device=device).to(dtype)
    affine = {
        name: torch.randn(normalised * channels, device=device).to(dtype) if normalised else None
        for name in ("weight", "bias")
    }
    return {"x": x, "grid": grid, **affine}


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read and write the tokens; backward read two of them for a LayerNorm, and write one."""
    num_values, weight = inputs["x"].numel(), inputs["weight"]
    num_weights = 0 if weight is None else 2 * weight.numel()
    values = 2 * num_values + num_weights
    if backward:
        values += (2 if weight is None else 3) * num_values + 2 * num_weights
    return values * inputs["x"].element_size()


def _flops(inputs: Inputs, backward: bool) -> int:
    """Of a LayerNorm, 8 operations a value forward and 14 backward."""
    a_value = 0 if inputs["weight"] is None else 22 if backward else 8
    return a_value * inputs["x"].numel()


def _permute(inputs: Inputs) -> Provider:
    """The chain of views and copies of the original code; a loop where images differ in size."""
    grid, width = inputs["grid"], inputs["x"].shape[1]
    sizes = grid.grid_thw.tolist()

    def norm(x: Tensor, size: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        here = weight is not None and weight.shape[0] == size
        return F.layer_norm(x, (size,), weight, bias, 1e-6) if here else x

    def merge(x: Tensor, weight: Tensor | None, bias: Tensor | None, **_) -> Tensor:
        x = norm(x, width, weight, bias)
        if grid.spatial_merge_size == 1:
            images = x.split([t * h * w for t, h, w in sizes])
            x = torch.cat(
                [
                    image.view(t, h // 2, 2, w // 2, 2, -1).transpose(2, 3).reshape(-1, 4 * width)
                    for image, (t, h, w) in zip(images, sizes, strict=True)
                ]
            )
        return norm(x.reshape(-1, 4 * width), 4 * width, weight, bias)

    return merge


BENCH = Bench(
    op="merge_tokens",
    shapes={
        "InternVL, 13 tiles 32x32": {"sizes": [(13, 32, 32)], "channels": 1024},
        "InternVL, 13 tiles 32x32, LayerNorm": {
            "sizes": [(13, 32, 32)],
            "channels": 1024,
            "normalised": 4,
        },
        "Qwen2-VL, 16 photos, LayerNorm": {
            "sizes": PHOTOS,
            "channels": 1280,
            "merge": 2,
            "normalised": 1,
        },
    },
    tiny={"sizes": [(4, 6), (2, 2)], "channels": 8, "normalised": 4},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={"views, F.layer_norm": _permute},
    max_relative_rms=1e-1,  # F.layer_norm errs by 0.05 in bfloat16 gradients of weight and bias
)
