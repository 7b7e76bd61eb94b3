"""Images encoded where there is least to do, and their tokens brought home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchpack import PackedGrid, _check
from patchpack.distributed._collectives import check_group, exchange
from patchpack.packing import balance, is_integer, vit_flops

Size = tuple[int, int, int]


@dataclass(frozen=True)
class _Image:
    """An image as ``vit_flops`` takes it."""

    grids: tuple[Size, ...]


def encode_images(
    encoder: Callable[[Tensor, PackedGrid], Any],
    pixels: Tensor,
    grid: PackedGrid,
    *,
    group: dist.ProcessGroup | None = None,
    sizes: Sequence[Sequence[Size]] | None = None,
    cost: Callable[[Size], float] | None = None,
    merge_size: int | None = None,
) -> Any:
    """Encode the images of all ranks, shared out by what they cost, and bring their tokens home.

    Every rank has images of its own. ``packing.balance`` says from the sizes of all which rank
    encodes which; patches go there and tokens come back, an all-to-all each. Every rank calls this,
    with images or without, and every rank takes part in the backward pass, so that its loss has to
    depend on the tokens, be they none. A rank that gets no image encodes an empty sequence: the
    collectives of FSDP or DDP run there as everywhere, and gradients are exactly 0.

    Args:
        encoder: The vision tower, ``encoder(pixels, grid)``, such as a ``NativeViT``: it gives
            tokens ``[T / m^2, C]`` in the order of the images, or a tuple of them and a list of
            more, as deepstack does. With the same weights on every rank, or sharded by
            ``fully_shard``.
        pixels: Patches of this rank's images, ``[T, P]``, floating; ``P`` and the dtype are the
            same on all ranks, and so is whether they require a gradient.
        grid: Which images they are. Orders are the same on all ranks.
        group: The ranks that share images out; by default all.
        sizes: Frames, rows and columns of the images of every rank, in patches, the same on every
            rank; ``sizes[rank]`` is ``grid.grid_thw``. By default ranks tell each other, which
            costs a collective of Python objects, and under NCCL a wait for the device.
        cost: What an image of ``(t, h, w)`` patches costs, in any unit; by default
            ``packing.vit_flops``.
        merge_size: ``m``: how many rows and columns of patches leave as one token; by default
            ``spatial_merge_size`` of ``grid``.

    Returns:
        What ``encoder`` gives of this rank's images, in their order, with the bits that it gives
        them anywhere, if its matrix products do not depend on how many tokens they have.
        Differentiable in the weights of ``encoder``, and in ``pixels``, where ops are. Gradients of
        the weights are of the images that were encoded here: summed over ranks they are those of
        one rank with all images, up to the order of sums.

    Raises:
        ValueError: A shape, ``sizes`` or ``merge_size`` does not fit, a cost is negative or not
            finite, or there is no process group.
        TypeError: An argument has the wrong type.

    The plan is made on the host, the same on every rank.
    """
    group = check_group(group)
    rank = group.rank()
    if not callable(encoder):
        raise TypeError(f"encoder must be callable, got {type(encoder).__name__}")
    _check.shape("pixels", pixels, None, None)
    _check.grid_of("pixels", pixels, grid)
    m = grid.spatial_merge_size if merge_size is None else merge_size
    (m,) = _check.whole(merge_size=m)
    grid.num_blocks(m)
    own = [(t, h, w) for t, h, w in grid.grid_thw.tolist()]
    everywhere = _gather(own, group) if sizes is None else _check_sizes(sizes, own, group)

    images = [(home, size) for home, held in enumerate(everywhere) for size in held]
    costs = [cost(size) if cost else vit_flops(_Image((size,))) for _, size in images]
    shares = balance(images, group.size(), costs).ranks
    patches = [t * h * w for _, (t, h, w) in images]

    first = sum(len(held) for held in everywhere[:rank])
    leaving = [[i for i in share if images[i][0] == rank] for share in shares]  # by destination
    order = [i - first for part in leaving for i in part]
    coming = [[i for i in shares[rank] if images[i][0] == home] for home in range(group.size())]
    send, receive = ([sum(patches[i] for i in part) for part in way] for way in (leaving, coming))

    # ranks have their images one after the other, so what comes from them in turn is in order
    packed = exchange(_ordered(pixels, patches[first:], order), send, receive, group)
    there = [images[i][1] for i in shares[rank]]
    there = PackedGrid(there, grid.spatial_merge_size, grid.merge_temporal, device=pixels.device)
    found = encoder(packed, there)
    tokens, more = found if isinstance(found, tuple) else (found, [])
    wide = torch.cat([tokens, *more], dim=1) if more else tokens
    if wide.shape[0] * m * m != there.num_tokens:
        raise ValueError(
            f"merge_size must be such that encoder gives {there.num_tokens // (m * m)} tokens of"
            f" {there.num_tokens} patches, got {m} where it gives {wide.shape[0]}"
        )
    send, receive = ([n // (m * m) for n in way] for way in (receive, send))
    wide = exchange(wide, send, receive, group)
    back = sorted(range(len(order)), key=order.__getitem__)
    wide = _ordered(wide, [patches[first + i] // (m * m) for i in order], back)
    if not isinstance(found, tuple):
        return wide
    tokens, *more = wide.split([x.shape[1] for x in (tokens, *more)], dim=1)
    return tokens, more


def _ordered(x: Tensor, lengths: Sequence[int], order: Sequence[int]) -> Tensor:
    """The runs of ``lengths`` rows of ``x`` in another order, in one copy."""
    if list(order) == list(range(len(order))):
        return x
    runs = x.split(lengths[: len(order)])
    return torch.cat([runs[i] for i in order])


def _gather(own: list[Size], group: dist.ProcessGroup) -> list[list[Size]]:
    """The sizes of the images of every rank."""
    everywhere: list[Any] = [None] * group.size()
    dist.all_gather_object(everywhere, own, group)
    return everywhere


def _check_sizes(
    sizes: Sequence[Sequence[Size]], own: list[Size], group: dist.ProcessGroup
) -> list[list[Size]]:
    """``sizes`` are of every rank, and of this rank those of its grid."""
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(f"sizes must be a list of sizes for each rank, got {type(sizes).__name__}")
    if len(sizes) != group.size():
        raise ValueError(f"sizes must be those of {group.size()} ranks, got {len(sizes)}")
    for rank, held in enumerate(sizes):
        for i, size in enumerate(held):
            whole = isinstance(size, (list, tuple)) and all(map(is_integer, size))
            if not whole or len(size) != 3 or min(size) < 1:
                raise ValueError(f"sizes[{rank}][{i}] must be (t, h, w) of 1 or more, got {size!r}")
    everywhere = [[(int(t), int(h), int(w)) for t, h, w in held] for held in sizes]
    if everywhere[group.rank()] != own:
        raise ValueError(
            f"sizes[{group.rank()}] must be those of grid, {own}, got {everywhere[group.rank()]}"
        )
    return everywhere
