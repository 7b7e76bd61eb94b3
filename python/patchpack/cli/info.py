"""Show versions, and which implementation of which op is available here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import patchpack
from patchpack import _dispatch
from patchpack.testing.catalogue import SPECS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has none."""


def run(args: argparse.Namespace) -> int:
    for name, value in _versions().items():
        print(f"{name:<12}{value}")

    missing: dict[tuple[str, str], list[str]] = {}  # ops by implementation and reason
    print(f"\n{'op':<20}" + "".join(f"{impl:<12}" for impl in _dispatch.IMPLS).rstrip())
    for op in SPECS:
        marks = []
        for impl in _dispatch.IMPLS:
            reason = patchpack.available(op, impl)
            marks.append("no" if reason else "yes")
            if reason:
                missing.setdefault((impl, reason), []).append(op)
        print(f"{op:<20}" + "".join(f"{mark:<12}" for mark in marks).rstrip())

    print()
    for (impl, reason), ops in missing.items():
        print(f"{impl} is not available{_of(ops)}: {reason}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        defaults: dict[str, list[str]] = {}
        for op in SPECS:
            impl = _dispatch.resolve(op, None, x=torch.empty(0, device=device))
            defaults.setdefault(impl, []).append(op)
        for impl, ops in defaults.items():
            print(f"impl=None on {device} tensors is {impl!r}{_of(ops)}")
    if not any(impl == "triton" for impl, _ in missing):
        print("impl='triton' on cpu tensors is Triton's interpreter: correct, and slow")
    return 0


def _of(ops: list[str]) -> str:
    """Which ops a line is about, unless it is about all of them."""
    return "" if len(ops) == len(SPECS) else f" for {', '.join(ops)}"


def _versions() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    versions = {
        "patchpack": patchpack.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "CUDA": torch.version.cuda or "not in this torch",
    }
    gpus = range(torch.cuda.device_count())
    names = [torch.cuda.get_device_name(i) for i in gpus] or ["none"]
    return {**versions, "GPU": ", ".join(names)}
