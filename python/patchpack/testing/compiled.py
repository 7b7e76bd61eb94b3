"""What the compiler makes of every kernel an op launches, for a GPU that need not be there.

    with compiled.session("sm_90") as launches:
        patchpack.rope_2d(q, k, grid, impl="triton")  # CPU tensors
    print(compiled.report(launches))

Each launch is specialised and compiled as it would be on the target, by what its arguments are:
pointers and integers divisible by 16, integers equal to 1. What the machine code holds is a fact;
how long it takes is not to be had from it.
"""

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from patchpack._interpreter import execute, interpreted, replaced
from patchpack.testing._machine_code import Code, kinds, read_amd, read_nvidia
from patchpack.testing._table import table


class Multiprocessor(NamedTuple):
    """What one multiprocessor (AMD: compute unit) has room for."""

    warps: int
    blocks: int
    registers: int  # of 32 bits
    shared: int  # bytes
    shared_a_block: int  # bytes


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 and
# CDNA 4 instruction set references
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 2**16, 164 * 1024, 163 * 1024),
    "sm_86": Multiprocessor(48, 16, 2**16, 100 * 1024, 99 * 1024),
    "sm_89": Multiprocessor(48, 24, 2**16, 100 * 1024, 99 * 1024),
    "sm_90": Multiprocessor(64, 32, 2**16, 228 * 1024, 227 * 1024),
    "sm_100": Multiprocessor(64, 32, 2**16, 228 * 1024, 227 * 1024),
    "sm_120": Multiprocessor(48, 24, 2**16, 100 * 1024, 99 * 1024),
    "gfx942": Multiprocessor(32, 32, 2**17, 64 * 1024, 64 * 1024),
    "gfx950": Multiprocessor(32, 32, 2**17, 160 * 1024, 160 * 1024),
}
TENSOR_MEMORY = 512  # columns, on targets that have it


@dataclass(frozen=True)
class Launch:
    """One kernel launch and the machine code it would run."""

    kernel: str
    key: str  # equal for launches that one compilation serves
    grid: tuple[int, int, int]
    target: str
    dtype: str  # of its floating tensors the narrowest
    constants: dict[str, Any]  # compile-time arguments
    num_warps: int  # those that the compiler adds included
    num_stages: int
    shared: int  # bytes of shared memory a block
    tensor_memory: int  # columns a block, on targets that have it
    code: Code

    @property
    def registers(self) -> int:
        """Registers a thread; on AMD vector registers, accumulation registers included."""
        return self.code.registers

    @property
    def stack(self) -> int:
        """Bytes a thread: spilled registers and local arrays."""
        return self.code.stack

    @property
    def opcodes(self) -> Counter[str]:
        return self.code.opcodes

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def loop(self) -> Counter[str]:
        """Instructions of the main loop by kind; none without a loop."""
        return kinds(self.code.loop, self.target)

    @property
    def occupancy(self) -> float:
        """Warps that a multiprocessor holds of this kernel, of those it has room for."""
        blocks = self.resident_blocks
        return blocks * self.num_warps / MULTIPROCESSORS[self.target].warps

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        has = MULTIPROCESSORS[self.target]
        if self.target.startswith("gfx"):
            registers = -(-self.registers // 8) * 8 * 64
            shared = self.shared
        else:
            registers = -(-self.registers * 32 // 256) * 256
            shared = self.shared + 1024  # which the system takes
        limits = [
            has.warps // self.num_warps,
            has.blocks,
            has.registers // registers // self.num_warps,
        ]
        if shared:
            limits.append(has.shared // shared)
        if self.tensor_memory:
            limits.append(TENSOR_MEMORY // self.tensor_memory)
        return min(limits)

    @property
    def spills(self) -> int:
        """Loads and stores of the stack."""
        return self._count(r"LDL|STL|scratch_(load|store)")

    @property
    def loads(self) -> int:
        """Loads of global memory, those into shared memory included."""
        return self._count(r"LDG|(global|buffer)_load")

    @property
    def wide_loads(self) -> int:
        """Loads of at least 128 bits a thread."""
        return self._count(r"LDG.*\.(128|256)|(global|buffer)_load\w*(x4|b128)")

    @property
    def stores(self) -> int:
        """Stores to global memory."""
        return self._count(r"STG|(global|buffer)_store")

    @property
    def wide_stores(self) -> int:
        """Stores of at least 128 bits a thread."""
        return self._count(r"STG.*\.(128|256)|(global|buffer)_store\w*(x4|b128)")

    @property
    def bulk_copies(self) -> int:
        """Copies of whole tiles by the tensor memory accelerator, either way."""
        return self._count(r"UTMA(LDG|STG|REDG)|UBLKCP")

    @property
    def tensor_core(self) -> dict[str, int]:
        """Matrix instructions by kind: HMMA, HGMMA (sm_90), UTC*MMA (sm_100), MFMA (AMD)."""
        found: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            if kind := re.match(r"H?G?MMA|UTC\w*MMA|v_(mfma)", opcode):
                found[(kind[1] or kind[0]).upper()] += count
        return dict(found)

    @property
    def cost(self) -> list[float]:
        """What autotuning minimises where nothing can be timed: spills, then instructions.

        Those of all warps: in the main loop for a multiplication of matrices, if there are any.
        """
        if self.code.macs and self.code.loop:
            return [self.spills, self.code.loop.total() * self.num_warps / self.code.macs]
        return [self.spills, self.instructions * self.num_warps * math.prod(self.grid)]

    def _count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


@contextlib.contextmanager
def session(target: str, *, run: bool = False) -> Iterator[list[Launch]]:
    """Compile for ``target`` what is launched on CPU tensors within this context.

    Where Triton would autotune, the configuration of least ``Launch.cost`` is launched.

    Args:
        target: A key of ``MULTIPROCESSORS``.
        run: Whether the interpreter runs each launch too. Otherwise outputs stay uninitialised.

    Yields:
        The launches, in order; it grows.

    Raises:
        ValueError: Nothing is known of ``target``.
        RuntimeError: ``TRITON_INTERPRET`` is set: kernels then cannot be compiled.
        OutOfResources: At a launch that needs more shared memory than ``target`` has.
    """
    if target not in MULTIPROCESSORS:
        raise ValueError(f"target must be one of {', '.join(MULTIPROCESSORS)}, got {target!r}")
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET set: unset it")
    compile_only = functools.partial(JITFunction.run, warmup=True)
    launches: list[Launch] = []
    tuning = False

    def launch(kernel, grid, args, kwargs):
        binary = compile_only(kernel, *args, grid=grid, **kwargs)
        _check_resources(binary, target)
        arguments = _bound(kernel, args, kwargs)
        launches.append(_inspect(kernel, binary, target, grid, arguments))
        if run and not tuning:
            execute(kernel, grid, args, kwargs)

    def measure(call, **_):
        nonlocal tuning
        tuning = True
        try:
            call()
        finally:
            tuning = False
        return launches.pop().cost

    with interpreted(launch), replaced(driver, "_active", _Driver(target, measure)):
        yield launches


def report(launches: Sequence[Launch]) -> str:
    """A plain table of ``launches``, a line each."""
    header = "kernel target grid warps regs stack spills shared tensor-core loads stores instr"
    rows = [header.split(), *map(_row, launches)]
    return table(rows) + "\nloads, stores: of 128 bits and more / all\n"


def _row(launch: Launch) -> list[str]:
    return [
        launch.kernel,
        launch.target,
        "x".join(map(str, launch.grid)),
        str(launch.num_warps),
        str(launch.registers),
        str(launch.stack),
        str(launch.spills),
        str(launch.shared),
        "+".join(f"{n} {kind}" for kind, n in launch.tensor_core.items()) or "-",
        f"{launch.wide_loads}/{launch.loads}",
        f"{launch.wide_stores}/{launch.stores}",
        str(launch.instructions),
    ]


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: str, measure: Callable[..., list[float]]) -> None:
        self.target = target
        self.measure = measure

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith("gfx"):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.target  # kernels keep what they compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return self.measure


def _check_resources(binary: Any, target: str) -> None:
    """What Triton checks when it loads a kernel on the target."""
    shared, limit = binary.metadata.shared, MULTIPROCESSORS[target].shared_a_block
    if shared > limit:
        raise OutOfResources(shared, limit, "shared memory")
    tensor = getattr(binary.metadata, "tmem_size", None) or 0
    if tensor > TENSOR_MEMORY:
        raise OutOfResources(tensor, TENSOR_MEMORY, "tensor memory")


def _bound(kernel: JITFunction, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The kernel's arguments by name."""
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def _inspect(
    kernel: JITFunction, binary: Any, target: str, grid: Any, arguments: dict[str, Any]
) -> Launch:
    read, source = (read_amd, "amdgcn") if target.startswith("gfx") else (read_nvidia, "cubin")
    dimensions: Any = grid(arguments) if callable(grid) else grid
    x, y, z = (*dimensions, 1, 1)[:3]
    tensors = [x.dtype for x in arguments.values() if isinstance(x, torch.Tensor)]
    floating = [dtype for dtype in tensors if dtype.is_floating_point] or tensors
    metadata = binary.metadata
    return Launch(
        kernel=kernel.__name__,
        key=binary.hash,
        grid=(int(x), int(y), int(z)),
        target=target,
        dtype=str(min(floating, key=lambda dtype: dtype.itemsize)).removeprefix("torch."),
        constants={p.name: arguments[p.name] for p in kernel.params if p.is_constexpr},
        num_warps=getattr(metadata, "total_num_warps", None) or metadata.num_warps,
        num_stages=metadata.num_stages,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        code=read(binary.asm[source], binary.asm["ttgir"]),
    )
