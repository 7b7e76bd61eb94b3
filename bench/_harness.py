"""All timing. Providers take turns, and the physical limit is one of them.

Machines drift by more than providers differ, so that timing one to the end before the next, as a
benchmark runner does, would compare two moments. A slow provider takes part in fewer rounds, spread
over all of them. pytest-benchmark gives the statistics and the layout of the results, which its
``pytest-benchmark compare`` reads.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
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
Step = Callable[[], Any]

# rows and columns, in patches, of sixteen images of mixed size and shape
PHOTOS = [
    *((32, 24), (24, 32), (18, 32), (36, 20), (28, 28), (16, 40), (22, 34), (40, 26)),
    *((14, 20), (30, 30), (12, 46), (26, 18), (20, 20), (34, 22), (24, 24), (44, 30)),
]

LIBRARIES = ("triton", "transformers", "torchvision", "liger_kernel", "flash_attn")

SECONDS = 0.6  # for the rounds of one provider
ROUNDS = (5, 100)  # at least and at most, whatever SECONDS says
REFERENCE_ROUNDS = 2  # at least: it is there to be right
# places of a case's tensors, if memory bounds it: one lies better than another, by a tenth or more
PLACES = 3
# how often a GPU clears its caches before a step: a millisecond or two by which the host is ahead,
# as in training, so that its own work shows only where it takes longer than that
LEAD = 32


@dataclass(frozen=True)
class Floor:
    """How many times as fast as ``peer`` the ``provider`` has to be in a case, on a CPU.

    ``peer`` is another provider or what bounds the op; ``direction`` is as in ``Case.params``.
    """

    shape: str
    dtype: str
    direction: str
    peer: str
    ratio: float
    provider: str = "native"


@dataclass(frozen=True)
class Bench:
    """What a bench file says of its op.

    ``shapes`` maps a name to keyword arguments of ``make_inputs(dtype, device, **shape)``,
    which gives those of the op; ``large`` are more of them, for GPUs alone, and ``tiny`` is one
    to try the file out. ``bytes_moved`` and ``flops`` count the least work of the forward pass,
    or with ``backward=True`` of both passes. ``bound`` names what limits the op, ``"copy"`` or
    ``"matmul"``. ``peers`` are other ways to compute it, beside ``_providers`` or in their
    place: functions that take the inputs and prepare a function of the op's keyword arguments.
    Where ``op`` is not of the catalogue they are all there are, and the first is what the
    others have to compute. ``backward`` says whether there is a backward pass, ``dtypes`` which
    dtypes there are if those of the command line do not apply, and ``floors`` how fast it has
    to be. ``threads`` is how many work on what a data loader does, on CPUs alone.
    ``max_relative_rms`` is how far providers may differ, if not as rounding does.
    """

    op: str
    shapes: dict[str, Inputs]
    tiny: Inputs
    make_inputs: Callable[..., Inputs]
    bytes_moved: Callable[[Inputs, bool], int]
    flops: Callable[[Inputs, bool], int]
    bound: str
    peers: dict[str, MakeProvider]
    large: dict[str, Inputs] = field(default_factory=dict)
    backward: bool = True
    dtypes: tuple[str, ...] = ()
    floors: tuple[Floor, ...] = ()
    threads: int | None = None
    max_relative_rms: float | None = None


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


def photo(height: int, width: int, device: str) -> Tensor:
    """Noise, but as smooth as photos are: bytes ``[3, H, W]``, a view of ``[H, W, 3]``.

    Pillow and NumPy hold photos channels last.
    """
    y = torch.arange(height, device=device)[:, None, None]
    x = torch.arange(width, device=device)[:, None]
    wave = 127 + 90 * torch.sin(y / 31) * torch.cos(x / 47 + torch.arange(3, device=device))
    noise = torch.randint(-30, 31, (height, width, 3), device=device)
    return (wave + noise).to(torch.uint8).permute(2, 0, 1)


def run_case(case: Case, quick: bool, without: Sequence[str] = ()) -> dict[str, list[dict]]:
    """Time the providers of a case, those ``without`` left out, and what bounds it.

    Returns:
        ``benchmarks``: results in pytest-benchmark's layout; ``skipped``: the providers that were
        not timed, with reasons; ``floors``: those of the case, with what was measured.

    Raises:
        WrongError: The op fails its accuracy check here, or a peer differs from the reference.
    """
    bench = case.bench
    shape = bench.tiny if quick else (bench.shapes | bench.large)[case.shape]
    clock = _clock(case.device)
    rounds: tuple[int, int] = (1, 1) if quick else ROUNDS
    places = PLACES if case.device == "cpu" and bench.bound == "copy" and not quick else 1
    stats: dict[str, Stats] = {}
    held = []  # of earlier places, so that the next one is another
    with threads(bench.threads):
        for _ in range(places):
            torch.manual_seed(0)
            inputs = bench.make_inputs(case.dtype, case.device, **shape)
            steps, skipped = _steps(case, inputs, _providers(case, quick, without))
            clocks: dict[str, Callable[[], float]] = {
                name: functools.partial(clock, step) for name, step in steps.items()
            }
            work = bench.bytes_moved(inputs, case.backward), bench.flops(inputs, case.backward)
            clocks[bench.bound] = _limit(case, *work, clock)
            with torch.set_grad_enabled(case.backward):
                _interleave(clocks, stats, places, *rounds)
            held.append(clocks)
        found = {name: s.as_dict() for name, s in stats.items()}
        limit_s = found[bench.bound]["median"]
        results = [_result(case, name, s, work, limit_s) for name, s in found.items()]
        if case.device == "cuda":
            for result in results[:-1]:
                with torch.set_grad_enabled(case.backward):
                    result["extra_info"]["host_s"] = _host_seconds(steps[result["name"]])
    return {"benchmarks": results, "skipped": skipped, "floors": _floors(case, results)}


@contextmanager
def threads(num_threads: int | None) -> Iterator[None]:
    """Run the body on so many threads of the CPU, if any are named."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _steps(
    case: Case, inputs: Inputs, providers: dict[str, MakeProvider]
) -> tuple[dict[str, Step], list[dict]]:
    """What is timed of each provider, and those that cannot run, with reasons."""
    cotangents: list[Tensor] = []
    if case.backward:
        with torch.no_grad():
            outputs = tensors(SPECS[case.bench.op].reference(**inputs))
        cotangents = [torch.randn_like(x) for x in outputs if x.is_floating_point()]
    steps: dict[str, Step] = {}
    skipped = []
    want = None
    for name, make in providers.items():
        try:
            step = _step(make(inputs), case, inputs, cotangents)
            with torch.set_grad_enabled(case.backward):
                got = tensors(step())
        except WrongError:
            raise
        except Exception as error:
            reason = re.split(r"\n|(?<=\.) ", str(error).strip())[0]  # its first sentence
            kind = "" if isinstance(error, UnavailableError) else f"{type(error).__name__}: "
            skipped.append({**case.params, "provider": name, "reason": kind + reason})
            continue
        want = want or got  # what is right comes first
        _same(name, case, got, want)
        steps[name] = step
    return steps, skipped


def _providers(case: Case, quick: bool, without: Sequence[str]) -> dict[str, MakeProvider]:
    bench = case.bench
    providers = dict(bench.peers)
    if bench.op in SPECS:
        reference = SPECS[bench.op].reference

        def compiled(inputs: Inputs) -> Provider:
            if case.device == "cpu":
                raise UnavailableError("compiling for a CPU takes longer than all that is timed")
            torch._dynamo.reset()
            return torch.compile(reference, dynamic=False)

        providers = {
            "reference": lambda inputs: reference,
            "reference, compiled": compiled,
            "triton": functools.partial(_ours, case, "triton"),
            "cuda": functools.partial(_ours, case, "cuda"),
            "native": functools.partial(_ours, case, "native"),
            **providers,
        }
    slow = [name for name in providers if quick and name.endswith(", compiled")]
    providers |= dict.fromkeys(slow, _unavailable("compiling takes longer than --quick may"))
    left_out = [name for name in providers if name in without]
    return providers | dict.fromkeys(left_out, _unavailable("it was left out with --without"))


def _unavailable(reason: str) -> MakeProvider:
    def make(inputs: Inputs) -> Provider:
        raise UnavailableError(reason)

    return make


def _ours(case: Case, impl: str, inputs: Inputs) -> Provider:
    op = case.bench.op
    if impl == "triton" and case.device == "cpu":
        raise UnavailableError("on a CPU it runs in Triton's interpreter, which is never timed")
    if (impl == "native") != (case.device == "cpu"):
        raise UnavailableError(f"it does not run on {case.device} tensors")
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
        return functools.partial(provider, **inputs)

    arguments = leaves(inputs, SPECS[case.bench.op].grads)
    flat = [x for x in tensors(list(arguments.values())) if x.requires_grad]

    def step() -> Sequence[Tensor]:
        outputs = tensors(provider(**{**inputs, **arguments}))
        return [*outputs, *torch.autograd.grad(outputs, flat, cotangents)]

    return step


def _same(name: str, case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Whoever computes something else is no provider of this op."""
    most = case.bench.max_relative_rms
    if most is None:
        most = 2 * MAX_RELATIVE_RMS.get(case.dtype, 0)  # both may err
    for x, y in zip(got, want, strict=True):
        error = torch.linalg.vector_norm(x.float() - y.float())
        if not error <= most * torch.linalg.vector_norm(y.float()):
            raise WrongError(f"{name} does not compute {case.bench.op}: {case.params}")


def _limit(
    case: Case, num_bytes: int, flops: int, clock: Callable[[Step], float]
) -> Callable[[], float]:
    """Seconds of a copy or a matrix product of as much work."""
    if case.bench.bound == "copy":
        source = torch.ones(num_bytes // 8, device=case.device)
        target = torch.ones_like(source)
        return lambda: clock(lambda: target.copy_(source))
    least = 1024 if case.device == "cpu" else 8192  # smaller products do not reach the peak
    n = max(least, math.ceil((flops / 2) ** (1 / 3) / 64) * 64)
    a, b = torch.randn(2, n, n, device=case.device).to(case.dtype)
    return lambda: clock(lambda: torch.mm(a, b)) * flops / (2 * n**3)


def _interleave(
    clocks: dict[str, Callable[[], float]],
    stats: dict[str, Stats],
    places: int,
    least: int,
    most: int,
) -> None:
    """Add to ``stats`` the seconds that every provider takes, its share of one of ``places``."""
    turns: dict[str, int] = {}
    for name, seconds in clocks.items():
        few = min(least, REFERENCE_ROUNDS) if name == "reference" else least
        turns[name] = math.ceil(max(few, min(most, int(SECONDS / seconds()))) / places)
        stats.setdefault(name, Stats())
    rounds = max(turns.values())
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name, seconds in clocks.items():
                if i * turns[name] // rounds < (i + 1) * turns[name] // rounds:
                    stats[name].update(seconds())
    finally:
        gc.enable()


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
        for _ in range(LEAD):
            flushed.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return cuda


def _host_seconds(step: Step) -> float:
    """How long the host takes to launch a step on a GPU that waits for it."""

    def seconds() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return statistics.median(seconds() for _ in range(9))


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
            "threads": torch.get_num_threads(),
            "bytes": num_bytes,
            "flops": flops,
            "gb_per_s": num_bytes / median / 1e9,
            "gflop_per_s": flops / median / 1e9,
            "limit": case.bench.bound,
            "of_limit": limit_s / median,
        },
    }


def _floors(case: Case, results: Sequence[dict]) -> list[dict]:
    """The floors of a case: ``met`` is ``None`` where the peer was not timed."""
    medians = {result["name"]: result["stats"]["median"] for result in results}
    params = case.params
    rows = []
    for floor in case.bench.floors if case.device == "cpu" else ():
        if (floor.shape, floor.dtype, floor.direction) != tuple(params.values())[1:]:
            continue
        ours, theirs = medians.get(floor.provider), medians.get(floor.peer)
        measured = theirs / ours if ours and theirs else None
        met = None if theirs is None else measured is not None and measured >= floor.ratio
        rows.append(
            {
                **params,
                "provider": floor.provider,
                "peer": floor.peer,
                "ratio": floor.ratio,
                "measured": measured,
                "met": met,
                "limit": case.bench.bound,
                "of_limit": medians[case.bench.bound] / ours if ours else None,
            }
        )
    return rows


@functools.cache
def machine(device: str) -> dict[str, Any]:
    """What a number was measured on: versions, device, threads and the allocator's settings.

    ``PATCHPACK_COMMIT`` names the commit where git cannot: in a copy without it, and after the
    first op of a run, whose results have changed the tree.
    """
    commit = get_commit_info()
    tuned = ("MALLOC_", "PYTORCH_", "THP_MEM_ALLOC", "LD_PRELOAD")
    return {
        "commit": os.environ.get("PATCHPACK_COMMIT")
        or commit["id"] + ("-dirty" if commit["dirty"] else ""),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in LIBRARIES if find_spec(name)},
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "allocator": {k: v for k, v in sorted(os.environ.items()) if k.startswith(tuned)},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()
