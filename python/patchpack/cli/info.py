"""Show what a bug report needs: versions, devices, settings, and which implementations run."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

import patchpack
from patchpack import _dispatch
from patchpack.testing import machine
from patchpack.testing.catalogue import SPECS

# what changes how kernels are compiled and run
SETTINGS = ("PATCHPACK_", "TRITON_", "TORCH_", "PYTORCH_", "CUDA_", "HIP_", "ROCR_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has none."""


def run(args: argparse.Namespace) -> int:
    for name, value in _facts().items():
        print(f"{name:<20}{value}")

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


def _facts() -> dict[str, Any]:
    facts = machine.describe("cpu")
    facts["cpu"] = facts.pop("device")
    if patchpack.available("rope", "native") is None:
        facts["cpu"] += f", {torch.ops.patchpack.cpu_capability('')}"
    facts |= machine.runtime()
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            gpu = machine.describe_gpu()
        facts[f"gpu {index}"] = ", ".join(
            str(value) if name == "device" else f"{name} {value}" for name, value in gpu.items()
        )
    if reason := machine.no_gpu():
        facts["gpu"] = f"none: {reason}"
    return facts | {x: y for x, y in sorted(os.environ.items()) if x.startswith(SETTINGS)}
