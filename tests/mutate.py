"""Plants faults one by one and shows that the tests see each: ``make mutate``.

Every fault of ``faults/`` is a small edit to a copy of the tree, and the tests named for it must
fail there, and pass without it. A fault that survives is a hole in the tests; the exit status says
so.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
from faults import Fault

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "csrc", "kernels", "python", "tests")


FAULTS: list[Fault] = [
    fault
    for module in pkgutil.iter_modules(faults.__path__)
    for fault in importlib.import_module(f"faults.{module.name}").FAULTS
]


def words(tests: str) -> list[str]:
    file, _, keyword = tests.partition(" -k ")
    return [file, *(["-k", keyword.replace("-and-", " and ")] if keyword else [])]


def copy_tree(folder: Path) -> None:
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    link = folder / "python/patchpack/kernels"
    if not link.exists():
        link.symlink_to("../../kernels")


def build(folder: Path) -> None:
    """The C++ of a copy, quickly."""
    env = {**os.environ, "PATCHPACK_NATIVE": "1", "CXXFLAGS": "-O1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the C++ does not compile:\n{done.stdout}\n{done.stderr}")


def run(folder: Path, tests: str) -> tuple[bool, str]:
    """Whether pytest passes there, and its last line."""
    env = {**os.environ, "PYTHONPATH": str(folder / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [Path(sys.executable).parent / "pytest", "-x", "-q", "--no-header", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-m", "", *words(tests)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        return False, f"killed by signal {-done.returncode}"
    lines = done.stdout.strip().splitlines()
    if done.returncode > 1:
        raise RuntimeError(f"pytest stopped with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.returncode == 0, lines[-1]


def try_fault(fault: Fault) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        file = folder / fault.file
        source = file.read_text()
        if source.count(fault.old) < 1:
            raise RuntimeError(f"{fault.what}: {fault.old!r} is not in {fault.file}")
        file.write_text(source.replace(fault.old, fault.new))
        if fault.file.startswith("csrc/") and not fault.file.startswith("csrc/cuda/"):
            build(folder)  # of CUDA, the tests build what they run
        passed, line = run(folder, fault.tests)
    return "SURVIVED" if passed else "seen", line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose description contains this")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    planted = [fault for fault in FAULTS if options.only in fault.what]

    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for tests in sorted({fault.tests for fault in planted}):
            passed, line = run(Path(name), tests)
            print(f"{'without a fault':60} {'green' if passed else 'RED':9} {line}", flush=True)
            if not passed:
                return 1

    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, (verdict, line) in zip(planted, pool.map(try_fault, planted), strict=True):
            survivors += verdict != "seen"
            print(f"{fault.what:60} {verdict:9} {line}", flush=True)
    print(f"{len(planted)} faults, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
