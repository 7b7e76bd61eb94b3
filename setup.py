"""Builds the C++ of csrc/ into patchpack._C. Everything else is declared in pyproject.toml.

The extension is optional. It is left out, with a line that says why, if ``PATCHPACK_NATIVE=0``, if
this environment has no headers of torch, or if they do not compile; ``PATCHPACK_NATIVE=1`` makes
each of these an error. It is built on the stable ABI of LibTorch and of Python, so that one wheel
serves every torch from 2.10 and every Python from 3.10 on, and torch is not imported.
"""

from __future__ import annotations

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
PYTHON = "0x030A0000"  # 3.10, also in bdist_wheel below
TORCH = "0x020A000000000000"  # 2.10
ASKED = os.environ.get("PATCHPACK_NATIVE", "")


def torch_folder() -> Path | None:
    """Where torch is installed in this environment, without importing it."""
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    return None


class BuildExtension(build_ext):
    """Compiles the files of an extension side by side."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extension(ext)


def extensions() -> list[Extension]:
    torch = torch_folder()
    if ASKED == "0" or torch is None:
        reason = "PATCHPACK_NATIVE=0" if ASKED == "0" else "no torch in this environment"
        if ASKED == "1":
            raise SystemExit(f"patchpack._C cannot be built: {reason}")
        print(f"patchpack is built without C++: {reason}")
        return []
    return [
        Extension(
            "patchpack._C",
            sorted(map(str, CSRC.glob("*.cpp"))),
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("Py_LIMITED_API", PYTHON), ("TORCH_TARGET_VERSION", TORCH)],
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
                *("-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-ignored-attributes"),
                "-Wno-maybe-uninitialized",  # GCC 12 in its own intrinsics
            ],
            depends=sorted(map(str, CSRC.glob("*.h"))),
            py_limited_api=True,
            optional=ASKED != "1",
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
