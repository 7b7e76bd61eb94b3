"""Every load and store of the kernels an op launches, followed in the interpreter.

    with traffic.session() as launches:
        patchpack.rope_2d(q, k, grid, impl="triton")  # CPU tensors; the results are right
    print(traffic.report(launches))

A pointer carries the number of its argument in the bits that addresses leave free. So a lane is
held against the elements of that argument alone, and finds no other tensor by mistake. Programs of
a launch have no order here, as on a GPU, though the interpreter runs them one after another. What
is counted are bytes; how many of them a cache serves is not to be had from it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from patchpack import _interpreter
from patchpack._interpreter import execute, replaced
from patchpack.layout import TokenLayout
from patchpack.packing import PackedGrid
from patchpack.testing._table import table
from patchpack.testing.contract import backward, leaves, tensors

SECTOR = 32  # bytes that a GPU moves at least


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one launch did to one of its arguments, or to all of them.

    A program races with another of the launch if one of them writes what the other reads or writes,
    unless both do so atomically, and with itself if two lanes store different values to one place.
    """

    requested: int  # bytes of all lanes of loads and stores that are not masked; atomics are both
    read: int  # distinct bytes
    written: int  # distinct bytes
    out_of_bounds: int  # lanes outside of the elements, or across them; they are left out
    uninitialised: int  # distinct bytes read before anything wrote them
    races: int  # distinct bytes of lanes that race
    unwritten: int  # bytes first passed to this launch that nothing has written: see ``session``

    @property
    def unique(self) -> int:
        """Bytes that a launch moves with a cache that holds everything."""
        return self.read + self.written


@dataclass(frozen=True, kw_only=True)
class Launch(Traffic):
    """One kernel launch; of memory that arguments share, distinct bytes are counted once."""

    kernel: str
    grid: tuple[int, int, int]
    idle: int  # programs that stored nothing
    sectors: int  # bytes of the distinct sectors of each load and store
    arguments: dict[str, Traffic]

    @property
    def programs(self) -> int:
        x, y, z = self.grid
        return x * y * z


@dataclass(frozen=True)
class Totals:
    """What the launches of one pass move, against what any would have to."""

    launches: tuple[Launch, ...]
    compulsory: int  # bytes

    @property
    def unique_ratio(self) -> float:
        """Distinct bytes of each launch over compulsory ones."""
        return sum(launch.unique for launch in self.launches) / self.compulsory

    @property
    def requested_ratio(self) -> float:
        """Bytes of all lanes over compulsory ones."""
        return sum(launch.requested for launch in self.launches) / self.compulsory


@contextlib.contextmanager
def session(*addressed: Tensor) -> Iterator[list[Launch]]:
    """Follow what is launched on CPU tensors within this context.

    What ``torch.empty`` and its like return here is uninitialised until a kernel or an operator of
    PyTorch writes it; all else has been written. It stays alive until the end.

    Args:
        addressed: Tensors that kernels reach by addresses in memory, not as arguments. What is
            allocated within the context may then be reached in this way too.

    Yields:
        The launches, in order; it grows. ``unwritten`` is as of now, and final after the context.
    """
    allocations = _Allocations()
    launches: list[Launch] = []
    outputs: list[dict[str, _Output]] = []
    interpreted = _interpreter.interpreted

    def run(kernel, grid, args, kwargs):
        named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        values = inspect.getcallargs(kernel.fn, *args, **named)
        with replaced(allocations, "paused", True):
            trace = _Trace(values, addressed, allocations)
            with trace.followed():
                execute(kernel, grid, args, kwargs)
            outputs.append(allocations.first_passed(trace.arguments))
            launches.append(_complete(trace.launch(kernel.__name__), outputs[-1]))

    @contextlib.contextmanager
    def launching(run=None):  # an operator's code runs without the mode around it
        with interpreted(run), allocations:
            yield

    with (
        interpreted(run=run),
        replaced(_interpreter, "interpreted", launching),
        allocations,
    ):
        yield launches
    launches[:] = map(_complete, launches, outputs)


def report(launches: Sequence[Launch]) -> str:
    """A plain table of ``launches``, a line each."""
    header = "kernel grid idle requested sectors read written out-of-bounds uninit races unwritten"
    rows = [header.split(), *map(_row, launches)]
    return table(rows) + "\nidle: programs; out-of-bounds: lanes; the rest: bytes\n"


def compulsory(*values: Any) -> int:
    """Distinct bytes of the elements of tensors: what has to be read, or written, at least.

    Args:
        values: Tensors, grids, layouts, and lists, tuples and dictionaries of them. What else there
            is counts nothing. Views of one buffer, and what is expanded, count once.
    """
    elements: dict[int, np.ndarray] = {}
    for x in _tensors_of(values):
        mask = elements.setdefault(_address(x), np.zeros(_num_bytes(x), bool))
        mask |= _elements(x)
    return sum(int(np.count_nonzero(mask)) for mask in elements.values())


def measure(
    op: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    grads: Sequence[str] = (),
    needs: Sequence[str] = (),
    reads: Any = None,
) -> tuple[Totals, Totals]:
    """Forward and backward pass of an op against the bytes that its definition asks for.

    Nothing that the op saves, recomputes or allocates in between is compulsory.

    Args:
        op: A public op, called as ``op(**inputs, impl="triton")``.
        inputs: Its arguments, on the CPU.
        grads: Those that it is differentiable in.
        needs: Those that its gradients depend on, besides the cotangents.
        reads: What the forward pass has to read, if not all of ``inputs``.

    Returns:
        Forward: ``reads`` and the outputs are compulsory. Backward: the cotangents, ``needs`` and
        the gradients are.
    """
    inputs = {**inputs, **leaves(inputs, grads)}
    listed = (x for x in inputs.values() if isinstance(x, list))
    with session(*_tensors_of(listed)) as launches:
        outputs = tensors(op(**inputs, impl="triton"))
        count = len(launches)
        cotangents = [torch.ones_like(x) for x in outputs]
        backward(outputs, cotangents)
    forward = compulsory(inputs if reads is None else reads) + compulsory(outputs)
    given = [y for x, y in zip(outputs, cotangents, strict=True) if x.requires_grad]
    gradients = [x.grad for x in _tensors_of(inputs) if x.grad is not None]
    needed = [inputs[name] for name in needs]
    return (
        Totals(tuple(launches[:count]), forward),
        Totals(tuple(launches[count:]), compulsory(given, needed) + compulsory(gradients)),
    )


def _row(launch: Launch) -> list[str]:
    counts = (
        *(launch.idle, launch.requested, launch.sectors, launch.read, launch.written),
        *(launch.out_of_bounds, launch.uninitialised, launch.races, launch.unwritten),
    )
    return [launch.kernel, "x".join(map(str, launch.grid)), *map(str, counts)]


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedGrid):
        yield value.geometry
    elif isinstance(value, TokenLayout):
        yield value.table
    elif isinstance(value, dict):
        yield from _tensors_of(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for x in value:
            yield from _tensors_of(x)


# ----------------------------------------------------------------------------------------- memory


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _num_bytes(x: Tensor) -> int:
    return x.untyped_storage().nbytes()


def _elements(x: Tensor) -> np.ndarray:
    """Which bytes of its storage belong to a tensor."""
    size = x.element_size()
    mask = np.zeros(_num_bytes(x), bool)
    np.lib.stride_tricks.as_strided(
        mask[x.storage_offset() * size :],
        (*x.shape, size),
        (*(stride * size for stride in x.stride()), 1),
    )[...] = True
    return mask


_Output = tuple[np.ndarray, np.ndarray]  # undefined bytes of a storage, and an argument's elements


def _complete(launch: Launch, outputs: dict[str, _Output]) -> Launch:
    """``launch`` with what is unwritten by now."""
    arguments = dict(launch.arguments)
    for name, (undefined, elements) in outputs.items():
        unwritten = int(np.count_nonzero(undefined & elements))
        arguments[name] = replace(arguments[name], unwritten=unwritten)
    unwritten = sum(argument.unwritten for argument in arguments.values())
    return replace(launch, arguments=arguments, unwritten=unwritten)


class _Allocations(TorchDispatchMode):
    """Knows which bytes of what is allocated under it hold no value yet."""

    EMPTY = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.tensors: list[Tensor] = []  # alive, so that no address is used twice
        self.undefined: dict[int, np.ndarray] = {}
        self.passed: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise compiled functions run uncompiled under it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.paused:
            return result
        if func.overloadpacket in self.EMPTY:
            self.tensors.append(result)
            self.undefined[_address(result)] = np.ones(_num_bytes(result), bool)
        names = (argument.name for argument in func._schema.arguments)
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(values.get(argument.name)):
                    if _address(x) in self.undefined:
                        self.undefined[_address(x)] &= ~_elements(x)
        return result

    def first_passed(self, arguments: dict[str, Tensor]) -> dict[str, _Output]:
        """Those arguments that were allocated here and that no launch had before."""
        fresh = self.undefined.keys() - self.passed
        self.passed |= {_address(x) for x in arguments.values()}
        return {
            name: (self.undefined[_address(x)], _elements(x))
            for name, x in arguments.items()
            if _address(x) in fresh
        }


# ----------------------------------------------------------------------------------------- a launch

# what is known of a byte of memory
_UNDEFINED = 1  # nothing has written it
_READ_UNDEFINED = _UNDEFINED << 1
_READ = 4  # by a program that has ended; so are the next two
_WRITTEN = 8
_ATOMIC = 16
_RACE = 32

_RACES_WITH = {
    _READ: _WRITTEN | _ATOMIC,
    _WRITTEN: _READ | _WRITTEN | _ATOMIC,
    _ATOMIC: _READ | _WRITTEN,
}

_TAG_SHIFT = 48  # addresses of user space are below
_ADDRESS = (1 << _TAG_SHIFT) - 1
_ALIGNMENT = 64


@functools.cache
def _in_each_byte(bits: int, size: int) -> Any:
    return np.full(size, bits, np.uint8).view(f"u{size}")[0]


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a kernel's argument, by name."""
    if isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors_in(name, value.base)
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, x in enumerate(value):
            yield from _tensors_in(f"{name}[{i}]", x)


def _same_elements(x: Any) -> tuple:
    """Equal for arguments that are one to a kernel."""
    return x.data_ptr(), x.element_size(), tuple(x.shape), x.stride()


class _Regions:
    """Arrays of bytes end to end, each as aligned as the memory that it describes."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.end = 0

    def append(self, part: np.ndarray, address: int) -> slice:
        before, after = address % _ALIGNMENT, -(address + part.size) % _ALIGNMENT
        self.parts.append(np.pad(part.astype(np.uint8), (before, after)))
        begin, self.end = self.end + before, self.end + before + part.size + after
        return slice(begin, begin + part.size)

    def join(self) -> np.ndarray:
        self.parts.append(np.zeros(_ALIGNMENT, np.uint8))  # what belongs to no region
        return np.concatenate(self.parts)


class _Trace:
    """The memory that one launch may touch, and what it did there.

    ``memory`` describes each byte of the storages once, ``elements`` says for each argument which
    bytes of its storage are its own. Tag 0 is that of addresses that no argument gave.
    """

    def __init__(
        self, values: dict[str, Any], addressed: Sequence[Tensor], allocations: _Allocations
    ) -> None:
        self.allocations = allocations
        self.arguments: dict[str, Tensor] = {}
        self.tags: dict[tuple, int] = {}
        named = [pair for name, x in values.items() for pair in _tensors_in(name, x)]
        for key in dict.fromkeys(_same_elements(x) for _, x in named):
            same = [(name, x) for name, x in named if _same_elements(x) == key]
            self.tags[key] = len(self.tags) + 1
            self.arguments["+".join(name for name, _ in same)] = same[0][1]

        reachable = [*addressed, *(allocations.tensors if addressed else ())]
        by_storage: dict[int, list[Tensor]] = {}
        for x in reachable:
            by_storage.setdefault(_address(x), []).append(x)
        groups = [[x] for x in self.arguments.values()]
        groups += [by_storage[address] for address in sorted(by_storage)]
        self.raw_addresses = np.array(sorted(by_storage), np.uint64)
        self.raw_tags = np.array([0, *range(len(self.arguments) + 1, len(groups) + 1)], np.uint64)

        memory, elements = _Regions(), _Regions()
        self.storages: dict[int, slice] = {}
        self.in_memory, self.in_elements = [slice(0, 0)], [slice(0, 0)]
        for group in groups:
            address = _address(group[0])
            if address not in self.storages:
                undefined = allocations.undefined.get(address, np.zeros(_num_bytes(group[0]), bool))
                self.storages[address] = memory.append(undefined * _UNDEFINED, address)
            own = functools.reduce(np.logical_or, map(_elements, group))
            self.in_memory.append(self.storages[address])
            self.in_elements.append(elements.append(own, address))
        self.memory, self.elements = memory.join(), elements.join()
        # by tag, and then once more for tags that do not exist
        self.first = np.array([0, *(_address(group[0]) for group in groups), 0], np.uint64)
        self.size = np.array([0, *(_num_bytes(group[0]) for group in groups), 0], np.uint64)
        starts = [[part.start for part in parts] for parts in (self.in_memory, self.in_elements)]
        self.memory_start, self.elements_start = (np.array([*x, 0], np.int64) for x in starts)

        self.requested = np.zeros(len(self.first), np.int64)
        self.out_of_bounds = np.zeros(len(self.first), np.int64)
        self.sectors = 0
        self.busy = 0
        self.stores = False
        self.accesses: list[tuple[np.ndarray, np.ndarray, Any]] = []

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Within this context the interpreter's launch is this one."""
        builder, to_argument = interpreter.interpreter_builder, interpreter._implicit_cvt

        def tagged(value):
            argument = to_argument(value)
            if hasattr(value, "data_ptr"):
                argument.handle.data |= np.uint64(self.tags[_same_elements(value)] << _TAG_SHIFT)
            return argument

        with (
            replaced(interpreter, "_implicit_cvt", tagged),
            replaced(builder, "__class__", _follow(self, type(builder))),
        ):
            yield
        self.end_program()
        self.grid = builder.grid_dim

    def end_program(self) -> None:
        """What it did, others race with from now on."""
        for memory, cells, bits in self.accesses:
            memory[cells] |= bits
        self.busy += self.stores
        self.stores = False
        self.accesses = []

    def access(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, kind: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Note that lanes load or store; return their addresses, and which of them are inside."""
        lanes = pointers[mask]
        if not lanes.size:
            return pointers, mask
        tags, places, inside = self._locate(lanes, size)
        allowed = mask
        if not inside.all():
            tags, outside = np.broadcast_to(tags, lanes.shape), ~inside
            self.out_of_bounds += np.bincount(tags[outside], minlength=len(self.first))
            lanes, tags, places = lanes[inside], tags[inside], places[inside]
            allowed = mask.copy()
            allowed[mask] = inside
        ways = 2 if kind == _ATOMIC else 1
        lanes_a_tag = lanes.size // max(tags.size, 1)
        requested = np.bincount(tags, minlength=len(self.first)) * (lanes_a_tag * size * ways)
        self.requested += requested
        sectors = (lanes & _ADDRESS) // SECTOR
        # runs first: there are few of them to sort
        runs = np.append(sectors[1:][sectors[1:] != sectors[:-1]], sectors[:1])
        self.sectors += np.unique(runs).size * SECTOR * ways

        memory = self.memory.view(f"u{size}")
        cells = (self.memory_start[tags] + places) // size
        before = memory[cells]
        after = before.copy()
        if kind != _WRITTEN:
            after |= (before & _in_each_byte(_UNDEFINED, size)) << 1
        conflict = before & _in_each_byte(_RACES_WITH[kind], size)
        after[conflict != 0] |= _in_each_byte(_RACE, size)
        if kind != _READ:
            after &= ~_in_each_byte(_UNDEFINED, size)
            self.stores |= lanes.size > 0
        memory[cells] = after
        self.accesses.append((memory, cells, _in_each_byte(kind, size)))
        return pointers & _ADDRESS, allowed

    def race(self, pointers: np.ndarray, size: int) -> None:
        """Note that lanes, all of them inside, race."""
        tags, places, _ = self._locate(pointers, size)
        cells = (self.memory_start[tags] + places) // size
        self.memory.view(f"u{size}")[cells] |= _in_each_byte(_RACE, size)

    def _locate(self, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tags (one if all are alike), bytes from the first of the storage, and whether inside."""
        tags = lanes >> _TAG_SHIFT
        if (tags == tags[0]).all():
            tags = tags[:1]
        if not tags.all():
            storage = np.searchsorted(self.raw_addresses, lanes, side="right")
            tags = np.where(tags == 0, self.raw_tags[storage], tags)
        tags = np.minimum(tags, len(self.first) - 1).astype(np.int64)
        places = (lanes & _ADDRESS) - self.first[tags]  # far beyond the end if before the first
        near = (places < self.size[tags]) & (lanes % size == 0)
        places = np.where(near, places, 0).astype(np.int64)
        elements = self.elements.view(f"u{size}")[(self.elements_start[tags] + places) // size]
        return tags, places, near & (elements == _in_each_byte(1, size))

    def launch(self, kernel: str) -> Launch:
        for address, undefined in self.allocations.undefined.items():
            if address in self.storages:
                undefined[:] = self.memory[self.storages[address]] & _UNDEFINED
        names = [*self.arguments, *(f"addressed[{i}]" for i in range(len(self.raw_addresses)))]
        arguments = {}
        for tag, name in enumerate(names, 1):
            own = self.elements[self.in_elements[tag]].astype(bool)
            arguments[name] = Traffic(
                **_distinct_bytes(self.memory[self.in_memory[tag]][own]),
                requested=int(self.requested[tag]),
                out_of_bounds=int(self.out_of_bounds[tag]),
            )
        return Launch(
            **_distinct_bytes(self.memory),
            requested=int(self.requested.sum()),
            out_of_bounds=int(self.out_of_bounds.sum()),
            kernel=kernel,
            grid=self.grid,
            idle=int(np.prod(self.grid)) - self.busy,
            sectors=self.sectors,
            arguments=arguments,
        )


def _distinct_bytes(memory: np.ndarray) -> dict[str, int]:
    bits = {
        "read": _READ | _ATOMIC,
        "written": _WRITTEN | _ATOMIC,
        "uninitialised": _READ_UNDEFINED,
        "races": _RACE,
        "unwritten": 0,
    }
    return {name: int(np.count_nonzero(memory & bit)) for name, bit in bits.items()}


def _follow(trace: _Trace, base: Any) -> type:
    """The interpreter's operations, those on memory followed."""

    def access(pointers, mask, kind):
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        lanes = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        addresses, allowed = trace.access(pointers.data, lanes, size, kind)
        return TensorHandle(addresses, pointers.dtype), TensorHandle(allowed, tl.int1)

    class Builder(base):
        def set_grid_idx(self, x, y, z):
            trace.end_program()
            super().set_grid_idx(x, y, z)

        def create_masked_load(self, ptrs, mask, *rest, **options):
            addresses, allowed = access(ptrs, mask, _READ)
            return super().create_masked_load(addresses, allowed, *rest, **options)

        def create_masked_store(self, ptrs, value, mask, *rest):
            addresses, allowed = access(ptrs, mask, _WRITTEN)
            super().create_masked_store(addresses, value, allowed, *rest)
            found = interpreter._interpreter.load(
                addresses.data, allowed.data, value.data, value.data.dtype
            )
            bits = f"u{value.data.itemsize}"
            lost = found.view(bits) != value.data.view(bits)
            if lost.any():  # another lane stored to the same place
                trace.race(ptrs.data[lost], value.data.itemsize)

        def create_atomic_rmw(self, op, ptr, val, mask, *rest):
            addresses, allowed = access(ptr, mask, _ATOMIC)
            return super().create_atomic_rmw(op, addresses, val, allowed, *rest)

        def create_atomic_cas(self, ptr, cmp, val, *rest):
            addresses, allowed = access(ptr, TensorHandle(np.ones(1, bool), tl.int1), _ATOMIC)
            some = [TensorHandle(x.data[allowed.data], x.dtype) for x in (addresses, cmp, val)]
            old = cmp.data.copy()
            old[allowed.data] = super().create_atomic_cas(*some, *rest).data
            return TensorHandle(old, cmp.dtype.scalar)

    return Builder
