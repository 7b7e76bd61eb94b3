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
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

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


class CudaExtension(Extension):
    """The CUDA C++ of csrc/cuda/, for whoever cannot compile with Triton: patchpack._C_cuda.

    It is left out, with a line that says why, if ``PATCHPACK_CUDA=0``, if there is no nvcc in
    ``CUDA_HOME`` or on the path, if torch is without CUDA, or if nvcc fails. ``PATCHPACK_CUDA=1``
    makes each of these an error but the third: then it compiles, and does not load here. It holds
    machine code for ``TORCH_CUDA_ARCH_LIST``, such as ``"8.0;9.0;10.0+PTX"``, and its own CUDA
    runtime.
    """

    asked = os.environ.get("PATCHPACK_CUDA", "")

    def __init__(self, torch: Path) -> None:
        csrc = Path("csrc")
        super().__init__(
            "patchpack._C_cuda",
            sorted(map(str, [*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.cpp")])),
            depends=sorted(map(str, [*csrc.glob("*.h"), *csrc.glob("cuda/*.cuh")])),
            py_limited_api=True,
            optional=self.asked != "1",
        )
        self.torch = torch

    @classmethod
    def nvcc(cls) -> str | None:
        home = os.environ.get("CUDA_HOME")
        return shutil.which("nvcc", path=f"{home}/bin" if home else None)

    @classmethod
    def reason_not(cls, torch: Path) -> str | None:
        if cls.asked == "0":
            return "PATCHPACK_CUDA=0"
        if cls.nvcc() is None:
            return "no nvcc in CUDA_HOME or on the path"
        if cls.asked != "1" and not (torch / "lib/libtorch_cuda.so").exists():
            return "torch is without CUDA"
        return None

    def targets(self) -> list[str]:
        """What nvcc generates: the targets asked for, or those of ours that it knows."""
        asked = re.split("[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;"))
        if asked == [""]:
            known = self.run("--list-gpu-arch")
            asked = [v for v in ("8.0", "9.0", "10.0") if f"compute_{v.replace('.', '')}" in known]
            asked[-1] += "+PTX"
        flags = []
        for version in asked:
            number, _, ptx = version.replace(".", "").partition("+")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def run(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc(), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise (CompileError if self.optional else SystemExit)(f"nvcc failed: {done.stderr}")
        return done.stdout

    def build(self, path: Path, folder: Path) -> None:
        """Compile the sources side by side in ``folder`` and link them to ``path``."""
        folder.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *self.targets()]
        flags += ["-Xfatbin=-compress-all", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH}"]
        flags += [
            f"-DPy_LIMITED_API={PYTHON}",
            f"-I{self.torch / 'include'}",
            f"-I{sysconfig.get_path('include')}",
        ]

        def compile_one(source: str) -> str:
            target = str(folder / Path(source).with_suffix(".o").name)
            self.run(*flags, "-c", source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, self.sources))
        libraries = ["-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
        folders = [f"-L{self.torch / 'lib'}", f"-L{folder}"]
        name = "libtorch_cuda.so"
        if not (self.torch / "lib" / name).exists():
            # where it is loaded torch has that library, and its symbols are found if it is named
            (empty := folder / "empty.cu").touch()
            stub = ["-shared", f"-Xlinker=-soname={name}", "-cudart=none"]
            self.run(*stub, str(empty), "-o", str(folder / name))
        # its own runtime is not that of torch, which may be of another release: keep them apart
        own = ["-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        self.run("-shared", *own, *objects, *folders, *libraries, "-o", str(path))


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
        if isinstance(ext, CudaExtension):
            ext.build(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp))
            return
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extension(ext)


def cuda_extensions(torch: Path) -> list[Extension]:
    reason = CudaExtension.reason_not(torch)
    if reason is None:
        return [CudaExtension(torch)]
    if CudaExtension.asked == "1":
        raise SystemExit(f"patchpack._C_cuda cannot be built: {reason}")
    print(f"patchpack is built without CUDA C++: {reason}")
    return []


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
        *cuda_extensions(torch),
        Extension(
            "patchpack._C",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("Py_LIMITED_API", PYTHON), ("TORCH_TARGET_VERSION", TORCH)],
            extra_compile_args=[
                *["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"],
                # what GCC says of vectors in signatures and in its own intrinsics
                *["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
                "-Wno-unknown-warning-option",
                *os.environ.get("CXXFLAGS", "").split(),  # has the last word
            ],
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            py_limited_api=True,
        ),
    ]


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
