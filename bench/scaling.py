"""How cost grows with tokens and with images: ``python bench/scaling.py [op ...] [--out DIR]``.

Forward passes in bfloat16 on a CPU. ``tokens``: images of 32 x 32 patches, more and more of them.
``images``: as many tokens, cut into more and more images. All points of an op take turns, first on
one thread, then on two. Every op is linear in tokens: its attention segments do not grow with them.
With images only attention changes, whose segments get shorter, and what an image costs shows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table

import patchpack
from _harness import Provider, machine, threads
from _results import write
from patchpack.testing.catalogue import SPECS, Inputs
from run import HERE, bench_of

SIDE = 32  # rows and columns of an image, in patches
TOKENS = [2**n for n in range(10, 19)]  # 1k to 256k
IMAGES = [4**n for n in range(7)]  # 1 to 4096
TOTAL = 2**14  # tokens of all of them
THREADS = (1, 2)
LARGE = 2**14  # from here on no overhead of a call is left
ROUNDS = 5
HEADS = {"num_heads": (8, 8), "head_dim": 64}
MROPE = {"mrope_section": (8, 12, 12)}

Shape = Callable[[int, int], Inputs]  # of the number of images and of their sides, in patches


def _squares(**options) -> Shape:
    return lambda count, side: {"sizes": [(side, side)] * count, **options}


def _tokens(**options) -> Shape:
    return lambda count, side: {"num_tokens": count * side**2, **options}


# keyword arguments of Bench.make_inputs
SHAPES: dict[str, Shape] = {
    "rope": _tokens(**HEADS),
    "rope_2d": _squares(num_heads=8, head_dim=64, merge=2),
    "mrope": _tokens(**HEADS, **MROPE),
    "varlen_attention": lambda count, side: {
        "lengths": [side**2] * count,
        "num_heads": (2, 2),
        "head_dim": 64,
    },
    "interpolate_tokens": _squares(channels=1152),
    "add_pos_embed": _squares(side=(27, 27), channels=1152),
    "region_attention": _squares(channels=1152, region=2),
    "merge_tokens": _squares(channels=1152),
    "patchify": _squares(patch_size=14, temporal_patch_size=1, merge=2),
    "resize_images": lambda count, side: {
        "photos": [(14 * side, 14 * side)] * count,
        "sizes": [(10 * side, 10 * side)] * count,
    },
    "assemble": lambda count, side: {
        "images": [((1, 1), (0, 0, side, side), (side // 2, side // 2))] * count,
        "side": side,
        "channels": 896,
    },
    "scatter_tokens": lambda count, side: {
        "num_rows": 2 * count * side**2,
        "num_images": count,
        "image_tokens": side**2,
        "channels": 1152,
    },
}


def points(quick: bool) -> dict[str, list[tuple[int, int]]]:
    """Along each axis, the number of images and of their sides."""
    if quick:
        return {"tokens": [(1, 2), (2, 2)], "images": [(1, 4), (4, 2)]}
    return {
        "tokens": [(n // SIDE**2, SIDE) for n in TOKENS],
        "images": [(n, math.isqrt(TOTAL // n)) for n in IMAGES],
    }


def measure(op: str, axis: str, places: list[tuple[int, int]], impl: str, rounds: int) -> dict:
    """Medians of the seconds at every place, on each number of threads."""
    make_inputs, function = bench_of(op).make_inputs, SPECS[op].op
    inputs = [make_inputs(torch.bfloat16, "cpu", **SHAPES[op](*place)) for place in places]
    seconds = {n: [_timed(function, x, impl, n)[1:] for x in inputs] for n in THREADS}
    for _ in range(rounds):
        for n in THREADS:
            for x, taken in zip(inputs, seconds[n], strict=True):
                taken += _timed(function, x, impl, n)
    return {
        "op": op,
        "axis": axis,
        "images": [count for count, _ in places],
        "tokens": [count * side**2 for count, side in places],
        "rounds": rounds,
        "seconds": {str(n): [statistics.median(s) for s in taken] for n, taken in seconds.items()},
    }


def _timed(function: Provider, inputs: Inputs, impl: str, num_threads: int) -> list[float]:
    with threads(num_threads), torch.no_grad():
        begin = time.perf_counter()
        function(**inputs, impl=impl)
        return [time.perf_counter() - begin]


def exponent(sizes: list[int], seconds: list[float], least: int) -> float:
    """The slope of a line through logarithms, of sizes from ``least``."""
    large = [(n, s) for n, s in zip(sizes, seconds, strict=True) if n >= least]
    logs = [[math.log(x) for x in xs] for xs in zip(*large, strict=True)]
    return statistics.linear_regression(*logs).slope


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print exponents, and what threads and images do."""
    table = Table(title="scaling", title_justify="left")
    table.add_column("op")
    table.add_column("along")
    for heading in ("exponent", "last / first", f"{THREADS[1]} threads, times as fast"):
        table.add_column(heading, justify="right")
    for row in rows:
        one, two = (row["seconds"][str(n)] for n in THREADS)
        figures = (two[-1] / two[0], one[-1] / two[-1])
        table.add_row(
            row["op"], row["axis"], f"{row['exponent']:.2f}", *(f"{x:.2f}" for x in figures)
        )
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds against tokens and images, a panel for each op."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(4, len(ops))
    figure, all_axes = plt.subplots(
        *(-(-len(ops) // columns), columns),
        figsize=(3.2 * columns, 2.6 * -(-len(ops) // columns) + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in all_axes.flat[len(ops) :]:
        axes.set_visible(False)
    for op, axes in zip(ops, all_axes.flat, strict=False):
        for row in rows:
            if row["op"] != op:
                continue
            color = "C0" if row["axis"] == "tokens" else "C1"
            sizes = row[row["axis"]]
            for n, style in zip(THREADS, ("--", "-"), strict=True):
                axes.plot(sizes, row["seconds"][str(n)], f"o{style}", color=color, markersize=3)
        axes.set(xscale="log", yscale="log", title=op)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    for axis, color in (("tokens", "C0"), (f"images of {TOTAL} tokens in all", "C1")):
        all_axes[0, 0].plot([], [], "o", color=color, label=f"against {axis}")
    for n, style in zip(THREADS, ("--", "-"), strict=True):
        all_axes[0, 0].plot([], [], f"k{style}", label=f"{n} thread{'s' * (n > 1)}")
    figure.supxlabel("tokens, or images")
    figure.supylabel("seconds")
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("op", nargs="*", choices=[*SHAPES, []], help="all of them by default")
    parser.add_argument("--impl", choices=("native", "reference"), default="native")
    parser.add_argument("--quick", action="store_true", help="one round of few tokens")
    parser.add_argument("--out", type=Path, help="bench/results, and with --quick build/bench")
    args = parser.parse_args()
    out = args.out or (HERE.parent / "build/bench" if args.quick else HERE / "results")

    console = Console()
    rows, reasons = [], {}
    for op in track(args.op or SHAPES, "timing", console=console):
        if reason := patchpack.available(op, args.impl):
            reasons[op] = reason
            continue
        for axis, places in points(args.quick).items():
            row = measure(op, axis, places, args.impl, 1 if args.quick else ROUNDS)
            least = 0 if args.quick or axis == "images" else LARGE
            row["exponent"] = exponent(row[axis], row["seconds"][str(THREADS[-1])], least)
            rows.append(row)
    for op, reason in reasons.items():
        console.print(f"{op}: {reason}", markup=False, highlight=False)
    if rows:
        show(rows, console)
        path = out / "scaling.json"
        results = {"machine": machine("cpu"), "impl": args.impl, "scaling": rows}
        write(path, results)
        plot(rows, path.with_suffix(".png"))
        console.print(f"wrote {path} and {path.with_suffix('.png').name}", highlight=False)


if __name__ == "__main__":
    main()
