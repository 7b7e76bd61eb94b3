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
import math
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
    An atomic loads and stores.
    """

    requested: int  # bytes of lanes that load or store, neither masked nor out of bounds
    read: int  # distinct bytes
    written: int  # distinct bytes
    out_of_bounds: int  # lanes outside of the elements, or across them; they are left out
    uninitialised: int  # distinct bytes read before anything wrote them
    races: int  # distinct bytes of lanes that race
    unwritten: int = 0  # bytes first passed to this launch that nothing wrote: see ``session``

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
            layout = _Layout(values, [*addressed, *allocations.tensors] if addressed else [])
            trace = _Trace(layout, allocations.undefined)
            with trace.followed():
                execute(kernel, grid, args, kwargs)
            outputs.append(allocations.first_passed(layout.arguments))
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


def _end_to_end(storages: Iterable[Tensor]) -> tuple[list[slice], int]:
    """Parts of an array, as aligned as the storages of tensors that they describe; its size."""
    parts, end = [], 0
    for x in storages:
        begin = end + _address(x) % _ALIGNMENT
        parts.append(slice(begin, begin + _num_bytes(x)))
        end = begin + _num_bytes(x)
        end += -end % _ALIGNMENT
    return parts, end + _ALIGNMENT  # a last part that is nobody's


class _Layout:
    """Where the pointers of one launch may lead.

    Each tag has a storage, described by a part of an array ``memory`` that it may share with other
    tags, and a part of ``elements`` that says which bytes of the storage are its own. Tag 0 is that
    of addresses that no argument gave: those of ``addressed``, which have tags after the arguments.
    """

    def __init__(self, values: dict[str, Any], addressed: Iterable[Tensor]) -> None:
        named = [pair for name, value in values.items() for pair in _tensors_in(name, value)]
        alike: dict[tuple, list[tuple[str, Tensor]]] = {}
        for name, x in named:
            alike.setdefault(_same_elements(x), []).append((name, x))
        self.arguments = {"+".join(n for n, _ in same): same[0][1] for same in alike.values()}
        self.tags = {key: tag for tag, key in enumerate(alike, 1)}

        by_storage: dict[int, list[Tensor]] = {}
        for x in addressed:
            by_storage.setdefault(_address(x), []).append(x)
        reached = [by_storage[address] for address in sorted(by_storage)]
        self.raw_addresses = np.array(sorted(by_storage), np.uint64)
        self.raw_tags = np.array([0, *(len(alike) + 1 + i for i in range(len(reached)))], np.uint64)
        self.names = [*self.arguments, *(f"addressed[{i}]" for i in range(len(reached)))]

        groups = [*([x] for x in self.arguments.values()), *reached]
        storages = {_address(x): x for x, *_ in groups}
        parts, self.memory_size = _end_to_end(storages.values())
        self.memory_of = dict(zip(storages, parts, strict=True))
        self.in_memory = [self.memory_of[_address(x)] for x, *_ in groups]
        self.in_elements, size = _end_to_end(x for x, *_ in groups)
        self.elements = np.zeros(size, np.uint8)
        for part, group in zip(self.in_elements, groups, strict=True):
            for x in group:
                self.elements[part] |= _elements(x)

        # by tag; the last stands for all tags that do not exist
        self.num_tags = len(groups) + 2
        self.first = np.array([0, *(_address(x) for x, *_ in groups), 0], np.uint64)
        self.size = np.array([0, *(_num_bytes(x) for x, *_ in groups), 0], np.uint64)
        self.memory_start = np.array([0, *(part.start for part in self.in_memory), 0])
        self.elements_start = np.array([0, *(part.start for part in self.in_elements), 0])

    def locate(self, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tags (one, if all are alike) and places in ``memory`` of lanes, and whether inside."""
        tags = lanes >> _TAG_SHIFT
        if (tags == tags[0]).all():
            tags = tags[:1]
        if not tags.all():
            storage = np.searchsorted(self.raw_addresses, lanes, side="right")
            tags = np.where(tags == 0, self.raw_tags[storage], tags)
        tags = np.minimum(tags, self.num_tags - 1).astype(np.int64)
        offsets = (lanes & _ADDRESS) - self.first[tags]  # wraps far beyond the end
        near = (offsets < self.size[tags]) & (lanes % size == 0)
        offsets = np.where(near, offsets, 0).astype(np.int64)
        own = self.elements.view(f"u{size}")[(self.elements_start[tags] + offsets) // size]
        return tags, self.memory_start[tags] + offsets, near & (own == _in_each_byte(1, size))


class _Trace:
    """What one launch does to each byte of memory."""

    def __init__(self, layout: _Layout, undefined: dict[int, np.ndarray]) -> None:
        self.layout, self.undefined = layout, undefined
        self.memory = np.zeros(layout.memory_size, np.uint8)
        for address in layout.memory_of.keys() & undefined.keys():
            self.memory[layout.memory_of[address]] = undefined[address] * _UNDEFINED
        self.requested = np.zeros(layout.num_tags, np.int64)  # by tag
        self.out_of_bounds = np.zeros(layout.num_tags, np.int64)
        self.sectors = 0
        self.busy = 0  # programs that stored
        self.stores = False  # of the program that runs, and its accesses
        self.accesses: list[tuple[np.ndarray, np.ndarray, Any]] = []

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Within this context the interpreter's launch is this one."""
        builder, to_argument = interpreter.interpreter_builder, interpreter._implicit_cvt

        def tagged(value):
            argument = to_argument(value)
            if hasattr(value, "data_ptr"):
                tag = self.layout.tags[_same_elements(value)]
                argument.handle.data |= np.uint64(tag << _TAG_SHIFT)
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
        tags, places, inside = self.layout.locate(lanes, size)
        tags = np.broadcast_to(tags, lanes.shape)
        if not inside.all():
            self.out_of_bounds += np.bincount(tags[~inside], minlength=self.layout.num_tags)
            lanes, tags, places = lanes[inside], tags[inside], places[inside]
            mask = mask.copy()
            mask[mask] = inside
        ways = 2 if kind == _ATOMIC else 1
        self.requested += np.bincount(tags, minlength=self.layout.num_tags) * size * ways
        self.sectors += _count_sectors(lanes) * SECTOR * ways
        self.stores |= kind != _READ and lanes.size > 0

        memory, cells = self.memory.view(f"u{size}"), places // size
        before = memory[cells]
        after = before.copy()
        if kind != _WRITTEN:
            after |= (before & _in_each_byte(_UNDEFINED, size)) << 1
        conflict = before & _in_each_byte(_RACES_WITH[kind], size)
        after[conflict != 0] |= _in_each_byte(_RACE, size)
        if kind != _READ:
            after &= ~_in_each_byte(_UNDEFINED, size)
        memory[cells] = after
        self.accesses.append((memory, cells, _in_each_byte(kind, size)))
        return pointers & _ADDRESS, mask

    def race(self, pointers: np.ndarray, size: int) -> None:
        """Note that lanes, all of them inside, race."""
        _, places, _ = self.layout.locate(pointers, size)
        self.memory.view(f"u{size}")[places // size] |= _in_each_byte(_RACE, size)

    def launch(self, kernel: str) -> Launch:
        """The whole of it, once it has ended; what it wrote is no longer undefined."""
        layout = self.layout
        for address in layout.memory_of.keys() & self.undefined.keys():
            self.undefined[address][:] = self.memory[layout.memory_of[address]] & _UNDEFINED
        arguments = {}
        parts = zip(layout.names, layout.in_memory, layout.in_elements, strict=True)
        for tag, (name, memory, elements) in enumerate(parts, 1):
            own = layout.elements[elements] != 0
            arguments[name] = Traffic(
                **_distinct_bytes(self.memory[memory][own]),
                requested=int(self.requested[tag]),
                out_of_bounds=int(self.out_of_bounds[tag]),
            )
        return Launch(
            **_distinct_bytes(self.memory),
            requested=int(self.requested.sum()),
            out_of_bounds=int(self.out_of_bounds.sum()),
            kernel=kernel,
            grid=self.grid,
            idle=math.prod(self.grid) - self.busy,
            sectors=self.sectors,
            arguments=arguments,
        )


def _count_sectors(lanes: np.ndarray) -> int:
    sectors = (lanes & _ADDRESS) // SECTOR
    runs = np.append(sectors[:1], sectors[1:][sectors[1:] != sectors[:-1]])  # few, to be sorted
    return np.unique(runs).size


def _distinct_bytes(memory: np.ndarray) -> dict[str, int]:
    bits = {
        "read": _READ | _ATOMIC,
        "written": _WRITTEN | _ATOMIC,
        "uninitialised": _READ_UNDEFINED,
        "races": _RACE,
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
