"""Samples into sequences: each once, none too long, little wasted, always in the same order."""

import dataclasses
import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchpack.packing import Packing, pack
from patchpack.systems import qwen2_vl

LENGTHS = st.integers(1, 40).flatmap(
    lambda most: st.tuples(st.just(most), st.lists(st.integers(0, most), max_size=30))
)


def _fewest(lengths, most):
    """The fewest sequences there can be, by trying everything."""

    def place(i, rooms):
        if i == len(lengths):
            return len(rooms)
        options = [
            place(i + 1, (*rooms[:b], room - lengths[i], *rooms[b + 1 :]))
            for b, room in enumerate(rooms)
            if lengths[i] <= room
        ]
        return min([*options, place(i + 1, (*rooms, most - lengths[i]))])

    return place(0, ())


def _best_fit_decreasing(lengths, most):
    """How long the sequences of the plain algorithm get, which looks at every one of them."""
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [b for b, room in enumerate(rooms) if room >= n]
        if fitting:
            rooms[min(fitting, key=lambda b: rooms[b])] -= n
        else:
            rooms.append(most - n)
    return sorted(most - room for room in rooms)


@given(LENGTHS)
def test_every_sample_is_in_one_sequence_and_none_is_too_long(drawn):
    most, lengths = drawn
    packing = pack(lengths, most)
    assert sorted(itertools.chain(*packing.bins)) == list(range(len(lengths)))
    assert packing.lengths == tuple(sum(lengths[i] for i in b) for b in packing.bins)
    assert max(packing.lengths, default=0) <= most
    assert packing.num_sequences == len(packing.bins) == len(packing.lengths)
    assert packing.max_tokens == most


@given(LENGTHS)
def test_samples_and_sequences_keep_the_order_of_the_input(drawn):
    most, lengths = drawn
    bins = pack(lengths, most).bins
    assert all(list(b) == sorted(b) for b in bins)
    firsts = [b[0] for b in bins]
    assert firsts == sorted(firsts)


@given(LENGTHS)
def test_no_two_sequences_fit_into_one(drawn):
    most, lengths = drawn
    packing = pack(lengths, most)
    assert all(a + b > most for a, b in itertools.combinations(packing.lengths, 2))
    if packing.num_sequences > 1:
        assert packing.fill > 1 / 2


@given(LENGTHS)
def test_it_is_the_best_fit_of_the_longest_first(drawn):
    most, lengths = drawn
    assert sorted(pack(lengths, most).lengths) == _best_fit_decreasing(lengths, most)


@given(st.lists(st.integers(1, 12), max_size=7))
def test_it_takes_hardly_more_sequences_than_there_must_be(lengths):
    fewest = _fewest(lengths, 12)
    assert fewest <= pack(lengths, 12).num_sequences <= 11 / 9 * fewest + 6 / 9


def test_a_case_by_hand():
    # longest first: 6 -> A, 5 -> B, 4 leaves A full, 3 would leave 2 in B, and 2 fills it
    assert pack([2, 6, 3, 5, 4], 10) == Packing(((0, 2, 3), (1, 4)), (10, 10), 10)
    # the tightest place is taken, which is not always the first: 2 goes to 8 and not to 5
    assert pack([8, 5, 2], 10).bins == ((0, 2), (1,))


def test_nothing_takes_no_sequence_and_wastes_nothing():
    packing = pack([])
    assert packing == Packing((), (), 16384)
    assert packing.fill == 1.0
    assert pack([[], 0]).bins == ((0, 1),)


def test_fill_is_what_is_used_of_all_sequences():
    assert pack([6, 6, 3], 10).fill == 15 / 20


def test_plans_count_with_their_markup_and_the_images_of_a_sample_together():
    image = qwen2_vl.plan(224, 224)
    clip = qwen2_vl.plan_video(8, 2.0, 224, 224)
    packing = pack([image, [image, clip], 100, [image, 34], []], 66 + clip.total_tokens)
    assert packing.lengths == (66 + 100 + 100, 66 + clip.total_tokens)
    assert packing.bins == ((0, 2, 3), (1, 4))
    assert pack([SimpleNamespace(total_tokens=np.int64(3))], 3).lengths == (3,)


def test_integers_may_be_those_of_numpy():
    packing = pack(np.array([3, 4, 5], np.uint8), np.int32(8))
    assert packing == pack([3, 4, 5], 8)
    assert all(type(n) is int for n in (*packing.lengths, packing.max_tokens))


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack([1]).max_tokens = 3


def test_a_hundred_thousand_samples_take_a_moment():
    rng = random.Random(0)
    lengths = [min(16384, int(rng.lognormvariate(7, 1))) for _ in range(100_000)]
    begin = time.process_time()
    packing = pack(lengths)
    assert time.process_time() - begin < 5  # some 0.3 s: looking at every sequence takes minutes
    assert packing.num_sequences <= -(-sum(lengths) // 16384) * 1.001
    assert packing == pack(lengths)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([3, 11], 10), ValueError, r"plans\[1\] must fit into max_tokens=10, got 11 tokens"),
        (([[6, 5]], 10), ValueError, r"plans\[0\] must fit into max_tokens=10, got 11 tokens"),
        (([3, -1],), ValueError, r"plans\[1\] must have 0 tokens or more, got -1"),
        (([[12, -2]],), ValueError, r"plans\[0\] must have 0 tokens or more, got -2"),
        (([2.0],), TypeError, r"plans\[0\] must be a plan, a number of tokens or .*, got 2.0"),
        (([True],), TypeError, r"plans\[0\] must be a plan, .*, got True"),
        (([1, "ab"],), TypeError, r"plans\[1\] must be a plan, .*, got 'a'"),
        (([[[1]]],), TypeError, r"plans\[0\] must be a plan, .*, got \[1\]"),
        (([None],), TypeError, r"plans\[0\] must be a plan, .*, got None"),
        ((3,), TypeError, r"plans must be a sequence of samples, got int"),
        (([], 0), ValueError, r"max_tokens must be at least 1, got 0"),
        (([], 1.5), TypeError, r"max_tokens must be an integer, got 1.5"),
        (([], True), TypeError, r"max_tokens must be an integer, got True"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pack(*arguments)
