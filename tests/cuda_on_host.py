"""Checks of CUDA C++ that was compiled for the host: ``cuda_on_host.py OP LIBRARY CHECK ...``.

The library gives ``patchpack::<op>.cuda`` a kernel for CPU tensors, which runs the threads of the
CUDA kernel one after the other.
"""

import sys

import torch

from patchpack import _dispatch
from patchpack.testing.contract import CHECKS, subjects


def main(op: str, library: str, *checks: str) -> int:
    torch.ops.load_library(library)
    _dispatch.RUNS_ON["cuda"] = ("cpu", "meta")
    _dispatch._UNAVAILABLE[op]["cuda"] = None
    failures = 0
    for check in checks:
        for subject in subjects(op, check, "cuda"):
            try:
                CHECKS[check](subject)
            except Exception as error:
                failures += 1
                print(f"{check}, {subject.case}, {subject.dtype}: {type(error).__name__}: {error}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
