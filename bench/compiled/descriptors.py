"""Attention's forward pass with tensor descriptors and warp specialisation, beside what is shipped.

    PYTHONPATH=bench python -m compiled.descriptors sm_90 sm_100

The variant is the shipped kernel, rewritten: keys and values come through descriptors (TMA) of the
segment and head, which fill with zeros what lies past the segment, and Triton may be asked to give
loads and products warps of their own. Tiles are those that are shipped and larger ones, for which
the variant may have the registers. What Triton's compiler refuses is a row with its error. On a GPU
``--time`` times them too.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

import _results
from compiled import tiles
from compiled.__main__ import RESULTS, versions
from patchpack.kernels import varlen_attention as kernels

TARGETS = ("sm_90", "sm_100")  # which have them
HEAD_DIMS = (64, 80, 128)
LARGER = ((128, 64, 8, 3), (128, 128, 8, 2))
FORMS = {
    "shipped": [],
    "descriptors": [
        (
            "    offs_q = first_q + tl.arange(0, BLOCK_Q)\n    offs_k",
            "".join(
                f"    {x}{i} = tl.make_tensor_descriptor({x}_ptr, [len_k, HEAD_DIM],"
                f" [stride_{x}_t.to(tl.int64) * STRIDE_UNIT, 1], [BLOCK_K, D{i} if D{i} else 16])\n"
                for x, i in itertools.product("kv", range(2))
            )
            + "    offs_q = first_q + tl.arange(0, BLOCK_Q)\n    offs_k",
        ),
        *(
            (
                f"            {x} = _load({x}_ptrs, mask_k, HEAD_DIM, D0, D1)\n",
                f"            {x} = {x}0.load([first_k, 0]), {x}1.load([first_k, D0])\n",
            )
            for x in "kv"
        ),
    ],
}
FORMS["descriptors, specialised warps"] = [
    *FORMS["descriptors"],
    (
        "in range(bounds[part], bounds[part + 1], BLOCK_K)",
        "in tl.range(bounds[part], bounds[part + 1], BLOCK_K, warp_specialize=True)",
    ),
]


def main() -> None:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("compiled.descriptors", description=description)
    parser.add_argument("targets", choices=TARGETS, nargs="+")
    parser.add_argument("--time", action="store_true", help="time them on the GPU here")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention-descriptors.json")
    args = parser.parse_args()
    device = "cuda" if args.time else "cpu"

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)  # of what descriptors are kept in
    with tempfile.TemporaryDirectory() as folder:
        variants = {form: variant(form, Path(folder)) for form in FORMS}
        wanted = list(configurations(args.targets))
        rows = [
            {**row, "form": form}
            for target, head_dim, tile, form in track(wanted, "compiling")
            if (row := compile_variant(variants[form], target, head_dim, tile, args.time))
        ]
    names = ("target", "head_dim", "tile", "form", "registers", "stack", "cycles", "error")
    table = Table(*names)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    Console(width=150).print(table)
    _results.write(args.out, {**versions(), "rows": rows})


def configurations(targets: list[str]) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
    for target, head_dim in itertools.product(targets, HEAD_DIMS):
        architecture = int(target.removeprefix("sm_"))
        shipped = kernels.attention_tiles("fwd", head_dim, False, torch.bfloat16, architecture)
        sizes = tuple(shipped[name] for name in tiles.NAMES[2:])
        for tile in dict.fromkeys((sizes, *LARGER)):
            yield from ((target, head_dim, tile, form) for form in FORMS)


def variant(form: str, folder: Path) -> ModuleType:
    """The kernels, with the forward pass rewritten."""
    source = Path(kernels.__file__).read_text()
    begin, end = (source.index(f"def _attend_{name}_kernel") for name in ("fwd", "bwd_dq"))
    forward = source[begin:end]
    for old, new in FORMS[form]:
        assert forward.count(old) == 1, old
        forward = forward.replace(old, new)
    path = folder / f"attention_{list(FORMS).index(form)}.py"
    path.write_text(source[:begin] + forward + source[end:])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_variant(
    module: ModuleType, target: str, head_dim: int, tile: tuple[int, ...], timed: bool
) -> dict[str, Any] | None:
    with mock.patch.object(tiles, "kernels", module):
        try:
            row = tiles.rank(target, "fwd", head_dim, (kernels.head_pieces(head_dim), tile))
        except RuntimeError as error:
            return {"target": target, "head_dim": head_dim, "tile": tile, "error": str(error)}
        if row and timed:
            row["us"] = {f"{n} x {length}": tiles.time(row, length, n) for length, n in tiles.TIMED}
        return row


if __name__ == "__main__":
    main()
