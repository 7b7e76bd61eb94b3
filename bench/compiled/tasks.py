"""What one process does of ``make compiled``: compile, or follow, and make rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from compiled.configurations import configurations
from compiled.peers import CASES, NEEDS, Missing, Peer, inputs_of, ours, peers, read_of
from compiled.rows import code_row, traffic_row
from patchpack.testing import compiled, traffic
from patchpack.testing.catalogue import SPECS

Rows = list[dict[str, Any]]
Task = tuple[Callable[..., dict[str, Rows]], tuple]
TRAFFIC_TARGET = "sm_90"  # as on which launches are followed


def run(task: Task) -> dict[str, Rows]:
    function, arguments = task
    return function(*arguments)


def of_op(op: str, target: str, dtype: str) -> dict[str, Rows]:
    """All configurations of an op; a row for each kernel that differs."""
    rows: dict[str, dict[str, Any]] = {}
    for configuration in configurations(op, dtype):
        try:
            launches = configuration.compile(target, dtype)
        except Exception as error:  # whatever it is, it is the finding
            named = {"provider": "patchpack", "op": op, "target": target, "dtype": dtype}
            reason = f"{type(error).__name__}: {error}"
            rows[configuration.name] = {
                **named,
                "inputs": dtype,
                "name": configuration.name,
                "error": reason,
            }
            continue
        for launch in launches:
            new = code_row("patchpack", op, configuration.name, launch)
            row = rows.setdefault(launch.key, {**new, "inputs": dtype, "configurations": []})
            if configuration.name not in row["configurations"]:
                row["configurations"].append(configuration.name)
    return {"rows": list(rows.values())}


def of_case(op: str, case: str, target: str) -> dict[str, Rows]:
    """Our kernels in a case that peers have too."""
    return _compile(ours(op, case), target)


def of_peers(op: str, case: str, target: str, checkouts: Path | None) -> dict[str, Rows]:
    found: dict[str, Rows] = {"rows": [], "missing": []}
    for peer in _peers_of(op, case, target, checkouts):
        if isinstance(peer, Missing):
            found["missing"].append({**vars(peer), "target": target})
            continue
        try:
            found["rows"] += _compile(peer, target)["rows"]
        except Exception as error:  # whatever a peer does not do is its row
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            named = {"name": peer.name, "op": op, "case": case, "target": target}
            found["missing"].append({**named, "reason": reason})
    return found


def _peers_of(op: str, case: str, target: str, checkouts: Path | None) -> Iterator[Peer | Missing]:
    return (peer for peer in peers(target, checkouts) if (peer.op, peer.case) == (op, case))


def _compile(peer: Peer, target: str) -> dict[str, Rows]:
    rows: Rows = []
    with compiled.session(target) as launches:
        backward = peer.run()
        forward = len(launches)
        if backward:
            backward()
    for i, launch in enumerate(launches):
        row = code_row(peer.name, peer.op, peer.case, launch)
        direction = "forward" if i < forward else "backward"
        rows.append({**row, "case": peer.case, "direction": direction, "version": peer.version})
    return {"rows": rows}


def traffic_of(op: str, case: str, checkouts: Path | None) -> dict[str, Rows]:
    """What ours and the peers' kernels move in a case, against the least that any have to."""
    found: dict[str, Rows] = {"traffic": [], "missing": []}
    few = {"num_heads": (2, 2)} if op == "varlen_attention" else {}  # each moves as much
    with mock.patch.dict(CASES[op, case], few):
        inputs = inputs_of(op, case)
        reads = read_of(op, inputs)
        with _as_on(TRAFFIC_TARGET):
            grads, needs = SPECS[op].grads, NEEDS[op]
            passes = traffic.measure(SPECS[op].op, inputs, grads=grads, needs=needs, reads=reads)
        least = {"forward": passes[0].compulsory, "backward": passes[1].compulsory}
        own = dict(zip(least, (totals.launches for totals in passes), strict=True))
        followed: list[tuple[Peer, Mapping[str, Sequence[traffic.Launch]]]] = [
            (ours(op, case), own)
        ]
        for peer in _peers_of(op, case, TRAFFIC_TARGET, checkouts):
            if isinstance(peer, Missing):
                continue
            try:
                followed.append((peer, follow(peer)))
            except Exception as error:
                reason = f"not followed: {type(error).__name__}: {error}".splitlines()[0]
                named = {"name": peer.name, "op": op, "case": case, "target": "any"}
                found["missing"].append({**named, "reason": reason})
    for peer, launches in followed:
        for direction, of_pass in launches.items():
            if of_pass:
                found["traffic"].append(traffic_row(peer, of_pass, direction, least[direction]))
    return found


def _as_on(target: str) -> AbstractContextManager:
    """What is launched chooses as on ``target``, whatever runs it."""
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return mock.patch.object(driver, "_active", SimpleNamespace(get_current_target=lambda: gpu))


def follow(peer: Peer) -> Mapping[str, Sequence[traffic.Launch]]:
    """The launches of each pass, as on ``TRAFFIC_TARGET``."""
    with compiled.session(TRAFFIC_TARGET):  # what autotuning chooses
        if backward := peer.run():
            backward()
    with _as_on(TRAFFIC_TARGET), traffic.session() as launches:
        backward = peer.run()
        forward = len(launches)
        if backward:
            backward()
    return {"forward": launches[:forward], "backward": launches[forward:]}
