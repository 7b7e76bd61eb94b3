"""``rope`` from a table, as vision towers and language models call it. Memory-bound."""

from __future__ import annotations

import torch

from _harness import Bench, heads
from _rotary import bytes_moved, flops, peers
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, num_tokens, num_heads, head_dim) -> Inputs:
    q, k, _ = heads(num_tokens, num_heads, head_dim, dtype, device)
    angle = torch.rand(num_tokens, head_dim // 2, device=device) * 100
    return {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin()}


BENCH = Bench(
    op="rope",
    shapes={
        "Qwen2-VL vision, T8192": {"num_tokens": 8192, "num_heads": (16, 16), "head_dim": 80},
        "Qwen2.5-7B text, T8192": {"num_tokens": 8192, "num_heads": (28, 4), "head_dim": 128},
    },
    tiny={"num_tokens": 6, "num_heads": (2, 1), "head_dim": 32},
    make_inputs=_make_inputs,
    bytes_moved=bytes_moved,
    flops=flops,
    bound="copy",
    peers=peers("rope"),
)
