"""One process both interprets and compiles kernels, from a clean and repeatable start."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]

# patchpack interprets kernels itself; with this set, Triton could no longer compile them
os.environ.pop("TRITON_INTERPRET", None)

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_configure():
    if ROOT in (Path(entry or ".").resolve() for entry in sys.path):
        raise pytest.UsageError(
            "run `pytest`, not `python -m pytest`: it puts the repository on sys.path, where the"
            " folder kernels/ hides the package of that name"
        )


@pytest.fixture(scope="module", params=["native", "torch"])
def with_and_without_extension(request):
    """Runs the tests of a module twice: with the C++ of integers, and with its code in torch."""
    from patchpack import _dispatch  # here, for what is above comes first

    missing = _dispatch._NOT_INSTALLED["native"]
    if request.param == "native" and missing:
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setitem(_dispatch._NOT_INSTALLED, "native", "it is hidden")
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
