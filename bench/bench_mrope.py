"""``mrope`` in the language models behind a vision tower. Memory-bound."""

from __future__ import annotations

import torch

from _harness import Bench, heads
from _rotary import bytes_moved, flops, liger_text, peers, transformers_text
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, num_tokens, num_heads, head_dim, **options) -> Inputs:
    q, k, _ = heads(num_tokens, num_heads, head_dim, dtype, device)
    position_ids = torch.randint(0, 4096, (3, num_tokens), device=device)
    return {"q": q, "k": k, "position_ids": position_ids, **options}


BENCH = Bench(
    op="mrope",
    shapes={
        "Qwen2-VL-7B, T8192": {
            "num_tokens": 8192,
            "num_heads": (28, 4),
            "head_dim": 128,
            "mrope_section": (16, 24, 24),
        },
        "Qwen3-VL-8B, T8192": {
            "num_tokens": 8192,
            "num_heads": (32, 8),
            "head_dim": 128,
            "mrope_section": (24, 20, 20),
            "mrope_interleaved": True,
            "base": 5e6,
        },
    },
    large={
        "Qwen2-VL-7B, T65536": {
            "num_tokens": 65536,
            "num_heads": (28, 4),
            "head_dim": 128,
            "mrope_section": (16, 24, 24),
        },
    },
    tiny={"num_tokens": 6, "num_heads": (2, 1), "head_dim": 32, "mrope_section": (4, 6, 6)},
    make_inputs=_make_inputs,
    bytes_moved=bytes_moved,
    flops=flops,
    bound="copy",
    peers=peers("mrope", transformers_text, liger_text),
)
