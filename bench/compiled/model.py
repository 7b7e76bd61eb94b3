"""How long a turn of a kernel's main loop takes a multiprocessor, from the compiled code alone.

Each pipe is busy for so many cycles a turn: what a block asks of it over what it does in a cycle.
If the warps that are resident overlapped perfectly, the busiest pipe alone would decide; without
others, a warp waits for each pipe in turn, and for memory as long as stages do not hide it:

    alone  = sum of pipes + LOAD_LATENCY / stages
    cycles = max(busiest pipe, alone / groups ** OVERLAP)

with as many groups as warps that take turns on a scheduler. These are no times: caches and the
order of instructions are not modelled. The number ranks tiles of one kernel on one target.

The two constants were fitted to 222 tiles of the three attention kernels, of head sizes 64, 80 and
128, timed on an NVIDIA H200: rank correlation 0.92 in the mean and 0.81 at least; what ranks first
takes 1.05 times as long as the best in the mean, and 1.30 times at most
(``results/attention-tiles.json``). Other targets have had no times.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from patchpack.testing.compiled import Launch

SCHEDULERS = 4
LOAD_LATENCY = 800  # cycles until what a block loads from afar is there
OVERLAP = 0.7


class Rates(NamedTuple):
    """What a multiprocessor does in a cycle."""

    macs: int  # multiplications of half precision, dense, summed in float32
    special: int  # exponentials and the like
    fp32: int
    integer: int  # and conversions, and whatever else there is
    shared: int  # bytes of shared memory
    wave: int = 32  # lanes of a warp


# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; tensor cores from the
# architectures' white papers: peak of a GPU over its multiprocessors and clock
RATES = {
    "sm_80": Rates(1024, 16, 64, 64, 128),
    "sm_86": Rates(512, 16, 128, 64, 128),
    "sm_90": Rates(2048, 16, 128, 64, 128),
    "sm_100": Rates(4096, 16, 128, 64, 128),
    "sm_120": Rates(512, 16, 128, 64, 128),
    "gfx942": Rates(1024, 16, 64, 64, 128, wave=64),
    "gfx950": Rates(2048, 16, 64, 64, 128, wave=64),
}


def pipes(launch: Launch) -> dict[str, float]:
    """Cycles that a turn of the main loop keeps each pipe of a multiprocessor busy, by a block."""
    rates, loop = RATES[launch.target], launch.loop
    lanes = launch.num_warps * rates.wave
    packed = sum(n for op, n in launch.code.loop.items() if re.match(r"F\w+2\b|v_pk_", op))
    others = sum(loop[kind] for kind in ("convert", "exchange", "other", "sync"))
    shared = sum(n * _shared_bytes(opcode) for opcode, n in launch.code.loop.items())
    return {
        "tensor": launch.code.macs / rates.macs,
        "special": loop["special"] * lanes / rates.special,
        "fp32": (loop["fp32"] + packed) * lanes / rates.fp32,
        "integer": others * lanes / rates.integer,
        "shared": shared * lanes / rates.shared,
        "issue": launch.code.loop.total() * launch.num_warps / SCHEDULERS,
    }


def cycles(launch: Launch) -> float:
    """Cycles of a multiprocessor for a turn of the main loop by one block."""
    busy = pipes(launch)
    groups = launch.num_warps / SCHEDULERS
    alone = sum(busy.values()) - busy["issue"] + LOAD_LATENCY / launch.num_stages * groups
    return max(*busy.values(), alone / (max(launch.resident_blocks, 1) * groups) ** OVERLAP)


def _shared_bytes(opcode: str) -> int:
    """Bytes of shared memory that a lane reads or writes."""
    if not re.match(r"LDS|STS|ds_(read|write)", opcode):
        return 0
    if match := re.search(r"\.M88\.([24])|\.(64|128)\b|_b(64|128)|_b(32)|_u16", opcode):
        return {"2": 8, "4": 16, "64": 8, "128": 16}.get(next(filter(None, match.groups()), ""), 4)
    return 4
