"""The yardstick itself: what counts as close, of one tensor and of a whole model."""

import math

import pytest
import torch

from patchpack.testing.compare import assert_as_accurate, measure, measure_model

ORACLE = torch.tensor([1.0, -2.0, 4.0, math.inf], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def _off(error, where=0):
    """The oracle in float32 with an error at one place."""
    x = ORACLE.float()
    x[where] += error
    return x


@pytest.mark.parametrize(
    ("error", "eager_error", "passed"),
    [
        (0, 0, True),
        (EPS, 0, True),  # roundings cost nothing
        (5 * EPS, 0, False),
        (16 * EPS, 8 * EPS, True),  # twice eager's
        (40 * EPS, 8 * EPS, False),
        (1e-3, 1e-3, False),  # above what any op may err, though eager does too
        (math.nan, math.nan, False),
    ],
)
def test_an_op_is_held_against_eager(error, eager_error, passed):
    accuracy = measure("x", _off(error), _off(eager_error), ORACLE)
    assert accuracy.passed is passed, str(accuracy)


def test_many_small_errors_count():
    oracle = torch.ones(1000, dtype=torch.float64)
    eager = oracle.float()
    eager[0] += 100 * EPS  # bad luck of one number does not excuse all
    accuracy = measure("x", oracle.float() + 100 * EPS, eager, oracle)
    assert accuracy.error <= accuracy.budget
    assert not accuracy.passed


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (ORACLE, "x: dtype torch.float64, want torch.float32"),
        (ORACLE[:3].float(), r"x: shape torch.Size\(\[3\]\), want torch.Size\(\[4\]\)"),
        (-ORACLE.float(), "x: infinities differ"),
        (ORACLE.float().clamp(max=9), "x: infinities differ"),
        (_off(1e-3), r"x: error 1.000e-03 \(eager 0.000e\+00, budget 4.768e-07\)"),
    ],
)
def test_a_failure_says_what_is_wrong(actual, message):
    with pytest.raises(AssertionError, match=message):
        assert_as_accurate("x", actual, ORACLE.float(), ORACLE)


def test_of_nothing_nothing_is_wrong():
    empty = torch.empty(0)
    assert measure("x", empty, empty, empty.double()).passed


def _model(weight, bias):
    return {"weight": _off(weight), "bias": 100 * _off(bias)}


def test_tensors_of_a_model_share_a_yardstick():
    oracle = {"weight": ORACLE, "bias": 100 * ORACLE}
    # eager is lucky in the one: what it errs in the other, relative to its values, is allowed
    for eager in (_model(1e-5, 0), _model(0, 1e-5)):
        verdicts = [a.passed for a in measure_model(_model(1.9e-5, 1.9e-5), eager, oracle)]
        assert verdicts == [True, True]
        verdicts = [a.passed for a in measure_model(_model(1e-6, 3e-5), eager, oracle)]
        assert verdicts == [True, False]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_is_not_excused_by_an_eager_one_that_overflows(broken):
    oracle = {"weight": ORACLE, "bias": 100 * ORACLE}
    eager = _model(1e-7, 0)
    eager["bias"][0] = broken
    assert not any(a.passed for a in measure_model(_model(1e-2, 1e-2), eager, oracle))


def test_zeros_must_stay_zeros_in_a_model():
    zero, one = torch.zeros(2), torch.ones(2)
    oracle = {"zero": zero.double(), "one": one.double()}
    found = measure_model({"zero": zero + 1e-3, "one": one}, {"zero": zero, "one": one}, oracle)
    assert [a.passed for a in found] == [False, True]
