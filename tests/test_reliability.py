"""Threads, worker processes, copies and a lack of memory: nothing is torn, stale or lost."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import patchpack
from patchpack import PackedGrid, TokenLayout, _interpreter
from patchpack.layout import FeatureMap, Vector
from patchpack.models import NativeViT, NativeViTConfig
from patchpack.packing import balance, pack
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, differentiate, tensors
from patchpack.video import VideoInfo

TESTS = Path(__file__).parent


@pytest.fixture
def workers(monkeypatch):
    """The module that workers import, from a path that they inherit."""
    monkeypatch.syspath_prepend(TESTS)
    return importlib.import_module("in_workers")


def smallest(op: str, impl: str) -> Subject:
    """The case of an op with the fewest numbers."""
    subjects = [Subject(op, case, impl=impl) for case in SPECS[op].cases]
    return min(subjects, key=lambda s: sum(x.numel() for x in tensors([*s.inputs().values()])))


def same(got, want):
    """Equal, tensors to the bit, wherever they are."""
    if isinstance(want, torch.Tensor):
        return torch.equal(got, want)
    if isinstance(want, (PackedGrid, TokenLayout)):
        return type(got) is type(want) and same(held(got), held(want))
    if isinstance(want, torch.nn.Module):
        return same(dict(got.state_dict()), dict(want.state_dict())) and got.config == want.config
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(map(same, got, want))
    return type(got) is type(want) and got == want


def held(x) -> dict:
    """What an object holds, but for what it was made of, which is compared by itself."""
    return {name: y for name, y in vars(x).items() if name != "_origin"}


def tensors_of(x) -> list[torch.Tensor]:
    if isinstance(x, torch.nn.Module):
        return list(x.parameters())
    found = vars(x).values() if isinstance(x, (PackedGrid, TokenLayout)) else ()
    return [z for y in found for z in tensors(y)]


# Threads -----------------------------------------------------------------------------------------


def in_threads(call, count=8, times=3):
    """Results of ``call`` from threads that begin together."""
    barrier = threading.Barrier(count)

    def work(_):
        barrier.wait()
        return [call() for _ in range(times)]

    with ThreadPoolExecutor(count) as pool:
        return [result for results in pool.map(work, range(count)) for result in results]


@pytest.mark.cpp
@pytest.mark.parametrize("op", SPECS)
def test_eight_threads_have_the_bits_of_one(op):
    subject = smallest(op, "native")
    inputs = subject.inputs()
    want = differentiate(subject, inputs, subject.spec.grads)
    results = in_threads(lambda: differentiate(subject, inputs, subject.spec.grads))
    assert len(results) == 24
    assert all(same(result, want) for result in results)


@pytest.mark.cpp
@pytest.mark.parametrize("op", ["rope_2d_", "mrope_"])
def test_threads_write_their_own_buffers(op):
    subject = smallest(op.removesuffix("_"), "native")
    inputs = subject.inputs()
    q, k = inputs.pop("q"), inputs.pop("k")
    want = [x.clone() for x in subject.spec.op(q, k, **inputs, impl="native")]
    num_heads = q.shape[1], k.shape[1]

    def call():
        qkv = torch.cat([q, k, k], dim=1)
        getattr(patchpack, op)(qkv, num_heads=num_heads, **inputs, impl="native")
        return list(qkv.split([*num_heads, k.shape[1]], dim=1)[:2])

    assert all(same(result, want) for result in in_threads(call))


def test_threads_use_different_options_of_one_op():
    """Tables of frequencies are remembered by what they are of."""
    grid = PackedGrid([(6, 6)])
    q = torch.randn(36, 2, 32)
    bases = [10.0 * (i + 1) for i in range(8)]
    want = [patchpack.rope_2d(q, q, grid, base=base) for base in bases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            got = list(pool.map(lambda base: patchpack.rope_2d(q, q, grid, base=base), bases))
            assert same(got, want)


def test_threads_share_a_grid_that_nobody_has_asked_for_positions():
    sizes = [(1 + i % 3, 2 * (1 + i % 7), 2 * (1 + i % 5)) for i in range(200)]
    want = PackedGrid(sizes, 2).position_ids
    for _ in range(5):
        grid = PackedGrid(sizes, 2)
        found = in_threads(lambda grid=grid: grid.position_ids, times=2)
        assert all(torch.equal(x, want) for x in found)
        grid.validate()


def test_threads_build_grids_and_layouts():
    sizes = [(4, 6), (2, 2), (8, 4)]
    parts = [FeatureMap(0, (4, 4), newline=0), Vector(1)]

    def call():
        grid = PackedGrid(sizes, 2)
        return [grid, grid.resized((2, 4)), grid.merged(), TokenLayout(parts)]

    want = call()
    assert all(same(got, want) for got in in_threads(call))


# Workers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_make_the_batches_of_this_process(context, workers):
    pytest.importorskip("PIL")
    names = list(workers.SYSTEMS)
    want = [workers.batch_of(names[:5]), workers.batch_of(names[5:])]
    pinned = torch.accelerator.is_available()
    loader = DataLoader(
        names,
        batch_size=5,
        collate_fn=workers.batch_of,
        num_workers=2,
        multiprocessing_context=context,
        pin_memory=pinned,
    )
    got = list(loader)
    assert same(got, want)
    for batch in got:
        for parts in batch.values():
            assert parts["pixels"].is_pinned() == pinned
            # what came through a pipe serves ops, and says what it is of
            parts["grid"].validate()
            assert same(parts["grid"].resized(parts["half"]), parts["half"])
            workers.used(parts["grid"])


# Copies ------------------------------------------------------------------------------------------


def with_positions(grid: PackedGrid) -> PackedGrid:
    assert grid.position_ids is not None
    return grid


def objects() -> dict:
    systems = importlib.import_module("in_workers")
    grid = PackedGrid([(2, 4, 6), (1, 2, 2)], 2, merge_temporal=True)
    small = NativeViTConfig(
        patch_size=2, temporal_patch_size=1, hidden_size=16, depth=1, num_heads=2, out_size=8
    )
    plans = [systems.system("qwen2_vl").plan(80, 60 + 40 * i) for i in range(4)]
    return {
        "grid": grid,
        "grid of nothing": PackedGrid([]),
        "grid with positions": with_positions(PackedGrid([(4, 6)], 2)),
        "grid that was resized": with_positions(grid.resized((2, 2))),
        "grid that was merged": grid.merged(),
        "layout": TokenLayout([FeatureMap(0, (4, 4), newline=0), Vector(1)]),
        "map": FeatureMap(1, (2, 3), (1, 2), (0, 0, 1, 1), (4, 4), 0),
        "vector": Vector(3),
        "packing": pack(plans, 64),
        "shares": balance(plans, 2),
        "configuration": small,
        "encoder": NativeViT(small),
        "video": VideoInfo(8, 30.0, 4, 6, 8 / 30),
        **{f"{name} plan": systems.system(name).plan(90, 120) for name in systems.SYSTEMS},
        **{
            f"{name} plan of a video": systems.system(name).plan_video(16, 8.0, 90, 120)
            for name in systems.SYSTEMS
            if hasattr(systems.system(name), "plan_video")
        },
    }


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda x, protocol=protocol: pickle.loads(pickle.dumps(x, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("clone", COPIES)
def test_copies_are_equal_and_serve_ops(clone, workers):
    for name, x in objects().items():
        want = workers.used(x)
        twin = COPIES[clone](x)
        assert same(twin, x), name
        assert same(workers.used(twin), want), name
        if hasattr(x, "__hash__") and x.__hash__ and x == copy.copy(x):
            assert hash(twin) == hash(x), name


@pytest.mark.parametrize("clone", [name for name in COPIES if name != "copy"])
def test_copies_share_no_memory(clone, workers):
    for name, x in objects().items():
        twin = COPIES[clone](x)
        mine = {y.data_ptr() for y in tensors_of(x) if y.numel()}
        theirs = {y.data_ptr() for y in tensors_of(twin) if y.numel()}
        assert not mine & theirs, name
        assert len(mine) == len(theirs), name


@pytest.mark.parametrize("clone", [name for name in COPIES if name != "copy"])
def test_a_grid_and_what_it_was_resized_to_stay_together(clone):
    grid = PackedGrid([(2, 4, 6), (1, 2, 2)], 2)
    small = grid.resized([(2, 2), (4, 2)])
    twin, twins_small = COPIES[clone]((grid, small))
    assert twins_small._origin is twin._sizes  # not compared again
    alone = COPIES[clone](small)
    for target in (twins_small, alone):
        x = torch.randn(grid.num_tokens, 4)
        want, _ = patchpack.interpolate_tokens(x, grid, small)
        got, _ = patchpack.interpolate_tokens(x, twin, target)
        assert torch.equal(got, want)
    other = PackedGrid([(1, 4, 6), (1, 2, 2)], 2)
    with pytest.raises(ValueError, match="must be a grid of the frames of grid"):
        other.resized(alone)


def test_copies_cross_to_another_process_and_back(workers):
    sent = list(objects().values())
    want = workers.all_used(sent)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        got = pool.submit(workers.all_used, sent).result(timeout=120)
    assert same(got, want)


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits addresses")
def test_native_ops_live_on_when_memory_is_short():
    ops = [*SPECS, "rope_2d_", "mrope_"]
    # every larger block is the system's, so that no memory of an earlier call is used
    malloc = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}
    malloc |= {"MALLOC_TOP_PAD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "16777216"}
    command = [sys.executable, "-X", "faulthandler", TESTS / "out_of_memory.py", *ops]
    done = subprocess.run(command, env=os.environ | malloc, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout, done.stderr
    counts = json.loads(done.stdout)
    for name in (*ops, "PackedGrid"):
        assert min(counts[name].values()) >= 1, (name, counts[name])


class Starved(TorchDispatchMode):
    """Refuses the allocation that comes after ``left`` others; counts them."""

    ALLOCATES = ("empty", "zeros", "ones", "full", "clone", "cat", "stack", "mul", "mm", "sum")

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(part in func.__name__ for part in self.ALLOCATES):
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("out of memory: refused by a test")
        return func(*args, **(kwargs or {}))


@contextmanager
def starved(impl: str, left: int):
    """Allocations of eager code, or of the launchers of kernels, which no mode around them sees."""
    mode, interpreted = Starved(left), _interpreter.interpreted
    if impl == "reference":
        with mode:
            yield mode
        return

    @contextmanager
    def launching():
        with interpreted(), mode:
            yield

    with _interpreter.replaced(_interpreter, "interpreted", launching):
        yield mode


def is_free(lock) -> bool:
    """Whether another thread gets the lock."""

    def attempt():
        got = lock.acquire(timeout=5)
        if got:
            lock.release()
        return got

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(attempt).result()


def starve(impl: str, call, check, points: int = 6) -> None:
    """Refuse allocations of ``call`` in turn, a few of many; ``check`` what is left every time."""
    with starved(impl, 10**9) as mode:
        want = call()
    number = 10**9 - mode.left
    for left in range(0, number, max(1, number // points)):
        with starved(impl, left), pytest.raises(torch.OutOfMemoryError, match="refused by a test"):
            call()
        assert not _interpreter._active
        assert is_free(_interpreter._lock)
        check()
    assert number
    assert same(call(), want)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("op", SPECS)
def test_an_allocation_that_fails_leaves_all_usable(op, impl):
    subject = smallest(op, impl)
    inputs = subject.inputs()
    watched = {name: tensors(x) + tensors_of(x) for name, x in inputs.items()}
    kept = {name: [y.clone() for y in x] for name, x in watched.items()}
    starve(
        impl,
        lambda: differentiate(subject, inputs, subject.spec.grads),
        lambda: None if same(watched, kept) else pytest.fail("an input was written"),
        points=6 if impl == "reference" else 2,
    )


@pytest.mark.parametrize("op", ["rope_2d_", "mrope_"])
def test_in_place_either_all_is_written_or_nothing(op):
    """Eager code turns heads elsewhere and copies them at the end; kernels allocate nothing."""
    subject = smallest(op.removesuffix("_"), "reference")
    inputs = subject.inputs()
    q, k = inputs.pop("q"), inputs.pop("k")
    right = torch.cat([q, k, k], dim=1)
    qkv = right.clone()

    def call():
        qkv.copy_(right)
        num_heads = q.shape[1], k.shape[1]
        return getattr(patchpack, op)(qkv, num_heads=num_heads, **inputs, impl="reference")

    def check():
        assert torch.equal(qkv, right)

    starve("reference", call, check)


def test_a_grid_keeps_no_half_of_its_positions(monkeypatch):
    monkeypatch.setitem(patchpack._dispatch._NOT_INSTALLED, "native", "it is hidden")
    grid = PackedGrid([(4, 6), (2, 2)], 2)
    with Starved(2), pytest.raises(torch.OutOfMemoryError):
        grid.position_ids  # noqa: B018 it is made and kept
    assert grid._position_ids is None
    grid.validate()
