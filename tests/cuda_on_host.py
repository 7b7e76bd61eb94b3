"""Checks of CUDA C++ that was compiled for the host: ``cuda_on_host.py OP LIBRARY CHECK ...``.

The library gives ``patchpack::<op>.cuda`` a kernel for CPU tensors, which runs the threads of the
CUDA kernel one after the other.
"""

import sys

import torch
from torch.nn.functional import pad

import patchpack
from patchpack import PackedGrid, _dispatch
from patchpack.testing.contract import CHECKS, Subject, differentiate, subjects


def check_unaligned(subject: Subject) -> None:
    """Views with odd strides, at even and odd addresses, give a contiguous input's bits."""
    inputs, grads = subject.inputs(), subject.spec.grads
    want = differentiate(subject, inputs, grads)
    for before in (0, 1):
        views = {name: pad(inputs[name], (before, 3))[..., before:-3] for name in grads}
        for name, x in differentiate(subject, {**inputs, **views}, grads).items():
            assert torch.equal(x, want[name]), name


def check_turns(subject: Subject) -> None:
    """In a large batch a thread turns several heads, one after the other."""
    rows, cols = 300, 350
    q, k = (torch.randn(rows * cols, heads, 8) for heads in (3, 2))
    options = {
        "rope_2d": {"grid": PackedGrid([(rows, cols)])},
        "mrope": {
            "position_ids": torch.arange(rows * cols).expand(3, -1),
            "mrope_section": (2, 1, 1),
        },
    }[subject.op]
    inputs = {"q": q, "k": k, **options}
    for x, want in zip(subject(inputs), subject.spec.reference(**inputs), strict=True):
        torch.testing.assert_close(x, want)


def check_in_place(subject: Subject) -> None:
    """A buffer is turned where it lies, with the bits of the op that allocates."""
    inputs = subject.inputs()
    want = torch.cat([*subject(inputs), inputs["k"]], dim=1)
    q, k = inputs.pop("q"), inputs.pop("k")
    around = pad(torch.cat([q, k, k], dim=1), (0, 0, 0, 1), value=float("nan"))
    qkv = around[:, :-1]
    in_place = getattr(patchpack, f"{subject.op}_")
    in_place(qkv, num_heads=(q.shape[1], k.shape[1]), impl=subject.impl, **inputs)
    assert torch.equal(qkv, want)
    assert around[:, -1].isnan().all()


HERE = {"unaligned inputs": check_unaligned}
ROTARY = ("rope_2d", "mrope")


def main(op: str, library: str, *checks: str) -> int:
    torch.ops.load_library(library)
    _dispatch.RUNS_ON["cuda"] = ("cpu", "meta")
    _dispatch._UNAVAILABLE[op]["cuda"] = None
    failures = 0
    if op in ROTARY:
        _dispatch._UNAVAILABLE[f"{op}_"]["cuda"] = None
        check_turns(subjects(op, "accuracy", "cuda")[0])
        for subject in subjects(op, "accuracy", "cuda"):
            check_in_place(subject)
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
