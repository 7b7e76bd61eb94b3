"""The data model: which images or clips are packed into one sequence, and how.

Images of different sizes become one sequence of patches with no padding between them. A
``PackedGrid`` knows everything that follows from the sizes alone: where each image starts, which
tokens may attend to each other, and the row and column of every token. It is built on the host
once a batch, and every op that depends on the sizes takes it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchpack import _dispatch
from patchpack.packing import _pytree

_LIBRARY = torch.library.Library("patchpack", "FRAGMENT")
# a registered op, so that a grid can be built inside torch.compile: its lengths are data there
_LIBRARY.define(
    "grid_metadata(Tensor grid_thw, int spatial_merge_size, bool merge_temporal)"
    " -> (Tensor geometry, Tensor cu_seqlens, Tensor tokens, Tensor longest)"
)
_LIBRARY.define("merged_sizes(Tensor grid_thw, int merge_size) -> (Tensor sizes, Tensor tokens)")


def check_sizes(sizes: np.ndarray, spatial_merge_size: int | np.ndarray) -> None:
    """Sizes ``[G, 3]`` are of grids that can be: positive, whole in blocks, not too many tokens."""
    m = np.broadcast_to(spatial_merge_size, sizes.shape[0])
    for i in np.flatnonzero(m < 1)[:1]:
        raise ValueError(f"spatial_merge_size[{i}] must be at least 1, got {m[i]}")
    for i in np.flatnonzero((sizes < 1).any(axis=1))[:1]:
        raise ValueError(f"grid_thw[{i}] must be at least 1 on every axis, got {sizes[i].tolist()}")
    for i in np.flatnonzero((sizes[:, 1:] % m[:, None]).any(axis=1))[:1]:
        raise ValueError(
            f"grid_thw[{i}] must have rows and columns that divide by"
            f" spatial_merge_size={m[i]}, got {sizes[i].tolist()}"
        )
    # floats cannot wrap around, and 2**31 is far below what they count exactly
    num_tokens = sizes.astype(np.float64).prod(axis=1).sum()
    if num_tokens >= 2**31:
        raise ValueError(f"grid_thw must hold fewer than 2**31 tokens, got {num_tokens:.0f}")


# What follows from the sizes, on any device and without a wait: the host says how long a result is.


def bounds_of(counts: Tensor) -> Tensor:
    """Where runs of ``counts`` ``[G]`` things begin, and the last ends, int64 ``[G + 1]``."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def place_of(bounds: Tensor, num_things: int) -> tuple[Tensor, Tensor]:
    """In which run each thing is, and where in it, int64 ``[num_things]`` each.

    What is past the last run is in one of its own, number ``G``.
    """
    thing = torch.arange(num_things, device=bounds.device)
    run = torch.searchsorted(bounds[1:], thing, right=True)
    return run, thing - bounds[run]


def geometry_of(grid_thw: Tensor) -> Tensor:
    """First token, rows and columns of grids ``[G, 3]``, and a last row ``(T, 1, 1)``."""
    sides = torch.nn.functional.pad(grid_thw[:, 1:], (0, 0, 0, 1), value=1)
    return torch.cat([bounds_of(grid_thw.prod(dim=1))[:, None], sides], dim=1)


def cu_seqlens_of(geometry: Tensor, frames: Tensor, num_segments: int) -> Tensor:
    """Where frames begin and end, int32 ``[num_segments + 1]``; grids have ``frames`` ``[G]``."""
    grid, frame = place_of(bounds_of(frames), num_segments + 1)
    first, rows, cols = geometry.index_select(0, grid).unbind(dim=1)  # [num_segments + 1] each
    return (first + frame * rows * cols).clamp(max=geometry[-1, 0]).int()


def position_ids_of(
    geometry: Tensor,
    spatial_merge_size: int | Tensor,
    num_tokens: int,
    include_temporal: bool = False,
) -> Tensor:
    """Row and column of every token, ``[num_tokens, 2]``, or frame, row and column.

    ``spatial_merge_size`` is one for all grids, or one for each row of ``geometry``.
    """
    offsets, rows, cols = geometry.unbind(dim=1)  # [G + 1] each
    m = spatial_merge_size
    across = (cols // m).clamp(min=1)  # blocks; past the last grid there is none
    grid, token = place_of(offsets.contiguous(), num_tokens)
    area, across = torch.stack([rows * cols, across], dim=1).index_select(0, grid).unbind(dim=1)
    m = m[grid] if isinstance(m, Tensor) else m
    frame = [token // area] if include_temporal else []
    token = token % area
    block, token = token // (m * m), token % (m * m)
    row = block // across * m + token // m
    col = block % across * m + token % m
    return torch.stack([*frame, row, col], dim=1)


def _metadata(
    sizes: np.ndarray, spatial_merge_size: int, merge_temporal: bool
) -> tuple[Tensor, Tensor, int, int]:
    """Geometry, segments, number of tokens and length of the longest segment."""
    check_sizes(sizes, spatial_merge_size)
    frames, rows, cols = sizes.T
    in_frame = rows * cols
    in_segment = frames * in_frame if merge_temporal else in_frame
    grid_thw = torch.from_numpy(sizes)
    geometry = geometry_of(grid_thw)
    if merge_temporal:
        cu_seqlens = geometry[:, 0].int()
    else:
        cu_seqlens = cu_seqlens_of(geometry, grid_thw[:, 0], int(frames.sum()))
    num_tokens, longest = (frames * in_frame).sum(), in_segment.max(initial=0)
    return geometry, cu_seqlens, int(num_tokens), int(longest)


@torch.library.impl(_LIBRARY, "grid_metadata", "CPU")
def _(grid_thw: Tensor, spatial_merge_size: int, merge_temporal: bool):
    found = _dispatch.native("packed_grid", grid_thw, spatial_merge_size, merge_temporal)
    if found is not None:
        _, _, *found = found
    else:
        found = _metadata(grid_thw.numpy(), spatial_merge_size, merge_temporal)
    geometry, cu_seqlens, *numbers = found
    return geometry, cu_seqlens, *(torch.empty(n, 0, device="cpu") for n in numbers)


@torch.library.register_fake("patchpack::grid_metadata", lib=_LIBRARY)
def _(grid_thw: Tensor, spatial_merge_size: int, merge_temporal: bool):
    context = torch.library.get_ctx()
    return (
        grid_thw.new_empty(grid_thw.shape[0] + 1, 3),
        grid_thw.new_empty(context.new_dynamic_size(min=1), dtype=torch.int32),
        grid_thw.new_empty(context.new_dynamic_size(), 0, dtype=torch.float32),
        grid_thw.new_empty(context.new_dynamic_size(), 0, dtype=torch.float32),
    )


@torch.library.impl(_LIBRARY, "merged_sizes", "CPU")
def _(grid_thw: Tensor, merge_size: int):
    sizes = grid_thw.numpy()
    for i in np.flatnonzero((sizes[:, 1:] % merge_size).any(axis=1))[:1]:
        raise ValueError(
            f"grid must have rows and columns that divide by {merge_size},"
            f" got {sizes[i].tolist()} in grid_thw[{i}]"
        )
    merged = sizes // (1, merge_size, merge_size)
    return torch.from_numpy(merged), torch.empty(int(merged.prod(axis=1).sum()), 0, device="cpu")


@torch.library.register_fake("patchpack::merged_sizes", lib=_LIBRARY)
def _(grid_thw: Tensor, merge_size: int):
    num_tokens = torch.library.get_ctx().new_dynamic_size()
    sizes = grid_thw.new_empty(grid_thw.shape)
    return sizes, grid_thw.new_empty(num_tokens, 0, dtype=torch.float32)


def _merged_sizes(grid_thw: Tensor, merge_size: int) -> tuple[Tensor, int]:
    """Sizes after ``m x m`` tokens became one, and how many tokens that leaves."""
    found = _dispatch.native("merged_grid", grid_thw, merge_size)
    if found is not None:
        return found
    sizes, tokens = torch.ops.patchpack.merged_sizes(grid_thw, merge_size)
    return sizes, tokens.shape[0]


def _keepable() -> contextlib.AbstractContextManager:
    """Where tensors are made that a backward pass can keep."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return contextlib.nullcontext()


def is_integer(n: object) -> bool:
    """Whether ``n`` is an integer of Python or NumPy."""
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool)


def _merge_size(m: int, name: str = "spatial_merge_size") -> int:
    if not is_integer(m):
        raise TypeError(f"{name} must be an int, got {m!r}")
    if not 1 <= m < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2**31, got {m}")
    return int(m)


def _plain_numbers(rows: Sequence, widths: set[int]) -> list[int] | None:
    """All of ``rows``, if they are the usual: tuples or lists of one width, of small integers."""
    found = {*map(len, rows)} if {*map(type, rows)} <= {tuple, list} else set()
    if len(found) != 1 or not found <= widths:
        return None
    numbers = list(itertools.chain.from_iterable(rows))
    if {*map(type, numbers)} != {int} or min(numbers) <= -(2**31) or max(numbers) >= 2**31:
        return None
    return numbers


def _rows_of(sizes: Sequence[Sequence[int]]) -> np.ndarray:
    """Sizes as int64 ``[G, 3]``; a pair is a single frame."""
    if not isinstance(sizes, Iterable):
        raise TypeError(f"grid_thw must be rows of integers or a tensor, got {sizes!r}")
    sizes = list(sizes)
    numbers = _plain_numbers(sizes, {2, 3})
    if numbers is not None:
        plain = np.array(numbers, dtype=np.int64).reshape(len(sizes), -1)
        return plain if plain.shape[1] == 3 else np.insert(plain, 0, 1, axis=1)
    rows = []
    for i, size in enumerate(sizes):
        row = tuple(size) if isinstance(size, Iterable) else (size,)
        if not all(map(is_integer, row)):
            raise TypeError(f"grid_thw[{i}] must hold integers, got {row}")
        if len(row) not in (2, 3):
            raise ValueError(f"grid_thw[{i}] must be (t, h, w) or (h, w), got {row}")
        if max(map(abs, row)) >= 2**31:
            raise ValueError(f"grid_thw[{i}] must be below 2**31 on every axis, got {row}")
        rows.append((*(1,) * (3 - len(row)), *row))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def device_of(device: torch.device | str) -> torch.device:
    """``device`` as torch has it."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a device of torch, got {device!r}") from None


def _on_host(sizes: Tensor) -> Tensor:
    """Sizes as an int64 CPU tensor ``[G, 3]``; a pair is a single frame."""
    if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool:
        raise TypeError(f"grid_thw must have an integer dtype, got {sizes.dtype}")
    if sizes.ndim != 2 or sizes.shape[1] not in (2, 3):
        raise ValueError(f"grid_thw must have shape [G, 3] or [G, 2], got {list(sizes.shape)}")
    if sizes.is_meta:
        raise ValueError("grid_thw must hold values, got a tensor on meta")
    grid_thw = sizes.detach().to("cpu", torch.int64)
    if sizes.shape[1] == 2:
        return torch.cat([torch.ones_like(grid_thw[:, :1]), grid_thw], dim=1)
    return grid_thw.clone()


def _pairs_on_host(
    target_hw: Tensor | Sequence[int] | Sequence[Sequence[int]], num_grids: int
) -> Tensor:
    """Rows and columns as an int64 CPU tensor ``[G, 2]``."""
    if isinstance(target_hw, np.ndarray):
        target_hw = torch.from_numpy(np.array(target_hw))
    if not isinstance(target_hw, Tensor):
        if not isinstance(target_hw, (list, tuple)):
            raise TypeError(f"target_hw must be pairs of integers or a tensor, got {target_hw!r}")
        single = len(target_hw) > 0 and is_integer(target_hw[0])
        pairs: list[Any] = [target_hw] if single else list(target_hw)
        for pair in pairs:
            is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
            if not is_pair or not all(map(is_integer, pair)):
                raise TypeError(f"target_hw must hold pairs of integers, got {pair!r}")
            if max(map(abs, pair)) >= 2**31:
                raise ValueError(f"target_hw must be below 2**31 on every axis, got {pair}")
        plain = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        target_hw = torch.from_numpy(plain[0] if single else plain)
    if target_hw.is_floating_point() or target_hw.is_complex() or target_hw.dtype == torch.bool:
        raise TypeError(f"target_hw must have an integer dtype, got {target_hw.dtype}")
    if target_hw.device.type != "cpu":
        raise ValueError(f"target_hw must be on the CPU, got {target_hw.device}")
    if target_hw.shape not in ((2,), (num_grids, 2)):
        raise ValueError(
            f"target_hw must have shape [{num_grids}, 2] or [2], got {list(target_hw.shape)}"
        )
    return target_hw.to(torch.int64).expand(num_grids, 2)


@dataclass(frozen=True, eq=False, init=False)
class PackedGrid:
    """Images or clips packed into one sequence of patches.

    Args:
        grid_thw: Frames, rows and columns of each image or clip, in patches: rows of Python
            integers ``(t, h, w)``, or ``(h, w)`` for single images, or an integer tensor
            ``[G, 3]`` or ``[G, 2]``. A tensor on another device than the CPU costs one copy to the
            host, which waits for that device.
        spatial_merge_size: ``m``. With 1 the tokens of a frame are in raster order (row, column);
            with more, every ``m x m`` block of patches is contiguous: (row / m, column / m, m, m).
        merge_temporal: One attention segment a clip if true, one a frame otherwise.
        device: Where ``geometry``, ``cu_seqlens`` and ``position_ids`` live; by default the device
            of ``grid_thw``.

    Attributes:
        grid_thw: int64 ``[G, 3]``, on the CPU.
        num_tokens: ``T``, the length of the packed sequence, known on the host.
        max_seqlen: Tokens of the longest attention segment, known on the host.
        geometry: int64 ``[G + 1, 3]``, on ``device``: first token, rows and columns of each grid;
            the last row is ``(T, 1, 1)``. It is what kernels read.
        cu_seqlens: int32 ``[S + 1]``, on ``device``: where attention segments begin and end.
        block_size: As ``padded`` was told, ``None`` without padding.

    Raises:
        TypeError: ``grid_thw`` or ``spatial_merge_size`` does not hold integers, or
            ``merge_temporal`` is not a bool.
        ValueError: A shape does not fit, a size is below 1, rows or columns do not divide by
            ``spatial_merge_size``, or there are 2**31 tokens or more.
    """

    grid_thw: Tensor
    spatial_merge_size: int
    merge_temporal: bool
    device: torch.device
    num_tokens: int = field(init=False)
    max_seqlen: int = field(init=False)
    geometry: Tensor = field(init=False, repr=False)
    cu_seqlens: Tensor = field(init=False, repr=False)
    block_size: int | None = field(init=False)
    _sizes: Tensor = field(init=False, repr=False)
    _position_ids: Tensor | None = field(init=False, repr=False)
    _origin: Tensor | None = field(init=False, repr=False)  # sizes of what was resized to this
    _bounds: Tensor | None = field(init=False, repr=False)  # cu_seqlens on the host, if padded
    _lengths: tuple[Tensor, ...] | None = field(init=False, repr=False)  # numbers, for pytrees

    def __init__(
        self,
        grid_thw: Tensor | Sequence[Sequence[int]],
        spatial_merge_size: int = 1,
        merge_temporal: bool = False,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        m = _merge_size(spatial_merge_size)
        if not isinstance(merge_temporal, bool):
            raise TypeError(f"merge_temporal must be a bool, got {merge_temporal!r}")
        if isinstance(grid_thw, np.ndarray):
            grid_thw = torch.from_numpy(np.array(grid_thw))
        with _keepable():
            if isinstance(grid_thw, Tensor):
                device = grid_thw.device if device is None else device
                rows, sizes = None, _on_host(grid_thw)
            else:
                rows = _rows_of(grid_thw)
                sizes = torch.from_numpy(rows)
            self._build(sizes, rows, m, merge_temporal, "cpu" if device is None else device)

    def _build(
        self,
        sizes: Tensor,
        rows: np.ndarray | None,
        spatial_merge_size: int,
        merge_temporal: bool,
        device: torch.device | str,
    ) -> None:
        """Set all fields from ``sizes``, int64 ``[G, 3]`` on the CPU, and its ``rows`` if known."""
        arguments = sizes, spatial_merge_size, merge_temporal
        found = _dispatch.native("packed_grid", *arguments)
        if found is None:
            if rows is not None:
                found = _metadata(rows, spatial_merge_size, merge_temporal)
            else:
                *found, tokens, longest = torch.ops.patchpack.grid_metadata(*arguments)
                found += tokens.shape[0], longest.shape[0]
            found = sizes, sizes.clone(), *found
        self._set(found, spatial_merge_size, merge_temporal, device_of(device))

    def _set(
        self, found: tuple, spatial_merge_size: int, merge_temporal: bool, device: torch.device
    ) -> None:
        """Set all fields; of the sizes there are two, for kernels to trust and to look at."""
        sizes, grid_thw, geometry, cu_seqlens, num_tokens, max_seqlen = found
        if device.type != "cpu":
            geometry = geometry.to(device, non_blocking=True)
            cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        for name, value in (
            ("grid_thw", grid_thw),
            ("spatial_merge_size", spatial_merge_size),
            ("merge_temporal", merge_temporal),
            ("device", device),
            ("num_tokens", num_tokens),
            ("max_seqlen", max_seqlen),
            ("geometry", geometry),
            ("cu_seqlens", cu_seqlens),
            ("block_size", None),
            ("_sizes", sizes),
            ("_position_ids", None),
            ("_origin", None),
            ("_bounds", None),
            ("_lengths", None),
        ):
            object.__setattr__(self, name, value)  # torch 2.10 can trace no other way

    def _like(self, sizes: Tensor, spatial_merge_size: int, device: torch.device) -> PackedGrid:
        """A grid of other ``sizes``, which become its own."""
        grid = object.__new__(PackedGrid)
        grid._build(sizes, None, spatial_merge_size, self.merge_temporal, device)
        return grid

    @property
    def num_grids(self) -> int:
        """``G``, the number of images and clips."""
        return self.grid_thw.shape[0]

    @property
    def num_segments(self) -> int:
        """``S``, the number of attention segments."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def position_ids(self) -> Tensor:
        """Row and column of every token, int64 ``[T, 2]``, in patches; built once, no sync."""
        if torch.compiler.is_compiling():  # whether they are built is nothing to compile twice for
            return self._make_position_ids()
        position_ids = self._position_ids
        if position_ids is None:
            with _keepable():
                position_ids = self._make_position_ids()
            object.__setattr__(self, "_position_ids", position_ids)
        return position_ids

    def _make_position_ids(self) -> Tensor:
        m = self.spatial_merge_size
        if type(self.geometry) is Tensor and self.geometry.is_cpu:
            found = _dispatch.native("vision_position_ids", self._sizes, m, None, False, None)
            if found is not None:
                return found
        return position_ids_of(self.geometry, m, self.num_tokens)

    def num_blocks(self, size: int) -> int:
        """How many blocks of ``size x size`` tokens the maps are made of, known on the host.

        Raises:
            TypeError: ``size`` is no integer.
            ValueError: Rows or columns do not divide by ``size``.
        """
        size = _merge_size(size, "size")
        if (self.block_size or self.spatial_merge_size) % size == 0:  # checked when it was built
            return self.num_tokens // size**2
        if self.block_size is not None:
            raise ValueError(
                f"grid must be padded with a block_size that divides by {size},"
                f" got {self.block_size}"
            )
        return _merged_sizes(self._sizes, size)[1]

    def merged(self, merge_size: int | None = None) -> PackedGrid:
        """The grid after every ``m x m`` block of patches became one token, in raster order.

        Args:
            merge_size: ``m``, for any order of the patches; by default their
                ``spatial_merge_size``, which merges nothing if they are in raster order.

        Raises:
            TypeError: ``merge_size`` is no integer.
            ValueError: Rows or columns do not divide by ``merge_size``.
        """
        m = self.spatial_merge_size if merge_size is None else _merge_size(merge_size, "merge_size")
        with _keepable():
            if self.block_size is not None:
                return self._merged_padded(m)
            sizes, _ = _merged_sizes(self._sizes, m)
            return self._like(sizes, 1, self.geometry.device)

    def padded(
        self,
        num_tokens: int,
        num_grids: int,
        num_segments: int | None = None,
        *,
        block_size: int | None = None,
    ) -> PackedGrid:
        """The grid with padding, so that its tensors have the shapes of what there is room for.

        Ops and models then see the same shapes for every batch that fits, which is what a CUDA
        graph needs, and ``torch.compile`` compiles once; ``copy_`` puts the values of another batch
        where those of this one are. The tokens of the batch come first. The rest is of images that
        are in no attention segment: whatever finite values it holds, it gives finite values, and
        gradients of 0 if nothing is made of what it gives. Tokens of the batch get the bits from
        every op that they get without padding; gradients that images share are the same up to the
        order of sums.

        Choose ``num_tokens`` for the batches that are common: a sequence packed to at most ``n``
        tokens, of at most ``num_grids`` images, needs ``n + (num_grids + 1) * block_size**2``.
        Where batches differ a lot, make a few budgets and take the smallest that a batch fits.

        Args:
            num_tokens: Tokens in all. There is at least one block of padding for each image that
                is missing from ``num_grids``, and one more.
            num_grids: Images and clips there is room for. The result has one more: what is left of
                ``num_tokens`` is a last image, ``block_size`` rows high.
            num_segments: Attention segments there is room for: by default ``num_grids``, which is
                enough for images of one frame. Those that are missing are empty.
            block_size: Side of the largest square of tokens that ops will make one token of; by
                default ``spatial_merge_size``. All rows and columns divide by it.

        Returns:
            The padded grid, on the same device. ``max_seqlen`` is ``num_tokens``. It can be merged;
            a grid is resized before it is padded, and ``patchify`` takes the one without padding.

        Raises:
            TypeError: A number is no integer.
            ValueError: The batch does not fit, a number does not divide, or the grid is padded.
        """
        if self.block_size is not None:
            raise ValueError("a padded grid cannot be padded again")
        num_segments = num_grids if num_segments is None else num_segments
        block_size = self.spatial_merge_size if block_size is None else block_size
        b = _merge_size(block_size, "block_size")
        missing = num_grids - self.num_grids
        for name, room, least in (
            ("num_grids", num_grids, self.num_grids),
            ("num_segments", num_segments, self.num_segments),
            ("num_tokens", num_tokens, self.num_tokens + (missing + 1) * b * b),
        ):
            if not is_integer(room):
                raise TypeError(f"{name} must be an int, got {room!r}")
            if room < least:
                raise ValueError(f"{name} must be at least {least} for this batch, got {room}")
        if b % self.spatial_merge_size:
            raise ValueError(
                f"block_size must divide by spatial_merge_size={self.spatial_merge_size}, got {b}"
            )
        for i in np.flatnonzero((self._sizes.numpy()[:, 1:] % b).any(axis=1))[:1]:
            raise ValueError(
                f"grid must have rows and columns that divide by block_size={b},"
                f" got {self._sizes[i].tolist()} in grid_thw[{i}]"
            )
        if num_tokens % (b * b):
            raise ValueError(f"num_tokens must divide by block_size**2 = {b * b}, got {num_tokens}")
        rest = num_tokens - self.num_tokens - missing * b * b
        with _keepable():
            padding = [(1, b, b)] * missing + [(1, b, rest // b)]
            sizes = torch.cat([self._sizes, torch.tensor(padding, device="cpu")])
            bounds = self.to("cpu").cu_seqlens
            bounds = torch.nn.functional.pad(
                bounds, (0, num_segments - self.num_segments), value=self.num_tokens
            )
            return self._like_padded(sizes, bounds, b, self.geometry.device)

    def _like_padded(
        self, sizes: Tensor, bounds: Tensor, block_size: int, device: torch.device
    ) -> PackedGrid:
        """A grid of ``sizes`` whose segments, with the ``bounds`` of the host, leave some out."""
        grid = self._like(sizes, self.spatial_merge_size, device)
        grid._pad(bounds, bounds.to(device, non_blocking=True, copy=True), block_size)
        return grid

    def _pad(self, bounds: Tensor, cu_seqlens: Tensor, block_size: int) -> None:
        for name, value in (
            ("max_seqlen", self.num_tokens),
            ("cu_seqlens", cu_seqlens),
            ("block_size", block_size),
            ("_bounds", bounds),
        ):
            object.__setattr__(self, name, value)

    def _merged_padded(self, m: int) -> PackedGrid:
        """As ``merged``, in a CUDA graph too: what is on the device follows from what is there."""
        num_tokens = self.num_blocks(m)  # where that is found, all sides divide by m
        sizes = self._sizes // torch.tensor([1, m, m], device="cpu")
        first, rows, cols = self.geometry.unbind(dim=1)
        found = (
            sizes,
            sizes.clone(),
            torch.stack([first // m**2, (rows // m).clamp(min=1), (cols // m).clamp(min=1)], dim=1),
            self.cu_seqlens // m**2,
            num_tokens,
            num_tokens,
        )
        grid = object.__new__(PackedGrid)
        grid._set(found, 1, self.merge_temporal, self.geometry.device)
        assert self._bounds is not None
        assert self.block_size is not None
        grid._pad(self._bounds // m**2, grid.cu_seqlens, self.block_size // m)
        return grid

    def copy_(self, grid: PackedGrid) -> PackedGrid:
        """Make this padded grid the one of another batch, in place.

        A CUDA graph that was captured with this grid and is replayed then computes that batch.
        Between a forward pass and its backward pass autograd refuses it, as for any tensor.

        Args:
            grid: The other batch, without padding, in the same order of tokens.

        Returns:
            This grid.

        Raises:
            TypeError: ``grid`` is no ``PackedGrid``.
            ValueError: This grid has no padding, or ``grid`` has some, is in another order, has
                other segments or does not fit. Nothing was written then.
        """
        if self.block_size is None:
            raise ValueError("a grid must be padded to be copied to: use grid.padded(...)")
        if not isinstance(grid, PackedGrid):
            raise TypeError(f"grid must be a PackedGrid, got {type(grid).__name__}")
        for name in ("spatial_merge_size", "merge_temporal"):
            want, got = getattr(self, name), getattr(grid, name)
            if want != got:
                raise ValueError(f"grid must have {name}={want}, got {got}")
        room = self.num_tokens, self.num_grids - 1, self.num_segments
        other = grid.padded(*room, block_size=self.block_size)
        for name in ("grid_thw", "geometry", "cu_seqlens", "_sizes", "_bounds"):
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)
        if self._position_ids is not None:
            self._position_ids.copy_(self._make_position_ids())
        return self

    def resized(
        self,
        target_hw: Tensor | Sequence[int] | Sequence[Sequence[int]] | PackedGrid,
        spatial_merge_size: int | None = None,
    ) -> PackedGrid:
        """The grid after the frames of every image or clip were resized.

        Args:
            target_hw: New rows and columns: an integer tensor ``[G, 2]`` on the CPU, rows of Python
                integers, or one pair for all; or what this method returned for them.
            spatial_merge_size: Order of the new tokens; by default that of this grid, or of the
                grid that ``target_hw`` is.

        Raises:
            TypeError: ``target_hw`` does not hold integers.
            ValueError: ``target_hw`` has another shape, is not on the CPU, gives a grid that cannot
                be, or is a grid of other frames, in another order, on another device or padded
                where this one is not; or this grid is padded and ``target_hw`` is no grid.
        """
        if isinstance(target_hw, PackedGrid):
            return self._checked(target_hw, spatial_merge_size)
        if self.block_size is not None:
            raise ValueError("grid must be resized before it is padded: then pad both")
        m = self.spatial_merge_size if spatial_merge_size is None else spatial_merge_size
        m = _merge_size(m)
        numbers = _plain_numbers(target_hw, {2}) if isinstance(target_hw, (list, tuple)) else None
        with _keepable():
            if numbers is not None:
                arguments = self._sizes, numbers, m, self.merge_temporal
                found = _dispatch.native("resized_grid", *arguments)
                if found is not None:
                    grid = object.__new__(PackedGrid)
                    grid._set(found, m, self.merge_temporal, self.geometry.device)
                    object.__setattr__(grid, "_origin", self._sizes)
                    return grid
                target_hw = torch.tensor(numbers, device="cpu").view(-1, 2)
            pairs = _pairs_on_host(target_hw, self.num_grids)
            sizes = torch.cat([self._sizes[:, :1], pairs], dim=1)
            try:
                return self._like(sizes, m, self.geometry.device)
            except ValueError as error:
                raise ValueError(f"target_hw does not fit: {error}") from None

    def _checked(self, target: PackedGrid, spatial_merge_size: int | None) -> PackedGrid:
        """``target``, if it can be this grid after its frames were resized."""
        m = target.spatial_merge_size if spatial_merge_size is None else spatial_merge_size
        if _merge_size(m) != target.spatial_merge_size:
            raise ValueError(
                f"target_hw must be a grid of spatial_merge_size={m},"
                f" got {target.spatial_merge_size}"
            )
        if target.geometry.device != self.geometry.device:
            raise ValueError(
                f"target_hw must be on the device of grid, {self.geometry.device},"
                f" got {target.geometry.device}; use target_hw.to(...)"
            )
        if (target.block_size is None) != (self.block_size is None):
            raise ValueError("target_hw must be padded if grid is, and only then")
        if torch.compiler.is_compiling():  # there are no values to compare
            if self.block_size is not None:
                torch._check(target.num_grids == self.num_grids)
                return target
            # it is made of this one's
            return self.resized(target._sizes[:, 1:], m)
        if target._origin is not self._sizes and type(target._sizes) is Tensor:
            frames, want = target._sizes.numpy()[:, 0], self._sizes.numpy()[:, 0]
            if not np.array_equal(frames, want):
                raise ValueError(
                    f"target_hw must be a grid of the frames of grid, {want.tolist()},"
                    f" got {frames.tolist()}"
                )
        return target

    def to(self, device: torch.device | str) -> PackedGrid:
        """The same grid with its device tensors on ``device``; itself if they are there."""
        device = torch.empty(0, device=device_of(device)).device  # "cuda" becomes "cuda:0"
        if device == self.geometry.device:
            return self
        # built anew from what the host knows: no device is waited for
        with _keepable():
            if self.block_size is not None and self._bounds is not None:
                return self._like_padded(self._sizes, self._bounds, self.block_size, device)
            return self._like(self._sizes, self.spatial_merge_size, device)

    def validate(self) -> None:
        """Check that all tensors say what the grid was built from. Waits for the device.

        Raises:
            ValueError: A tensor was changed after the grid was built.
        """
        cpu = torch.device("cpu")
        fresh = self._like(self._sizes, self.spatial_merge_size, cpu)
        if self.block_size is not None and self._bounds is not None:
            fresh = self._like_padded(self._sizes, self._bounds, self.block_size, cpu)
        for name in ("grid_thw", "geometry", "cu_seqlens", "position_ids"):
            want, got = getattr(fresh, name), getattr(self, name).cpu()
            if want.shape != got.shape:
                raise ValueError(
                    f"{name} must have shape {list(want.shape)}, got {list(got.shape)}"
                )
            for row in (want != got).nonzero()[:1, 0].tolist():
                raise ValueError(
                    f"{name}[{row}] must be {want[row].tolist()}, got {got[row].tolist()}"
                )


_pytree.register(
    PackedGrid,
    tensors=("grid_thw", "geometry", "cu_seqlens", "_sizes", "_bounds"),
    numbers=("num_tokens", "max_seqlen"),
    options=("spatial_merge_size", "merge_temporal", "block_size"),
    rest=lambda grid: {
        "device": getattr(grid.geometry, "device", None),
        "_position_ids": None,
        "_origin": None,
    },
)


def validate_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Check the values of ``cu_seqlens``, which ops do not read. Waits for the device.

    Args:
        cu_seqlens: Where segments begin and end, int32 ``[S + 1]``, in tokens.
        num_tokens: Length of the packed sequence; the last segment may end before it.

    Raises:
        TypeError: It is no int32 tensor of one dimension, or ``num_tokens`` no integer.
        ValueError: It does not start at 0, decreases, or ends past ``num_tokens``.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if not is_integer(num_tokens):
        raise TypeError(f"num_tokens must be an int, got {num_tokens!r}")
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start with 0, got {bounds[:1]}")
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end < begin:
            raise ValueError(f"cu_seqlens must not decrease, got {begin}, {end} at {i}")
    if bounds[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens must end at or before num_tokens={num_tokens}, got {bounds[-1]}"
        )
