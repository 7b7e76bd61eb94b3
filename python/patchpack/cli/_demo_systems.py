"""The four systems of the literature, small enough for an interpreter, on the same media.

Each is its own planning and preprocessing, its own encoder with fewer channels and blocks, and its
own token path; only the budgets of pixels and frames are smaller than those of the papers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from patchpack import PackedGrid
from patchpack.cli import _media
from patchpack.cli._media import Medium
from patchpack.models.native_vit import CONFIGS, NativeViT
from patchpack.systems import internvl, llava_onevision, oryx
from patchpack.systems._plan import Plan
from patchpack.testing.compare import Accuracy, measure_model

WIDTH = 96
TILE = 70
# options of plan and plan_video, and sizes of the encoder
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "internvl": (
        {"image_size": 84, "max_tiles": 4},
        {"image_size": 84, "num_segments": 3},
        {"hidden_size": 128, "num_heads": 1, "pos_table": (12, 12)},
    ),
    "llava_onevision": (
        {"image_size": TILE, "max_tiles": 2, "pinpoints": [(TILE, TILE * 2), (TILE * 2, TILE * 2)]},
        {"image_size": TILE, "frames_upbound": 3, "newline": "grid"},
        {"hidden_size": 72, "num_heads": 1},
    ),
    "oryx": (
        {"maxres": 160, "lowres": 128},
        {"maxres": 192, "minres": 160, "frames_upbound": 2},
        {"hidden_size": 72, "num_heads": 1, "pos_table": (24, 24)},
    ),
    "qwen2_vl": (
        {"max_pixels": 25 * 28**2},
        {"min_frames": 2, "max_frames": 4, "min_pixels": 4 * 28**2, "max_pixels": 9 * 28**2},
        {"hidden_size": 80, "num_heads": 1, "out_size": WIDTH},
    ),
}


@dataclass(frozen=True)
class Result:
    """What one system did: its small plans, every check, and the seconds of a pass."""

    plans: list[Plan]
    checks: list[Accuracy]
    seconds: dict[str, float]


def worst(checks: Sequence[Accuracy]) -> float:
    """The largest error over what is allowed."""
    return max(check.error / check.budget if check.budget else 0.0 for check in checks)


class SystemModel(nn.Module):
    """A system from patches to the tokens of its language model."""

    def __init__(self, name: str, impl: str) -> None:
        super().__init__()
        self.name, self.impl = name, impl
        config = replace(CONFIGS[name], depth=1, mlp_ratio=2.0, **SMALL[name][2])
        self.vit = NativeViT(config, impl=impl)
        self.path: nn.Module = {
            "internvl": lambda size: internvl.Projector(size, WIDTH),
            "llava_onevision": lambda size: llava_onevision.Projector(size, WIDTH),
            "oryx": lambda size: oryx.TokenPath(size, WIDTH, impl=impl),
            "qwen2_vl": lambda size: nn.Identity(),  # the encoder ends in its merger
        }[name](config.hidden_size)

    def forward(self, pixels: Tensor, grid: PackedGrid, plans: Sequence[Plan]) -> Tensor:
        x = self.vit(pixels, grid)
        if self.name == "internvl":
            return self.path(x, grid, impl=self.impl)
        if self.name == "llava_onevision":
            return self.path(x, plans, impl=self.impl)
        return self.path(x, plans) if self.name == "oryx" else self.path(x)


def plan(name: str, media: Sequence[Medium]) -> list[Plan]:
    """What the system makes of each on its smaller budget."""
    images, clips, _ = SMALL[name]
    return [
        _media.plan([medium], name, **(images if medium.clip is None else clips))[0]
        for medium in media
    ]


def run(
    name: str,
    impl: str,
    media: Sequence[Medium],
    plans: list[Plan],
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> Result:
    """Forward and backward, fused, by the reference, and in float64, from the same weights."""
    frames = [medium.frames(plan) for medium, plan in zip(media, plans, strict=True)]
    pixels, grid = _media.system(name).preprocess(frames, plans)

    torch.manual_seed(seed)
    fused, reference, oracle = (
        SystemModel(name, path).to(device, dtype) for path in (impl, "reference", "reference")
    )
    for parameter in fused.parameters():  # biases and tables too, or their gradients say little
        nn.init.normal_(parameter, std=0.05)
    for model in (reference, oracle):
        model.load_state_dict(fused.state_dict())
    # the oracle goes first, and takes what the first of all passes takes
    models = {"float64": oracle.double(), "reference": reference, "fused": fused}
    pixels, grid = pixels.to(device, dtype), grid.to(device)
    outputs, gradients, seconds = {}, {}, {}
    for label, model in models.items():
        begin = time.perf_counter()
        outputs[label], gradients[label] = _differentiate(model, pixels, grid, plans)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[label] = time.perf_counter() - begin
    checks = [
        check
        for x in (outputs, gradients)
        for check in measure_model(x["fused"], x["reference"], x["float64"])
    ]
    return Result(plans, checks, {label: seconds[label] for label in ("fused", "reference")})


def _differentiate(
    model: SystemModel, pixels: Tensor, grid: PackedGrid, plans: Sequence[Plan]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tokens = model(pixels.to(next(model.parameters()).dtype), grid, plans)
    assert tokens.shape[0] == sum(plan.llm_tokens for plan in plans)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(tokens.shape, generator=generator).to(pixels)
    tokens.backward(cotangent.to(tokens.dtype))
    gradients = {
        f"grad {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None  # Oryx's key bias has none
    }
    return {"tokens": tokens.detach()}, gradients
