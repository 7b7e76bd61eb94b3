"""``rope_2d`` in the vision towers of real models, on sixteen images. Memory-bound."""

from __future__ import annotations

from _harness import PHOTOS, Bench, Floor, heads
from _rotary import bytes_moved, flops, peers
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, sizes, num_heads, head_dim, merge=1, **options) -> Inputs:
    grid = PackedGrid(sizes, merge, device=device)
    q, k, _ = heads(grid.num_tokens, (num_heads, num_heads), head_dim, dtype, device)
    return {"q": q, "k": k, "grid": grid, **options}


# 8192 patches
SIZES = [(16, 32), (8, 64), (20, 20), (24, 26), (22, 24), (8, 62), (18, 28), (20, 26)]
SIZES += [(w, h) for h, w in SIZES]
QWEN2_VL = "Qwen2-VL, 16 images, T8192"

BENCH = Bench(
    op="rope_2d",
    shapes={
        QWEN2_VL: {"sizes": SIZES, "num_heads": 16, "head_dim": 80, "merge": 2},
        "Pixtral, 16 photos": {
            "sizes": PHOTOS,
            "num_heads": 16,
            "head_dim": 64,
            "axes": "even_odd",
        },
        "MoonViT, 16 photos": {
            "sizes": PHOTOS,
            "num_heads": 16,
            "head_dim": 72,
            "axes": "paired",
            "interleaved": True,
        },
    },
    large={
        "Qwen2-VL, 128 images, T65536": {
            "sizes": SIZES * 8,
            "num_heads": 16,
            "head_dim": 80,
            "merge": 2,
        },
    },
    tiny={"sizes": [(4, 6), (2, 2)], "num_heads": 2, "head_dim": 32, "merge": 2},
    make_inputs=_make_inputs,
    bytes_moved=bytes_moved,
    flops=flops,
    bound="copy",
    peers=peers("rope_2d"),
    floors=(
        Floor(QWEN2_VL, "bfloat16", "forward+backward", "transformers", 12),
        Floor(QWEN2_VL, "bfloat16", "forward+backward", "transformers, compiled", 4),
    ),
)
