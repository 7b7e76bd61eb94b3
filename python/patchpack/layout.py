"""How maps of tokens and learned vectors become one sequence.

A language model reads a map row by row, often with a learned vector at the end of every row,
between two maps, or around all of them. A ``TokenLayout`` says in which order, which tiles make up
a map, which part of it is kept and to which size that is resized. It is built on the host once a
batch, and ``patchpack.assemble`` follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from patchpack.packing import _pytree, is_integer
from patchpack.packing._grid import device_of


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A map of tokens, made of tiles: cropped, then resized, then written row by row.

    Attributes:
        first: Row of ``tokens`` where the map begins.
        tile_hw: Rows and columns of a tile, in tokens. Its tokens are in raster order.
        tiles_hw: Rows and columns of tiles. They are in raster order too, one after the other.
        crop: What is kept of the map, ``(top, left, height, width)`` in tokens; by default all.
        target_hw: Rows and columns after what is kept was resized, bilinearly, without antialiasing
            and with the corners of cells aligned; by default its own.
        newline: Index of the vector that ends every row, or ``None``.
    """

    first: int
    tile_hw: tuple[int, int]
    tiles_hw: tuple[int, int] = (1, 1)
    crop: tuple[int, int, int, int] | None = None
    target_hw: tuple[int, int] | None = None
    newline: int | None = None


@dataclass(frozen=True, slots=True)
class Vector:
    """A learned vector, one row of the sequence.

    Attributes:
        index: Which of ``vectors``.
    """

    index: int


def _integers(i: int, part: FeatureMap | Vector, name: str, count: int) -> tuple[int, ...]:
    """The attribute ``name`` of a part: so many integers, or one."""
    value = getattr(part, name)
    values = value if isinstance(value, (list, tuple)) else (value,)
    if len(values) != count or not all(map(is_integer, values)):
        what = "an integer" if count == 1 else f"{count} integers"
        raise TypeError(f"parts[{i}].{name} must be {what}, got {value!r}")
    return tuple(values)


def _index(i: int, part: FeatureMap | Vector, name: str) -> int:
    """Which vector, from 0."""
    (index,) = _integers(i, part, name, 1)
    if index < 0:
        raise ValueError(f"parts[{i}].{name} must not be negative, got {index}")
    return index


def _numbers_of(i: int, part: FeatureMap | Vector) -> tuple[int, ...]:
    """A part as a row of ``TokenLayout.table``: a vector is a row of no columns and its end."""
    if isinstance(part, Vector):
        return (0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, _index(i, part, "index"))
    if not isinstance(part, FeatureMap):
        raise TypeError(f"parts[{i}] must be a FeatureMap or a Vector, got {part!r}")
    first = _integers(i, part, "first", 1)
    tile = _integers(i, part, "tile_hw", 2)
    tiles = _integers(i, part, "tiles_hw", 2)
    if part.crop is None:
        crop = (0, 0, tile[0] * tiles[0], tile[1] * tiles[1])
    else:
        crop = _integers(i, part, "crop", 4)
    target = crop[2:] if part.target_hw is None else _integers(i, part, "target_hw", 2)
    newline = -1 if part.newline is None else _index(i, part, "newline")
    return (*first, *tile, *tiles, *crop, *target, newline)


def _checked(parts: Sequence[FeatureMap | Vector]) -> np.ndarray:
    """All parts as int64 ``[P, 12]``: sizes are above zero, crops within their maps."""
    numbers = np.array([_numbers_of(i, part) for i, part in enumerate(parts)]).reshape(-1, 12)
    for i in np.flatnonzero((np.abs(numbers) >= 2**31).any(axis=1))[:1]:
        raise ValueError(f"parts[{i}] must hold numbers below 2**31, got {parts[i]}")
    numbers = numbers.astype(np.int64)
    is_map = np.array([isinstance(part, FeatureMap) for part in parts], dtype=bool)
    first, tile, tiles, start, size, target, _ = np.split(numbers, [1, 3, 5, 7, 9, 11], axis=1)
    for name, bad, what in (
        ("first", first < 0, "not be negative"),
        ("tile_hw", tile < 1, "be at least 1"),
        ("tiles_hw", tiles < 1, "be at least 1"),
        ("crop", (start < 0) | (size < 1) | (start + size > tile * tiles), "be inside the map"),
        ("target_hw", target < 1, "be at least 1"),
    ):
        for i in np.flatnonzero(bad.any(axis=1) & is_map)[:1]:
            raise ValueError(f"parts[{i}].{name} must {what}, got {getattr(parts[i], name)}")
    return numbers


def _count(name: str, number: float) -> int:
    """A number that was computed as a float, which does not wrap around."""
    if number >= 2**31:
        raise ValueError(f"parts must have fewer than 2**31 {name}, got {number:.0f}")
    return int(number)


@dataclass(frozen=True, eq=False, init=False)
class TokenLayout:
    """Parts of a sequence, in order: maps and learned vectors.

    An image of LLaVA-OneVision, for example, is ``[FeatureMap(0, (27, 27)), FeatureMap(729,
    (27, 27), tiles_hw, crop, target_hw, newline=0)]``, and one of Oryx ``[Vector(1),
    FeatureMap(0, low_hw, newline=0), Vector(3), FeatureMap(n, high_hw, newline=0), Vector(2)]``.

    Args:
        parts: What the sequence consists of. Maps may come in another order than their tokens, and
            leave some out, but share none.
        device: Where ``table`` and ``maps`` live; by default the CPU.

    Attributes:
        parts: What it was built from.
        num_tokens: Length of the sequence.
        num_source_tokens: The least number of tokens that hold all maps.
        num_vectors: The least number of vectors that the parts name.
        table: int64 ``[P + 1, 13]``, on ``device``. Of each part its first row of the sequence and
            first token, rows and columns of a tile, rows and columns of tiles, top, left, height
            and width of the crop, rows and columns after resizing, and the vector that ends a row,
            or -1. A vector is a map of one row and no columns. The last row is the end.
        maps: int64 ``[M + 1, 3]``, on ``device``: first token, part and number of tokens of each
            map, in the order of their tokens. The last row is the end.

    Raises:
        TypeError: A part is none, or does not hold integers.
        ValueError: A size is below 1, an index negative or a crop outside its map, two maps share a
            token, or there are 2**31 tokens or more.
    """

    parts: tuple[FeatureMap | Vector, ...]
    num_tokens: int = field(init=False)
    num_source_tokens: int = field(init=False)
    num_vectors: int = field(init=False)
    table: Tensor = field(init=False, repr=False)
    maps: Tensor = field(init=False, repr=False)
    _on_host: tuple[Tensor, Tensor] = field(init=False, repr=False)
    _lengths: tuple[Tensor, ...] | None = field(init=False, repr=False)  # numbers, for pytrees

    def __init__(
        self,
        parts: Iterable[FeatureMap | Vector],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(parts, Iterable):
            raise TypeError(f"parts must be FeatureMaps and Vectors, got {parts!r}")
        parts = tuple(parts)
        numbers = _checked(parts)
        rows, cols, newline = numbers[:, 9:].T
        widths = cols + (newline >= 0)
        num_tokens = _count("tokens", (rows.astype(np.float64) * widths).sum())
        begins = np.concatenate([[0], np.cumsum(rows * widths)])

        part = np.flatnonzero(cols)
        part = part[np.argsort(numbers[part, 0], kind="stable")]
        first = numbers[part, 0]
        ends = first + numbers[part, 1:5].astype(np.float64).prod(axis=1)
        num_source_tokens = _count("tokens of maps", ends.max(initial=0))
        for i in np.flatnonzero(first[1:] < ends[:-1])[:1]:
            one, other = sorted(part[i : i + 2])
            raise ValueError(f"parts[{one}] and parts[{other}] must not share tokens")
        end = (num_source_tokens, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, -1)
        table = np.column_stack([begins, np.vstack([numbers, end])])
        maps = np.column_stack([first, part, ends.astype(np.int64) - first])
        maps = np.vstack([maps, (num_source_tokens, len(parts), 0)])

        with torch.inference_mode(False):  # or no backward pass could keep these tensors
            on_host = torch.from_numpy(table), torch.from_numpy(maps)
            self._set(
                parts=parts,
                num_tokens=num_tokens,
                num_source_tokens=num_source_tokens,
                num_vectors=int(newline.max(initial=-1)) + 1,
                _on_host=on_host,
                _lengths=None,
            )
            self._copy_to(device_of("cpu" if device is None else device))

    def _set(self, **fields) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _copy_to(self, device: torch.device) -> None:
        table, maps = (x.to(device, non_blocking=True, copy=True) for x in self._on_host)
        self._set(table=table, maps=maps)

    @classmethod
    def cat(cls, layouts: Iterable[TokenLayout]) -> TokenLayout:
        """One layout after the other, on the device of the first.

        Their tokens follow each other likewise: each layout begins ``num_source_tokens`` after the
        one before it. Their vectors are the same.

        Raises:
            TypeError: There is something else than layouts.
        """
        if not isinstance(layouts, Iterable):
            raise TypeError(f"layouts must be TokenLayouts, got {type(layouts).__name__}")
        layouts = list(layouts)
        for i, layout in enumerate(layouts):
            if not isinstance(layout, TokenLayout):
                raise TypeError(f"layouts[{i}] must be a TokenLayout, got {type(layout).__name__}")
        shifts = accumulate((layout.num_source_tokens for layout in layouts), initial=0)
        parts = [
            replace(part, first=part.first + shift) if isinstance(part, FeatureMap) else part
            for layout, shift in zip(layouts, shifts, strict=False)
            for part in layout.parts
        ]
        return cls(parts, device=layouts[0].table.device if layouts else None)

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with its tensors on ``device``; itself if they are there."""
        device = torch.empty(0, device=device_of(device)).device  # "cuda" becomes "cuda:0"
        if device == self.table.device:
            return self
        moved = copy.copy(self)
        with torch.inference_mode(False):
            moved._copy_to(device)
        return moved


_pytree.register(
    TokenLayout,
    tensors=("table", "maps"),
    numbers=("num_tokens", "num_source_tokens", "num_vectors"),
    rest=lambda layout: {"parts": (), "_on_host": (layout.table, layout.maps)},
)
torch.serialization.add_safe_globals([FeatureMap, Vector])


def validate_index(index: Tensor, num_rows: int) -> None:
    """Check the values of ``index``, which ``scatter_tokens`` does not read. Waits for the device.

    Args:
        index: Which rows are replaced, int64 or int32 ``[N]``.
        num_rows: How many rows there are.

    Raises:
        TypeError: It is no integer tensor of one dimension, or ``num_rows`` no integer.
        ValueError: It names a row twice, or one that is not there.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index must be int64 or int32 [N], got {index.dtype} {list(index.shape)}")
    if not is_integer(num_rows):
        raise TypeError(f"num_rows must be an int, got {num_rows!r}")
    rows = index.cpu()
    for i in ((rows < 0) | (rows >= num_rows)).nonzero()[:1, 0].tolist():
        raise ValueError(f"index[{i}] must be a row of num_rows={num_rows}, got {int(rows[i])}")
    ordered = rows.sort().values
    for row in ordered[1:][ordered.diff() == 0][:1].tolist():
        raise ValueError(f"index must name every row once at most, got {row} twice")
