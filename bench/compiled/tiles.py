"""Ranks tiles of attention by the model: ``PYTHONPATH=bench python -m compiled.tiles sm_90``.

Every tile is compiled for the target, those that spill are left out, and the rest is ranked by the
cycles that ``compiled.model`` gives for segments of many lengths. On a GPU ``--time`` times them
too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.runtime.errors import OutOfResources

from compiled import model
from compiled.configurations import HEAD_DIMS, TARGETS
from patchpack.kernels import varlen_attention as kernels
from patchpack.testing import compiled

SEGMENTS = (64, 256, 620, 1024, 4096)
TIMED = ((620, 13), (4096, 2))  # length and number of segments, 16 heads
NAMES = ("D0", "D1", "BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
# queries, keys, warps, stages
CANDIDATES = {
    "fwd": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
    "dq": ((64, 128), (32, 64), (4, 8), (1, 2, 3)),
    "dkv": ((16, 32, 64), (64, 128), (4, 8), (1, 2, 3)),
}
OTHER = {"dq": (16, 16, 4, 1), "dkv": (16, 16, 4, 1)}  # of the pass that is not looked at
Tile = tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser("compiled.tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--pass", dest="passes", choices=CANDIDATES, action="append")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, action="append")
    parser.add_argument("--time", action="store_true", help="time them on the GPU here")
    parser.add_argument("--out", type=Path, help="a file for all rows")
    args = parser.parse_args()
    console = Console()
    console.width = max(console.width, 130)
    rows = []
    for name, head_dim in itertools.product(args.passes or CANDIDATES, args.head_dim or HEAD_DIMS):
        found = [
            row
            for tile in track(list(tiles(name, head_dim)), f"{name}, {head_dim}", console=console)
            if (row := rank(args.target, name, head_dim, tile)) and not row["stack"]
        ]
        for row in found if args.time else ():
            row["us"] = {f"{n} x {length}": time(row, length, n) for length, n in TIMED}
        _show(console, sorted(found, key=lambda row: row["weighted_cycles"])[:8])
        rows += found
    if args.out:
        args.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def tiles(name: str, head_dim: int) -> Iterator[tuple[tuple[int, int], Tile]]:
    """Pieces of a head, and tiles of a pass."""
    pieces = kernels.head_pieces(head_dim)
    halves = [(64, 64)] if pieces == (128, 0) and name != "fwd" else []
    return itertools.product([pieces, *halves], itertools.product(*CANDIDATES[name]))


def rank(target: str, name: str, head_dim: int, tile: tuple[tuple[int, int], Tile]) -> Any:
    """What a tile is compiled to, and its cycles; nothing if it does not fit the target."""
    qkv = torch.zeros(328, 3, 16, head_dim, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 200, 328], dtype=torch.int32)
    try:
        with compiled.session(target) as launches:
            launcher(name, tile, qkv, cu_seqlens)()
    except OutOfResources:
        return None
    (launch,) = (x for x in launches if name in x.kernel)
    scores = tile[1][0] * tile[1][1]
    cycles = 1000 * model.cycles(launch) / scores
    return {
        "target": target,
        "pass": name,
        "head_dim": head_dim,
        "pieces": tile[0],
        "tile": tile[1],
        "registers": launch.registers,
        "stack": launch.stack,
        "shared_memory": launch.shared,
        "occupancy": launch.occupancy,
        "pipes": {k: round(1000 * v / scores, 1) for k, v in model.pipes(launch).items()},
        "cycles": round(cycles, 1),
        "weighted_cycles": round(cycles * _waste(tile[1]), 1),
    }


def _waste(tile: Tile) -> float:
    """Scores that are computed for each that is needed, the geometric mean over SEGMENTS."""

    def of(length: int) -> float:
        return math.prod(-(-length // side) * side / length for side in tile[:2])

    return math.exp(statistics.mean(math.log(of(length)) for length in SEGMENTS))


def launcher(
    name: str, tile: tuple[tuple[int, int], Tile], qkv: Tensor, cu_seqlens: Tensor
) -> Callable[[], Any]:
    """Launches a pass with a tile; the backward pass has two, and the other is small."""
    q, k, v = qkv.unbind(1)
    tokens, heads, _ = q.shape
    out, lse = torch.zeros_like(q), qkv.new_zeros(heads, tokens, dtype=torch.float32)

    def chosen(of: str, *_) -> dict[str, int]:
        sizes = tile[1] if of == name else OTHER[of]
        return dict(zip(NAMES, (*tile[0], *sizes), strict=True))

    def launch() -> None:
        limits = cu_seqlens, cu_seqlens, q.shape[2] ** -0.5, -1, -1
        with mock.patch.object(kernels, "attention_tiles", chosen):
            if name == "fwd":
                kernels.attend(q, k, v, *limits)
            else:
                kernels.attend_bwd(out, None, q, k, v, out, lse, *limits)

    return launch


def time(row: dict[str, Any], length: int, count: int) -> float:
    """Median microseconds on the GPU; of the backward pass, the other part is left out."""
    heads = torch.randn(length * count, 3, 16, row["head_dim"], device="cuda").bfloat16()
    cu_seqlens = torch.arange(count + 1, device="cuda", dtype=torch.int32) * length
    launch = launcher(row["pass"], (row["pieces"], row["tile"]), heads, cu_seqlens)
    other = {"dq": "_attend_bwd_dkv_kernel", "dkv": "_attend_bwd_dq_kernel"}.get(row["pass"])
    times = []
    with mock.patch.object(kernels, other, mock.MagicMock()) if other else mock.patch.dict({}):
        for _ in range(9):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(300_000)  # the host is ahead
            begin.record()
            launch()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return round(statistics.median(times[2:]), 1)


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    names = [name for name in rows[0] if name not in ("target", "stack", "pipes")]
    table = Table(*names, "busiest pipe", title=rows[0]["target"], title_justify="left")
    for row in rows:
        busiest = max(row["pipes"], key=row["pipes"].get)
        table.add_row(*(str(row[name]) for name in names), busiest)
    console.print(table)


if __name__ == "__main__":
    main()
