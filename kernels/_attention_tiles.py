"""Tiles of ``varlen_attention`` for a pass, a head size and a GPU.

They spill no registers, whatever the mask, and are ranked by ``bench/compiled/model.py`` for
segments of 64 to 4096 rows. They do not depend on lengths: the bits of a segment would as well.
"""

from functools import lru_cache

import torch
import triton


def head_pieces(head_dim: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold a head of the next multiple of 16 channels."""
    width = triton.cdiv(head_dim, 16) * 16
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return (first, rest) if rest & (rest - 1) == 0 else (2 * first, 0)


# BLOCK_Q, BLOCK_K, warps and stages of each pass, by the largest head size they are for.
# "masked" says what differs with masks, or keys that heads share
_TILES = {  # sm_80, and what is not named below: at most 99 KiB of shared memory
    "fwd": {
        64: (64, 32, 4, 3),
        72: (128, 32, 8, 2),
        80: (64, 64, 4, 2),
        96: (64, 32, 4, 1),
        128: (64, 64, 4, 2),
    },
    "fwd, masked": {80: (64, 32, 4, 3)},
    "dq": {
        64: (64, 32, 4, 2),
        72: (64, 32, 4, 1),
        80: (128, 32, 8, 2),
        96: (64, 32, 4, 1),
        128: (64, 32, 4, 2),
    },
    "dkv": {
        64: (32, 64, 4, 2),
        72: (16, 64, 4, 1),
        80: (16, 128, 8, 3),
        96: (16, 64, 4, 1),
        128: (16, 64, 4, 2),
    },
}
_TILES_SM_86 = {  # sm_89 and sm_120 too: what spills on them with the above
    "fwd": {**_TILES["fwd"], 128: (64, 32, 4, 2)},
    "dq": {**_TILES["dq"], 120: (128, 32, 8, 1), 128: (128, 32, 8, 2)},
    "dkv": {
        48: (32, 64, 4, 2),
        56: (16, 64, 4, 3),
        **_TILES["dkv"],
        120: (16, 64, 4, 1),
    },
    "fwd, masked": _TILES["fwd, masked"],
    "dkv, masked": {80: (16, 128, 8, 1)},
}
_TILES_SM_90 = {  # by times on an H200, over segments of 64, 620 and 4096: none is best for all
    "fwd": {64: (64, 64, 4, 3), 80: (128, 64, 4, 3), 128: (64, 64, 4, 3)},
    "dq": {96: (64, 64, 4, 3), 128: (64, 64, 4, 2)},
    "dkv": {128: (32, 64, 4, 3)},
    "dkv, masked": {
        80: (32, 64, 4, 3),
        96: (32, 128, 8, 3),
        112: (16, 64, 4, 3),
        128: (32, 128, 8, 3),
    },
}
_TILES_SM_100 = {
    "fwd": {80: (128, 64, 4, 3), 96: (64, 64, 4, 3), 128: (128, 64, 8, 3)},
    "dq": {64: (128, 64, 4, 3), 96: (128, 32, 4, 3), 128: (64, 64, 8, 2)},
    "dkv": {64: (32, 64, 4, 3), 128: (64, 64, 8, 1)},
    "fwd, masked": {80: (128, 64, 4, 1)},
    "dkv, masked": {64: (32, 64, 4, 1)},
}
_TILES_AMD = {  # at most 64 KiB of shared memory
    "fwd": {64: (128, 32, 4, 3), 96: (128, 32, 4, 1), 128: (128, 64, 8, 2)},
    "dq": {64: (128, 32, 4, 2), 96: (128, 32, 4, 1), 128: (128, 32, 8, 2)},
    "dkv": {64: (16, 64, 4, 1), 80: (16, 128, 8, 2), 128: (16, 64, 4, 1)},
}
_TILES_GFX950 = {**_TILES_AMD, "dq, masked": {128: (128, 32, 8, 1)}}
_TILES_FLOAT32 = {
    "fwd": {128: (32, 32, 8, 1)},
    "dq": {128: (32, 16, 8, 1)},  # one shape for both, so that their products have the same bits
    "dkv": {128: (32, 16, 8, 1)},
}
_TILES_AMD_FLOAT32 = {
    "fwd": {128: (32, 32, 8, 1)},
    "dq": {128: (32, 16, 4, 1)},
    "dkv": {128: (32, 16, 4, 1)},
}
_TILES_FLOAT32_OF = {"gfx942": _TILES_AMD_FLOAT32, "gfx950": _TILES_AMD_FLOAT32}
_TILES_OF = {
    86: _TILES_SM_86,
    89: _TILES_SM_86,
    120: _TILES_SM_86,
    90: _TILES_SM_90,
    100: _TILES_SM_100,
    103: _TILES_SM_100,
    "gfx942": _TILES_AMD,
    "gfx950": _TILES_GFX950,
}


@lru_cache
def attention_tiles(
    pass_name: str,
    head_dim: int,
    masked: bool,
    dtype: torch.dtype,
    architecture: int | str | None,
) -> dict[str, int]:
    """Pieces of a head, tile sizes, warps and stages of a pass.

    ``masked`` says that keys are masked or shared by heads, which takes registers.
    """
    float32 = dtype == torch.float32
    passes = _TILES_OF.get(architecture, _TILES)
    if float32:
        passes = _TILES_FLOAT32_OF.get(architecture, _TILES_FLOAT32)
    pieces = head_pieces(head_dim)
    if pieces == (128, 0) and (float32 or (pass_name != "fwd" and passes is not _TILES_SM_100)):
        pieces = 64, 64  # what registers hold of a head at once is half as much
    tiles = passes[pass_name]
    if masked:
        tiles = {**tiles, **passes.get(f"{pass_name}, masked", {})}
    names = ("D0", "D1", "BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    largest = min(size for size in tiles if size >= head_dim)
    return dict(zip(names, (*pieces, *tiles[largest]), strict=True))
