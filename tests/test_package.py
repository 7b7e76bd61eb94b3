"""The package as a whole: who imports whom, what an op consists of, and what gets installed."""

import ast
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import patchpack
from patchpack.testing.catalogue import SPECS

ROOT = Path(__file__).parents[1]
NATIVE = patchpack.available("rope", "native") is None
SOURCE = (".cpp", ".h", ".json", ".md", ".py")

SOURCES = {"patchpack.kernels": ROOT / "kernels", "patchpack": ROOT / "python/patchpack"}

# what a layer may import besides the standard library and itself; the longest name applies
LAYERS = {
    "patchpack.packing": "numpy torch patchpack._dispatch",
    "patchpack.layout": "numpy torch patchpack.packing",
    "patchpack._resampling": "numpy torch",
    "patchpack.reference": "torch patchpack._resampling patchpack.layout patchpack.packing",
    "patchpack.kernels": "torch triton patchpack._resampling",
    "patchpack._check": "torch patchpack.packing",
    "patchpack._interpreter": "numpy torch triton patchpack._interpreter_arithmetic",
    "patchpack._interpreter_arithmetic": "numpy torch triton patchpack._interpreter",
    "patchpack._dispatch": "torch patchpack._interpreter",
    "patchpack.ops": "torch patchpack._check patchpack._dispatch patchpack._resampling"
    " patchpack.layout patchpack.packing patchpack.reference",
    "patchpack.video": "av numpy PIL patchpack.packing",
    "patchpack.metadata": "torch patchpack._check patchpack._dispatch patchpack.packing",
    "patchpack.__init__": "patchpack._dispatch patchpack.layout patchpack.metadata patchpack.ops"
    " patchpack.packing patchpack.reference",
    "patchpack.systems": "numpy torch PIL patchpack patchpack._check patchpack.layout"
    " patchpack.metadata patchpack.packing",
    "patchpack.distributed": "torch patchpack patchpack._check patchpack.packing",
    "patchpack.integrations": "numpy torch PIL transformers patchpack patchpack._check"
    " patchpack._resampling patchpack.layout patchpack.metadata patchpack.packing"
    " patchpack.systems",
    "patchpack.models": "torch patchpack patchpack._check patchpack.metadata patchpack.packing",
    "patchpack.testing": "numpy torch triton patchpack patchpack._interpreter patchpack.kernels"
    " patchpack.layout patchpack.packing patchpack.reference",
    "patchpack.cli": "matplotlib numpy PIL rich skimage torch triton patchpack patchpack._dispatch"
    " patchpack.models patchpack.packing patchpack.systems patchpack.testing patchpack.video",
    "patchpack.__main__": "patchpack.cli",
}


def _modules() -> dict[str, Path]:
    """Every module of the package and its file, by its import name."""
    modules = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            if package == "patchpack" and "kernels" in path.relative_to(folder).parts:
                continue  # the link of `make dev`
            modules[".".join([package, *path.relative_to(folder).with_suffix("").parts])] = path
    return modules


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it; of ours, the submodule that is meant."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = full in MODULES or f"{full}.__init__" in MODULES
                found.add(full if ours else str(node.module))
    return {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _may_import(layer: str, name: str) -> bool:
    # `patchpack` alone is its public face: it does not stand for the modules inside
    return _inside(name, layer) or any(
        name == other if other == "patchpack" else _inside(name, other)
        for other in LAYERS[layer].split()
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_may(module):
    layers = [layer for layer in LAYERS if _inside(module, layer)]
    assert layers, f"{module} belongs to no layer: add it to LAYERS"
    layer = max(layers, key=len)
    foreign = {name for name in _imports(MODULES[module]) if not _may_import(layer, name)}
    assert not foreign, f"{module} must not import {sorted(foreign)}"


@pytest.mark.parametrize(("folder", "other"), [("tests", "bench"), ("bench", "tests")])
def test_tests_and_bench_do_not_import_each_other(folder, other):
    others = {other} | {path.stem for path in (ROOT / other).glob("*.py")}
    for path in (ROOT / folder).rglob("*.py"):
        foreign = {name for name in _imports(path) if name.partition(".")[0] in others}
        assert not foreign, f"{path.name} must not import {sorted(foreign)}"


def _python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light_and_needs_no_triton():
    heavy = {
        "triton",
        "PIL",
        "av",
        "matplotlib",
        "rich",
        "skimage",
        "scipy",
        "pytest",
        "hypothesis",
    }
    _python(
        "import sys; sys.modules['triton'] = None\n"
        "import patchpack\n"
        "assert 'not installed' in patchpack.available('rope', 'triton')\n"
        f"loaded = [n for n in {sorted(heavy)} if sys.modules.get(n)]\n"
        "assert not loaded, loaded"
    )


@pytest.mark.parametrize("op", SPECS)
def test_an_op_has_all_its_parts(op):
    parts = [
        f"python/patchpack/reference/{op}.py",
        f"kernels/{op}.py",
        f"python/patchpack/ops/{op}.py",
        f"tests/test_{op}.py",
        f"bench/bench_{op}.py",
        f"csrc/{op}.cpp",
        f"csrc/{op}.h",
    ]
    assert not NATIVE or patchpack.available(op, "native") is None
    missing = [part for part in parts if not (ROOT / part).is_file()]
    assert not missing
    assert op in patchpack.__all__
    assert getattr(patchpack, op) is SPECS[op].op
    assert getattr(patchpack.reference, op) is SPECS[op].reference
    assert f"\n| `{op}" in (ROOT / "README.md").read_text(), "no row in the README's table of ops"


def test_every_op_is_in_the_catalogue():
    ops = {path.stem for path in (ROOT / "python/patchpack/ops").glob("[!_]*.py")}
    assert ops == set(SPECS)


def _golden_functions() -> list[str]:
    cases = json.loads((ROOT / "tests/golden.json").read_text())["cases"]
    return sorted({case["function"] for case in cases})


@pytest.mark.parametrize("function", _golden_functions())
def test_no_golden_value_is_forgotten(function):
    model, _, name = function.partition(".")
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text()
        by_name = f'"{model}.{{function}}"' in text and f'"{name}"' in text
        if f'"{function}"' in text or by_name:
            return
    pytest.fail(f"no test asks for the cases of {function}")


def test_all_is_sorted_and_true():
    assert patchpack.__all__ == sorted(patchpack.__all__)
    assert all(hasattr(patchpack, name) for name in patchpack.__all__)


def test_available_knows_what_is_public():
    with pytest.raises(ValueError, match="op must be one of ") as error:
        patchpack.available("nothing", "triton")
    known = str(error.value).removeprefix("op must be one of ").partition(", got")[0].split(", ")
    assert set(known) == {name for name in patchpack.__all__ if name.rstrip("_") in SPECS}


# kinds of wheels, in the order in which they are built in one tree
WHEELS = {
    "native": {"PATCHPACK_NATIVE": "1", "CXXFLAGS": "-O0"},  # faster to compile
    "pure": {"PATCHPACK_NATIVE": "0"},
    "no compiler": {"CXX": "false"},
}
every_wheel = pytest.mark.parametrize(
    "wheel",
    [
        pytest.param(kind, marks=[pytest.mark.cpp, pytest.mark.slow] if kind == "native" else ())
        for kind in WHEELS
    ],
    indirect=True,
)


def _build(tree: Path, out: Path, what: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "build", "--no-isolation", what, "--outdir", out, tree]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree") / "patchpack", tmp_path_factory.mktemp("dist")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leftovers)
    done = _build(tree, out, "--sdist")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(request, unpacked, tmp_path_factory) -> Path:
    """The wheel of a kind, built from the source distribution and nothing else."""
    out = tmp_path_factory.mktemp("wheel")
    done = _build(unpacked, out, "--wheel", **WHEELS[request.param])
    assert done.returncode == 0, done.stdout + done.stderr
    is_native = request.param == "native"
    assert is_native != ("patchpack is built without C++: " in done.stdout)
    (path,) = out.glob("*.whl")
    tag = r"cp310-abi3-linux_\w+" if is_native else "py3-none-any"
    assert re.fullmatch(rf"patchpack-[\d.]+-{tag}\.whl", path.name)
    return path


@every_wheel
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        assert any(n.endswith(".dist-info/licenses/LICENSE") for n in archive.namelist())
    expected = {f"{module.replace('.', '/')}.py" for module in MODULES} | {"patchpack/py.typed"}
    if "-abi3-" in wheel.name:
        expected.add("patchpack/_C.abi3.so")
    assert sorted(names) == sorted(expected)


@every_wheel
def test_an_op_runs_from_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    native = "-abi3-" in wheel.name
    where = _python(
        "import torch, patchpack, patchpack.kernels.rope_2d as kernel\n"
        "q, grid = torch.randn(4, 1, 32), patchpack.PackedGrid([(2, 2)])\n"
        f"impls = ('reference', 'triton', None, {'native' if native else None!r})\n"
        "want, *got = (patchpack.rope_2d(q, q, grid, impl=impl)[0] for impl in impls)\n"
        "for x in got: torch.testing.assert_close(x, want)\n"
        "print(kernel.__file__, patchpack.available('rope_2d', 'native'), sep='\\n')",
        PYTHONPATH=str(tmp_path),
    )
    reason = "the C++ extension patchpack._C is not part of this installation"
    kernel = str(tmp_path / "patchpack/kernels/rope_2d.py")
    assert where.splitlines() == [kernel, "None" if native else reason]


@pytest.mark.cpp
def test_a_cpu_capability_that_is_not_to_be_had_is_an_error():
    environment = {**os.environ, "PATCHPACK_CPU_CAPABILITY": "avx1024"}
    done = subprocess.run(
        [sys.executable, "-c", "import patchpack"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "PATCHPACK_CPU_CAPABILITY must be one of plain, " in done.stderr
    assert "got 'avx1024'" in done.stderr


def test_an_extension_that_does_not_load_is_not_passed_over_in_silence(tmp_path):
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python/patchpack", tmp_path / "patchpack", ignore=without)
    (tmp_path / "patchpack/_C.abi3.so").write_bytes(b"no library")
    found = _python(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import patchpack\n"
        "(warning,) = (str(w.message) for w in caught if w.category is RuntimeWarning)\n"
        "assert warning == patchpack.available('rope_2d', 'native')\n"
        "print(warning)",
        PYTHONPATH=str(tmp_path),
    )
    assert "the extension patchpack._C does not load with torch " in found


def test_an_extension_that_is_asked_for_is_built_or_an_error(unpacked, tmp_path):
    done = _build(unpacked, tmp_path, "--wheel", CXX="false", PATCHPACK_NATIVE="1")
    assert done.returncode != 0
    assert "patchpack._C cannot be built: " in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.cpp
@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump")
def test_only_the_code_of_a_level_has_its_instructions():
    extension = importlib.import_module("patchpack._C").__file__
    command = ["objdump", "--disassemble", "--no-show-raw-insn", extension]
    assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = re.findall(r"^[0-9a-f]+ <(\w\S*)>:\n((?:.+\n)*)", assembly, flags=re.M)
    if "x86-64" not in assembly:
        pytest.skip("there are no levels")
    newer = re.compile(r"\t(v[a-z]\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)\b")
    using = {name for name, code in functions if newer.search(code)}
    of_a_level = {name for name, _ in functions if re.search(r"\d(avx2|avx512|avx512_bf16)", name)}
    assert using & of_a_level
    assert not using - of_a_level


def test_planted_faults_still_have_a_place(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    faults = runpy.run_path(str(ROOT / "tests/mutate.py"))["FAULTS"]
    lost = [fault.what for fault in faults if fault.old not in (ROOT / fault.file).read_text()]
    assert not lost


def test_the_source_distribution_holds_what_builds_and_checks_it(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("bench", "csrc", "kernels", "python", "tests")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.*") if p.is_file()]
    wanted = {p.relative_to(ROOT).as_posix() for p in files if p.suffix in SOURCE}
    wanted = {p for p in wanted if not p.startswith("python/patchpack/kernels/")}
    wanted |= {"LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    assert not wanted - names
