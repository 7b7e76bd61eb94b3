"""Time ops against their peers: ``python bench/run.py [op ...] [--device cuda] [--out DIR]``.

Each op has a process of its own: a heap full of what another left slows the next. With ``--check``
the exit status is 1 if a floor is missed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from _harness import Bench, Case, machine, run_case
from _report import merge, plot, show, show_floors
from patchpack.testing.catalogue import SPECS

HERE = Path(__file__).parent
OPS = sorted([*SPECS, "metadata", "preprocess"])
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help="all of them by default")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="float32 and bfloat16")
    parser.add_argument("--quick", action="store_true", help="one round of one tiny shape")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PROVIDER", help="leave out a provider"
    )
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    parser.add_argument("--out", type=Path, help="bench/results, and with --quick build/bench")
    args = parser.parse_args()
    out = args.out or (HERE.parent / "build/bench" if args.quick else HERE / "results")

    ops = args.op or OPS
    console = Console()
    console.width = max(console.width, 110)
    info = machine(args.device)
    path = out / (re.sub(r"\W+", "-", info["device"]).strip("-").lower() + ".json")
    if len(ops) == 1:
        console.print(", ".join(f"{name} {value}" for name, value in info.items()), highlight=False)
        floors = time_op(ops[0], args, path, console)
    else:
        options = [f"--device={args.device}", f"--out={out}", *["--quick"] * args.quick]
        options += [f"--dtype={dtype}" for dtype in args.dtype or ()]
        options += [f"--without={provider}" for provider in args.without]
        environment = {**os.environ, "PATCHPACK_COMMIT": info["commit"]}
        for op in ops:
            subprocess.run([sys.executable, __file__, op, *options], check=True, env=environment)
        floors = [
            row
            for row in json.loads(path.read_text())["floors"]
            if row["op"] in ops and row["dtype"] in (args.dtype or [row["dtype"]])
        ]
    if floors:
        show_floors(floors, console)
    if args.check and any(floor["met"] is False for floor in floors):
        sys.exit(1)


def time_op(op: str, args: argparse.Namespace, path: Path, console: Console) -> list[dict]:
    """Time all cases of ``op`` in this process, into the file ``path``; returns their floors."""
    on_gpu = args.device == "cuda"
    bench = bench_of(op)
    if bench.threads and on_gpu:
        return []  # it is the CPU's
    cases = [
        Case(bench, shape, getattr(torch, dtype), backward, args.device)
        for shape, dtype, backward in itertools.product(
            ["tiny"] if args.quick else bench.shapes | (bench.large if on_gpu else {}),
            bench.dtypes or args.dtype or DTYPES[:2],
            (False, True) if bench.backward else (False,),
        )
    ]
    reasons, floors = {}, []
    for case in track(cases, "timing", console=console):
        found = run_case(case, args.quick, args.without)
        show(found["benchmarks"], console)
        merge(path, found)
        reasons |= {f"{s['op']}: no {s['provider']}: {s['reason']}": None for s in found["skipped"]}
        floors += found["floors"]
    for reason in reasons:
        console.print(reason, markup=False, highlight=False)
    plot(path)
    console.print(f"wrote {path} and {path.with_suffix('.png').name}", highlight=False)
    return floors


def bench_of(op: str) -> Bench:
    """What the bench file of an op says."""
    return importlib.import_module(f"bench_{op}").BENCH


if __name__ == "__main__":
    main()
