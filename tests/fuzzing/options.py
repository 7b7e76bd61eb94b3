"""Drawn batches, and drawn options of every op."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from patchpack.layout import FeatureMap, Vector

MOST = 5000  # tokens of an image


class _Many(list):
    """``count`` small images, drawn from a seed: a list of them would be long to read."""

    def __init__(self, count: int, divisor: int, seed: int) -> None:
        sides = random.Random(seed)
        most = (2, 3, 3) if divisor == 1 else (1, 2, 2)
        thw = [tuple(sides.randint(1, n) for n in most) for _ in range(count)]
        super().__init__((t, h * divisor, w * divisor) for t, h, w in thw)
        self.arguments = count, divisor, seed

    def __repr__(self) -> str:
        return f"_Many{self.arguments}"


def _ones(divisor: int, frames: int = 3, side: int = 12) -> st.SearchStrategy:
    sides = st.integers(1, max(side // divisor, 1)).map(lambda n: n * divisor)
    return st.tuples(st.integers(1, frames), sides, sides)


@st.composite
def batches(draw, divisor: int = 1, *, small: bool = False) -> list:
    """Sizes of images; no image is ``(0, 0, 0)``."""
    kind = 0 if small else draw(st.integers(0, 23))
    if kind < 20:
        one = _ones(divisor, 2, 6) if small else _ones(divisor)
        few = st.lists(st.just((0, 0, 0)) | one, min_size=1, max_size=3 if small else 6)
        return draw(few)
    if kind < 22:
        long = draw(st.integers(1, MOST // divisor**2)) * divisor
        square = (draw(st.integers(1, math.isqrt(MOST) // divisor)) * divisor,) * 2
        side = draw(st.sampled_from([(divisor, long), (long, divisor), square]))
        return [(1, *side), *draw(st.lists(_ones(divisor), max_size=1))]
    return draw(_many(divisor))


def _many(divisor: int = 1) -> st.SearchStrategy:
    counts = st.sampled_from([20, 64, 200, 64, 20, 64, 200, 4096])
    return st.builds(_Many, counts, st.just(divisor), st.integers(0, 2**32))


def num_tokens(sizes: list) -> int:
    return sum(map(math.prod, sizes))


def _most(sizes: list, most: int, numbers: int = 2**19) -> int:
    """As much for each token as can be afforded, at most ``most``."""
    return max(1, min(most, numbers // max(num_tokens(sizes), 1)))


# Options, as the catalogue's functions take them -------------------------------------------------


@st.composite
def _heads(draw, sizes: list, multiple: int, least: int, most: int) -> dict:
    afforded = _most(sizes, most)
    steps = draw(st.integers(-(-least // multiple), max(least, afforded) // multiple))
    num_heads = st.integers(1, _most(sizes, 9 * most) // most or 1)
    return {"head_dim": multiple * steps, "heads": (draw(num_heads), draw(num_heads))}


@st.composite
def _rope(draw, small: bool) -> dict:
    sizes = draw(batches(small=small))
    options = draw(_heads(sizes, 1, 2, 256))
    half = options["head_dim"] // 2
    pairs = draw(st.integers(1, half))
    interleaved = draw(st.booleans())
    full = not interleaved and 2 * pairs > half and draw(st.booleans())
    return {"sizes": sizes, **options, "pairs": pairs, "interleaved": interleaved, "full": full}


BASES = st.sampled_from([10_000.0, 100.0, 1.5, 5e6]) | st.floats(1.0, 1e9)
MERGES = st.integers(1, 4)


@st.composite
def _rope_2d(draw, small: bool) -> dict:
    merge = draw(MERGES)
    sizes = draw(batches(merge, small=small))
    return {
        "sizes": sizes,
        "merge": merge,
        **draw(_heads(sizes, 4, 4, 256)),
        "base": draw(BASES),
        "interleaved": draw(st.booleans()),
        "axes": draw(st.sampled_from(["split", "even_odd", "paired"])),
    }


@st.composite
def _mrope(draw, small: bool) -> dict:
    sizes = draw(batches(small=small))
    options = draw(_heads(sizes, 1, 2, 256))
    left, sections = options["head_dim"] // 2, []
    for _ in range(3):
        sections.append(draw(st.integers(0, left)))
        left -= sections[-1]
    if not any(sections):
        sections[draw(st.integers(0, 2))] = 1
    return {
        "sizes": sizes,
        **options,
        "sections": tuple(sections),
        "rows": draw(st.sampled_from([3, 4])),
        "start": draw(st.sampled_from([0, -7, 131_000, 2**31 - 2 * MOST, MOST - 2**31])),
        "mrope_interleaved": draw(st.booleans()),
        "base": draw(BASES),
    }


@st.composite
def _varlen_attention(draw, small: bool) -> dict:
    merge = draw(st.sampled_from([None, None, 1, 2]))
    if merge is None:
        edges = st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
        lengths = st.integers(0, 20) if small else edges | st.integers(0, 300)
        segment = st.tuples(st.integers(1, 2), lengths, st.just(1))
        kind = 0 if small else draw(st.integers(0, 23))
        if kind < 22:
            sizes = draw(st.lists(segment, min_size=1, max_size=3 if small else 6))
        else:
            one = st.integers(601, MOST).map(lambda n: [(1, n, 1)])
            sizes = draw(one if kind < 23 else _many())
    else:
        sizes = draw(st.lists(_ones(merge, 2, 6 if small else 14), min_size=1, max_size=5))
    pairs = sum(t * (h * w) ** 2 for t, h, w in sizes)
    many = len(sizes) > 64  # autograd of a slice costs the whole: the reference takes as many
    num_k_heads = draw(st.integers(1, 1 if small or many or pairs > 2**20 else 3))
    group = draw(st.integers(1, 1 if many or pairs > 2**20 else 2 if small else 4))
    head_dim = 4 * draw(st.integers(1, 32)) if merge else draw(st.integers(1, 8 if many else 128))
    options = {
        "sizes": sizes,
        "heads": (group * num_k_heads, num_k_heads),
        "head_dim": head_dim,
        "causal": draw(st.booleans()),
        "return_lse": draw(st.booleans()),
        "padding": draw(st.sampled_from([0, 0, 1, 70])),
        "softmax_scale": draw(st.none() | st.floats(0.05, 1.5).map(lambda x: x * head_dim**-0.5)),
        "window_size": draw(st.tuples(*[st.just(-1) | st.integers(0, 200) | st.just(2**31)] * 2)),
    }
    if merge is not None:
        options |= {
            "merge": merge,
            "padding": 0,
            "return_lse": False,  # in float32, of heads that were rounded: they have no yardstick
            "rope_base": draw(BASES),
            "rope_interleaved": draw(st.booleans()),
            "rope_axes": draw(st.sampled_from(["split", "even_odd", "paired"])),
        }
        longest = max(h * w for _, h, w in sizes)
        options["max_seqlen_q"] = draw(st.sampled_from([None, longest]))
    elif not many and draw(st.booleans()):
        options["keys"] = draw(st.sampled_from([1.0, 0.0, 0.4, 2.5] if pairs < 2**20 else [1.0]))
        options["more_keys"] = draw(
            st.sampled_from([0, 1, 40, 1100] if pairs < 2**16 and not small else [0, 1, 40])
        )
    return options


@st.composite
def _interpolate_tokens(draw, small: bool) -> dict:
    merge, target_merge = draw(MERGES), draw(st.none() | MERGES)
    sizes = draw(batches(merge, small=small))
    m = target_merge or merge
    afforded = math.isqrt(_most([(1, 1, len(sizes))], 14**2 if small else MOST, 2 * MOST))
    side = st.integers(1, max(afforded // m, 1)).map(lambda n: n * m)
    mode = draw(st.sampled_from(["bilinear", "bicubic", "area", "max", "nearest"]))
    options = {
        "sizes": sizes,
        "merge": merge,
        "spatial_merge_size": target_merge,
        "target_hw": draw(
            st.tuples(side, side) | st.lists(st.tuples(side, side), min_size=1, max_size=6)
        ),
        "channels": draw(st.integers(1, _most(sizes, 40 if small else 300))),
        "mode": mode,
    }
    if mode in ("bilinear", "bicubic"):
        options |= {"align_corners": draw(st.booleans()), "antialias": draw(st.booleans())}
    return options


@st.composite
def _add_pos_embed(draw, small: bool) -> dict:
    merge = draw(MERGES)
    sizes = draw(batches(merge, small=small))
    side = st.integers(1, 9 if small else 40)
    return {
        "sizes": sizes,
        "merge": merge,
        "table": draw(st.tuples(side, side)),
        "table_dtype": draw(st.sampled_from([None, torch.float32])),
        "channels": draw(st.integers(1, _most(sizes, 40 if small else 300))),
        "mode": draw(st.sampled_from(["bilinear", "bicubic"])),
        "align_corners": draw(st.booleans()),
        "antialias": draw(st.booleans()),
    }


@st.composite
def _region_attention(draw, small: bool) -> dict:
    merge = draw(st.sampled_from([1, 2, 4]))
    region = draw(st.integers(1, 4) if small else st.integers(1, 5) | st.sampled_from([16, 64]))
    sizes = draw(batches(math.lcm(merge, region), small=small))
    return {
        "sizes": sizes,
        "merge": merge,
        "region": region,
        "channels": draw(st.integers(1, _most(sizes, 40 if small else 300))),
        "softmax_scale": draw(st.none() | st.floats(0.01, 2.0)),
    }


@st.composite
def _merge_tokens(draw, small: bool) -> dict:
    merge = draw(st.sampled_from([1, 2, 4]))
    large = st.sampled_from([2, 4] if small else [16, 64])
    merge_size = draw(st.none() | st.integers(1, 4) | large)
    divisor = math.lcm(merge, merge_size or (2 if merge == 1 else merge))
    sizes = draw(batches(divisor, small=small))
    params = "weight", "bias", "weight bias"
    norms = [f"{what} {by}" for what in ("token", "merged") for by in params]
    return {
        "sizes": sizes,
        "merge": merge,
        "merge_size": merge_size,
        "order": draw(st.sampled_from(["row", "column"])),
        "norm": draw(st.sampled_from(["", *norms])),
        "params": draw(st.sampled_from([None, torch.float32])),
        "channels": draw(st.integers(1, _most(sizes, 40 if small else 300))),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
    }


@st.composite
def _patchify(draw, small: bool) -> dict:
    merge = draw(MERGES)
    sizes = draw(batches(merge, small=small))
    layout = draw(st.sampled_from(["ctpp", "ppc"]))
    temporal = 1 if layout == "ppc" else draw(st.integers(1, 3))
    patch_size = draw(st.integers(1, math.isqrt(_most(sizes, 16**2, 2**19))))
    still = draw(st.booleans())
    if still:  # one frame
        sizes = [(min(t, 1), h, w) for t, h, w in sizes]
    largest = patch_size * max(max(size) for size in sizes)
    filters = ["bicubic", "bilinear"] if largest < 500 else []  # the reference is slow
    resample = draw(st.sampled_from([None, None, *filters]))
    remainder = st.integers(0, patch_size - 1 if resample is None else 40)
    return {
        "sizes": sizes,
        "merge": merge,
        "layout": layout,
        "temporal_patch_size": temporal,
        "patch_size": patch_size,
        "still": still,
        "missing": draw(st.integers(0, temporal - 1)),
        "remainder": draw(st.tuples(remainder, remainder)),
        "channels": draw(st.integers(1, 4)),
        "bytes_": resample is not None or draw(st.booleans()),
        "resample": resample,
    }


@st.composite
def _resize_images(draw, small: bool) -> dict:
    sizes = draw(batches(small=small))
    scale = st.floats(0.02, 1.5 if small else min(4.0, 300 / len(sizes)))
    return {
        "sizes": [(t, min(h, 100), min(w, 100)) for t, h, w in sizes],  # the reference is slow
        "scale": draw(st.tuples(scale, scale)),
        "still": draw(st.booleans()),
        "channels": draw(st.integers(1, 4)),
        "mode": draw(st.sampled_from(["bicubic", "bilinear"])),
    }


@st.composite
def _scatter_tokens(draw, small: bool) -> dict:
    sizes = draw(batches(small=small))
    batched = draw(st.booleans())
    if batched:  # sequences of one length
        sizes = [(t, *max(sizes)[1:]) for t, _, _ in sizes[:64]]
    return {
        "sizes": sizes,
        "batched": batched,
        "channels": draw(st.integers(1, _most(sizes, 40 if small else 300))),
        "vectors": draw(st.integers(0, 5)),
        "index_dtype": draw(st.sampled_from([torch.int64, torch.int32])),
    }


@dataclass(frozen=True)
class Parts:
    """What ``assemble`` makes of an image: vectors, and maps that are cropped and resized."""

    whole: bool
    across: bool
    last_first: bool
    crop: tuple[int, int, int, int]  # modulo what there is
    target_hw: tuple[int, int] | None
    newline: int | None
    separators: tuple[int, ...]

    def __call__(self, t: int, h: int, w: int) -> list:
        tiles = (1, t) if self.across else (t, 1)
        rows, cols = h * tiles[0], w * tiles[1]
        top, left = self.crop[0] % rows, self.crop[1] % cols
        size = 1 + self.crop[2] % (rows - top), 1 + self.crop[3] % (cols - left)
        first = h * w if self.whole else 0
        parts: list = [FeatureMap(0, (h, w), newline=self.newline)] if self.whole else []
        parts += [Vector(i) for i in self.separators]
        crop = (top, left, *size)
        parts.append(FeatureMap(first, (h, w), tiles, crop, self.target_hw, self.newline))
        return parts[::-1] if self.last_first else parts


@st.composite
def _assemble(draw, small: bool) -> dict:
    sizes = draw(batches(small=small))
    vectors = draw(st.integers(0, 4))
    index = st.integers(0, max(vectors - 1, 0))
    side = st.integers(1, 9 if small else _most([(1, 1, len(sizes))], 40, 400))
    parts = st.builds(
        Parts,
        *[st.booleans()] * 3,
        st.tuples(*[st.integers(0, 99)] * 4),
        st.none() | st.tuples(side, side),
        st.none() | index if vectors else st.none(),
        st.lists(index, max_size=3).map(tuple) if vectors else st.just(()),
    )
    return {
        "sizes": sizes,
        "parts": draw(parts),
        "vectors": vectors,
        "channels": draw(st.integers(1, _most(sizes, 40 if small else 300))),
        "spare": draw(st.integers(0, 3)) if len(sizes) == 1 else 0,
    }


OPTIONS: dict[str, Callable[[bool], st.SearchStrategy]] = {
    "rope": _rope,
    "rope_2d": _rope_2d,
    "mrope": _mrope,
    "varlen_attention": _varlen_attention,
    "interpolate_tokens": _interpolate_tokens,
    "add_pos_embed": _add_pos_embed,
    "region_attention": _region_attention,
    "merge_tokens": _merge_tokens,
    "patchify": _patchify,
    "resize_images": _resize_images,
    "scatter_tokens": _scatter_tokens,
    "assemble": _assemble,
}
