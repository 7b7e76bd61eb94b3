"""Time ops against their peers: ``python bench/run.py [op ...] [--device cuda] [--out DIR]``.

Each op has a process of its own: a heap full of what another left slows the next, and a GPU that an
illegal access stopped works again. What was measured is kept as it comes, also by Ctrl-C. Of many
GPUs the first of CUDA_VISIBLE_DEVICES is timed.

The exit status is 1 if an implementation of ours failed or computed something else, and with
``--check`` if a floor is missed; 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from _harness import OURS, Bench, Case, machine, run_case
from _report import merge, plot, show, show_floors
from _results import FloorFound, Machine, Skipped, read
from patchpack.testing.catalogue import SPECS
from patchpack.testing.machine import has_unused_gpu, no_gpu

HERE = Path(__file__).parent
OPS = sorted([*SPECS, "image_processor", "metadata", "preprocess", "transformers"])
DTYPES = ("float32", "bfloat16", "float16")
INTERRUPTED = 130


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("op", nargs="*", choices=[*OPS, []], help="all of them by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU, if one is here")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="float32 and bfloat16")
    parser.add_argument("--quick", action="store_true", help="one round of one tiny shape")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PROVIDER", help="leave out a provider"
    )
    parser.add_argument("--check", action="store_true", help="fail if a floor is missed")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # of a run
    parser.add_argument("--out", type=Path, help="bench/results, and with --quick build/bench")
    args = parser.parse_args()
    if args.device is None and has_unused_gpu():
        parser.error(f"{no_gpu()}; --device cpu times the CPU")
    args.device = args.device or ("cpu" if no_gpu() else "cuda")
    if args.device == "cuda" and (reason := no_gpu()):
        parser.error(f"--device cuda: {reason}")
    args.out = args.out or (HERE.parent / "build/bench" if args.quick else HERE / "results")

    ops = args.op or OPS
    console = Console()
    console.width = max(console.width, 110)
    info = machine(args.device)
    path = args.out / (re.sub(r"\W+", "-", info["device"]).strip("-").lower() + ".json")
    failed = []
    try:
        if not args.part:
            _introduce(info, console)
        if len(ops) == 1:
            failed = time_op(ops[0], args, path, console)
        else:
            failed = _time_each(ops, args, info)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept")
        sys.exit(INTERRUPTED)
    finally:
        if path.exists() and not args.part:
            plot(path)
            console.print(f"wrote {path} and {path.with_suffix('.png').name}", highlight=False)
    floors = [floor for floor in read(path)["floors"] if _asked(floor, ops, args)]
    if floors and not args.part:
        show_floors(floors, console)
    for line in failed:
        console.print(f"failed: {line}", style="red", markup=False, highlight=False)
    missed = any(floor["met"] is False for floor in floors)
    sys.exit(int(bool(failed) or (args.check and missed)))


def _introduce(info: Machine, console: Console) -> None:
    console.print(", ".join(f"{name} {value}" for name, value in info.items()), highlight=False)
    if info.get("memory_taken_gib", 0) > 2:  # a context takes half a GiB
        console.print("[yellow]another process has memory of this GPU, and may take its time")


def _time_each(ops: list[str], args: argparse.Namespace, info: Machine) -> list[str]:
    """Time each op in a process of its own; returns those that failed."""
    options = [f"--device={args.device}", f"--out={args.out}", "--part"]
    options += ["--quick"] * args.quick
    options += [f"--dtype={dtype}" for dtype in args.dtype or ()]
    options += [f"--without={provider}" for provider in args.without]
    environment = {**os.environ, "PATCHPACK_COMMIT": info["commit"] or ""}
    failed = []
    for op in ops:
        done = subprocess.run([sys.executable, __file__, op, *options], env=environment)
        if done.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        if done.returncode:
            failed.append(f"{op}, see above")
    return failed


def time_op(op: str, args: argparse.Namespace, path: Path, console: Console) -> list[str]:
    """Time all cases of ``op`` in this process, into the file ``path``.

    Returns:
        What failed: implementations of ours that raised or computed something else.
    """
    on_gpu = args.device == "cuda"
    bench = bench_of(op)
    if bench.threads and on_gpu:
        console.print(f"{op}: it works on a CPU", highlight=False)
        return []
    cases = [
        Case(bench, shape, getattr(torch, dtype), backward, args.device)
        for shape, dtype, backward in itertools.product(
            ["tiny"] if args.quick else bench.shapes | (bench.large if on_gpu else {}),
            bench.dtypes or args.dtype or DTYPES[:2],
            (False, True) if bench.backward else (False,),
        )
    ]
    skipped: list[Skipped] = []
    for case in track(cases, "timing", console=console):
        found = run_case(case, args.quick, args.without)
        show(found["benchmarks"], console)
        merge(path, found)
        skipped += found["skipped"]
    reasons = {f"{s['op']}: no {s['provider']}: {s['reason']}": None for s in skipped}
    for reason in reasons:
        console.print(reason, markup=False, highlight=False)
    return [
        f"{s['provider']} of {s['op']}, {s['shape']}, {s['dtype']}, {s['direction']}: {s['reason']}"
        for s in skipped
        if s.get("failed") and s["provider"] in OURS
    ]


def _asked(floor: FloorFound, ops: list[str], args: argparse.Namespace) -> bool:
    return floor["op"] in ops and floor["dtype"] in (args.dtype or [floor["dtype"]])


def bench_of(op: str) -> Bench:
    """What the bench file of an op says."""
    return importlib.import_module(f"bench_{op}").BENCH


if __name__ == "__main__":
    main()
