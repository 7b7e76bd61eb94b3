"""The only definition of "close": eager PyTorch's own error, measured, is the yardstick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# root mean square error over root mean square value that no op may exceed, however bad eager is
MAX_RELATIVE_RMS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class Accuracy:
    """Errors of one tensor and of eager's own, against a float64 oracle.

    ``error`` and ``eager_error`` are the largest absolute errors, ``rms`` and ``eager_rms`` the
    root mean squares, ``budget`` and ``rms_budget`` what the policy allows, and ``value`` is the
    oracle's largest.
    """

    name: str
    error: float
    eager_error: float
    budget: float
    rms: float
    eager_rms: float
    rms_budget: float
    value: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget and self.rms <= self.rms_budget  # NaN fails

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3e} (eager {self.eager_error:.3e}, budget"
            f" {self.budget:.3e}), rms {self.rms:.3e} (eager {self.eager_rms:.3e}, budget"
            f" {self.rms_budget:.3e})"
        )


class _Errors(NamedTuple):
    """Of one tensor in one norm: the errors of ``actual`` and of eager, and the oracle's value."""

    error: float
    eager_error: float
    value: float


def measure(name: str, actual: Tensor, eager: Tensor, oracle: Tensor) -> Accuracy:
    """Measure ``actual`` and ``eager`` of one op against ``oracle``, the same in float64.

    The largest error may be twice eager's plus one rounding of the largest value, the root mean
    square error twice eager's plus a third of a rounding of the root mean square value, within
    ``MAX_RELATIVE_RMS``. Infinities must stand where the oracle has them, and
    integers must be equal.
    """
    eps = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0
    (error, eager_error, largest), (rms, eager_rms, scale) = _errors(name, actual, eager, oracle)
    budget = 2 * eager_error + eps * largest
    rms_budget = min(2 * eager_rms + eps / 3 * scale, MAX_RELATIVE_RMS.get(actual.dtype, 0) * scale)
    return Accuracy(name, error, eager_error, budget, rms, eager_rms, rms_budget, largest)


def measure_model(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> list[Accuracy]:
    """Measure what a whole model computes, tensors by name, as ``measure`` does an op.

    In a tensor of few numbers eager's error is luck, so all tensors share a yardstick: the largest
    of eager's errors relative to the value of their tensor. Nothing but eager bounds it, because a
    model rounds many times in a row.
    """
    errors = {name: _errors(name, actual[name], eager[name], oracle[name]) for name in oracle}
    largest, rms = (_yardstick(norm) for norm in zip(*errors.values(), strict=True))
    accuracies = []
    for name, (in_max, in_rms) in errors.items():
        eps = torch.finfo(actual[name].dtype).eps
        budget = (2 * largest + eps) * in_max.value
        rms_budget = (2 * rms + eps / 3) * in_rms.value
        found = *in_max[:2], budget, *in_rms[:2], rms_budget, in_max.value
        accuracies.append(Accuracy(name, *found))
    return accuracies


def _yardstick(errors: Iterable[_Errors]) -> float:
    """Eager's largest relative error; where all is zero, or eager overflows, there is none."""
    relative = (e.eager_error / e.value for e in errors if e.value > 0)
    return max((x for x in relative if math.isfinite(x)), default=0)


def _errors(name: str, actual: Tensor, eager: Tensor, oracle: Tensor) -> tuple[_Errors, _Errors]:
    """Errors and value of the finite numbers, in the maximum and in the root mean square."""
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, want {eager.dtype}"
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, want {oracle.shape}"
    actual, eager, oracle = actual.double(), eager.double(), oracle.double()
    infinite = oracle.isinf()
    assert torch.equal(actual.isinf() & (actual == oracle), infinite), f"{name}: infinities differ"
    finite = [x[~infinite] for x in (actual - oracle, eager - oracle, oracle)]
    return _Errors(*map(_largest, finite)), _Errors(*map(_rms, finite))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0


def assert_as_accurate(name: str, actual: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """Fail unless ``measure`` finds ``actual`` within its budgets."""
    accuracy = measure(name, actual, eager, oracle)
    assert accuracy.passed, str(accuracy)
