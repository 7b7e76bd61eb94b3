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
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pytest_benchmark.stats import Stats
from torch import Tensor

import patchpack
from _results import Bound, FloorFound, Machine, Params, Results, Skipped, Timing
from patchpack.testing.catalogue import SPECS, Inputs
from patchpack.testing.compare import MAX_RELATIVE_RMS
from patchpack.testing.contract import Subject, accuracies, leaves, tensors
from patchpack.testing.machine import answers, describe, nvidia_smi

# a provider that cannot run here raises while it is made or first called: that is the reason given
Provider = Callable[..., Any]
MakeProvider = Callable[[Inputs], Provider]
Step = Callable[[], Any]

# rows and columns, in patches, of sixteen images of mixed size and shape
PHOTOS = [
    *((32, 24), (24, 32), (18, 32), (36, 20), (28, 28), (16, 40), (22, 34), (40, 26)),
    *((14, 20), (30, 30), (12, 46), (26, 18), (20, 20), (34, 22), (24, 24), (44, 30)),
]

OURS = ("triton", "cuda", "native", "patchpack")

SECONDS = 0.6  # for the rounds of one provider
ROUNDS = (5, 100)  # at least and at most, whatever SECONDS says
REFERENCE_ROUNDS = 2  # at least: it is there to be right
# places of a case's tensors, if memory bounds it: one lies better than another, by a tenth or more
PLACES = 3
# bytes that a GPU clears before a step, larger than any cache, and how often: a millisecond or two
# by which the host is ahead, as in training, so that its own work shows only where it takes longer
CACHES = 2**29
LEAD = 16
# of a GPU, bytes that are copied and rows that are multiplied to know what it reaches at most
PEAK_BYTES, PEAK_ROWS = 2**29, 8192


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
    bound: Bound
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

    def of(self, provider: str) -> Params:
        """The case as computed by a provider."""
        return {**self.params, "provider": provider}  # pyright: ignore[reportReturnType]


class UnavailableError(Exception):
    """A provider cannot run a case, and why."""


class WrongError(Exception):
    """A provider computes something else than the op, so it is not timed."""


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


def run_case(case: Case, quick: bool, without: Sequence[str] = ()) -> Results:
    """Time the providers of a case, those ``without`` left out, and what bounds it.

    Returns:
        ``benchmarks``: results in pytest-benchmark's layout; ``skipped``: the providers that were
        not timed, with reasons; ``floors``: those of the case, with what was measured. Where the
        case does not fit into the memory of a GPU none is timed.
    """
    try:
        return _run_case(case, quick, without)
    except torch.OutOfMemoryError as error:
        reason = f"the case needs more memory: {_first_sentence(error)}"
    torch.cuda.empty_cache()
    return {"benchmarks": [], "skipped": [_skipped(case, "any", reason)], "floors": []}


def _run_case(case: Case, quick: bool, without: Sequence[str]) -> Results:
    bench = case.bench
    shape = bench.tiny if quick else (bench.shapes | bench.large)[case.shape]
    clock = _clock(case.device, quick)
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
            clocks[bench.bound] = _limit(case, *work, clock, quick)
            with torch.set_grad_enabled(case.backward):
                _interleave(clocks, stats, places, *rounds)
            held.append(clocks)
        found = {name: s.as_dict() for name, s in stats.items()}
        limit_s = found[bench.bound]["median"]
        results = [_result(case, name, s, work, limit_s) for name, s in found.items()]
        if case.device == "cuda":
            _add_what_a_gpu_has(case, results, steps, quick)
    return {"benchmarks": results, "skipped": skipped, "floors": _floors(case, results)}


def _add_what_a_gpu_has(
    case: Case, results: Sequence[Timing], steps: dict[str, Step], quick: bool
) -> None:
    """The clocks it has reached, the host's share, and what the GPU reaches at most."""
    clocks = nvidia_smi(sm_clock="clocks.sm", memory_clock="clocks.mem")
    copy, matmul = peaks(case.device, case.dtype, quick)
    for result in results:
        info = result["extra_info"]
        info["copy_gb_per_s"], info["matmul_gflop_per_s"] = copy, matmul
        info["of_copy"] = info["gb_per_s"] / copy
        info["of_matmul"] = info["gflop_per_s"] / matmul
        if step := steps.get(result["name"]):
            with torch.set_grad_enabled(case.backward):
                info["host_s"] = _host_seconds(step, 1 if quick else 9)
        info.update(clocks)  # pyright: ignore[reportArgumentType, reportCallIssue]


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
) -> tuple[dict[str, Step], list[Skipped]]:
    """What is timed of each provider, and those that cannot run, with reasons."""
    cotangents: list[Tensor] = []
    if case.backward:
        with torch.no_grad():
            outputs = tensors(SPECS[case.bench.op].reference(**inputs))
        cotangents = [torch.randn_like(x) for x in outputs if x.is_floating_point()]
    steps: dict[str, Step] = {}
    skipped = []
    kept = [x.clone() for x in tensors(list(inputs.values()))]
    want = None
    for name, make in providers.items():
        try:
            own = [x.clone() for x in cotangents]  # some write gradients over them
            step = _step(make(inputs), case, inputs, own)
            with torch.set_grad_enabled(case.backward):
                got = tensors(step())
            _unchanged(inputs, kept)
            want = want or got  # what is right comes first
            _same(case, got, want)
        except (UnavailableError, torch.OutOfMemoryError) as error:
            skipped.append(_skipped(case, name, _first_sentence(error)))
        except ModuleNotFoundError as error:
            skipped.append(_skipped(case, name, f"{error.name} is not installed"))
        except WrongError as error:
            skipped.append({**_skipped(case, name, str(error)), "failed": True})
        except Exception as error:  # a library may raise anything: the others go on
            if not answers(case.device):
                raise RuntimeError(f"{name} has stopped the GPU: {case.params}") from error
            reason = f"{type(error).__name__}: {_first_sentence(error)}"
            skipped.append({**_skipped(case, name, reason), "failed": True})
        else:
            steps[name] = step
    return steps, skipped


def _skipped(case: Case, provider: str, reason: str) -> Skipped:
    return {**case.of(provider), "reason": reason}


def _first_sentence(error: Exception) -> str:
    return re.split(r"\n|(?<=\.) ", str(error).strip())[0]


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
    failed = [str(accuracy) for accuracy in accuracies(subject) if not accuracy.passed]
    if failed:
        raise WrongError(f"it is not as accurate as eager in {subject.case!r}: {failed[0]}")


def _step(provider: Provider, case: Case, inputs: Inputs, cotangents: Sequence[Tensor]) -> Step:
    if not case.backward:
        return functools.partial(provider, **inputs)

    arguments = leaves(inputs, SPECS[case.bench.op].grads)
    flat = [x for x in tensors(list(arguments.values())) if x.requires_grad]

    def step() -> Sequence[Tensor]:
        outputs = tensors(provider(**{**inputs, **arguments}))
        return [*outputs, *torch.autograd.grad(outputs, flat, cotangents)]

    return step


def _unchanged(inputs: Inputs, kept: Sequence[Tensor]) -> None:
    """Whoever writes into its inputs spoils those of the others: they are put back."""
    changed = False
    for x, before in zip(tensors(list(inputs.values())), kept, strict=True):
        if not torch.equal(x, before):
            x.copy_(before)
            changed = True
    if changed:
        raise WrongError("it changes its inputs")


def _same(case: Case, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Whoever computes something else is no provider of this op."""
    most = case.bench.max_relative_rms
    if most is None:
        most = 2 * MAX_RELATIVE_RMS.get(case.dtype, 0)  # both may err
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        error = torch.linalg.vector_norm(x.float() - y.float())
        norm = torch.linalg.vector_norm(y.float())
        if not error <= most * norm:
            found = f"result {i} errs by {(error / norm).item():.1e}, at most {most:.1e}"
            raise WrongError(f"it does not compute {case.bench.op}: {found}")


def _limit(
    case: Case, num_bytes: int, flops: int, clock: Callable[[Step], float], quick: bool
) -> Callable[[], float]:
    """Seconds of a copy or a matrix product of as much work."""
    if case.bench.bound == "copy":
        step = _copy(num_bytes // 2, case.device)
        return lambda: clock(step)
    least = 1024 if case.device == "cpu" or quick else PEAK_ROWS  # less does not reach the peak
    n = max(least, math.ceil((flops / 2) ** (1 / 3) / 64) * 64)
    step = _matmul(n, case.device, case.dtype)
    return lambda: clock(step) * flops / (2 * n**3)


def _copy(num_bytes: int, device: str) -> Step:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _matmul(rows: int, device: str, dtype: torch.dtype) -> Step:
    a, b = torch.randn(2, rows, rows, device=device).to(dtype)
    return lambda: torch.mm(a, b)


@functools.cache
def peaks(device: str, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """GB a second of a large copy, read and written, and GFLOP a second of a large product."""
    num_bytes, rows = (2**20, 64) if quick else (PEAK_BYTES, PEAK_ROWS)
    clock = _clock(device, quick)

    def median(step: Step) -> float:
        return statistics.median(clock(step) for _ in range(1 if quick else 20))

    return (
        2 * num_bytes / median(_copy(num_bytes, device)) / 1e9,
        2 * rows**3 / median(_matmul(rows, device, dtype)) / 1e9,
    )


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


def _clock(device: str, quick: bool) -> Callable[[Step], float]:
    """A function that gives the seconds of one step."""
    if device == "cpu":

        def cpu(step: Step) -> float:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin

        return cpu

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed = torch.empty(1 if quick else CACHES, dtype=torch.uint8, device=device)

    def cuda(step: Step) -> float:
        for _ in range(LEAD):
            flushed.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return cuda


def _host_seconds(step: Step, rounds: int) -> float:
    """How long the host takes to launch a step on a GPU that waits for it."""

    def seconds() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return statistics.median(seconds() for _ in range(rounds))


def _result(
    case: Case, provider: str, stats: dict[str, Any], work: tuple[int, int], limit_s: float
) -> Timing:
    num_bytes, flops = work
    median = stats["median"]
    group = ", ".join(case.params.values())
    return {
        "group": group,
        "name": provider,
        "fullname": f"{group}, {provider}",
        "param": provider,
        "params": case.of(provider),
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


def _floors(case: Case, results: Sequence[Timing]) -> list[FloorFound]:
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
                **case.of(floor.provider),
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
def machine(device: str) -> Machine:
    """What a number was measured on: see ``describe``; threads and the allocator's settings.

    ``PATCHPACK_COMMIT`` names the commit where git cannot: in a copy without it, and after the
    first op of a run, whose results have changed the tree.
    """
    tuned = ("MALLOC_", "PYTORCH_", "THP_MEM_ALLOC", "LD_PRELOAD")
    return {
        **describe(device),
        "threads": torch.get_num_threads(),
        "allocator": {k: v for k, v in sorted(os.environ.items()) if k.startswith(tuned)},
    }  # pyright: ignore[reportReturnType]
