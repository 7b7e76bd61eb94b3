"""The form of the files in ``results/``, and how they are read and written."""

import json
import os
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

# postponed annotations would hide from ``TypedDict`` which keys are not required
from typing_extensions import NotRequired, TypedDict, get_type_hints, is_typeddict

Direction = Literal["forward", "forward+backward"]
Bound = Literal["copy", "matmul"]
CASE = ("op", "shape", "dtype", "direction")


class Params(TypedDict):
    """A case, and who computes it."""

    op: str
    shape: str
    dtype: str
    direction: Direction
    provider: str


class Skipped(Params):
    """Who was not timed; ``failed`` if it ran, and raised or computed something else."""

    reason: str
    failed: NotRequired[bool]


class FloorFound(Params):
    """What ``Floor`` asks and what was measured."""

    peer: str
    ratio: float
    measured: float | None
    met: bool | None
    limit: str
    of_limit: float | None


class Machine(TypedDict):
    """What a number was measured on: see ``patchpack.testing.machine``."""

    commit: str | None
    device: str
    torch: str
    threads: int
    allocator: dict[str, str]
    date: NotRequired[str]
    patchpack: NotRequired[str]
    python: NotRequired[str]
    platform: NotRequired[str]
    triton: NotRequired[str]
    transformers: NotRequired[str]
    torchvision: NotRequired[str]
    liger_kernel: NotRequired[str]
    flash_attn: NotRequired[str]
    # of a GPU
    cuda: NotRequired[str]
    rocm: NotRequired[str]
    architecture: NotRequired[str]
    multiprocessors: NotRequired[int]
    memory_gib: NotRequired[float]
    memory_taken_gib: NotRequired[float]
    driver: NotRequired[str]
    power_limit: NotRequired[str]
    max_sm_clock: NotRequired[str]
    max_memory_clock: NotRequired[str]


class Measured(Machine):
    """What follows from the times of a provider; ``of_...`` is its share of what was measured."""

    bytes: int
    flops: int
    gb_per_s: float
    gflop_per_s: float
    limit: Bound
    of_limit: float
    # of a GPU: of the largest copy and product, and the clocks just after the last round
    copy_gb_per_s: NotRequired[float]
    matmul_gflop_per_s: NotRequired[float]
    of_copy: NotRequired[float]
    of_matmul: NotRequired[float]
    host_s: NotRequired[float]
    sm_clock: NotRequired[str]
    memory_clock: NotRequired[str]


class Timing(TypedDict):
    """A provider of a case, in the layout of pytest-benchmark."""

    group: str
    name: str
    fullname: str
    param: str
    params: Params
    stats: dict[str, Any]
    extra_info: Measured


class Results(TypedDict):
    """What ``run.py`` writes, one file a device."""

    benchmarks: list[Timing]
    skipped: list[Skipped]
    floors: list[FloorFound]


class Scaling(TypedDict):
    """What ``scaling.py`` writes."""

    machine: Machine
    impl: str
    scaling: list[dict[str, Any]]


class Packing(TypedDict):
    """What ``bench_packing.py`` writes."""

    machine: Machine
    date: str
    rounds: int
    images: int
    max_tokens: int
    tokens: dict[str, float]
    pack: list[dict[str, str | float]]
    balance: list[dict[str, float]]


class Distributed(TypedDict):
    """What ``bench_packing.py distributed`` writes; rows are of a number of ranks, in bytes."""

    machine: Machine
    date: str
    images: int
    images_a_rank: int
    model: dict[str, int]
    rows: list[dict[str, float]]


class Compiled(TypedDict):
    """What ``make compiled`` writes; see ``compiled/rows.py``."""

    commit: str
    commits: dict[str, str]  # by op
    date: str
    triton: str
    torch: str
    rows: list["CodeRow"]
    traffic: list["TrafficRow"]
    missing: list["MissingRow"]


class CodeRow(TypedDict):
    """A kernel as it is compiled for a target: of ``configurations`` or, beside peers, a ``case``.

    A configuration that does not compile has an ``error``, and no more than its name.
    """

    provider: str
    op: str
    name: str
    target: str
    dtype: str
    error: NotRequired[str]
    inputs: NotRequired[str]  # dtype that was asked for
    configurations: NotRequired[list[str]]
    case: NotRequired[str]
    direction: NotRequired[Literal["forward", "backward"]]
    version: NotRequired[str]
    kernel: NotRequired[str]
    head_dim: NotRequired[int | None]
    config: NotRequired[dict[str, Any]]
    registers: NotRequired[int]
    spills: NotRequired[int]  # loads and stores of the stack
    stack: NotRequired[int]  # bytes a thread
    shared_memory: NotRequired[int]  # bytes a block
    tensor_memory: NotRequired[int]  # columns a block
    occupancy: NotRequired[float]
    instructions: NotRequired[int]
    loads: NotRequired[int]
    wide_loads: NotRequired[int]
    stores: NotRequired[int]
    wide_stores: NotRequired[int]
    bulk_copies: NotRequired[int]
    tensor_core: NotRequired[dict[str, int]]
    loop: NotRequired[dict[str, Any]]


class TrafficRow(TypedDict):
    """What the launches of a pass move, in bytes, and programs that store nothing."""

    provider: str
    op: str
    case: str
    version: str
    direction: Literal["forward", "backward"]
    launches: int
    kernels: list[str]
    compulsory: int
    requested: int
    sectors: int
    unique: int
    programs: int
    idle: int
    out_of_bounds: int
    uninitialised: int
    races: int
    unique_over_compulsory: float
    requested_over_compulsory: float


class MissingRow(TypedDict):
    """A peer that could not be had, and why."""

    name: str
    op: str
    case: str
    target: str
    reason: str


class Tiles(TypedDict):
    """Tiles of attention that were timed, and how the model ranks them."""

    device: str
    date: str
    triton: str
    torch: str
    ranking: list[dict[str, Any]]
    rows: list[dict[str, Any]]


class Descriptors(TypedDict):
    """Attention with tensor descriptors, beside what is shipped."""

    commit: str
    date: str
    triton: str
    torch: str
    rows: list[dict[str, Any]]


FORMS = {
    "scaling": Scaling,
    "packing": Packing,
    "distributed": Distributed,
    "compiled": Compiled,
    "attention-tiles": Tiles,
    "attention-descriptors": Descriptors,
}


def read(path: Path) -> Any:
    """The results in a file, or none if there is no file.

    Raises:
        ValueError: They are not of the form that the file's name asks for.
    """
    if not path.exists():
        return {name: [] for name in get_type_hints(Results)}
    found = json.loads(path.read_text())
    check(found, FORMS.get(path.stem, Results), path.name)
    return found


def write(path: Path, results: Any) -> None:
    """Write a file whole or not at all, whenever it is interrupted."""
    check(results, FORMS.get(path.stem, Results), path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, path)


def check(value: Any, form: Any, where: str) -> None:
    """Raise ``ValueError`` if a value read from JSON is not of a type, and say where."""
    if is_typeddict(form):
        fields = get_type_hints(form)
        for names, fault in (
            (form.__required_keys__ - value.keys(), "lacks"),
            (value.keys() - fields.keys(), "has unknown"),
        ):
            if names:
                raise ValueError(f"{where} {fault} {', '.join(sorted(names))}")
        for name, x in value.items():
            check(x, fields[name], f"{where}.{name}")
        return
    origin, inner = get_origin(form), get_args(form)
    if origin is Literal:
        fits = value in inner
    elif origin is types.UnionType:
        fits = any(_is(value, kind) for kind in inner)
    else:
        fits = _is(value, origin or form)
    if not fits:
        raise ValueError(f"{where} must be {form}, got {value!r}")
    if origin is list:
        for i, x in enumerate(value):
            check(x, inner[0], f"{where}[{i}]")
    if origin is dict:
        for name, x in value.items():
            check(x, inner[1], f"{where}.{name}")


def _is(value: Any, kind: Any) -> bool:
    """Numbers that are whole are floats too; no truth value is a number."""
    if kind is Any:
        return True
    return isinstance(value, (int, float) if kind is float else kind) and (
        kind is bool or not isinstance(value, bool)
    )
