"""What kernels are compiled to, and what they move: ``make compiled``.

Every shipped configuration of every kernel, for every target, and peers beside the same cases of
ours; then each load and store, followed in the interpreter. Writes ``compiled.json`` and tables in
``compiled.md``. The exit status is 1 if a kernel of ours spills or does not compile.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track

from _harness import machine
from compiled import report
from compiled.configurations import DTYPES, TARGETS
from compiled.peers import CASES
from compiled.tasks import Rows, Task, of_case, of_op, of_peers, run, traffic_of
from patchpack.testing.catalogue import SPECS

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("kernels", "peers", "traffic")
# of which Inductor can be asked for code
PEER_TARGETS = ("sm_80", "sm_90", "sm_100")


def main() -> None:
    parser = argparse.ArgumentParser("compiled", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="all of them by default")
    parser.add_argument("--op", choices=list(SPECS), action="append", help="all of them by default")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="all of them by default")
    parser.add_argument("--part", choices=PARTS, action="append", help="all of them by default")
    parser.add_argument("--peers", type=Path, help="a folder with checkouts of other libraries")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    targets, dtypes = args.target or TARGETS, args.dtype or DTYPES
    ops = args.op or sorted(SPECS, key="varlen_attention".__ne__)  # what takes longest comes first

    parts = args.part or PARTS

    cases = [case for case in CASES if case[0] in ops]
    tasks_of: dict[str, list[Task]] = {
        "kernels": [
            (of_op, (op, target, dtype))
            for op, target, dtype in itertools.product(ops, targets, dtypes)
            if target != "gfx950" or dtype == "bfloat16"  # which is compiled as gfx942 is
        ],
        "peers": [
            *((of_case, (*case, target)) for case in cases for target in targets),
            *(
                (of_peers, (*case, target, args.peers))
                for case in cases
                for target in PEER_TARGETS
                if target in targets
            ),
        ],
        "traffic": [(traffic_of, (*case, args.peers)) for case in cases],
    }
    tasks = [task for part in parts for task in tasks_of[part]]
    found: dict[str, Rows] = {"rows": [], "traffic": [], "missing": []}
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs, maxtasksperchild=8) as pool:  # whose memory grows
        done = pool.imap_unordered(run, tasks)
        for result in track(done, "compiling", total=len(tasks)):
            for kind, rows in result.items():
                found[kind] += rows
    report.write(args.out, versions(), found, ops, targets, dtypes, parts)
    console = Console()
    failed = [row for row in found["rows"] if row["provider"] == "patchpack" and not fine(row)]
    for row in failed:
        console.print("spilled or failed:", row, highlight=False, markup=False)
    console.print(f"wrote {args.out / 'compiled.json'} and compiled.md", highlight=False)
    sys.exit(bool(failed))


def versions() -> dict[str, Any]:
    """Of what is compiled, and with what."""
    commit, date = machine("cpu")["commit"], datetime.date.today().isoformat()
    return {
        "commit": commit,
        "date": date,
        "triton": triton.__version__,
        "torch": torch.__version__,
    }


def fine(row: dict[str, Any]) -> bool:
    """Whether a kernel compiled, and keeps what it needs in registers."""
    return "error" not in row and row["spills"] == row["stack"] == 0


if __name__ == "__main__":
    main()
