"""Samples into sequences of bounded length: best fit, longest first.

Every sample goes where it leaves the least room, after all that are longer. With token counts far
below the limit this wastes next to nothing; at worst it takes 11/9 of the fewest sequences that
there can be, and four more (Johnson, Demers, Ullman, Garey and Graham, "Worst-case performance
bounds for simple one-dimensional packing algorithms", SIAM J. Comput. 3, 1974).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from patchpack.packing._grid import is_integer


class _Plan(Protocol):
    @property
    def total_tokens(self) -> int: ...


@dataclass(frozen=True)
class Packing:
    """Which samples share a sequence.

    Attributes:
        bins: The samples of every sequence, as indices in ascending order; sequences are in the
            order of their first samples.
        lengths: Tokens in every sequence.
        max_tokens: The most that a sequence may hold.
    """

    bins: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    max_tokens: int

    @property
    def num_sequences(self) -> int:
        """How many sequences there are."""
        return len(self.bins)

    @property
    def fill(self) -> float:
        """Tokens, of what the sequences could hold; 1 where there are none."""
        capacity = self.num_sequences * self.max_tokens
        return sum(self.lengths) / capacity if capacity else 1.0


def pack(plans: Iterable[_Plan | int | Sequence[_Plan | int]], max_tokens: int = 16384) -> Packing:
    """Put samples into few sequences of at most ``max_tokens``. Samples are never split.

    Equal input gives equal output. No two of the sequences fit into one.

    Args:
        plans: One entry a sample: its plan (whose ``total_tokens`` counts), its number of tokens,
            or a sequence of these for a sample of several images.
        max_tokens: The most tokens of a sequence.

    Returns:
        Every sample in one sequence.

    Raises:
        TypeError: An entry is none of these, or ``max_tokens`` is not an integer.
        ValueError: A sample has more than ``max_tokens`` or less than none, or ``max_tokens`` is
            below 1.
    """
    if not is_integer(max_tokens):
        raise TypeError(f"max_tokens must be an integer, got {max_tokens!r}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not isinstance(plans, Iterable):
        raise TypeError(f"plans must be a sequence of samples, got {type(plans).__name__}")
    tokens = [_tokens(i, sample) for i, sample in enumerate(plans)]
    for i, n in enumerate(tokens):
        if n > max_tokens:
            raise ValueError(f"plans[{i}] must fit into max_tokens={max_tokens}, got {n} tokens")

    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # the keys of open_bins, ascending
    for i in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        at = bisect_left(rooms, tokens[i])
        if at == len(rooms):
            room, b = int(max_tokens), len(bins)
            bins.append([i])
        else:
            room = rooms[at]
            b = open_bins[room].pop()
            bins[b].append(i)
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        room -= tokens[i]
        if room not in open_bins:
            open_bins[room] = []
            insort(rooms, room)
        open_bins[room].append(b)

    in_order = tuple(sorted(tuple(sorted(samples)) for samples in bins))
    lengths = tuple(sum(tokens[i] for i in samples) for samples in in_order)
    return Packing(in_order, lengths, int(max_tokens))


def _tokens(i: int, sample: Any) -> int:
    total = 0
    for part in sample if isinstance(sample, Iterable) else (sample,):
        n = getattr(part, "total_tokens", part)
        if not is_integer(n):
            raise TypeError(
                f"plans[{i}] must be a plan, a number of tokens or a sequence of these,"
                f" got {part!r}"
            )
        if n < 0:
            raise ValueError(f"plans[{i}] must have 0 tokens or more, got {n}")
        total += int(n)
    return total
