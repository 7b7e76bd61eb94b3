"""Check on this machine that every op does what it promises.

Runs the contract of the catalogue, the same that the tests run. An op may err at most twice as much
as eager PyTorch does, against a float64 oracle; the table shows the case closest to that limit.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import patchpack
from patchpack import _dispatch
from patchpack.cli import CommandError, to_json
from patchpack.testing import machine
from patchpack.testing.catalogue import SPECS
from patchpack.testing.compare import Accuracy
from patchpack.testing.contract import CHECKS, NOT_OWED_BY_REFERENCE, accuracies, subjects

VERDICTS = {True: "[green]ok", False: "[red]FAILED", None: "[dim]skipped"}


@dataclass
class Result:
    """What one check found about one op; ``passed`` is ``None`` where it was skipped."""

    op: str
    check: str
    passed: bool | None
    cases: int = 0
    error: float | None = None
    eager_error: float | None = None
    message: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=SPECS, help="one op only")
    parser.add_argument("--impl", choices=_dispatch.IMPLS, help="by default that of the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU, if one is here")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write the report, to send it; without PATH print it instead of a table",
    )


def run(args: argparse.Namespace) -> int:
    device = args.device or ("cpu" if machine.no_gpu() else "cuda")
    if device == "cuda" and (reason := machine.no_gpu()):
        raise CommandError(f"cannot verify on cuda: {reason}")
    asked = [args.op] if args.op else list(SPECS)
    try:
        impl = args.impl or _dispatch.resolve(asked[0], None, x=torch.empty(0, device=device))
    except (RuntimeError, ValueError) as error:  # a GPU that others hold alone; no Triton
        raise CommandError(f"cannot verify on {device}: {str(error).splitlines()[0]}") from error
    reasons = {op: reason for op in asked if (reason := patchpack.available(op, impl))}
    ops = [op for op in asked if op not in reasons]  # few have CUDA C++
    if not ops:
        raise CommandError(f"cannot verify impl={impl!r} of {asked[0]}: {reasons[asked[0]]}")
    path = Path(args.json) if args.json not in (None, "-") else None
    if path:
        _reserve(path)

    found = {"impl": impl, "device": device, "machine": machine.describe(device)}
    results: list[Result] = []
    stopped = None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(ops) * len(CHECKS))
        try:
            for op, check in itertools.product(ops, CHECKS):
                progress.update(task, description=f"{op}: {check}")
                results.append(_verify(op, check, impl, device))
                progress.advance(task)
                if not machine.answers(device):
                    stopped = f"the GPU answers no more since {check} of {op}: the rest is not run"
                    break
        except KeyboardInterrupt:
            stopped = f"it was interrupted in {check} of {op}: the rest is not run"

    verdicts = [asdict(result) for result in results]
    report = to_json({**found, "results": verdicts, "left_out": reasons, "stopped": stopped})
    if args.json == "-":
        print(report)
    else:
        console = Console()
        console.print(f"{impl} on {device}, {found['machine']['device']}", highlight=False)
        if device == "cpu" and machine.has_unused_gpu():
            console.print(f"[yellow]not on a GPU: {escape(machine.no_gpu() or '')}")
        if impl == "reference":
            console.print("[yellow]--impl triton checks the kernels, on a CPU in the interpreter")
        left_out = [f"[dim]{op} is left out: {escape(why)}" for op, why in reasons.items()]
        end = [f"[red]{stopped}"] if stopped else []
        console.print(_table(ops, results), *_remarks(results), *left_out, *end, sep="\n")
    if path:
        path.write_text(report + "\n")
        print(f"wrote {path}")
    return int(stopped is not None or any(result.passed is False for result in results))


def _reserve(path: Path) -> None:
    """Make the file of the report: what takes minutes does not fail in the end."""
    try:
        path.touch()
    except OSError as error:
        raise CommandError(f"cannot write the report to {path}: {error.strerror}") from error


def _verify(op: str, check: str, impl: str, device: str) -> Result:
    if impl == "reference" and check in NOT_OWED_BY_REFERENCE:
        return Result(op, check, None, message=NOT_OWED_BY_REFERENCE[check])
    failures: list[str] = []
    too_large: list[str] = []
    measured: list[Accuracy] = []
    cases = subjects(op, check, impl, device)
    for subject in cases:
        try:
            if check == "accuracy":
                found = accuracies(subject)
                failures += [f"{subject.case}, {subject.dtype}: {a}" for a in found if not a.passed]
                measured += found
            else:
                CHECKS[check](subject)
            if device == "cuda":
                torch.cuda.synchronize()  # what went wrong on the GPU is of this case
        except torch.OutOfMemoryError as error:
            too_large.append(f"{subject.case}: {str(error).partition(' GPU ')[0]}")
        except Exception as error:  # whatever it is, it is the finding
            failures.append(f"{subject.case}: {type(error).__name__}: {error}")
            if not machine.answers(device):
                break
    verdict = False if failures else None if too_large else True
    result = Result(op, check, verdict, len(cases), message="; ".join(failures or too_large))
    if measured:
        worst = max(measured, key=lambda a: (not a.passed, a.error / a.budget if a.budget else 0))
        result.error, result.eager_error = worst.error, worst.eager_error
    return result


def _table(ops: list[str], results: list[Result]) -> Table:
    table = Table("check", *ops)
    for check in CHECKS:
        found = [result for result in results if result.check == check]
        table.add_row(check, *(VERDICTS[result.passed] for result in found))
        if any(result.error is not None for result in found):
            table.add_row("  largest error", *(_number(result.error) for result in found))
            table.add_row("  eager's error", *(_number(result.eager_error) for result in found))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _remarks(results: list[Result]) -> Iterator[str]:
    skipped = {(r.check, r.message) for r in results if r.passed is None}
    for check, message in sorted(skipped):
        yield f"[dim]{check} is skipped: {escape(message)}"
    for result in results:
        if result.passed is False:
            yield f"[red]{result.op}, {result.check}[/]: {escape(result.message)}"
