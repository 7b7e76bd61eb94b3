"""One process both interprets and compiles kernels, from a clean and repeatable start."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import patchpack
from patchpack.testing import machine

ROOT = Path(__file__).parents[1]

sys.path.append(str(ROOT / "tests"))  # for what several tests share

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
    installed = patchpack._dispatch._NOT_INSTALLED
    missing = installed["native"]
    if request.param == "native" and missing:
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setitem(installed, "native", "it is hidden")
        yield


def pytest_collection_modifyitems(items):
    """Without a GPU what needs one is skipped, without the extension what has its ``impl``."""
    if no_gpu := machine.no_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=no_gpu))
    if (reason := patchpack.available("rope", "native")) is None:
        return
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if item.get_closest_marker("cpp") or (params and params.get("impl") == "native"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What is too large for a GPU is skipped, and one that answers no more ends the run."""
    if not item.get_closest_marker("gpu"):
        return (yield)
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(str(error).partition(" GPU ")[0])
    finally:
        if not machine.answers("cuda"):
            item.session.shouldstop = f"the GPU answers no more since {item.name}"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def cpu_capability(request):
    """The instructions that native kernels use: all, but those that this CPU does not have."""
    if (reason := patchpack.available("rope", "native")) is not None:
        pytest.skip(reason)
    before = torch.ops.patchpack.cpu_capability("")
    try:
        torch.ops.patchpack.cpu_capability(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).partition("\n")[0])
    yield
    torch.ops.patchpack.cpu_capability(before)
