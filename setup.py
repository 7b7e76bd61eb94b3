"""Builds the C++ of csrc/ into patchpack._C. Everything else is declared in pyproject.toml.

The extension is optional. The package is built without it, with a line that says why, if
``PATCHPACK_NATIVE=0``, if this environment has no headers of torch, or if they do not compile;
``PATCHPACK_NATIVE=1`` makes each of these an error. It is built on the stable ABI of LibTorch and
of Python, so that one wheel serves every torch from 2.10 and every Python from 3.10 on. torch is
not imported, and not a requirement of the build: that would be another one than the user's.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

PYTHON = "0x030A0000"  # 3.10, also in bdist_wheel below
TORCH = "0x020A000000000000"  # 2.10
ASKED = os.environ.get("PATCHPACK_NATIVE", "")


def torch_folder() -> Path | None:
    """Where torch is, in this environment or in that which asks for the build, or None."""
    spec = importlib.util.find_spec("torch")
    imported = spec.submodule_search_locations if spec else None
    site_packages = [sysconfig.get_path(scheme) for scheme in ("purelib", "platlib")]
    for folder in [*map(Path, imported or []), *(Path(path, "torch") for path in site_packages)]:
        if (folder / "include/torch/headeronly/version.h").exists():  # since 2.10
            return folder
    return None


def do_without(reason: str) -> None:
    """Say why there will be no extension, or raise if it was asked for."""
    if ASKED == "1":
        raise SystemExit(f"patchpack._C cannot be built: {reason}")
    print(f"patchpack is built without C++: {reason}")


class BuildExtension(build_ext):
    """Compiles the files side by side; if that fails, what is built is a pure-Python package."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # what lies in build/ may be of another torch, or of other flags

    def run(self) -> None:
        inplace = self.inplace
        try:
            super().run()
        except (BaseError, CCompilerError) as error:
            self.inplace = inplace
            for extension in self.extensions:  # of an earlier build
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            text = str(error)  # has the whole command
            do_without(text if len(text) < 100 else f"{text[:40]} ... {text[-40:]}")
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True  # its tag

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
    reason = None
    if ASKED == "0":
        reason = "PATCHPACK_NATIVE=0"
    elif torch is None:
        reason = "no torch >= 2.10 in this environment"
    elif sysconfig.get_config_var("Py_GIL_DISABLED"):
        reason = "free-threaded Python has no stable ABI"
    if reason:
        do_without(reason)
        return []
    return [
        Extension(
            "patchpack._C",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("Py_LIMITED_API", PYTHON), ("TORCH_TARGET_VERSION", TORCH)],
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
                # what GCC says of vectors in signatures and in its own intrinsics
                *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
                *os.environ.get("CXXFLAGS", "").split(),  # has the last word
            ],
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            py_limited_api=True,
        )
    ]


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
