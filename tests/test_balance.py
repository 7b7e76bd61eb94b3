"""Images onto ranks: each once, none much busier than it must be, always in the same order."""

import dataclasses
import itertools
import math
import random
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchpack.packing import Balance, balance, pack, vit_flops
from patchpack.systems import qwen2_vl

COSTS = st.lists(st.integers(0, 50), max_size=25)
RANKS = st.integers(1, 6)


@given(COSTS, RANKS)
def test_every_image_is_on_one_rank_in_the_order_of_the_input(costs, ranks):
    found = balance(costs, ranks, costs)
    assert sorted(itertools.chain(*found.ranks)) == list(range(len(costs)))
    assert len(found.ranks) == len(found.costs) == ranks
    assert all(list(share) == sorted(share) for share in found.ranks)
    assert found.costs == tuple(sum(costs[i] for i in share) for share in found.ranks)


@given(COSTS, RANKS)
def test_without_its_cheapest_image_no_rank_is_busier_than_another(costs, ranks):
    found = balance(costs, ranks, costs)
    for share, total in zip(found.ranks, found.costs, strict=True):
        cheapest = min((costs[i] for i in share), default=0)
        assert total - cheapest <= min(found.costs)


@given(st.lists(st.integers(0, 9), max_size=7), st.integers(1, 3))
def test_the_busiest_rank_is_within_grahams_bound(costs, ranks):
    best = min(
        max(sum(c for c, r in zip(costs, where, strict=True) if r == rank) for rank in range(ranks))
        for where in itertools.product(range(ranks), repeat=len(costs))
    )
    busiest = max(balance(costs, ranks, costs).costs)
    assert best <= busiest <= Fraction(4 * ranks - 1, 3 * ranks) * best


def test_a_case_by_hand():
    # 5 -> A, 4 -> B, 3 -> B, 3 -> A, 2 -> B
    found = balance("abcde", 2, [3, 5, 2, 4, 3])
    assert found == Balance(((1, 4), (0, 2, 3)), (8.0, 9.0))
    assert found.imbalance == 9 / 8.5


def test_nothing_is_balanced():
    assert balance([], 3) == Balance(((), (), ()), (0.0, 0.0, 0.0))
    assert balance([], 3).imbalance == balance("ab", 3, [0, 0]).imbalance == 1.0
    assert balance("a", 4, [2]).imbalance == 4.0


def test_a_layer_is_counted_by_hand():
    tokens, square, channels = 6 * 4, (6 * 4) ** 2, 1280
    linear = 2 * tokens * channels * (3 * channels + channels + 2 * 4 * channels)
    attention = 2 * square * channels * 2  # queries by keys, weights by values
    image = SimpleNamespace(grids=[(1, 6, 4)])
    assert vit_flops(image) == linear + attention
    # a frame attends to itself alone
    clip = SimpleNamespace(grids=[(3, 6, 4), (1, 6, 4)])
    assert vit_flops(clip) == 4 * vit_flops(image)


def test_large_images_cost_more_than_their_tokens():
    small, large = qwen2_vl.plan(140, 140), qwen2_vl.plan(560, 560)
    assert large.vit_tokens == 16 * small.vit_tokens
    ratio = vit_flops(large) / vit_flops(small)
    assert ratio == pytest.approx(16 * (1 + 1600 / 7680) / (1 + 100 / 7680))
    plans = [large, *[small] * 20]
    assert balance(plans, 2).ranks == balance(plans, 2, vit_flops).ranks
    assert len(balance(plans, 2, lambda plan: plan.vit_tokens).ranks[0]) == 3
    assert balance(plans, 2).ranks[0] == (0,)


def test_packed_sequences_are_shared_out_too():
    packing = pack([9, 2, 8, 3, 5], 10)
    found = balance(packing.bins, 2, packing.lengths)
    assert found == balance(packing.bins, 2, np.array(packing.lengths))
    assert sum(found.costs) == 27
    assert found == balance(iter(packing.bins), 2, iter(packing.lengths))


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        balance([], 1).ranks = ()


@pytest.mark.parametrize("ranks", [1, 8, 256])
def test_a_hundred_thousand_images_take_a_moment(ranks):
    rng = random.Random(0)
    costs = [rng.lognormvariate(7, 1) for _ in range(100_000)]
    begin = time.process_time()
    found = balance(costs, ranks, costs)
    assert time.process_time() - begin < 5  # some 0.4 s
    assert 1 <= found.imbalance < 1.0001 or math.isclose(found.imbalance, 1)
    assert found == balance(costs, ranks, costs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 0), ValueError, r"ranks must be at least 1, got 0"),
        (([], 2.0), TypeError, r"ranks must be an integer, got 2.0"),
        ((4, 2), TypeError, r"plans must be a sequence of plans, got int"),
        (([4], 2), TypeError, r"plans\[0\] must be a plan where cost is None, got 4"),
        (("ab", 2, [1]), ValueError, r"cost must be one number for each of 2 plans, got 1"),
        (("ab", 2, 7), TypeError, r"cost must be a function or a sequence of numbers, got 7"),
        (("ab", 2, [1, math.nan]), ValueError, r"cost\[1\] must be at least 0 and below .* nan"),
        (("ab", 2, [math.inf, 1]), ValueError, r"cost\[0\] must be at least 0 .*, got inf"),
        (("ab", 2, [1, -1]), ValueError, r"cost\[1\] must be at least 0 and .*, got -1"),
        (("ab", 2, [1, 10**400]), ValueError, r"cost\[1\] must be .* below 2\*\*127, got 1000"),
        (("ab", 2, ["1", 1]), TypeError, r"cost\[0\] must be a number, got '1'"),
        (("ab", 2, lambda _: None), TypeError, r"cost\[0\] must be a number, got None"),
        (("ab", 2, [True, 1]), TypeError, r"cost\[0\] must be a number, got True"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        balance(*arguments)
