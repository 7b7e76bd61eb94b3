"""``packing``: how full sequences get, how even ranks get, and what ranks have to send each other.

``python bench/bench_packing.py [packing | distributed] [--quick] [--out DIR]``. All of it is
arithmetic on the host, so that the figures but for the seconds are the same everywhere.

The mix of images stands for one of the web: shapes of cameras, phones, screens and documents, each
upright and lying, with areas around a median of 1 megapixel (log-normal, sigma 1: two thirds within
a factor of e), from 64 pixels a side to 8192. Qwen2-VL plans them with at most as many tokens as a
sequence holds.

``distributed`` counts what a rank sends in a training step of Qwen2-VL-7B's vision tower, on 1 to
1024 ranks of 32 images each, in bfloat16. Of ``encode_images``: patches that leave home, their
tokens that come back, and the gradients of those. Of ``fully_shard``: weights are gathered for the
forward and the backward pass and gradients scattered, by rings. Of ``sequence_parallel_attention``
over all ranks, if there are as many heads: four all-to-alls a layer, two forward and two backward,
of a sequence of the images of all. Not counted is what a rank keeps, the exchange of sizes, and the
language model.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from _harness import machine
from _results import write
from patchpack.models.native_vit import CONFIGS, NativeViT
from patchpack.packing import balance, pack, vit_flops
from patchpack.systems import qwen2_vl

T = TypeVar("T")
HERE = Path(__file__).parent
MAX_TOKENS = 16384
RANKS = (8, 64, 256)
IMAGES_A_RANK = 32  # of one training step
SCALE = [2**n for n in range(11)]  # ranks that send
CONFIG = CONFIGS["qwen2_vl"]
BYTES = 2  # of a number
ROUNDS = 5
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

# width / height, and how many of a hundred images have it; half of them are turned
SHAPES = {3 / 2: 30, 4 / 3: 30, 16 / 9: 15, 1: 15, 19.5 / 9: 5, 2**0.5: 5}


def sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths of ``count`` images of the mix."""
    rng = np.random.default_rng(0)
    weights = np.array(list(SHAPES.values()))
    ratio = rng.choice(list(SHAPES), count, p=weights / weights.sum())
    ratio = np.where(rng.random(count) < 0.5, ratio, 1 / ratio)
    area = 1e6 * np.exp(rng.standard_normal(count))
    sides = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1)
    return [(h, w) for h, w in sides.round().clip(64, 8192).astype(int).tolist()]


def next_fit(tokens: Sequence[int]) -> int:
    """Sequences that are needed if samples are taken as they come."""
    count, room = 0, 0
    for n in tokens:
        if n > room:
            count, room = count + 1, MAX_TOKENS
        room -= n
    return count


def first_fit_decreasing(tokens: Sequence[int]) -> int:
    """Sequences that are needed if the longest goes first, to the first that has room."""
    room = np.full(len(tokens), MAX_TOKENS)
    count = 0
    for n in sorted(tokens, reverse=True):
        first = int(np.argmax(room[: count + 1] >= n))
        room[first] -= n
        count = max(count, first + 1)
    return count


def least_imbalance(costs: Sequence[float], ranks: int) -> float:
    """What no assignment can go below: one image, or two of the ``ranks + 1`` most costly."""
    most = sorted(costs, reverse=True)
    pair = sum(most[ranks - 1 : ranks + 1]) if len(most) > ranks else 0.0
    return max(most[0], pair, sum(costs) / ranks) * ranks / sum(costs)


def in_turn(costs: Sequence[float], ranks: int) -> float:
    """Imbalance if rank ``r`` takes images ``r``, ``r + ranks``, and so on."""
    shares = [sum(costs[rank::ranks]) for rank in range(ranks)]
    return max(shares) * ranks / sum(shares)


def run(count: int, rounds: int) -> dict[str, Any]:
    """All figures of ``count`` images."""
    plans = [qwen2_vl.plan(h, w, max_pixels=(MAX_TOKENS - 2) * 28**2) for h, w in sizes(count)]
    tokens = [plan.total_tokens for plan in plans]
    return {
        "machine": machine("cpu"),
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "images": count,
        "tokens": dict(zip(QUANTILES, np.quantile(tokens, QUANTILES).tolist(), strict=True)),
        "max_tokens": MAX_TOKENS,
        "pack": _packings(plans, tokens, rounds),
        "balance": [
            _balances(plans, ranks, size, rounds)
            for ranks in RANKS
            for size in (IMAGES_A_RANK * ranks, count)
            if size <= count
        ],
    }


def _packings(plans: list[qwen2_vl.Plan], tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    ways: dict[str, Callable[[], int]] = {
        "pack": lambda: pack(plans, MAX_TOKENS).num_sequences,
        "first fit decreasing": lambda: first_fit_decreasing(tokens),
        "in order": lambda: next_fit(tokens),
        "lower bound": lambda: -(-sum(tokens) // MAX_TOKENS),
    }
    rows = []
    for name, way in ways.items():
        count, seconds = _timed(way, rounds)
        fill = sum(tokens) / (count * MAX_TOKENS)
        rows.append({"name": name, "sequences": count, "fill": fill, "cpu_seconds": seconds})
    return rows


def _balances(plans: list[qwen2_vl.Plan], ranks: int, size: int, rounds: int) -> dict[str, Any]:
    """Means over all whole batches of ``size``; the seconds are those of the first."""
    starts = range(0, len(plans) - size + 1, size)
    batches = [[vit_flops(plan) for plan in plans[i : i + size]] for i in starts]
    ways: dict[str, Callable[[list[float]], float]] = {
        "balance": lambda costs: balance(costs, ranks, costs).imbalance,
        "in turn": lambda costs: in_turn(costs, ranks),
        "lower bound": lambda costs: least_imbalance(costs, ranks),
    }
    means = {name: float(np.mean([way(costs) for costs in batches])) for name, way in ways.items()}
    _, seconds = _timed(lambda: balance(plans[:size], ranks), rounds)
    return {
        "images": size,
        "ranks": ranks,
        "batches": len(batches),
        **means,
        "cpu_seconds": seconds,
    }


def run_distributed(count: int) -> dict[str, Any]:
    """Balance and bytes on ever more ranks."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in NativeViT(CONFIG).parameters())
    plans = [qwen2_vl.plan(h, w, max_pixels=(MAX_TOKENS - 2) * 28**2) for h, w in sizes(count)]
    patches = np.array([plan.vit_tokens for plan in plans])
    costs = np.array([vit_flops(plan) for plan in plans])
    return {
        "machine": machine("cpu"),
        "date": datetime.date.today().isoformat(),
        "images": count,
        "images_a_rank": IMAGES_A_RANK,
        "model": {
            "parameters": parameters,
            "depth": CONFIG.depth,
            "num_heads": CONFIG.num_heads,
            "hidden_size": CONFIG.hidden_size,
            "patch_dim": CONFIG.patch_dim,
            "out_size": CONFIG.out_size,
            "bytes": BYTES,
        },
        "rows": [
            _sent(patches, costs, ranks, parameters)
            for ranks in SCALE
            if ranks * IMAGES_A_RANK <= count
        ],
    }


def _sent(patches: np.ndarray, costs: np.ndarray, ranks: int, parameters: int) -> dict[str, float]:
    """Means over all whole batches of a step, of one number of ranks."""
    size = ranks * IMAGES_A_RANK
    starts = range(0, len(costs) - size + 1, size)
    found = [_step(patches[i : i + size], costs[i : i + size], ranks) for i in starts]
    means = {name: float(np.mean([step[name] for step in found])) for name in found[0]}
    others = (ranks - 1) / ranks  # of what is shared, that other ranks have
    sent = {"fully_shard": 3 * parameters * BYTES * others}
    if CONFIG.num_heads % ranks == 0:
        numbers = (
            4 * CONFIG.hidden_size * 2 * CONFIG.depth
        )  # of a token: q, k, v, out and gradients
        sent["sequence_parallel"] = means["patches"] * numbers * BYTES * others
    return {"ranks": ranks, "batches": len(found), **means, **sent}


def _step(patches: np.ndarray, costs: np.ndarray, ranks: int) -> dict[str, float]:
    """Whom a batch keeps busy, and the bytes that ``encode_images`` sends, mean and most."""
    share = balance(range(len(costs)), ranks, costs.tolist())
    home = np.arange(len(costs)) // IMAGES_A_RANK
    away = np.empty_like(home)
    for rank, images in enumerate(share.ranks):
        away[list(images)] = rank
    moved = np.where(home != away, patches, 0)
    tokens = moved // CONFIG.spatial_merge_size**2 * (CONFIG.out_size or 0)
    # from home: patches, and gradients of tokens; from where they were encoded: tokens
    sent = np.bincount(home, moved * CONFIG.patch_dim + tokens, ranks)
    sent += np.bincount(away, tokens, ranks)
    at_home = np.bincount(home, costs, ranks)
    return {
        "balance": share.imbalance,
        "at home": float(at_home.max() / at_home.mean()),
        "patches": float(patches.sum() / ranks),
        "encode_images": float(sent.mean() * BYTES),
        "encode_images, most": float(sent.max() * BYTES),
    }


def show_distributed(results: dict[str, Any], console: Console) -> None:
    """Print what ``run_distributed`` found."""
    table = Table(title=f"{IMAGES_A_RANK} images a rank: busiest of mean, MB that a rank sends")
    headings = ("ranks", "balance", "at home", "encode_images", "most", "FSDP", "sequences")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        names = ("encode_images", "encode_images, most", "fully_shard", "sequence_parallel")
        sent = (f"{row[name] / 1e6:.0f}" if name in row else "-" for name in names)
        table.add_row(str(row["ranks"]), f"{row['balance']:.5f}", f"{row['at home']:.3f}", *sent)
    console.print(table)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw balance and bytes against ranks."""
    rows = [row for row in results["rows"] if row["ranks"] > 1]
    figure, (even, sent) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, label in (("at home", "each its own"), ("balance", "packing.balance")):
        even.plot([row["ranks"] for row in rows], [row[name] for row in rows], "o-", label=label)
    even.set(title="busiest rank, of the mean", ylim=(0.9, None))
    for name, label, style in (
        ("fully_shard", "fully_shard: weights and gradients", "C2o-"),
        ("sequence_parallel", "sequence_parallel_attention, all layers", "C3o-"),
        ("encode_images", "encode_images: patches, tokens, gradients", "C1o-"),
        ("encode_images, most", "the same, rank that sends most", "C1--"),
    ):
        known = [row for row in rows if name in row]
        sent.plot(
            [row["ranks"] for row in known], [row[name] / 1e9 for row in known], style, label=label
        )
    sent.set(title="GB that a rank sends in a step", yscale="log", ylim=(0.05, 300))
    for axes in (even, sent):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("ranks")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _timed(function: Callable[[], T], rounds: int) -> tuple[T, float]:
    """What a function returns, and the median of the seconds that it keeps a processor busy."""
    seconds, results = [], []
    for _ in range(rounds):
        begin = time.process_time()
        results.append(function())
        seconds.append(time.process_time() - begin)
    return results[0], float(np.median(seconds))


def show(results: dict[str, Any], console: Console) -> None:
    """Print what ``run`` found."""
    table = Table(title=f"{results['images']} images into sequences of {MAX_TOKENS} tokens")
    for heading in ("", "sequences", "fill", "CPU seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in results["pack"]:
        figures = str(row["sequences"]), f"{row['fill']:.3%}", f"{row['cpu_seconds']:.3f}"
        table.add_row(row["name"], *figures)
    console.print(table)

    table = Table(title="busiest rank, of the mean")
    for heading in ("images", "ranks", "balance", "in turn", "lower bound", "CPU seconds"):
        table.add_column(heading, justify="right")
    for row in results["balance"]:
        imbalance = (f"{row[name]:.5f}" for name in ("balance", "in turn", "lower bound"))
        table.add_row(
            str(row["images"]), str(row["ranks"]), *imbalance, f"{row['cpu_seconds']:.4f}"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "part", nargs="?", choices=("packing", "distributed"), help="by default both"
    )
    parser.add_argument("--quick", action="store_true", help="one round of few images")
    parser.add_argument("--out", type=Path, help="bench/results, and with --quick build/bench")
    args = parser.parse_args()
    out = args.out or (HERE.parent / "build/bench" if args.quick else HERE / "results")
    count, rounds = (1000, 1) if args.quick else (100_000, ROUNDS)
    console = Console()
    if args.part != "distributed":
        results = run(count, rounds)
        show(results, console)
        write(out / "packing.json", results)
        print(f"wrote {out / 'packing.json'}")
    if args.part != "packing":
        results = run_distributed(count)
        show_distributed(results, console)
        write(out / "distributed.json", results)
        picture = out if args.out or args.quick else HERE.parent / "docs"
        plot(results, picture / "distributed.png")
        print(f"wrote {out / 'distributed.json'} and {picture / 'distributed.png'}")


if __name__ == "__main__":
    main()
