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
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from patchpack._interpreter import execute, interpreted, replaced
from patchpack.testing._table import table

# Bytes of shared memory one block may have.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
TENSOR_MEMORY = 512  # columns, on targets that have it


@dataclass(frozen=True)
class Launch:
    """One kernel launch and the machine code it would run."""

    kernel: str
    key: str  # equal for launches that one compilation serves
    grid: tuple[int, int, int]
    target: str
    constants: dict[str, Any]  # compile-time arguments
    num_warps: int
    shared: int  # bytes of shared memory a block
    registers: int  # a thread; on AMD vector registers, accumulation registers included
    stack: int  # bytes a thread: spilled registers and local arrays
    opcodes: Counter[str]
    matrix_flops: int  # of the matrix products in the code of a block, each counted once

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

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
    def tensor_core(self) -> dict[str, int]:
        """Matrix instructions by kind: HMMA, HGMMA (sm_90), UTC*MMA (sm_100), MFMA (AMD)."""
        kinds: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            if kind := re.match(r"H?G?MMA|UTC\w*MMA|v_(mfma)", opcode):
                kinds[(kind[1] or kind[0]).upper()] += count
        return dict(kinds)

    @property
    def cost(self) -> list[float]:
        """What autotuning minimises where nothing can be timed: spills, then instructions.

        These are the instructions of all warps, a matrix FLOP if there are any.
        """
        a_block = self.instructions * self.num_warps
        if self.matrix_flops:
            return [self.spills, a_block / self.matrix_flops]
        return [self.spills, a_block * math.prod(self.grid)]

    def _count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))


@contextlib.contextmanager
def session(target: str, *, run: bool = False) -> Iterator[list[Launch]]:
    """Compile for ``target`` what is launched on CPU tensors within this context.

    Where Triton would autotune, the configuration of least ``Launch.cost`` is launched.

    Args:
        target: A key of ``SHARED_MEMORY``.
        run: Whether the interpreter runs each launch too. Otherwise outputs stay uninitialised.

    Yields:
        The launches, in order; it grows.

    Raises:
        ValueError: Nothing is known of ``target``.
        RuntimeError: ``TRITON_INTERPRET`` is set: kernels then cannot be compiled.
        OutOfResources: At a launch that needs more shared memory than ``target`` has.
    """
    if target not in SHARED_MEMORY:
        raise ValueError(f"target must be one of {', '.join(SHARED_MEMORY)}, got {target!r}")
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled with TRITON_INTERPRET set: unset it")
    compile_only = functools.partial(JITFunction.run, warmup=True)
    launches: list[Launch] = []
    tuning = False

    def launch(kernel, grid, args, kwargs):
        binary = compile_only(kernel, *args, grid=grid, **kwargs)
        _check_resources(binary, target)
        launches.append(_inspect(kernel, binary, target, grid, _arguments(kernel, args, kwargs)))
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
    shared, limit = binary.metadata.shared, SHARED_MEMORY[target]
    if shared > limit:
        raise OutOfResources(shared, limit, "shared memory")
    tensor = getattr(binary.metadata, "tmem_size", None) or 0
    if tensor > TENSOR_MEMORY:
        raise OutOfResources(tensor, TENSOR_MEMORY, "tensor memory")


def _arguments(kernel: JITFunction, args: tuple, kwargs: dict) -> dict[str, Any]:
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def _inspect(
    kernel: JITFunction, binary: Any, target: str, grid: Any, arguments: dict[str, Any]
) -> Launch:
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    source = binary.asm["amdgcn" if target.startswith("gfx") else "cubin"]
    registers, stack, opcodes = read(source)
    if callable(grid):
        grid = grid(arguments)
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(
        kernel=kernel.__name__,
        key=binary.hash,
        grid=(int(x), int(y), int(z)),
        target=target,
        constants={p.name: arguments[p.name] for p in kernel.params if p.is_constexpr},
        num_warps=binary.metadata.num_warps,
        shared=binary.metadata.shared,
        registers=registers,
        stack=stack,
        opcodes=opcodes,
        matrix_flops=_matrix_flops(binary.asm["ttgir"]),
    )


def _matrix_flops(ttgir: str) -> int:
    """FLOPs of the products ``M x K`` by ``K x N`` that a block's code holds."""
    product = r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .*?<(\d+)x(\d+)x\w+,.*?<\d+x(\d+)x\w+,"
    return sum(2 * math.prod(map(int, sizes)) for sizes in re.findall(product, ttgir))


@functools.lru_cache(maxsize=256)
def _read_nvidia(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """Registers, stack and instructions, from the ``cuobjdump`` that Triton carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"  # address, predicate, opcode
    opcodes = Counter(re.findall(line, text, re.MULTILINE))
    del opcodes["NOP"]  # padding
    return usage["REG"], usage["STACK"] + usage["LOCAL"], opcodes


@functools.lru_cache(maxsize=256)
def _read_amd(assembly: str) -> tuple[int, int, Counter[str]]:
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    opcodes = Counter(re.findall(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", assembly, re.M))
    return int(usage["vgpr_count"]), int(usage["private_segment_fixed_size"]), opcodes
