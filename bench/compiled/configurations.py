"""Every shipped configuration: ops, options and the widths of real models.

Lengths are small, since no kernel depends on them. A case of the catalogue is the start of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from patchpack.testing import compiled
from patchpack.testing.catalogue import SPECS, Inputs
from patchpack.testing.contract import backward, leaves, tensors

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
DTYPES = ("bfloat16", "float32", "float16")
# of SigLIP and LLaVA-OneVision 72, of Qwen2-VL's encoder 80, of language models 128
HEAD_DIMS = (64, 72, 80, 96, 128)
OTHER_HEAD_DIMS = (16, 32, 48, 56, 88, 104, 112, 120)


@dataclass(frozen=True)
class Configuration:
    """An op, a name for what is asked of it, and the options that say it to the catalogue."""

    op: str
    name: str
    options: Inputs

    def compile(self, target: str, dtype: str) -> list[compiled.Launch]:
        """All launches of the forward and the backward pass."""
        spec = SPECS[self.op]
        options = {"device": "cpu", "seed": 0, **self.options}
        inputs = spec.pack(spec.make_images(dtype=getattr(torch, dtype), **options))
        arguments = leaves(inputs, spec.grads)
        with compiled.session(target) as launches:
            outputs = tensors(spec.op(**{**inputs, **arguments}, impl="triton"))
            backward(outputs, [torch.zeros_like(x) for x in outputs])
        return launches


def configurations(op: str, dtype: str) -> Iterator[Configuration]:
    """Of an op in a dtype; what differs little between dtypes is compiled for a part of them."""
    step = {"bfloat16": 1, "float32": 2, "float16": 3}[dtype]
    if op == "varlen_attention":  # which needs all registers
        step = 1
    for name, (case, options) in list(_OPTIONS[op].items())[::step]:
        if dtype == "bfloat16" or "head_dim" not in options or options["head_dim"] in HEAD_DIMS:
            yield Configuration(op, name, {**SPECS[op].cases[case], **options})


_ROTARY = {"heads": (16, 16)}
_FULL = {"softmax_scale": None}
_MASKS = {
    "": {"return_lse": True},
    ", causal, GQA": {"heads": (4, 1), "causal": True},
    ", window": {"window_size": (20, 9)},
}

# by op and name: a case of the catalogue, and what is changed in it
_OPTIONS: dict[str, dict[str, tuple[str, Inputs]]] = {
    "rope": {
        **{f"head size {d}": ("one image", {**_ROTARY, "head_dim": d}) for d in HEAD_DIMS},
        "interleaved": ("interleaved", _ROTARY),
        "partial": ("partial", _ROTARY),
        "Qwen2-VL-7B": ("full-width table", {"heads": (28, 4)}),
    },
    "rope_2d": {
        **{f"head size {d}": ("one image", {**_ROTARY, "head_dim": d}) for d in HEAD_DIMS},
        "Qwen2-VL": ("Qwen2-VL", _ROTARY),
        "Pixtral": ("Pixtral", _ROTARY),
        "MoonViT": ("MoonViT", _ROTARY),
        "GQA": ("head size 32, GQA", {"head_dim": 128, "heads": (32, 8)}),
    },
    "mrope": {
        "Qwen2-VL-7B": ("Qwen2-VL", {"heads": (28, 4)}),
        "Qwen3-VL-8B": ("Qwen3-VL", {"heads": (32, 8)}),
        "a quarter of 256": ("partial, interleaved", {"heads": (16, 2), "head_dim": 256}),
        "head size 64": ("no time", {"heads": (12, 2)}),
    },
    "varlen_attention": {
        **{
            f"head size {d}{name}": ("scale", {**_FULL, "head_dim": d, **options})
            for d, (name, options) in itertools.product(HEAD_DIMS, _MASKS.items())
        },
        **{f"head size {d}": ("scale", {**_FULL, "head_dim": d}) for d in OTHER_HEAD_DIMS},
        **{
            f"head size {d}, few queries": ("few queries, many keys", {**_ROTARY, "head_dim": d})
            for d in HEAD_DIMS
        },
        **{
            f"head size {d}, rotated": ("rotated, short segments", {"head_dim": d})
            for d in (64, 80, 128)
        },
    },
    "interpolate_tokens": {
        case: (case, {"channels": 1152})
        for case in (
            "LLaVA-OneVision", "ragged", "blocks made", "bilinear, corners", "bilinear, antialias",
            "bicubic", "bicubic, corners", "bicubic, antialias", "area", "max", "nearest",
        )
    },
    "add_pos_embed": {
        "Qwen3-VL": ("Qwen3-VL", {"channels": 1152, "table": (48, 48)}),
        "SigLIP 2": ("SigLIP 2", {"channels": 768, "table": (16, 16)}),
        "MoonViT": ("MoonViT", {"channels": 1152, "table": (64, 64)}),
        "Oryx": ("Oryx", {"channels": 1152, "table": (128, 128)}),
        "table in float32": ("table in float32", {"channels": 1152, "table": (64, 64)}),
        "bicubic, antialias": ("bicubic, antialias", {"channels": 768, "table": (16, 16)}),
    },
    "patchify": {
        "Qwen2-VL": ("Qwen2-VL", {}),
        "Qwen3-VL": ("Qwen2-VL", {"patch_size": 16}),
        "SigLIP 2": ("SigLIP 2", {}),
        "floating": ("floating", {"patch_size": 14}),
    },
    "resize_images": {"bicubic": ("bicubic", {}), "bilinear": ("bilinear", {})},
    "scatter_tokens": {
        "tokens": ("tokens", {"channels": 3584}),
        "tokens and vectors": ("tokens and vectors", {"channels": 3584}),
        "batch": ("batch", {"channels": 4096}),
    },
    "merge_tokens": {
        "nothing normalised": ("many images", {"channels": 1280}),
        "InternVL": ("InternVL", {"channels": 1024}),
        "InternVL v1": ("InternVL v1", {"channels": 1024}),
        "Qwen2-VL": ("Qwen2-VL", {"channels": 1280}),
        "Qwen3-VL, deepstack": ("float32 weights", {"channels": 1152, "order": "row"}),
    },
    "region_attention": {
        case: (case, {"channels": 1152})
        for case in ("Oryx, image", "Oryx, video", "Oryx, long video")
    },
    "assemble": {
        "LLaVA-OneVision": ("LLaVA-OneVision", {"channels": 3584}),
        "Oryx": ("Oryx", {"channels": 3584}),
    },
}  # fmt: skip
