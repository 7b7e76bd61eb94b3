"""The only definition of "close": eager PyTorch's own error, measured, is the yardstick."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# root mean square error over root mean square value that no op may exceed, however bad eager is
MAX_RELATIVE_RMS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class Accuracy:
    """Errors of one tensor and of eager's own, against a float64 oracle.

    ``error`` and ``eager_error`` are the largest absolute errors, ``rms`` and ``eager_rms`` the
    root mean squares, ``budget`` and ``rms_budget`` what the policy allows.
    """

    name: str
    error: float
    eager_error: float
    budget: float
    rms: float
    eager_rms: float
    rms_budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget and self.rms <= self.rms_budget  # NaN fails

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3e} (eager {self.eager_error:.3e}, budget"
            f" {self.budget:.3e}), rms {self.rms:.3e} (eager {self.eager_rms:.3e}, budget"
            f" {self.rms_budget:.3e})"
        )


def measure(
    name: str, actual: Tensor, eager: Tensor, oracle: Tensor, *, one_op: bool = True
) -> Accuracy:
    """Measure ``actual`` and ``eager`` against ``oracle``, the same computation in float64.

    The largest error may be twice eager's plus one rounding of the largest value, the root mean
    square error twice eager's plus a third of a rounding of the root mean square value, within
    ``MAX_RELATIVE_RMS``. Infinities must stand where the oracle has them. A model rounds many times
    in a row: it is not ``one_op``, and eager alone is its yardstick.
    """
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, want {eager.dtype}"
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, want {oracle.shape}"
    eps = torch.finfo(actual.dtype).eps
    ceiling = MAX_RELATIVE_RMS[actual.dtype] if one_op else math.inf
    actual, eager, oracle = actual.double(), eager.double(), oracle.double()
    infinite = oracle.isinf()
    assert torch.equal(actual.isinf() & (actual == oracle), infinite), f"{name}: infinities differ"
    actual, eager, oracle = (x[~infinite] for x in (actual, eager, oracle))
    if oracle.numel() == 0:
        return Accuracy(name, 0, 0, 0, 0, 0, 0)

    error, eager_error = _largest(actual - oracle), _largest(eager - oracle)
    rms, eager_rms, scale = _rms(actual - oracle), _rms(eager - oracle), _rms(oracle)
    budget = 2 * eager_error + eps * _largest(oracle)
    rms_budget = min(2 * eager_rms + eps / 3 * scale, ceiling * scale)
    return Accuracy(name, error, eager_error, budget, rms, eager_rms, rms_budget)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_as_accurate(
    name: str, actual: Tensor, eager: Tensor, oracle: Tensor, *, one_op: bool = True
) -> None:
    """Fail unless ``measure`` finds ``actual`` within its budgets."""
    accuracy = measure(name, actual, eager, oracle, one_op=one_op)
    assert accuracy.passed, str(accuracy)
