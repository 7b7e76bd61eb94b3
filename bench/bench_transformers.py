"""Vision encoders of transformers, as they are and after ``apply_to``: of patches, tokens.

Heads have the models' widths; blocks are fewer and narrower, so that a CPU can be timed. A training
step is both passes, with the gradients of all parameters. Nothing is prepared by a data loader.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import patchpack
from _harness import PHOTOS, Bench, Provider, UnavailableError
from patchpack.testing.catalogue import Inputs

WIDTH = {"hidden_size": 320, "out_hidden_size": 512, "num_heads": 4, "intermediate_size": 1280}
# configuration, model and what is other than its default
ENCODERS = {
    "qwen2_vl": (
        "Qwen2VLVisionConfig",
        "Qwen2VisionTransformerPretrainedModel",
        {"embed_dim": 320, "hidden_size": 512, "num_heads": 4, "depth": 2},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        {**WIDTH, "depth": 2, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        "Qwen3VLVisionConfig",
        "Qwen3VLVisionModel",
        {**WIDTH, "depth": 2, "deepstack_visual_indexes": [0]},
    ),
}


def _encoder(inputs: Inputs, attention: str) -> nn.Module:
    """The same weights every time."""
    family = inputs["family"]
    config, model, options = ENCODERS[family]
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    torch.manual_seed(0)
    encoder = getattr(modeling, model)(getattr(modeling, config)(**options))
    encoder.set_attn_implementation(attention)
    return encoder.to(inputs["pixels"].device, inputs["pixels"].dtype)


def _make_inputs(dtype, device, family, sizes, training=False) -> Inputs:
    patch_size = 16 if family == "qwen3_vl" else 14
    grid_thw = torch.tensor([(1, *size) for size in sizes], device=device)
    num_tokens = sum(rows * cols for rows, cols in sizes)
    pixels = torch.randn(num_tokens, 6 * patch_size**2, device=device).to(dtype)
    return {"family": family, "pixels": pixels, "grid_thw": grid_thw, "training": training}


def _called(encoder: nn.Module) -> Provider:
    parameters = list(encoder.parameters())

    def call(pixels: Tensor, grid_thw: Tensor, training: bool, **_) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            tokens = encoder(pixels, grid_thw).pooler_output
            loss = tokens.float().square().mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True) if training else ()
        return [tokens.detach(), *(x for x in grads if x is not None)]

    return call


def _theirs(attention: str, inputs: Inputs) -> Provider:
    return _called(_encoder(inputs, attention))


def _ours(inputs: Inputs) -> Provider:
    from patchpack.integrations.transformers import apply_to

    if reason := inputs["pixels"].device.type == "cpu" and patchpack.available("rope", "native"):
        raise UnavailableError(reason)
    encoder = _encoder(inputs, "sdpa")
    apply_to(encoder)
    return _called(encoder)


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read patches and weights and write tokens; in training weights twice, and their gradients."""
    encoder = _encoder(inputs, "eager")
    weights = sum(x.numel() for x in encoder.parameters()) * (3 if inputs["training"] else 1)
    num_tokens, size = len(inputs["pixels"]) // 4, inputs["pixels"].itemsize
    return size * (inputs["pixels"].numel() + weights + num_tokens * 512)


def _flops(inputs: Inputs, backward: bool) -> int:
    """Of all matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        _called(_encoder(inputs, "eager"))(**inputs)
    return counter.get_total_flops()


SHAPES = {}
for family, name in (
    ("qwen2_vl", "Qwen2-VL"),
    ("qwen2_5_vl", "Qwen2.5-VL"),
    ("qwen3_vl", "Qwen3-VL"),
):
    SHAPES[f"{name}, 8 photos"] = {"family": family, "sizes": PHOTOS[:8]}
    SHAPES[f"{name}, 8 photos, training step"] = {**SHAPES[f"{name}, 8 photos"], "training": True}

BENCH = Bench(
    op="transformers",
    shapes=SHAPES,
    tiny={"family": "qwen2_vl", "sizes": [(4, 4), (2, 6)]},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="matmul",
    peers={
        "transformers, eager": functools.partial(_theirs, "eager"),
        "transformers, sdpa": functools.partial(_theirs, "sdpa"),
        "patchpack": _ours,
    },
    backward=False,
    max_relative_rms=0.05,  # of bfloat16 through two blocks; `tests/test_transformers.py` is strict
)
