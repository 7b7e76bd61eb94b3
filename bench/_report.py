"""What a run leaves: a file of results, a table and a picture."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

CASE = ("op", "shape", "dtype", "direction")


def merge(path: Path, results: list[dict], skipped: list[dict]) -> None:
    """Put a run into a file of results, in place of what it has of the same cases."""
    stored = json.loads(path.read_text()) if path.exists() else {"benchmarks": [], "skipped": []}
    measured = {_case(result["params"]) for result in results}
    stored = {
        "benchmarks": [b for b in stored["benchmarks"] if _case(b["params"]) not in measured]
        + results,
        "skipped": [s for s in stored["skipped"] if _case(s) not in measured] + skipped,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")


def _case(params: dict) -> tuple[str, ...]:
    return tuple(params[name] for name in CASE)


def show(results: list[dict], skipped: list[dict], console: Console) -> None:
    """Print a table of every case, and once each why a provider is missing."""
    for group, members in groupby(results, key=lambda result: result["group"]):
        table = Table(title=group, title_justify="left", min_width=88)
        table.add_column("provider")
        for heading in ("median ms", "quartiles", "GB/s", "GFLOP/s", "of limit"):
            table.add_column(heading, justify="right")
        for result in members:
            stats, info = result["stats"], result["extra_info"]
            table.add_row(
                result["name"],
                f"{stats['median'] * 1e3:.3f}",
                f"{stats['q1'] * 1e3:.3f} to {stats['q3'] * 1e3:.3f}",
                f"{info['gb_per_s']:.1f}",
                f"{info['gflop_per_s']:.1f}",
                f"{info['of_limit']:.0%} of {info['limit']}",
            )
        console.print(table)
    for reason in dict.fromkeys(f"{s['op']}: no {s['provider']}: {s['reason']}" for s in skipped):
        console.print(reason, markup=False, highlight=False)


def plot(path: Path) -> None:
    """Draw, beside a file of results, how much of its limit every provider reaches."""
    results = json.loads(path.read_text())["benchmarks"]
    groups = {group: list(members) for group, members in groupby(results, lambda r: r["group"])}
    names = list(dict.fromkeys(result["name"] for result in results))
    height = 0.35 * len(results) + 1.5
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    y, ticks = 0.0, []
    for members in groups.values():
        ticks.append(y + (len(members) - 1) / 2)
        for result in members:
            median, info = result["stats"]["median"], result["extra_info"]
            reached = info["of_limit"]
            spread = [reached * median / result["stats"][q] - reached for q in ("q3", "q1")]
            axes.barh(y, reached, color=f"C{names.index(result['name'])}")
            axes.errorbar(reached, y, xerr=[[-spread[0]], [spread[1]]], color="black", capsize=2)
            axes.text(0.01, y, f"{result['name']}  {median * 1e3:.3g} ms", va="center", fontsize=7)
            y += 1
        y += 1
    axes.set_yticks(ticks, [group.replace(", ", "\n", 1) for group in groups], fontsize=7)
    axes.axvline(1, color="grey", linestyle="dotted")
    axes.set_xlabel("of the physical limit (a copy or a matrix product of as much work)")
    axes.invert_yaxis()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
