"""Native ops while memory is short: ``python tests/out_of_memory.py op ...``.

Address space is limited ever less, so that one allocation after the other fails, in the forward
and in the backward pass. Whatever failed, inputs are as they were, and with memory the same call
has its bits. Prints for each op how many calls failed and how many did not.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

import patchpack
from patchpack import PackedGrid
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, differentiate, tensors

WIDE = ("rope", "rope_2d", "mrope", "varlen_attention", "patchify")  # of many numbers a token
STEPS = [0, *(int(2**15 * 2.2**i) for i in range(9))]  # bytes; the last holds all of a call


def limit(headroom: int | None) -> None:
    """Let the process have no more than ``headroom`` bytes above what it has."""
    if headroom is None:
        most = resource.RLIM_INFINITY
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + headroom
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def caller(op: str) -> tuple[dict, Callable[[], dict[str, torch.Tensor]]]:
    """Arguments of ``op``, and a call with them, forward and backward."""
    name = op.removesuffix("_")
    subject = Subject(name, next(iter(SPECS[name].cases)), impl="native")
    side = 16 if name in WIDE else 80  # so that the system is asked for all that a call allocates
    sizes = [(1, side, side), (1, side, 2 * side)]
    inputs = subject.inputs(sizes=sizes, **subject.without_padding)
    if name == op:
        return inputs, lambda: differentiate(subject, inputs, subject.spec.grads)
    q, k = inputs.pop("q"), inputs.pop("k")
    num_heads = q.shape[1], k.shape[1]
    qkv = torch.cat([q, k, k], dim=1)

    def call() -> dict[str, torch.Tensor]:
        leaf = qkv.detach().requires_grad_()
        out = getattr(patchpack, op)(leaf * 1, num_heads=num_heads, impl="native", **inputs)
        out.backward(torch.ones_like(out))
        return {"output": out.detach(), "grad": leaf.grad}

    return {"qkv": qkv, **inputs}, call


def starve(inputs: dict, call: Callable[[], dict[str, torch.Tensor]]) -> dict[str, int]:
    for _ in range(2):
        want = call()  # with its threads, and whatever is made once
    # small blocks go on to be had: torch writes its error into some, and reads what it did not get
    blocks = [bytearray(16_000) for _ in range(64)]
    del blocks
    kept = [x.clone() for x in tensors(list(inputs.values()))]
    counts = {"failed": 0, "passed": 0}
    for headroom in STEPS:
        limit(headroom)
        try:
            call()
            counts["passed"] += 1
        except (RuntimeError, MemoryError):
            counts["failed"] += 1
        finally:
            limit(None)
        for x, y in zip(tensors(list(inputs.values())), kept, strict=True):
            assert torch.equal(x, y), f"an input was written with {headroom} bytes"
        got = call()
        for name, x in want.items():
            assert torch.equal(got[name], x), f"{name} differs after {headroom} bytes"
    return counts


def starve_a_grid() -> dict[str, int]:
    """What a grid keeps is whole or not there."""
    grid, counts = PackedGrid([(500, 500)]), {"failed": 0, "passed": 0}
    for headroom in (0, 2**20, 2**24):
        limit(headroom)
        try:
            grid.position_ids  # noqa: B018 it is made and kept
            counts["passed"] += 1
        except (RuntimeError, MemoryError):
            counts["failed"] += 1
            assert grid._position_ids is None
        finally:
            limit(None)
    grid.validate()
    return counts


def main(ops: list[str]) -> None:
    torch.set_num_threads(2)
    counts = {op: starve(*caller(op)) for op in ops}
    print(json.dumps({**counts, "PackedGrid": starve_a_grid()}))


if __name__ == "__main__":
    # the stack of the first thread grows, and kills the process where it may not
    threading.stack_size(2**26)
    thread = threading.Thread(target=main, args=(sys.argv[1:],))
    thread.start()
    thread.join()
