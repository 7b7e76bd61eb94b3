"""What a measurement or a report comes from: the commit, versions, the CPU or the GPU."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import patchpack

LIBRARIES = ("triton", "transformers", "torchvision", "liger_kernel", "flash_attn")
# the driver of NVIDIA and that of AMD: here even if torch cannot use them
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def describe(device: str) -> dict[str, Any]:
    """What ``"cpu"`` or ``"cuda"`` is on this machine, and what runs there, ready for JSON.

    The GPU is the current device of torch, the first of ``CUDA_VISIBLE_DEVICES``. Its driver and
    clocks are those that ``nvidia-smi`` tells, and left out where it tells nothing.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "patchpack": patchpack.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **libraries(),
        **(describe_gpu() if device == "cuda" else {"device": cpu_name()}),
    }


def libraries() -> dict[str, str]:
    """Versions of what runs or is compared, by import name: on AMD others distribute Triton."""
    distributions = metadata.packages_distributions()
    return {
        name: metadata.version(distributions[name][0])
        for name in LIBRARIES
        if name in distributions
    }


def commit() -> str | None:
    """The commit of the package, ``-dirty`` if files differ from it, or ``PATCHPACK_COMMIT``.

    ``None`` where no repository holds the package: a virtual environment may lie in another's.
    """
    if told := os.environ.get("PATCHPACK_COMMIT"):
        return told
    source = Path(patchpack.__file__)
    if _run("git", "-C", str(source.parent), "ls-files", source.name) is None:
        return None
    described = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return _run("git", "-C", str(source.parent), *described)


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def gpu_name(index: int | None = None) -> str:
    """The name of a GPU, or its architecture: some of AMD's have none."""
    return torch.cuda.get_device_name(index) or architecture(index)


def architecture(index: int | None = None) -> str:
    """What kernels are compiled for: ``"sm_90"``, ``"gfx942"``."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def runtime() -> dict[str, str]:
    """What torch was built for: CUDA or ROCm, with the version, or nothing."""
    built = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    return {name: version for name, version in built.items() if version}


def no_gpu() -> str | None:
    """Why torch has no GPU here, or ``None`` if it has one."""
    if torch.cuda.is_available():
        return None
    driver = next((f", though {path} is here" for path in DRIVERS if path.exists()), "")
    if not runtime():
        return f"torch {torch.__version__} is built without CUDA and ROCm{driver}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = "" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden}"
    built = " ".join(word for item in runtime().items() for word in item)
    return f"torch {torch.__version__} for {built} finds no GPU{chosen}{driver}"


def has_unused_gpu() -> bool:
    """Whether a driver is here whose GPU torch does not see, and nobody has hidden it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return visible and no_gpu() is not None and any(path.exists() for path in DRIVERS)


def answers(device: str) -> bool:
    """Whether a device still works: a kernel that reads out of bounds ends all work on a GPU."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def nvidia_smi(**fields: str) -> dict[str, str]:
    """What nvidia-smi says of the current GPU, by the names that ``fields`` gives its queries."""
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    query = f"--query-gpu={','.join(fields.values())}"
    line = uuid and _run("nvidia-smi", query, "--format=csv,noheader", f"--id=GPU-{uuid}")
    told = zip(fields, line.split(", "), strict=True) if line else ()
    return {name: value for name, value in told if not value.startswith("[")}  # [N/A]


def describe_gpu() -> dict[str, Any]:
    """The current GPU: what torch and its driver say of it."""
    properties = torch.cuda.get_device_properties()
    free, total = torch.cuda.mem_get_info()
    return {
        "device": gpu_name(),
        **runtime(),
        "architecture": architecture(),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / 2**30, 1),
        "memory_taken_gib": round((total - free) / 2**30, 1),
        **nvidia_smi(
            driver="driver_version",
            power_limit="power.limit",
            max_sm_clock="clocks.max.sm",
            max_memory_clock="clocks.max.memory",
        ),
    }


def _run(*command: str) -> str | None:
    """What a command prints, or ``None`` if it fails, hangs or says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
