"""Every public op on drawn batches: ragged lengths, strange strides, every option and instruction.

``make fuzz`` runs this file: it draws for ``FUZZ_SECONDS``, op after op, prints every failure with
what repeats it, and keeps failures in ``.hypothesis``, where the next run begins. As a test it
makes a few draws that are always the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import patchpack
from patchpack import PackedGrid, _dispatch, metadata
from patchpack.layout import FeatureMap, Vector
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import CHECKS, DTYPES, Subject, accuracies, differentiate, tensors

DATABASE = Path(__file__).parents[1] / ".hypothesis/fuzz"
MOST = 5000  # tokens of an image

# Batches -----------------------------------------------------------------------------------------


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

# Layouts: the same values elsewhere in memory ----------------------------------------------------


def _around(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A part of a larger buffer."""
    shape = list(x.shape)
    shape[dim] += 3
    return x.new_full(shape, 99).narrow(dim, 1, x.shape[dim]).copy_(x)


def _every_second(x: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] *= 2
    index = (*[slice(None)] * (dim % x.ndim), slice(1, None, 2))
    return x.new_full(shape, 99)[index].copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "a part of rows": lambda x: _around(x, 0),
    "a part of columns": lambda x: _around(x, -1),
    "a part of what is between": lambda x: _around(x, x.ndim // 2),
    "every second row": lambda x: _every_second(x, 0),
    "every second column": lambda x: _every_second(x, -1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "not aligned": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "first row expanded": lambda x: x[:1].expand(x.shape) if x.is_floating_point() else x.clone(),
    "first column expanded": lambda x: (
        x[..., :1].expand(x.shape) if x.is_floating_point() else x.clone()
    ),
}


@dataclass(frozen=True)
class Drawn(Subject):
    """A drawn case of an op: what is checked of it, in which layouts, by which instructions."""

    options: dict = field(default_factory=dict)
    check: str = "accuracy"
    layouts: tuple[str, ...] = ("contiguous",)
    level: str = "plain"

    @property
    def spec(self):
        spec = SPECS[self.op]
        reference = partial(spec.op, impl="reference")  # with what patchify resamples
        return replace(spec, cases={self.case: self.options}, reference=reference)


def check_accuracy(drawn: Drawn) -> None:
    """As the contract's; what fails is measured on more numbers: in few, eager's error is luck."""
    numbers = max((x.numel() for x in tensors([*drawn.inputs().values()])), default=0)
    few = numbers < 2**12 and len(drawn.options["sizes"]) < 8 and drawn.impl != "triton"
    for seeds in (4, 64, 400) if few else (1, 4, 12):
        failed = [str(a) for a in accuracies(drawn, range(seeds)) if not a.passed]
        if not failed:
            return
    raise AssertionError("; ".join(failed))


def check_layouts(drawn: Drawn) -> None:
    """Any strides give the bits of contiguous inputs, and nothing is written into them."""
    layouts = itertools.cycle(LAYOUTS[name] for name in drawn.layouts)

    def lay(x):
        if isinstance(x, list):
            return [lay(y) for y in x]
        return next(layouts)(x) if isinstance(x, torch.Tensor) and x.ndim else x

    laid = {name: lay(x) for name, x in drawn.inputs().items()}
    plain = {name: _map(lambda y: y.clone(memory_format=torch.contiguous_format), x)
             for name, x in laid.items()}  # fmt: skip
    before = [x.clone() for x in tensors(list(laid.values()))]
    want = differentiate(drawn, plain, drawn.spec.grads)
    got = differentiate(drawn, laid, drawn.spec.grads)
    same(got, want)
    for x, y in zip(tensors(list(laid.values())), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was written"


def _map(function, x):
    if isinstance(x, list):
        return [_map(function, y) for y in x]
    return function(x) if isinstance(x, torch.Tensor) else x


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        torch.testing.assert_close(got[name], x, rtol=0, atol=0, equal_nan=True, msg=name)


def check_threads(drawn: Drawn) -> None:
    inputs, before = drawn.inputs(), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(differentiate(drawn, inputs, drawn.spec.grads))
        finally:
            torch.set_num_threads(before)
    same(*results)


FUZZED_CHECKS: dict[str, Callable[[Drawn], None]] = {
    "accuracy": check_accuracy,
    "layouts": check_layouts,
    "threads": check_threads,
    **{
        name: CHECKS[name]
        for name in (
            "packed as alone",
            "inputs unmodified",
            "fully written",
            "deterministic",
            "strided inputs",
        )
    },
}


def _levels() -> list[str]:
    """The instructions that this CPU has."""
    if patchpack.available("rope", "native"):
        return ["plain"]
    before, found = torch.ops.patchpack.cpu_capability(""), []
    for level in ("plain", "avx2", "avx512", "avx512_bf16"):
        try:
            found.append(torch.ops.patchpack.cpu_capability(level))
        except RuntimeError:
            continue
    torch.ops.patchpack.cpu_capability(before)
    return found


LEVELS = _levels()


@st.composite
def drawn_case(draw, op: str, impl: str) -> Drawn:
    checks = [name for name in FUZZED_CHECKS if impl != "triton" or name != "threads"]
    return Drawn(
        op=op,
        case="drawn",
        dtype=draw(st.sampled_from(DTYPES)),
        impl=impl,
        options=draw(OPTIONS[op](impl == "triton")),
        check=draw(st.just("accuracy") | st.sampled_from(checks)),
        layouts=tuple(draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=4))),
        level=draw(st.sampled_from(LEVELS)),
    )


def check_drawn(drawn: Drawn) -> None:
    if drawn.impl != "native":
        FUZZED_CHECKS[drawn.check](drawn)
        return
    before = torch.ops.patchpack.cpu_capability("")
    torch.ops.patchpack.cpu_capability(drawn.level)
    try:
        FUZZED_CHECKS[drawn.check](drawn)
    finally:
        torch.ops.patchpack.cpu_capability(before)


# In place ----------------------------------------------------------------------------------------


@st.composite
def drawn_buffer(draw, op: str, impl: str) -> tuple[Drawn, str, int]:
    """A case of the op that allocates, the layout of a buffer, and what its gradient is of."""
    drawn = draw(drawn_case(op, impl))
    kept = ("contiguous", "a part of rows", "a part of what is between", "every second row")
    return drawn, draw(st.sampled_from([*kept, "not aligned"])), draw(st.integers(1, 3))


def check_in_place(drawn_buffer: tuple[Drawn, str, int]) -> None:
    """The bits of the op that allocates, forward and backward; values of attention stay."""
    drawn, layout, num_values = drawn_buffer
    inputs = drawn.inputs()
    q, k = inputs.pop("q"), inputs.pop("k")
    num_heads = q.shape[1], k.shape[1]
    where = inputs.pop("grid" if drawn.op == "rope_2d" else "position_ids")
    v = torch.randn(k.shape).to(k.dtype)
    x = LAYOUTS[layout](torch.cat([q, k, v], dim=1))
    results = []
    for function in (getattr(patchpack, f"{drawn.op}_"), None):
        leaf = x.detach().clone().requires_grad_()
        if function:
            buffer = LAYOUTS[layout](leaf)
            out = function(buffer, where, num_heads=num_heads, impl=drawn.impl, **inputs)
            assert out is buffer
        else:
            heads = leaf.split([*num_heads, k.shape[1]], dim=1)
            turned = SPECS[drawn.op].op(*heads[:2], where, impl=drawn.impl, **inputs)
            out = torch.cat([*turned, heads[2]], dim=1)
        out.backward(torch.sin(num_values * out.detach()))
        results.append({"output": out.detach(), "gradient": leaf.grad})
    same(*results)


# Metadata ----------------------------------------------------------------------------------------


class _Torch:
    """Within this context the code in torch runs, not the C++."""

    def __enter__(self) -> None:
        self.missing = _dispatch._NOT_INSTALLED["native"]
        _dispatch._NOT_INSTALLED["native"] = "it is hidden"

    def __exit__(self, *exception) -> None:
        _dispatch._NOT_INSTALLED["native"] = self.missing


@st.composite
def drawn_grids(draw) -> dict:
    merge = draw(MERGES)
    sizes = [size for size in draw(batches(merge)) if all(size)]
    side = st.integers(1, 20).map(lambda n: n * merge)
    return {
        "grid_thw": sizes,
        "m": merge,
        "merge_temporal": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.int64, torch.int32])),
        "window": draw(st.integers(1, 9)),
        "target_hw": draw(st.tuples(side, side)),
        "merges": draw(st.lists(st.integers(1, merge), min_size=1, max_size=3)),
        "include_temporal": draw(st.booleans()),
    }


def _metadata_of(drawn: dict) -> list[torch.Tensor]:
    sizes, m = drawn["grid_thw"], drawn["m"]
    thw = torch.tensor(sizes, dtype=drawn["dtype"]).reshape(-1, 3)
    merges = torch.tensor([m // math.gcd(m, n) for n in drawn["merges"]] * (1 + len(sizes)))
    window = drawn["window"] * m * 14
    grids = [PackedGrid(thw, m, drawn["merge_temporal"])]
    grids += [grids[0].merged(), grids[0].resized(drawn["target_hw"])]
    results = [
        metadata.get_vision_cu_seqlens(thw, drawn["merge_temporal"]),
        metadata.get_vision_position_ids(thw, m, drawn["include_temporal"]),
        metadata.get_vision_position_ids(thw, merges[: len(sizes)], drawn["include_temporal"]),
        *metadata.get_vision_window_index(thw, m, window, 14),
    ]
    for grid in grids:
        grid.validate()
        results += [grid.grid_thw, grid.geometry, grid.cu_seqlens, grid.position_ids]
        results.append(torch.tensor([grid.num_tokens, grid.max_seqlen, grid.num_segments]))
    return results


def _positions(t: int, h: int, w: int, m: int) -> torch.Tensor:
    """Frame, row and column of the tokens of an image, block by block."""
    shape = (t, h // m, w // m, m, m)
    frame, row, col, down, right = (torch.arange(n) for n in shape)
    grid = torch.meshgrid(frame, row, col, down, right, indexing="ij")
    return torch.stack([grid[0], grid[1] * m + grid[3], grid[2] * m + grid[4]], -1).reshape(-1, 3)


def check_metadata(drawn: dict) -> None:
    """C++ and torch agree, and with what a loop over the images says."""
    found = _metadata_of(drawn)
    with _Torch():
        in_torch = _metadata_of(drawn)
    for i, (x, y) in enumerate(zip(found, in_torch, strict=True)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), f"result {i}"
    sizes, m = drawn["grid_thw"], drawn["m"]
    want = torch.cat([torch.empty(0, 3).long(), *(_positions(*size, m) for size in sizes)])
    assert torch.equal(found[1], want if drawn["include_temporal"] else want[:, 1:])
    order, bounds = found[3:5]
    assert torch.equal(order.sort().values, torch.arange(len(order)))
    merged, first = _positions_merged(sizes, m), 0
    for begin, end in itertools.pairwise((bounds // m**2).tolist()):
        window = merged[order[begin:end]]  # image, frame, row, column
        assert end > begin == first
        assert (window[:, :2] == window[0, :2]).all()
        assert len((window[:, 2:] // drawn["window"]).unique(dim=0)) == 1
        first = end
    assert first == len(order)


def _positions_merged(sizes: list, m: int) -> torch.Tensor:
    """Image, frame, row and column of merged tokens in raster order."""
    parts = [torch.empty(0, 4).long()]
    for i, (t, h, w) in enumerate(sizes):
        thw = _positions(t, h // m, w // m, 1)
        parts.append(torch.cat([torch.full_like(thw[:, :1], i), thw], dim=1))
    return torch.cat(parts)


START, IMAGE, VIDEO, TEXT = 1, 3, 4, 10


@st.composite
def drawn_sequence(draw) -> dict:
    """Samples of text, images and videos, as a padded batch or packed."""
    m = draw(st.integers(1, 3))
    length = st.sampled_from([0, 1, 2, 30, 700])
    text = st.tuples(st.just("text"), length, st.just(1), st.just(1))
    vision = st.tuples(
        st.sampled_from(["image", "video"]), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)
    )
    sample = st.lists(text | vision, max_size=6)
    return {
        "samples": draw(st.lists(sample, min_size=1, max_size=4)),
        "many": draw(st.sampled_from([1, 1, 1, 50])),
        "m": m,
        "tokens_per_second": draw(st.sampled_from([1, 2, 2.5])),
        "seconds": draw(st.none() | st.floats(0.125, 5.0, width=32)),
        "split_frames": draw(st.booleans()),
        "layout": draw(st.sampled_from(["left", "right", "packed"])),
        "dtype": draw(st.sampled_from([torch.int64, torch.int32])),
    }


def _sequence_of(drawn: dict) -> tuple[tuple, dict]:
    """Arguments of ``get_mrope_position_ids``."""
    m, rows, grids = drawn["m"], [], {"image": [], "video": []}
    for sample in drawn["samples"] * drawn["many"]:
        ids = []
        for kind, t, h, w in sample:
            if kind == "text":
                ids += [TEXT] * t
                continue
            grids[kind].append([t, h * m, w * m])
            runs = t if kind == "video" and drawn["split_frames"] else 1
            ids += ([START] + [IMAGE if kind == "image" else VIDEO] * (t * h * w // runs)) * runs
        rows.append(ids)
    options = {
        f"{kind}_grid_thw": torch.tensor(thw, dtype=drawn["dtype"]).reshape(-1, 3)
        for kind, thw in grids.items()
    }
    options |= {"split_frames": drawn["split_frames"], "merge_size": m}
    options |= {"vision_start_token_id": START, "image_token_id": IMAGE, "video_token_id": VIDEO}
    if drawn["seconds"] is not None:
        options["second_per_grid_ts"] = torch.full((len(grids["video"]),), drawn["seconds"])
    longest = max(map(len, rows))
    if drawn["layout"] == "packed":
        bounds = [0, *itertools.accumulate(map(len, rows))]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        ids = torch.tensor([i for row in rows for i in row] + [TEXT] * 3, dtype=drawn["dtype"])
        return (ids,), options
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    ids = torch.full((len(rows), longest), IMAGE, dtype=drawn["dtype"])
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if drawn["layout"] == "left" else slice(len(row))
        mask[i, place], ids[i, place] = True, torch.tensor(row, dtype=drawn["dtype"])
    return (ids,), options | {"attention_mask": mask}


def check_sequence(drawn: dict) -> None:
    """C++ and torch agree on M-RoPE ids, and samples have those they have alone."""
    (ids,), options = _sequence_of(drawn)
    metadata.validate_vision_tokens(ids, **options)
    seconds = {"tokens_per_second": drawn["tokens_per_second"]}
    found = metadata.get_mrope_position_ids(ids, **options, **seconds)
    with _Torch():
        in_torch = metadata.get_mrope_position_ids(ids, **options, **seconds)
    for x, y in zip(found, in_torch, strict=True):
        assert torch.equal(x, y)
    if drawn["layout"] == "packed":
        (_, *bounds) = options["cu_seqlens"].tolist()
        parts = [
            metadata.get_mrope_position_ids(*arguments, **alone, **seconds)[0][:, :-3]
            for sample in drawn["samples"]
            for arguments, alone in [_sequence_of({**drawn, "samples": [sample], "many": 1})]
        ]
        want = torch.cat(parts * drawn["many"], dim=1)
        assert torch.equal(found[0][:, : bounds[-1]], want)


# What is fuzzed ----------------------------------------------------------------------------------

FUZZED: dict[str, tuple[st.SearchStrategy, Callable]] = {
    "grids": (drawn_grids(), check_metadata),
    "M-RoPE ids": (drawn_sequence(), check_sequence),
}
for impl in ("native", "triton"):
    for op in OPTIONS:
        FUZZED[f"{op}, {impl}"] = drawn_case(op, impl), check_drawn
    for op in ("rope_2d", "mrope"):
        FUZZED[f"{op}_, {impl}"] = drawn_buffer(op, impl), check_in_place


def fuzz(name: str, settings: hypothesis.settings, seed: int, blob: str | None = None) -> None:
    """Make draws of ``FUZZED[name]``; raises what the smallest that fails raises."""
    strategy, check = FUZZED[name]

    def run(drawn):
        check(drawn)

    if blob:
        run = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())(run)
    settings(hypothesis.seed(seed)(hypothesis.given(strategy)(run)))()


def test_every_op_is_fuzzed():
    assert OPTIONS.keys() == SPECS.keys()
    in_place = {name for name in patchpack.__all__ if name.endswith("_")}
    assert in_place == {name.partition(",")[0] for name in FUZZED if "_, " in name}


@pytest.mark.parametrize("name", FUZZED)
def test_a_few_draws(name):
    if "native" in name and (reason := patchpack.available("rope", "native")):
        pytest.skip(reason)
    draws = 2 if "triton" in name else 6 if "native" in name else 25
    settings = hypothesis.settings(
        SETTINGS, max_examples=draws, database=None, phases=[Phase.generate]
    )
    fuzz(name, settings, seed=1)  # as drawn: `make fuzz` looks for the smallest that fails


@pytest.mark.parametrize("op", SPECS)
def test_every_layout_has_the_bits_of_contiguous_inputs(op):
    if reason := patchpack.available(op, "native"):
        pytest.skip(reason)
    for layout, case in itertools.product(LAYOUTS, list(SPECS[op].cases)[:2]):
        drawn = Drawn(op, case, impl="native", options=SPECS[op].cases[case], layouts=(layout,))
        check_layouts(drawn)


SETTINGS = hypothesis.settings(
    deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", 600)))
    parser.add_argument("--only", default="", help="what contains this in its name, one of FUZZED")
    parser.add_argument("--seed", type=int, help="of the first round; by default another every run")
    parser.add_argument("--blob", help="repeat one failure of --only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in FUZZED if options.only in name]
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    began, draws, failed = time.monotonic(), Counter(), {}

    for name in itertools.cycle(names):
        if time.monotonic() - began >= options.seconds or len(failed) == len(names):
            break
        if name in failed:
            continue
        database = DirectoryBasedExampleDatabase(DATABASE / name)
        settings = hypothesis.settings(SETTINGS, max_examples=10, database=database)
        try:
            fuzz(name, settings, seed, options.blob)
        except Exception as error:  # whatever it is, it is the finding
            failed[name] = seed
            print(f"FAILED {name}, seed {seed}: {type(error).__name__}: {error}")
            print(*getattr(error, "__notes__", []), sep="\n", flush=True)
        draws[name] += 10
        if name == names[-1]:
            seed += 1
            print(f"{sum(draws.values())} draws, {time.monotonic() - began:.0f} s", flush=True)

    for name in names:
        print(f"{name:28} {draws[name]:6} draws {'FAILED' if name in failed else 'ok'}")
    print(f"{time.monotonic() - began:.0f} s, {sum(draws.values())} draws, {len(failed)} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
