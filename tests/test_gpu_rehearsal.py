"""What runs on a GPU, rehearsed on one that is pretended: see ``tests/pretended_gpu``."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import patchpack
from patchpack.__main__ import main
from patchpack.cli import verify
from patchpack.testing import machine

ROOT = Path(__file__).parents[1]
BENCH, PRETENDED = ROOT / "bench", ROOT / "tests/pretended_gpu"


def _python(*arguments, status=0, gpu=False) -> str:
    """What a Python program prints, on a pretended GPU or on what is here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if gpu:
        paths = (str(PRETENDED), os.environ.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["PATH"] = os.pathsep.join((str(PRETENDED), os.environ["PATH"]))
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": BENCH, "env": environment, "text": True}
    done = subprocess.run(command, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout
    return " ".join(done.stdout.split())


# bench -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, str]:
    """The file and the results of a run, and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    without = (f"--without={name}" for name in ("FlexAttention", "eager loop", "SDPA loop"))
    options = ("--quick", "--dtype", "bfloat16", *without, "--out", out)
    printed = _python("run.py", "mrope", "varlen_attention", "metadata", *options, gpu=True)
    path = out / "pretended-gpu.json"
    return path, json.loads(path.read_text()), printed


@pytest.mark.slow
def test_a_gpu_is_found_and_its_file_bears_its_name(run):
    path, results, printed = run
    assert path.with_suffix(".png").stat().st_size > 0
    assert {b["params"]["op"] for b in results["benchmarks"]} == {"mrope", "varlen_attention"}
    assert "metadata: it works on a CPU" in printed
    assert "another process has memory of this GPU" in printed  # 10 of 80 GiB
    assert printed.count("driver 580.65.06") == 1


@pytest.mark.slow
def test_results_of_a_gpu_say_what_it_is_and_reaches(run):
    for b in run[1]["benchmarks"]:
        info = b["extra_info"]
        assert (
            info
            | {
                "device": "Pretended GPU",
                "cuda": "13.0",
                "architecture": "sm_90",
                "multiprocessors": 132,
                "memory_gib": 80.0,
                "memory_taken_gib": 10.0,
                "driver": "580.65.06",
                "max_sm_clock": "1980 MHz",
                "sm_clock": "1755 MHz",
                "memory_clock": "2619 MHz",
            }
            == info
        )
        assert "power_limit" not in info  # nvidia-smi does not know it
        assert info.keys() >= {"date", "commit", "python", "platform", "triton"}
        assert info["torch"] == torch.__version__
        assert info["of_copy"] == pytest.approx(info["gb_per_s"] / info["copy_gb_per_s"])
        matmul = info["gflop_per_s"] / info["matmul_gflop_per_s"]
        assert info["of_matmul"] == pytest.approx(matmul)
        assert (b["name"] == info["limit"]) == ("host_s" not in info)


@pytest.mark.slow
def test_peers_that_need_a_gpu_are_timed(run):
    timed = {}
    for b in run[1]["benchmarks"]:
        timed.setdefault((b["params"]["op"], b["params"]["direction"]), set()).add(b["name"])
    for direction in ("forward", "forward+backward"):
        assert timed["mrope", direction] >= {"triton", "transformers", "Liger", "flash-attn"}
        releases = {"flash-attn", "flash-attn 3", "flash-attn 4"}
        assert timed["varlen_attention", direction] >= {"triton", *releases}


@pytest.mark.slow
def test_all_providers_of_a_gpu_are_drawn(run):
    _python(
        "-c",
        f"""
import itertools, matplotlib.pyplot as plt, _report
from pathlib import Path
results = _report.read(Path({str(run[0])!r}))["benchmarks"]
for op, rows in itertools.groupby(results, lambda row: row["params"]["op"]):
    rows, (_, axes) = list(rows), plt.subplots()
    _report._plot_op(op, rows, axes)
    drawn = {{text.get_text() for text in axes.get_legend().get_texts()}}
    limit = rows[0]["extra_info"]["limit"]
    assert drawn == {{row["name"] for row in rows}} - {{limit}}, drawn
""",
    )


FAULTS = """
import dataclasses, sys
import torch
import bench_rope, run
from patchpack.testing.catalogue import SPECS

right, make_inputs = SPECS["rope"], bench_rope.BENCH.make_inputs

def wrong(q, k, cos, sin, **options):
    return right.op(q, k, cos, 1.001 * sin, **options)

def not_compiled(q, k, cos, sin, **options):
    raise RuntimeError("out of resource: shared memory. Reduce the tiles.")

def too_large(dtype, *arguments, **shape):
    if dtype == torch.float32:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8")
    return make_inputs(dtype, *arguments, **shape)

def interrupted(dtype, *arguments, **shape):
    if dtype == torch.bfloat16:
        raise KeyboardInterrupt
    return make_inputs(dtype, *arguments, **shape)

faults = [globals()[name] for name in sys.argv.pop().split()]
SPECS["rope"] = dataclasses.replace(right, op=faults[0])
bench_rope.BENCH = dataclasses.replace(bench_rope.BENCH, make_inputs=faults[1])
run.main()
"""


def _faulty(faults, out, status) -> tuple[set, dict, str]:
    """Who is timed by dtype, why others are not, and what is printed."""
    options = ("--quick", "--dtype", "float32", "--dtype", "bfloat16", "--out", out)
    printed = _python("-c", FAULTS, "rope", *options, faults, status=status, gpu=True)
    results = json.loads((out / "pretended-gpu.json").read_text())
    assert (out / "pretended-gpu.png").stat().st_size > 0
    timed = {(b["params"]["dtype"], b["name"]) for b in results["benchmarks"]}
    return timed, {(s["dtype"], s["provider"]): s for s in results["skipped"]}, printed


PEERS = ("reference", "transformers", "Liger", "flash-attn", "copy")


@pytest.mark.slow
def test_a_wrong_op_is_refused_and_what_was_measured_is_kept(tmp_path):
    timed, skipped, printed = _faulty("wrong interrupted", tmp_path, 130)
    assert timed == {("float32", name) for name in PEERS}
    row = skipped["float32", "triton"]
    assert row["failed"] is True
    assert row["reason"].startswith("it is not as accurate as eager in 'one image': output 0")
    assert "interrupted: what was measured is kept" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_what_memory_cannot_hold_or_triton_cannot_compile_is_left_out(tmp_path):
    timed, skipped, printed = _faulty("not_compiled too_large", tmp_path, 1)
    assert timed == {("bfloat16", name) for name in PEERS}
    reason = "the case needs more memory: CUDA out of memory."
    assert skipped["float32", "any"]["reason"] == reason
    assert reason in printed
    row = skipped["bfloat16", "triton"]
    assert (row["failed"], row["reason"]) == (True, "RuntimeError: out of resource: shared memory.")
    assert "failed: triton of rope, tiny, bfloat16, forward+backward" in printed
    assert printed.count("failed: ") == 2  # nothing failed in float32


def test_an_op_that_stops_does_not_stop_the_others(tmp_path):
    """But Ctrl-C does, which its process reports."""
    printed = _python(
        "-c",
        f"""
import sys
from types import SimpleNamespace
import run

def child(command, env):
    timed.append(command[2])
    return SimpleNamespace(returncode=first if len(timed) == 1 else 0)

run.subprocess = SimpleNamespace(run=child)
sys.argv = ["run.py", "mrope", "rope", "rope_2d", "--device", "cpu", "--out", {str(tmp_path)!r}]
for first in (0, 1, -11, 130):
    timed = []
    try:
        run.main()
    except SystemExit as stop:
        print(first, stop.code, *timed)
""",
    )
    assert "0 0 mrope rope rope_2d" in printed
    assert "failed: mrope, see above 1 1 mrope rope rope_2d" in printed
    assert "failed: mrope, see above -11 1 mrope rope rope_2d" in printed
    assert printed.endswith("interrupted: what was measured is kept 130 130 mrope")


def test_a_peer_that_fails_or_writes_where_it_should_not_spoils_nothing():
    _python(
        "-c",
        """
import dataclasses
import torch
import _harness
from bench_rope import BENCH
from patchpack.testing.catalogue import SPECS

reference = SPECS["rope"].reference

class Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        kept = grad.clone()
        grad.zero_()
        return kept

def over_inputs(inputs):
    def rotate(q, k, cos, sin):
        q.detach().zero_()
        return reference(q, k, cos, sin)
    return rotate

def over_gradients(inputs):
    return lambda q, k, cos, sin: [Overwrites.apply(x) for x in reference(q, k, cos, sin)]

def raises(inputs):
    raise OSError("no such GPU. Try another.")

def missing(inputs):
    import a_library_that_is_not_there

def honest(inputs):
    return reference

peers = (over_inputs, over_gradients, raises, missing, honest)
bench = dataclasses.replace(BENCH, peers={peer.__name__: peer for peer in peers})
for backward in (False, True):
    case = _harness.Case(bench, "tiny", torch.float32, backward, "cpu")
    found = _harness.run_case(case, True, ["native"])
    timed = [row["name"] for row in found["benchmarks"]]
    assert timed == ["reference", "over_gradients", "honest", "copy"], timed
    reasons = {row["provider"]: (row["reason"], row.get("failed")) for row in found["skipped"]}
    assert reasons["over_inputs"] == ("it changes its inputs", True)
    assert reasons["raises"] == ("OSError: no such GPU.", True)
    assert reasons["missing"] == ("a_library_that_is_not_there is not installed", None)

_harness.answers = lambda device: False
try:
    _harness.run_case(case, True, ["native"])
except RuntimeError as error:
    assert str(error).startswith("raises has stopped the GPU: "), error
else:
    raise SystemExit("it goes on")
""",
    )


def test_a_gpu_that_torch_does_not_see_is_not_passed_over(tmp_path):
    printed = _python(
        "-c",
        f"""
import sys
from pathlib import Path
from patchpack.testing import machine
machine.DRIVERS = (Path(sys.executable),)
import run
run.torch.cuda.is_available = lambda: False
for device in ([], ["--device", "cuda"]):
    sys.argv = ["run.py", "rope", "--quick", *device, "--out", {str(tmp_path)!r}]
    try:
        run.main()
    except SystemExit as stop:
        assert stop.code == 2
""",
    )
    assert f"though {sys.executable} is here; --device cpu times the CPU" in printed
    assert f"error: --device cuda: torch {torch.__version__}" in printed
    assert not list(tmp_path.iterdir())


# the form of results -----------------------------------------------------------------------------


def test_results_in_the_repository_have_their_form():
    printed = _python(
        "-c",
        """
from pathlib import Path
import _results
for path in sorted(Path("results").glob("*.json")):
    _results.read(path)
    print(path.name)
""",
    )
    assert {"amd-epyc.json", "nvidia-h200.json", "packing.json", "scaling.json"} <= {
        *printed.split()
    }


CHANGES = {
    "del b['stats']": "benchmarks[0] lacks stats",
    "b['seconds'] = 1": "benchmarks[0] has unknown seconds",
    "info['bytes'] = '7'": "extra_info.bytes must be <class 'int'>, got '7'",
    "info['of_limit'] = True": "extra_info.of_limit must be <class 'float'>, got True",
    "info['limit'] = 'host'": "limit must be typing.Literal['copy', 'matmul'], got 'host'",
    "info['commit'] = 7": "extra_info.commit must be str | None, got 7",
    "info['allocator'] = {'x': 1}": "extra_info.allocator.x must be <class 'str'>, got 1",
    "found['skipped'] = {}": "skipped must be list[_results.Skipped], got {}",
}


@pytest.mark.slow
def test_results_of_another_form_are_refused(run, tmp_path):
    printed = _python(
        "-c",
        f"""
import json
from pathlib import Path
import _results
path = Path({str(tmp_path)!r}, "results.json")
_results.write(path, json.loads(Path({str(run[0])!r}).read_text()))
before = path.read_text()
for change in {list(CHANGES)}:
    found = json.loads(before)
    b = found["benchmarks"][0]
    info = b["extra_info"]
    exec(change)
    try:
        _results.write(path, found)
    except ValueError as error:
        print(error)
assert path.read_text() == before
""",
    )
    missing = [message for message in CHANGES.values() if message not in printed]
    assert not missing, printed


# verify ------------------------------------------------------------------------------------------


TRACED = ("opcheck", "compiled")


@pytest.mark.slow
def test_verify_leaves_a_report(tmp_path):
    path = tmp_path / "report.json"
    printed = _python(
        "-c",
        f"""
import sys
from patchpack.__main__ import main
from patchpack.cli import verify
for check in {TRACED}:  # torch.compile would find no GPU
    del verify.CHECKS[check]
sys.exit(main(["verify", "--op", "rope", "--impl", "triton", "--json", {str(path)!r}]))
""",
        gpu=True,
    )
    assert printed.startswith("triton on cuda, Pretended GPU")
    report = json.loads(path.read_text())
    assert (report["impl"], report["device"], report["stopped"]) == ("triton", "cuda", None)
    facts = ("date", "commit", "patchpack", "torch", "triton", "cuda", "driver", "architecture")
    assert report["machine"].keys() >= set(facts)
    checks = [check for check in verify.CHECKS if check not in TRACED]
    assert [result["check"] for result in report["results"]] == checks
    assert all(result["passed"] for result in report["results"])


@pytest.fixture
def checks(monkeypatch):
    """Two checks, the first of which does what it is told."""
    told = SimpleNamespace(do=lambda: None)
    found = {"first": lambda subject: told.do(), "second": lambda subject: None}
    monkeypatch.setattr(verify, "CHECKS", found)
    return told


def _report(path, status, *options):
    assert main(["verify", "--op", "rope", "--impl", "triton", "--json", str(path)]) == status
    report = json.loads(path.read_text())
    return report["stopped"], {r["check"]: r for r in report["results"]}


def test_a_gpu_that_answers_no_more_ends_the_report(checks, monkeypatch, tmp_path, capsys):
    answers = []

    def fail():
        answers.append(False)
        raise RuntimeError("an illegal memory access was encountered")

    checks.do = fail
    monkeypatch.setattr(machine, "answers", lambda device: not answers)
    stopped, results = _report(tmp_path / "report.json", 1)
    assert stopped == "the GPU answers no more since first of rope: the rest is not run"
    assert [(name, r["passed"]) for name, r in results.items()] == [("first", False)]
    assert results["first"]["message"].count("illegal memory access") == 1  # of many cases
    assert stopped in capsys.readouterr().out


def test_an_interrupted_report_has_what_was_found(checks, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    checks.do = interrupt
    stopped, results = _report(tmp_path / "report.json", 1)
    assert stopped == "it was interrupted in first of rope: the rest is not run"
    assert not results


def test_a_report_that_cannot_be_written_stops_verify_at_once(checks, tmp_path, capsys):
    checks.do = lambda: pytest.fail("it has begun")
    path = tmp_path / "missing/report.json"
    assert main(["verify", "--op", "rope", "--impl", "triton", "--json", str(path)]) == 2
    assert f"cannot write the report to {path}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_gpu_that_cannot_be_used_is_one_line(error, monkeypatch, capsys):
    def resolve(*arguments, **first):
        raise error("CUDA-capable device(s) is/are busy\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(verify._dispatch, "resolve", resolve)
    assert main(["verify", "--op", "rope"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("cannot verify on cpu: CUDA-capable device(s) is/are busy")


# pytest -m gpu -----------------------------------------------------------------------------------

TESTS = """
import pytest
import torch

def lost():
    raise RuntimeError("an illegal memory access was encountered")

@pytest.mark.gpu
def test_too_large():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 8 GiB")

def test_too_large_for_the_host():
    raise torch.OutOfMemoryError("it is not on a GPU")

@pytest.mark.gpu
def test_out_of_bounds():
    torch.cuda.synchronize = lost
    lost()

@pytest.mark.gpu
def test_that_cannot_run():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [True, False])
def test_tests_of_a_gpu_are_skipped_or_stopped_with_a_reason(gpu, tmp_path, monkeypatch):
    """With the hooks of our ``conftest.py``."""
    if not gpu and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "test_it.py").write_text(TESTS)
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), *sys.path[1:]]))
    options = ("-p", "conftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", tmp_path)
    printed = _python("-m", "pytest", *options, gpu=gpu, status=2 if gpu else 1)
    assert "FAILED" in printed
    if gpu:
        assert "CUDA out of memory. Tried to allocate 9.00 GiB." in printed
        assert "the GPU answers no more since test_out_of_bounds" in printed
        assert "2 failed, 1 skipped" in printed
    else:
        assert machine.no_gpu() in printed
        assert "1 failed, 3 skipped" in printed


# the machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "visible", "driver", "message"),
    [
        (None, None, False, "is built without CUDA and ROCm"),
        (None, None, True, "is built without CUDA and ROCm, though {driver} is here"),
        ("13.0", None, False, "for cuda 13.0 finds no GPU"),
        (
            "13.0",
            "",
            True,
            "for cuda 13.0 finds no GPU with {hidden}, though {driver} is here",
        ),
    ],
)
def test_why_there_is_no_gpu(cuda, visible, driver, message, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(machine, "DRIVERS", (tmp_path / "none", *[tmp_path] * driver))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    named = message.format(driver=tmp_path, hidden="CUDA_VISIBLE_DEVICES=")
    assert machine.no_gpu() == f"torch {torch.__version__} {named}"
    assert machine.has_unused_gpu() == (driver and visible is None)


def test_a_gpu_of_amd_is_named_by_its_architecture(monkeypatch):
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 192 * 2**30))
    assert machine.describe_gpu() == {
        "device": "gfx942",
        "rocm": "7.1",
        "architecture": "gfx942",
        "multiprocessors": 304,
        "memory_gib": 192.0,
        "memory_taken_gib": 191.0,
    }


def test_versions_are_of_whoever_distributes_a_library(monkeypatch):
    versions = {"triton-rocm": "3.7.1", "torch": "2.13.0"}
    distributions = {"triton": ["triton-rocm"], "torch": ["torch"]}
    monkeypatch.setattr(machine.metadata, "packages_distributions", lambda: distributions)
    monkeypatch.setattr(machine.metadata, "version", versions.__getitem__)
    assert machine.libraries() == {"triton": "3.7.1"}


def test_the_commit_is_that_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCHPACK_COMMIT", "told")
    assert machine.commit() == "told"
    monkeypatch.setenv("PATCHPACK_COMMIT", "")
    # installed in a virtual environment within somebody's repository
    git = ("git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    source = tmp_path / "patchpack/__init__.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.setattr(patchpack, "__file__", str(source))
    assert machine.commit() is None
    subprocess.run([*git, "add", "."], check=True)
    assert len((machine.commit() or "").removesuffix("-dirty")) == 40


def test_info_says_what_a_bug_report_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    facts = dict(line.split(maxsplit=1) for line in printed.partition("\n\n")[0].splitlines())
    names = ("commit", "patchpack", "python", "platform", "torch", "cpu", "TRITON_CACHE_DIR")
    assert facts.keys() >= set(names)
    assert math.isfinite(float(facts["patchpack"].rpartition(".")[0]))
    if not torch.cuda.is_available():
        assert facts["gpu"] == f"none: {machine.no_gpu()}"
    printed = _python("-m", "patchpack", "info", gpu=True)
    assert "gpu 0 Pretended GPU, cuda 13.0, architecture sm_90" in printed
