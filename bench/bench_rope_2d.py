"""``rope_2d`` in the vision towers of real models, on sixteen photographs. Memory-bound."""

from __future__ import annotations

from _harness import PHOTOS, Bench, heads
from _rotary import bytes_moved, flops, peers
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, sizes, num_heads, head_dim, merge=1, **options) -> Inputs:
    grid = PackedGrid(sizes, merge, device=device)
    q, k, _ = heads(grid.num_tokens, (num_heads, num_heads), head_dim, dtype, device)
    return {"q": q, "k": k, "grid": grid, **options}


BENCH = Bench(
    op="rope_2d",
    shapes={
        "Qwen2-VL, 16 photos": {"sizes": PHOTOS, "num_heads": 16, "head_dim": 80, "merge": 2},
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
    tiny={"sizes": [(4, 6), (2, 2)], "num_heads": 2, "head_dim": 32, "merge": 2},
    make_inputs=_make_inputs,
    bytes_moved=bytes_moved,
    flops=flops,
    bound="copy",
    peers=peers("rope_2d"),
)
