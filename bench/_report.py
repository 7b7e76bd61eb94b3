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
    kept = [b for b in stored["benchmarks"] if _case(b["params"]) not in measured]
    stored = {
        "benchmarks": sorted(kept + results, key=lambda b: b["params"]["op"]),
        "skipped": [s for s in stored["skipped"] if _case(s) not in measured] + skipped,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")


def _case(params: dict) -> tuple[str, ...]:
    return tuple(params[name] for name in CASE)


def show(results: list[dict], console: Console) -> None:
    """Print the results of a case."""
    table = Table(title=results[0]["group"], title_justify="left", min_width=88)
    table.add_column("provider")
    for heading in ("median ms", "quartiles", "GB/s", "GFLOP/s", "of limit"):
        table.add_column(heading, justify="right")
    for result in results:
        stats, info = result["stats"], result["extra_info"]
        table.add_row(
            result["name"],
            _milliseconds(stats["median"]),
            f"{_milliseconds(stats['q1'])} to {_milliseconds(stats['q3'])}",
            f"{info['gb_per_s']:.1f}",
            f"{info['gflop_per_s']:.1f}",
            f"{info['of_limit']:.0%} of {info['limit']}",
        )
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def plot(path: Path) -> None:
    """Draw, beside a file of results, how much of its limit every provider reaches."""
    results = json.loads(path.read_text())["benchmarks"]
    ops = {op: list(members) for op, members in groupby(results, lambda r: r["params"]["op"])}
    cases = {op: list(dict.fromkeys(r["group"] for r in members)) for op, members in ops.items()}
    palette = matplotlib.colormaps["tab20"].resampled(20)
    names = dict.fromkeys(r["name"] for r in results)
    # strong colours first, then the pale ones
    colors = {name: palette((2 * i + i // 10) % 20) for i, name in enumerate(names)}
    rows = [len(groups) for groups in cases.values()]
    figure, all_axes = plt.subplots(
        *(len(ops), 1),
        figsize=(9, 0.27 * sum(rows) + 0.5 * len(ops) + 0.7),
        height_ratios=rows,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (op, members), axes in zip(ops.items(), all_axes[:, 0], strict=True):
        for result in members:
            stats, reached = result["stats"], result["extra_info"]["of_limit"]
            low, high = (reached * stats["median"] / stats[q] for q in ("q3", "q1"))
            y = cases[op].index(result["group"])
            spread = [[reached - low], [high - reached]]
            axes.errorbar(reached, y, xerr=spread, fmt="o", color=colors[result["name"]])
        axes.set_yticks(range(len(cases[op])), [g.removeprefix(f"{op}, ") for g in cases[op]])
        axes.set_ylim(len(cases[op]) - 0.5, -0.5)
        axes.set_title(op, loc="left", fontsize="medium", fontweight="bold")
        axes.grid(alpha=0.3)
        axes.axvline(1, color="black", linewidth=1)
    all_axes[-1, 0].set(xscale="log", xlabel="of the physical limit, with quartiles")
    for name, color in colors.items():
        all_axes[0, 0].plot([], [], "o", color=color, label=name)
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
