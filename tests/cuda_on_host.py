"""Checks of CUDA C++ that was compiled for the host: ``cuda_on_host.py OP LIBRARY CHECK ...``.

The library gives ``patchpack::<op>.cuda`` a kernel for CPU tensors, which runs the threads of the
CUDA kernel one after the other.
"""

import sys

import torch
from torch.nn.functional import pad

from patchpack import _dispatch
from patchpack.testing.contract import CHECKS, Subject, differentiate, subjects


def check_unaligned(subject: Subject) -> None:
    """Views with odd strides, at even and odd addresses, give a contiguous input's bits."""
    inputs, grads = subject.inputs(), subject.spec.grads
    want = differentiate(subject, inputs, grads)
    for before in (0, 1):
        views = {name: pad(inputs[name], (before, 3))[..., before:-3] for name in grads}
        for name, x in differentiate(subject, {**inputs, **views}, grads).items():
            assert torch.equal(x, want[name]), name


HERE = {"unaligned inputs": check_unaligned}


def main(op: str, library: str, *checks: str) -> int:
    torch.ops.load_library(library)
    _dispatch.RUNS_ON["cuda"] = ("cpu", "meta")
    _dispatch._UNAVAILABLE[op]["cuda"] = None
    failures = 0
    for check in checks:
        for subject in subjects(op, "accuracy" if check in HERE else check, "cuda"):
            try:
                (CHECKS | HERE)[check](subject)
            except Exception as error:
                failures += 1
                print(f"{check}, {subject.case}, {subject.dtype}: {type(error).__name__}: {error}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
