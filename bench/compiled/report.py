"""The results of ``make compiled`` as a file, and as tables to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _results import Compiled, check
from compiled.configurations import HEAD_DIMS, TARGETS

Row = dict[str, Any]
PASSES = {
    "forward": "_attend_fwd_kernel",
    "gradient of q": "_attend_bwd_dq_kernel",
    "gradients of k, v": "_attend_bwd_dkv_kernel",
}


def write(
    folder: Path,
    versions: dict[str, str],
    found: dict[str, list[Row]],
    ops: Sequence[str],
    targets: Sequence[str],
    dtypes: Sequence[str],
    parts: Sequence[str],
) -> None:
    """Write ``compiled.json`` and ``compiled.md``, with what they have of the rest."""
    path = folder / "compiled.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    commits = {**stored.get("commits", {}), **dict.fromkeys(ops, versions["commit"])}
    results: Row = {**versions, "commits": commits}
    order = ("op", "target", "dtype", "provider", "case", "direction", "kernel", "name", "reason")
    for kind, rows in found.items():
        kept = [
            row
            for row in stored.get(kind, [])
            if row["op"] not in ops
            or row.get("target", "any") not in (*targets, "any")
            or row.get("inputs", dtypes[0]) not in dtypes
            or _part(kind, row) not in parts
        ]
        results[kind] = sorted(kept + rows, key=lambda row: [str(row.get(x, "")) for x in order])
    check(results, Compiled, path.name)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(map(_lines, results, results.values())) + "\n}\n")
    path.with_suffix(".md").write_text("\n".join(_tables(results)))


def _part(kind: str, row: Row) -> str:
    if kind == "rows":
        return "peers" if "case" in row else "kernels"
    return "traffic" if kind == "traffic" or row["target"] == "any" else "peers"


def _lines(name: str, value: Any) -> str:
    """A member of the file, a line each row: one that changes is one line of a diff."""
    if isinstance(value, list):
        return f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    return f"{json.dumps(name)}: {json.dumps(value)}"


def _tables(results: Row) -> Iterable[str]:
    rows = [row for row in results["rows"] if "error" not in row]
    shipped = [row for row in rows if row["provider"] == "patchpack" and "case" not in row]
    yield "# What kernels are compiled to"
    yield ""
    yield "Triton {triton}, torch {torch}, commit {commit}, {date}.".format(**results)
    yield "Made by `make compiled`; all rows are in `compiled.json`. Nothing here is a time, and"
    yield "nothing was run on a GPU."
    yield ""
    yield "## Every kernel, every shipped configuration"
    yield ""
    yield "Ranges over dtypes, head sizes and options. Wide: accesses of global memory of 128 bits"
    yield "a thread, of all. Narrower ones are indices, sizes and tables, what is gathered, and"
    yield "heads whose halves do not begin at 16 bytes."
    yield ""
    yield from _overview(shipped)
    yield "## Attention, bfloat16"
    yield ""
    yield "Tile: queries x keys, warps, stages. Of the main loop: instructions, those of tensor"
    yield "cores and of special functions, fp32 instructions, matrix FLOPs issued for each needed,"
    yield "and the cycles of a multiprocessor that the model gives for 1000 scores."
    yield ""
    for target in TARGETS:
        yield from _attention(target, shipped)
    yield "## Beside peers"
    yield ""
    yield "The same shapes, each library's own launches. Registers, instructions and accesses are"
    yield "sums or ranges over the launches of a pass; tables that a peer needs made before it, and"
    yield "block masks, are not counted."
    yield ""
    yield from _beside(rows, results["traffic"])
    yield "## What moves"
    yield ""
    yield "Every load and store, followed in the interpreter, with the tiles of sm_90. Least: what"
    yield "the definition asks for, in bytes. Unique: distinct bytes of a launch. Programs without"
    yield "work are launched where their number must not be read from the GPU."
    yield ""
    yield from _moved(results["traffic"])
    yield "## What could not be had"
    yield ""
    reasons = {(r["name"], r["op"], r["reason"]) for r in results["missing"]}
    yield from _table(["peer", "op", "reason"], sorted(reasons))


def _overview(rows: Sequence[Row]) -> Iterable[str]:
    head = ["kernel", "target", "rows", "registers", "spilled", "shared KiB", "occupancy"]
    lines = []
    for op, kernel in dict.fromkeys((r["op"], r["kernel"]) for r in rows):
        for target in TARGETS:
            of = [r for r in rows if (r["op"], r["kernel"], r["target"]) == (op, kernel, target)]
            if of:
                lines.append(
                    [
                        f"`{op}` {kernel}",
                        target,
                        len(of),
                        _range(of, "registers"),
                        sum(bool(r["stack"] or r["spills"]) for r in of),
                        _range([{"k": r["shared_memory"] // 1024} for r in of], "k"),
                        _range([{"k": round(100 * r["occupancy"])} for r in of], "k") + "%",
                        _range(of, "instructions"),
                        f"{sum(r['wide_loads'] for r in of)}/{sum(r['loads'] for r in of)}",
                        f"{sum(r['wide_stores'] for r in of)}/{sum(r['stores'] for r in of)}",
                        ", ".join(sorted({k for r in of for k in r["tensor_core"]})) or "-",
                    ]
                )
    return _table([*head, "instructions", "wide loads", "wide stores", "tensor cores"], lines)


def _attention(target: str, rows: Sequence[Row]) -> Iterable[str]:
    lines = []
    for head_dim in HEAD_DIMS:
        for name, kernel in PASSES.items():
            asked = (target, "bfloat16", head_dim, kernel)
            for r in rows:
                found = (r["target"], r["dtype"], r["head_dim"], r["kernel"])
                if found == asked and f"head size {head_dim}" in r["configurations"]:
                    c, loop = r["config"], r["loop"]
                    lines.append(
                        [
                            head_dim,
                            name,
                            f"{c['BLOCK_Q']}x{c['BLOCK_K']}, {c['num_warps']}, {c['num_stages']}",
                            r["registers"],
                            f"{r['shared_memory'] / 1024:.0f}",
                            f"{r['occupancy']:.0%}",
                            loop["instructions"],
                            loop["tensor"],
                            loop["special"],
                            loop["fp32"],
                            f"{loop.get('macs_issued_over_needed', 0):.2f}",
                            f"{loop.get('cycles_a_1000_scores', 0):.0f}",
                        ]
                    )
    if lines:
        yield f"### {target}"
        yield ""
        yield from _table(
            [
                "head size", "pass", "tile", "registers", "shared KiB", "occupancy", "loop",
                "tensor", "special", "fp32", "issued / needed", "cycles",
            ],
            lines,
        )  # fmt: skip


def _beside(rows: Sequence[Row], traffic: Sequence[Row]) -> Iterable[str]:
    beside = [row for row in rows if "case" in row]
    moved = {(r["op"], r["case"], r["provider"], r["direction"]): r for r in traffic}
    cases = dict.fromkeys((r["op"], r["case"]) for r in beside)
    for op, case in cases:
        of_case = [r for r in beside if (r["op"], r["case"]) == (op, case)]
        providers = sorted({r["provider"] for r in of_case}, key=lambda p: (p != "patchpack", p))
        peers = len(providers) > 1
        lines = []
        for direction in ("forward", "backward"):
            for target in TARGETS:
                for provider in providers if peers else ():
                    of = [
                        r
                        for r in of_case
                        if (r["direction"], r["target"], r["provider"])
                        == (direction, target, provider)
                    ]
                    if of:
                        bytes_ = moved.get((op, case, provider, direction))
                        lines.append([direction, target, provider, *_launches(of, bytes_)])
        if lines:
            yield f"### `{op}`, {case}"
            yield ""
            yield from _table(
                [
                    "pass", "target", "", "launches", "registers", "spilled", "occupancy",
                    "instructions", "loop", "loop / 1000 MACs", "wide loads", "wide stores",
                    "tensor cores", "unique / least", "requested / least",
                ],
                lines,
            )  # fmt: skip


def _moved(rows: Sequence[Row]) -> Iterable[str]:
    head = ["op", "case", "pass", "", "launches", "programs", "without work", "least bytes"]
    head += ["unique / least", "requested / least", "out of bounds", "not written before", "races"]
    order = sorted(rows, key=lambda r: (r["op"], r["case"], r["direction"] != "forward"))
    return _table(
        head,
        (
            [
                *(f"`{r['op']}`", r["case"], r["direction"], r["provider"]),
                *(r["launches"], r["programs"], r["idle"], r["compulsory"]),
                f"{r['unique_over_compulsory']:.3f}",
                f"{r['requested_over_compulsory']:.3f}",
                *(r["out_of_bounds"], r["uninitialised"], r["races"]),
            ]
            for r in order
        ),
    )


def _launches(rows: Sequence[Row], moved: Row | None) -> list[Any]:
    """Of the launches of a pass what the table shows."""
    macs = [r for r in rows if "macs" in r["loop"]]
    a_mac = [
        1000 * r["loop"]["instructions"] * r["config"]["num_warps"] / r["loop"]["macs"]
        for r in macs
    ]
    return [
        len(rows),
        _range(rows, "registers"),
        sum(bool(r["stack"] or r["spills"]) for r in rows),
        _range([{"k": round(100 * r["occupancy"])} for r in rows], "k") + "%",
        sum(r["instructions"] for r in rows),
        sum(r["loop"]["instructions"] for r in rows),
        " + ".join(f"{x:.2f}" for x in a_mac) or "-",
        f"{sum(r['wide_loads'] for r in rows)}/{sum(r['loads'] for r in rows)}",
        f"{sum(r['wide_stores'] for r in rows)}/{sum(r['stores'] for r in rows)}",
        ", ".join(sorted({k for r in rows for k in r["tensor_core"]})) or "-",
        f"{moved['unique_over_compulsory']:.3f}" if moved else "-",
        f"{moved['requested_over_compulsory']:.3f}" if moved else "-",
    ]


def _range(rows: Sequence[Row], name: str) -> str:
    least, most = min(r[name] for r in rows), max(r[name] for r in rows)
    return f"{least}" if least == most else f"{least} to {most}"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for line in lines:
        yield "| " + " | ".join(str(x) for x in line) + " |"
    yield ""
