"""Images onto ranks, by what they cost: the most costly first, each to the rank with the least.

The busiest rank gets at most 4/3 - 1/(3 ranks) of what it would at best (Graham, "Bounds on
multiprocessing timing anomalies", SIAM J. Appl. Math. 17, 1969).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from patchpack.packing._grid import is_integer

CHANNELS = 1280  # of Qwen2-VL's vision transformer, whose feed-forward layers are 4 times as wide


class _Plan(Protocol):
    @property
    def grids(self) -> Iterable[tuple[int, int, int]]: ...


@dataclass(frozen=True)
class Balance:
    """Which rank takes which images.

    Attributes:
        ranks: The images of every rank, as indices in ascending order.
        costs: What the images of every rank cost together.
    """

    ranks: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank, of the mean: 1 is perfect, and so is no cost at all."""
        total = math.fsum(self.costs)
        return max(self.costs) * len(self.costs) / total if total else 1.0


def vit_flops(plan: _Plan) -> float:
    """Operations of one layer of Qwen2-VL's vision transformer on one image or video, forward.

    A token takes ``24 C**2``: ``8 C**2`` for queries, keys, values and output, ``16 C**2`` for the
    feed-forward layer. Attention takes ``4 C L`` for each of the ``L`` tokens of a frame, with
    ``C = 1280`` channels. Other widths shift the balance of the two, other depths nothing; a
    backward pass takes twice as much of both.

    Raises:
        TypeError: ``plan`` has no ``grids``.
    """
    if not hasattr(plan, "grids"):
        raise TypeError(f"plan must be a plan, got {plan!r}")
    tokens = squares = 0
    for frames, rows, cols in plan.grids:
        tokens += frames * rows * cols
        squares += frames * (rows * cols) ** 2
    return float(24 * CHANNELS**2 * tokens + 4 * CHANNELS * squares)


def balance(
    plans: Iterable[Any],
    ranks: int,
    cost: Callable[[Any], float] | Sequence[float] | None = None,
) -> Balance:
    """Share images out to ``ranks``, so that all have about as much to compute.

    Equal input gives equal output.

    Args:
        plans: The plans of images and videos, or with ``cost`` whatever is to be shared out.
        ranks: How many ranks there are.
        cost: What a plan costs, in any unit: a function of the plan, or one number for each; by
            default ``vit_flops``.

    Returns:
        Every image on one rank.

    Raises:
        TypeError: ``ranks`` is not an integer, a cost not a number, or without ``cost`` a plan has
            no ``grids``.
        ValueError: ``ranks`` is below 1, a cost is negative or not finite, or there are not as
            many costs as plans.
    """
    if not is_integer(ranks):
        raise TypeError(f"ranks must be an integer, got {ranks!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if not isinstance(plans, Iterable):
        raise TypeError(f"plans must be a sequence of plans, got {type(plans).__name__}")
    costs = _costs(list(plans), cost)

    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0.0, rank) for rank in range(ranks)]  # a heap
    for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, rank = least[0]
        shares[rank].append(i)
        heapq.heapreplace(least, (load + costs[i], rank))

    in_order = tuple(tuple(sorted(share)) for share in shares)
    return Balance(in_order, tuple(math.fsum(costs[i] for i in share) for share in in_order))


def _costs(plans: list[Any], cost: Any) -> list[float]:
    if cost is None:
        for i, plan in enumerate(plans):
            if not hasattr(plan, "grids"):
                raise TypeError(f"plans[{i}] must be a plan where cost is None, got {plan!r}")
        cost = vit_flops
    if callable(cost):
        cost = map(cost, plans)
    elif not isinstance(cost, Iterable):
        raise TypeError(f"cost must be a function or a sequence of numbers, got {cost!r}")
    costs: list[float] = list(cost)
    if len(costs) != len(plans):
        raise ValueError(
            f"cost must be one number for each of {len(plans)} plans, got {len(costs)}"
        )
    for i, value in enumerate(costs):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"cost[{i}] must be a number, got {value!r}")
        if not 0 <= value < 2**127:  # sums stay finite
            raise ValueError(f"cost[{i}] must be at least 0 and below 2**127, got {value}")
    return [float(value) for value in costs]
