"""What a run leaves: a file of results, tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from _results import CASE, FloorFound, Results, Timing, read, write

# what is shown the same way for every op
COLORS = dict.fromkeys(("native", "triton", "patchpack"), "black")
COLORS |= {"cuda": "dimgray", "reference": "silver"}


def merge(path: Path, found: Results) -> None:
    """Put results of cases into a file, in place of what it has of the same cases."""
    stored = read(path)
    measured = set(map(_case, [*found["benchmarks"], *found["skipped"]]))
    for kind, rows in stored.items():
        kept = [row for row in rows if _case(row) not in measured]
        stored[kind] = sorted([*kept, *found[kind]], key=lambda row: _case(row)[0])
    write(path, stored)


def _case(row: Mapping[str, Any]) -> tuple[str, ...]:
    params = row.get("params", row)
    return tuple(params[name] for name in CASE)


def show(results: list[Timing], console: Console) -> None:
    """Print the results of a case; of a GPU, also what share of its peaks they reach."""
    if not results:
        return
    table = Table(title=results[0]["group"], title_justify="left", min_width=88)
    table.add_column("provider")
    on_gpu = "of_copy" in results[0]["extra_info"]
    headings = ("median ms", "quartiles", "GB/s", "GFLOP/s", "of limit", "host ms")
    for heading in headings if on_gpu else headings[:-1]:
        table.add_column(heading, justify="right")
    for result in results:
        stats, info = result["stats"], result["extra_info"]
        copy, matmul = (f" {x:4.0%}" if x else "" for x in map(info.get, ("of_copy", "of_matmul")))
        table.add_row(
            result["name"],
            _milliseconds(stats["median"]),
            f"{_milliseconds(stats['q1'])} to {_milliseconds(stats['q3'])}",
            f"{info['gb_per_s']:.1f}{copy}",
            f"{info['gflop_per_s']:.1f}{matmul}",
            f"{info['of_limit']:.0%} of {info['limit']}",
            *([_milliseconds(info["host_s"])] if "host_s" in info else []),
        )
    console.print(table)


def show_floors(floors: list[FloorFound], console: Console) -> None:
    """Print how fast ops have to be, and how fast they are."""
    table = Table(title="floors", title_justify="left", min_width=88)
    table.add_column("case")
    table.add_column("against")
    for heading in ("floor", "measured", "of limit", ""):
        table.add_column(heading, justify="right")
    for floor in floors:
        measured, reached = floor["measured"], floor["of_limit"]
        table.add_row(
            ", ".join(floor[name] for name in CASE),
            floor["peer"],
            f"{floor['ratio']:.2f}",
            f"{measured:.2f}" if measured else "-",
            f"{reached:.0%} of {floor['limit']}" if reached else "-",
            {True: "met", False: "missed", None: "no peer"}[floor["met"]],
        )
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def plot(path: Path) -> None:
    """Draw, beside a file of results, how much of its limit every provider reaches."""
    results = read(path)["benchmarks"]
    if not results:
        return
    ops = {op: list(rows) for op, rows in groupby(results, lambda r: r["params"]["op"])}
    heights = {op: len({r["group"] for r in rows}) + 3 for op, rows in ops.items()}
    columns: list[list[str]] = [[], []]
    for op, height in heights.items():
        left = sum(heights[name] for name in columns[0])
        columns[2 * left + height > sum(heights.values())].append(op)
    columns = [column for column in columns if column]
    tallest = max(sum(heights[op] for op in column) for column in columns)
    figure = plt.figure(figsize=(9 * len(columns), 0.2 * tallest + 1), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        all_axes = part.subplots(
            *(len(column), 1),
            height_ratios=[heights[op] for op in column],
            sharex=True,
            squeeze=False,
        )[:, 0]
        for op, axes in zip(column, all_axes, strict=True):
            _plot_op(op, ops[op], axes)
        all_axes[-1].set(xscale="log", xlabel="of the physical limit, with quartiles")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _plot_op(op: str, results: list[dict], axes: Axes) -> None:
    cases = list(dict.fromkeys(r["group"] for r in results))
    special = {*COLORS, results[0]["extra_info"]["limit"]}
    peers = [name for name in dict.fromkeys(r["name"] for r in results) if name not in special]
    colors = COLORS | {name: f"C{i}" for i, name in enumerate(peers)}
    for name, color in colors.items():
        rows = [r for r in results if r["name"] == name]
        reached = [r["extra_info"]["of_limit"] for r in rows]
        ends = [
            [
                x * abs(r["stats"]["median"] / r["stats"][q] - 1)
                for x, r in zip(reached, rows, strict=True)
            ]
            for q in ("q3", "q1")
        ]
        places = [cases.index(r["group"]) for r in rows]
        if rows:
            axes.errorbar(
                reached,
                places,
                xerr=ends,
                fmt="D" if name in COLORS else "o",
                color=color,
                label=name,
            )
    axes.set_yticks(range(len(cases)), [g.removeprefix(f"{op}, ") for g in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.axvline(1, color="black", linewidth=1)
    legend = axes.legend(
        title=op,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        fontsize=8,
        frameon=False,
        alignment="left",
        handletextpad=0,
        columnspacing=1,
        borderpad=0.2,
    )
    legend.get_title().set_fontweight("bold")
