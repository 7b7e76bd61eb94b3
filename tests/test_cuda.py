"""CUDA C++ without a GPU: its threads run one after the other on the host, and its machine code.

``PATCHPACK_CUDA_TARGETS="80 90 100" pytest tests/test_cuda.py -rP`` compiles for more than one GPU
and prints what ptxas made of every kernel.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path

import pytest
import torch
from marks import slow
from torch._subclasses.fake_tensor import FakeTensorMode

import patchpack
from patchpack import _dispatch
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import CHECKS, TRACING

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = os.environ.get("PATCHPACK_CUDA_TARGETS", "90").split()

TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020A000000000000", f"-I{TORCH / 'include'}"]
COMPILER = os.environ.get("CXX", "g++")

# the address sanitizer marks every byte of the huge buffers of int64 offsets
UNSANITIZED = ("int64 offsets", *sorted(TRACING))
BUILDS = {
    "sanitized": ["unaligned inputs", *(check for check in CHECKS if check not in UNSANITIZED)],
    "plain": UNSANITIZED,
}
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g"]


def _runtime(name: str) -> str | None:
    """Where the compiler has a library to preload, or None."""
    command = [COMPILER, f"-print-file-name={name}"]
    try:
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None
    return path if os.path.isabs(path) else None


@pytest.mark.parametrize(
    ("op", "build"),
    [
        ("rope_2d", "sanitized"),
        *slow(x for x in product(OPS, BUILDS) if x != ("rope_2d", "sanitized")),
    ],
)
def test_on_the_host(op, build, tmp_path):
    preloaded = [_runtime(name) for name in ("libasan.so", "libstdc++.so")]
    if None in preloaded or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("there is no GCC with sanitizers")
    library = tmp_path / "library.so"
    flags = ["-x", "c++", "-fPIC", "-fvisibility=hidden", "-shared", "-Wall", "-Werror"]
    flags += ["-Wno-unknown-pragmas", *FLAGS]
    flags += ["-O1", *SANITIZERS] if build == "sanitized" else ["-O0"]
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", library]
    subprocess.run([COMPILER, *flags, ROOT / f"csrc/cuda/{op}.cu", *link], check=True)

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if build == "sanitized":
        environment |= {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, ROOT / "tests/cuda_on_host.py", op, library, *BUILDS[build]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("objdump")), reason="needs nvcc")
def test_it_names_the_library_of_torch_that_has_cuda(tmp_path, monkeypatch):
    """Where it is built that library may be missing, as here; unnamed, it is not searched."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATCHPACK_NATIVE", "0")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    extension = runpy.run_path("setup.py")["CudaExtension"](TORCH)
    extension.sources = ["csrc/cuda/module.cpp"]
    library = tmp_path / "library.so"
    extension.build(library, tmp_path / "objects")
    command = ["objdump", "--private-headers", library]
    headers = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"NEEDED +libtorch_cuda\.so", headers)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", ["rope_2d", *slow(op for op in OPS if op != "rope_2d")])
def test_machine_code(op, target, tmp_path):
    """No kernel spills or has a stack, and vectors of 16 bytes are read and written as such."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("there is no nvcc")
    cubin = tmp_path / "kernels.cubin"
    command = [nvcc, *FLAGS, "-O3", "-DUSE_CUDA", "-cubin", f"-arch=sm_{target}", "-Xptxas=-v"]
    command += [ROOT / f"csrc/cuda/{op}.cu", "-o", cubin]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "warning" not in log, log
    names = re.findall(r"Function properties for (\S+)", log)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    registers = re.findall(r"Used (\d+) registers", log)
    code = _machine_code(cubin)
    assert len(names) == len(stacks) == len(registers) == len(code)
    for name, (stack, spills), used in zip(names, stacks, registers, strict=True):
        loads, stores = (re.findall(rf"\b{kind}\.\S+", code[name]) for kind in ("LDG", "STG"))
        wide_loads, wide_stores = (
            [x for x in found if x.endswith((".128", ".256"))] for found in (loads, stores)
        )
        wide = f"{len(wide_loads)} loads and {len(wide_stores)} stores of 16 bytes or more"
        print(f"sm_{target} {_readable(name)}: {used} registers, {wide}")
        assert (stack, spills) == ("0", "0"), name
        if re.search("VectorI(fLi4|.*Li8)E", name):
            assert wide_loads, name
            # other than vectors only what normalises a token is written
            assert len(stores) - len(wide_stores) <= 1, name


def _machine_code(cubin: Path) -> dict[str, str]:
    """The instructions of every kernel, by its name."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {part.split()[0]: part for part in code.split("Function : ")[1:]}


def _readable(name: str) -> str:
    done = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
    return re.sub(
        "patchpack::|c10::|void |\\(.*", "", done.stdout.replace("(patchpack::", "").strip()
    )


def _only(monkeypatch, *impls):
    reasons = {impl: None if impl in impls else "it is not here" for impl in _dispatch.IMPLS}
    monkeypatch.setitem(_dispatch._UNAVAILABLE, "rope_2d", reasons)


@pytest.mark.parametrize(
    ("device", "installed", "default"),
    [
        ("cuda", ["triton", "cuda", "native"], "triton"),
        ("cuda", ["cuda", "native"], "cuda"),
        ("meta", ["cuda"], "cuda"),
        ("meta", ["native"], "native"),
        ("cpu", ["triton", "cuda", "native"], "native"),
        ("cpu", ["triton", "cuda"], "reference"),
    ],
)
def test_the_default_is_what_the_device_has(device, installed, default, monkeypatch):
    _only(monkeypatch, *installed, "reference")
    with FakeTensorMode():
        x = torch.empty(0, device=device)
    assert _dispatch.resolve("rope_2d", None, q=x) == default


def test_a_gpu_does_not_fall_back_to_the_reference(monkeypatch):
    _only(monkeypatch, "native", "reference")
    with FakeTensorMode():
        x = torch.empty(0, device="cuda")
    with pytest.raises(ValueError, match="impl='triton' of rope_2d is not available"):
        _dispatch.resolve("rope_2d", None, q=x)


def test_cuda_is_for_cuda_tensors(monkeypatch):
    _only(monkeypatch, *_dispatch.IMPLS)
    with pytest.raises(ValueError, match="it runs on cuda and meta tensors, got one on cpu"):
        _dispatch.resolve("rope_2d", "cuda", q=torch.empty(0))


@pytest.mark.parametrize("op", SPECS)
def test_available_says_why_not(op):
    reason = patchpack.available(op, "cuda")
    if not torch.version.cuda:
        assert reason == "this torch is without CUDA"
    elif op not in OPS:
        assert "has no cuda kernel" in reason or "patchpack._C_cuda" in reason
