"""All timing. Providers take turns: every round runs each of them once.

Machines drift by more than providers differ, so that timing one to the end before the next, as a
benchmark runner does, would compare two moments. pytest-benchmark gives the statistics and the
layout of the results, which its ``pytest-benchmark compare`` reads.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

import patchpack
from patchpack.testing.catalogue import SPECS, Inputs
from patchpack.testing.compare import MAX_RELATIVE_RMS
from patchpack.testing.contract import Subject, check_accuracy, leaves, tensors

# a provider that cannot run here raises while it is made or first called: that is the reason given
Provider = Callable[..., Any]
MakeProvider = Callable[[Inputs], Provider]
Step = Callable[[], Sequence[Tensor]]

# rows and columns, in patches, of sixteen images of mixed size and shape
PHOTOS = [
    *((32, 24), (24, 32), (18, 32), (36, 20), (28, 28), (16, 40), (22, 34), (40, 26)),
    *((14, 20), (30, 30), (12, 46), (26, 18), (20, 20), (34, 22), (24, 24), (44, 30)),
]

ROUNDS = (7, 100)  # at least and at most, whatever SECONDS says
SECONDS = 4.0  # for the rounds of one case


@dataclass(frozen=True)
class Bench:
    """What a bench file says of its op.

    ``shapes`` maps a name to keyword arguments of ``make_inputs(dtype, device, **shape)``, which
    gives those of the op; ``tiny`` is one more, to try the file out. ``bytes_moved`` and ``flops``
    count the least work of the forward pass, or with ``backward=True`` of both passes. ``bound``
    names what limits the op, ``"copy"`` or ``"matmul"``. ``peers`` are other ways to compute it,
    beside ``_providers`` or in their place: functions that take the inputs and prepare a function
    of the op's keyword arguments. ``backward`` says whether there is a backward pass.
    """

    op: str
    shapes: dict[str, Inputs]
    tiny: Inputs
    make_inputs: Callable[..., Inputs]
    bytes_moved: Callable[[Inputs, bool], int]
    flops: Callable[[Inputs, bool], int]
    bound: str
    peers: dict[str, MakeProvider]
    backward: bool = True


@dataclass(frozen=True)
class Case:
    """One line of the results: an op, a shape, a dtype, a direction, and where it runs."""

    bench: Bench
    shape: str
    dtype: torch.dtype
    backward: bool
    device: str

    @property
    def params(self) -> dict[str, str]:
        return {
            "op": self.bench.op,
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": "forward+backward" if self.backward else "forward",
        }


class UnavailableError(Exception):
    """A provider cannot run a case, and why."""


class WrongError(Exception):
    """A provider computes something else than the op, so nothing is timed."""


def heads(
    num_tokens: int, num_heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``q``, ``k`` and ``v``: views of one buffer, as a model's projection leaves them."""
    num_q, num_k = num_heads
    qkv = torch.randn(num_tokens, num_q + 2 * num_k, head_dim, device=device).to(dtype)
    q, k, v = qkv.split([num_q, num_k, num_k], dim=1)
    return q, k, v


def run_case(case: Case, quick: bool) -> tuple[list[dict], list[dict]]:
    """Time every provider of a case.

    Returns:
        Results in pytest-benchmark's layout, and the providers that were not timed, with reasons.

    Raises:
        WrongError: The op fails its accuracy check here, or a peer differs from the reference.
    """
    torch.manual_seed(0)
    bench = case.bench
    shape = bench.tiny if quick else bench.shapes[case.shape]
    inputs = bench.make_inputs(case.dtype, case.device, **shape)
    with torch.no_grad():
        outputs = tensors(SPECS[bench.op].reference(**inputs))
    cotangents = [torch.randn_like(x) for x in outputs if x.is_floating_point()]

    steps: dict[str, Step] = {}
    skipped = []
    want = None
    for name, make in _providers(case, quick).items():
        try:
            step = _step(make(inputs), case, inputs, cotangents)
            got = step()
        except WrongError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            kind = "" if isinstance(error, UnavailableError) else f"{type(error).__name__}: "
            skipped.append({**case.params, "provider": name, "reason": kind + reason})
            continue
        want = want or got  # the reference comes first
        _same(name, case, got, want)
        steps[name] = step
    del want

    work = bench.bytes_moved(inputs, case.backward), bench.flops(inputs, case.backward)
    limit, scale = _limit(case, *work)
    stats = _interleave({**steps, "limit": limit}, _clock(case.device), quick)
    limit_s = stats.pop("limit")["median"] * scale
    return [_result(case, name, s, work, limit_s) for name, s in stats.items()], skipped


def _providers(case: Case, quick: bool) -> dict[str, MakeProvider]:
    reference = SPECS[case.bench.op].reference

    def compiled(inputs: Inputs) -> Provider:
        if quick:
            raise UnavailableError("compiling takes longer than --quick may")
        torch._dynamo.reset()
        return torch.compile(reference, dynamic=False)

    return {
        "reference": lambda inputs: reference,
        "reference, compiled": compiled,
        "triton": functools.partial(_ours, case, "triton"),
        "native": functools.partial(_ours, case, "native"),
        **case.bench.peers,
    }


def _ours(case: Case, impl: str, inputs: Inputs) -> Provider:
    op = case.bench.op
    if impl == "triton" and case.device == "cpu":
        raise UnavailableError("on a CPU it runs in Triton's interpreter, which is never timed")
    if impl == "native" and case.device != "cpu":
        raise UnavailableError("it runs on CPU tensors")
    if reason := patchpack.available(op, impl):
        raise UnavailableError(reason)
    _check_accuracy(Subject(op, next(iter(SPECS[op].cases)), case.dtype, impl, case.device))
    return functools.partial(SPECS[op].op, impl=impl)


@functools.cache
def _check_accuracy(subject: Subject) -> None:
    try:
        check_accuracy(subject)
    except AssertionError as error:
        raise WrongError(f"{subject} is not as accurate as eager: {error}") from error


def _step(provider: Provider, case: Case, inputs: Inputs, cotangents: Sequence[Tensor]) -> Step:
    if not case.backward:
        return torch.no_grad()(lambda: tensors(provider(**inputs)))

    arguments = leaves(inputs, SPECS[case.bench.op].grads)
    flat = [x for x in tensors(list(arguments.values())) if x.requires_grad]

    def step() -> Sequence[Tensor]:
        outputs = tensors(provider(**{**inputs, **arguments}))
        return [*outputs, *torch.autograd.grad(outputs, flat, cotangents)]

    return step


def _same(name: str, case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Whoever computes something else is no provider of this op."""
    for x, y in zip(got, want, strict=True):
        error = torch.linalg.vector_norm(x.float() - y.float())
        # both may err
        if not error <= 2 * MAX_RELATIVE_RMS[case.dtype] * torch.linalg.vector_norm(y.float()):
            raise WrongError(f"{name} does not compute {case.bench.op}: {case.params}")


def _limit(case: Case, num_bytes: int, flops: int) -> tuple[Step, float]:
    """A copy or a matrix product of as much work, and what its time has to be multiplied by."""
    if case.bench.bound == "copy":
        source = torch.ones(num_bytes // 8, device=case.device)
        target = torch.ones_like(source)
        return lambda: [target.copy_(source)], 1.0
    least = 1024 if case.device == "cpu" else 8192  # smaller products do not reach the peak
    n = max(least, math.ceil((flops / 2) ** (1 / 3) / 64) * 64)
    a, b = torch.randn(2, n, n, device=case.device).to(case.dtype)
    return lambda: [torch.mm(a, b)], flops / (2 * n**3)


def _interleave(
    steps: dict[str, Step], clock: Callable[[Step], float], quick: bool
) -> dict[str, dict[str, Any]]:
    """Statistics of every step, in seconds."""
    round_s = sum([clock(step) for step in steps.values()])
    least, most = (1, 1) if quick else ROUNDS
    rounds = max(least, min(most, int(SECONDS / round_s)))
    stats = {name: Stats() for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                stats[name].update(clock(step))
    finally:
        gc.enable()
    return {name: s.as_dict() for name, s in stats.items()}


def _clock(device: str) -> Callable[[Step], float]:
    """A function that gives the seconds of one step."""
    if device == "cpu":

        def cpu(step: Step) -> float:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin

        return cpu

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed = torch.empty(2**28, dtype=torch.uint8, device=device)  # larger than any L2 cache

    def cuda(step: Step) -> float:
        flushed.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return cuda


def _result(
    case: Case, provider: str, stats: dict[str, Any], work: tuple[int, int], limit_s: float
) -> dict[str, Any]:
    num_bytes, flops = work
    median = stats["median"]
    group = ", ".join(case.params.values())
    return {
        "group": group,
        "name": provider,
        "fullname": f"{group}, {provider}",
        "param": provider,
        "params": {**case.params, "provider": provider},
        "stats": {**stats, "iterations": 1},
        "extra_info": {
            **machine(case.device),
            "bytes": num_bytes,
            "flops": flops,
            "gb_per_s": num_bytes / median / 1e9,
            "gflop_per_s": flops / median / 1e9,
            "limit": case.bench.bound,
            "of_limit": limit_s / median,
        },
    }


@functools.cache
def machine(device: str) -> dict[str, Any]:
    """What a number was measured on: versions, device, threads and the allocator's settings."""
    commit = get_commit_info()
    tuned = ("MALLOC_", "PYTORCH_", "THP_MEM_ALLOC", "LD_PRELOAD")
    return {
        "commit": commit["id"] + ("-dirty" if commit["dirty"] else ""),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "allocator": {k: v for k, v in sorted(os.environ.items()) if k.startswith(tuned)},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()
