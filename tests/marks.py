"""Parameters that a default run leaves out: more cases of what it tests anyway."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(values: Iterable[Any]) -> list:
    """``values`` of ``parametrize``, tuples for several names, marked ``slow``."""
    return [
        pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow) for x in values
    ]
