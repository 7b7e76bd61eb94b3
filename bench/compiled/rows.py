"""A launch as a row of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compiled import model
from compiled.peers import Peer
from patchpack.testing import compiled, traffic

# products of rows with rows of a head that attention has to make, queries times keys each
PRODUCTS = {"_attend_fwd_kernel": 2, "_attend_bwd_dq_kernel": 3, "_attend_bwd_dkv_kernel": 4}


def code_row(provider: str, op: str, name: str, launch: compiled.Launch) -> dict[str, Any]:
    """What a kernel was compiled to; ``name`` is what was asked of it."""
    constants = {k: v for k, v in launch.constants.items() if isinstance(v, int | float | str)}
    row = {
        "provider": provider,
        "op": op,
        "name": name,
        "kernel": launch.kernel,
        "target": launch.target,
        "dtype": launch.dtype,
        "head_dim": constants.get("HEAD_DIM"),
        "config": {**constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages},
        "registers": launch.registers,
        "spills": launch.spills,
        "stack": launch.stack,
        "shared_memory": launch.shared,
        "tensor_memory": launch.tensor_memory,
        "occupancy": round(launch.occupancy, 4),
        "instructions": launch.instructions,
        "loads": launch.loads,
        "wide_loads": launch.wide_loads,
        "stores": launch.stores,
        "wide_stores": launch.wide_stores,
        "bulk_copies": launch.bulk_copies,
        "tensor_core": launch.tensor_core,
        "loop": {"instructions": launch.code.loop.total(), **launch.loop},
    }
    if launch.code.macs and launch.code.loop:
        row["loop"] |= {"macs": launch.code.macs, "cycles": round(model.cycles(launch), 1)}
        busy = {pipe: round(cycles, 1) for pipe, cycles in model.pipes(launch).items()}
        row["loop"]["pipes"] = busy
        scores = _scores(launch)
        if scores:
            needed = scores * PRODUCTS[launch.kernel] * launch.constants["HEAD_DIM"]
            row["loop"]["macs_issued_over_needed"] = round(launch.code.macs / needed, 4)
            row["loop"]["cycles_a_1000_scores"] = round(1000 * model.cycles(launch) / scores, 1)
    return row


def _scores(launch: compiled.Launch) -> int:
    """Of our attention, queries times keys in a turn of the main loop."""
    if launch.kernel not in PRODUCTS:
        return 0
    return launch.constants["BLOCK_Q"] * launch.constants["BLOCK_K"]


def traffic_row(
    peer: Peer, launches: Sequence[traffic.Launch], direction: str, compulsory: int
) -> dict[str, Any]:
    """What the launches of a pass move, in bytes; ``compulsory`` is the least that any move."""
    sums = {
        name: sum(getattr(launch, name) for launch in launches)
        for name in (
            "requested",
            "sectors",
            "unique",
            "programs",
            "idle",
            "out_of_bounds",
            "uninitialised",
            "races",
        )
    }
    named = {"provider": peer.name, "op": peer.op, "case": peer.case, "version": peer.version}
    kernels = [launch.kernel for launch in launches]
    return {
        **named,
        "direction": direction,
        "launches": len(launches),
        "kernels": kernels,
        "compulsory": compulsory,
        **sums,
        "unique_over_compulsory": round(sums["unique"] / compulsory, 4),
        "requested_over_compulsory": round(sums["requested"] / compulsory, 4),
    }
