"""The benchmarks run, count right, and refuse what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from patchpack.testing.catalogue import SPECS

BENCH = Path(__file__).parents[1] / "bench"
FORWARD_ONLY = ("patchify", "resize_images")  # of bytes


def _python(*arguments) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """Results of one quick run of every bench file, and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    options = ("--quick", "--device", "cpu", "--dtype", "float32", "--out", out)
    printed = _python("run.py", *SPECS, *options)
    (path,) = out.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 0
    return json.loads(path.read_text()), " ".join(printed.split())


@pytest.mark.parametrize("op", SPECS)
def test_every_provider_is_timed_or_says_why_not(run, op):
    results, printed = run
    directions = ("forward",) if op in FORWARD_ONLY else ("forward", "forward+backward")
    for direction in directions:
        timed = {
            b["name"]: b
            for b in results["benchmarks"]
            if (b["params"]["op"], b["params"]["direction"]) == (op, direction)
        }
        reasons = {
            s["provider"]: s["reason"]
            for s in results["skipped"]
            if (s["op"], s["direction"]) == (op, direction)
        }
        assert "reference" in timed
        assert {"reference, compiled", "triton", "native"} <= reasons.keys()
        assert "interpreter, which is never timed" in reasons["triton"]
        assert not timed.keys() & reasons.keys()
        for name, reason in reasons.items():
            assert f"{op}: no {name}: {reason}" in printed
        for b in timed.values():
            stats, info = b["stats"], b["extra_info"]
            assert 0 < stats["q1"] <= stats["median"] <= stats["q3"]
            assert info.keys() >= {"commit", "torch", "triton", "device", "threads", "allocator"}
            assert info["gb_per_s"] == pytest.approx(info["bytes"] / stats["median"] / 1e9)
            assert info["of_limit"] > 0


# bytes and operations of the tiny shapes in float32, counted by hand
WORK = {
    "rope": (2 * 6 * 3 * 32 * 4 + 2 * 6 * 16 * 4, 3 * 6 * 3 * 32),
    "rope_2d": (2 * 28 * 4 * 32 * 4, 3 * 28 * 4 * 32),
    "mrope": (2 * 6 * 3 * 32 * 4 + 3 * 6 * 8, 3 * 6 * 3 * 32),
    "interpolate_tokens": ((38 + 12) * 8 * 4, 8 * 12 * 8),
    "add_pos_embed": ((2 * 20 + 16) * 8 * 4, 9 * 20 * 8),
    "merge_tokens": ((2 * 28 * 8 + 2 * 32) * 4, 8 * 28 * 8),
    "region_attention": ((12 + 48 + 12) * 8 * 4, 4 * 48 * 8),
    "patchify": (20 * 588 + 20 * 1176 * 4, 3 * 20 * 1176),
    "resize_images": (
        3 * (60 * 80 + 50 * 30 + 56 * 84 + 84 * 56),
        8 * 3 * (60 * 84 + 84 * 60 + 50 * 56 + 56 * 84),
    ),
    "assemble": ((9 + 12 + 9 + 18 + 9 + 15 + 9 + 9) * 8 * 4, 8 * 6 * 8),
    "scatter_tokens": (2 * 12 * 8 * 4, 0),
    "varlen_attention": (16 * (4 + 2 * 2 + 4) * 16 * 4, 4 * (25 + 81 + 4) * 4 * 16),
}


@pytest.mark.parametrize("op", SPECS)
def test_the_work_is_what_a_hand_counts(run, op):
    (forward,) = {
        (b["extra_info"]["bytes"], b["extra_info"]["flops"])
        for b in run[0]["benchmarks"]
        if (b["params"]["op"], b["params"]["direction"]) == (op, "forward")
    }
    assert forward == WORK[op]


def test_results_are_read_by_pytest_benchmark(run, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run[0]))
    compare = ("-m", "pytest_benchmark", "compare", path, "--columns=median,iqr")
    assert "rope_2d, tiny, float32, forward" in _python(*compare, "--group-by=group")


def test_a_wrong_provider_is_refused():
    _python(
        "-c",
        """
import dataclasses, torch
import _harness, bench_rope
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject


def refused(function, *arguments):
    try:
        function(*arguments)
    except _harness.WrongError as error:
        return str(error)
    raise SystemExit("not refused")


def turned_too_far(inputs):
    return lambda q, k, cos, sin: SPECS["rope"].reference(q, k * 1.001, cos, sin)


peers = {"turned too far": turned_too_far}
bench = dataclasses.replace(bench_rope.BENCH, peers=peers)
for backward in (False, True):
    case = _harness.Case(bench, "tiny", torch.float32, backward, "cpu")
    assert "turned too far does not compute rope" in refused(_harness.run_case, case, True)

right = SPECS["rope"]
wrong = lambda q, k, cos, sin, impl, **_: right.op(q, k, cos, -sin, impl=impl, **_)
SPECS["rope"] = dataclasses.replace(right, op=wrong)
subject = Subject("rope", "one image")
assert "is not as accurate as eager" in refused(_harness._check_accuracy, subject)
""",
    )


def test_packing_is_compared_with_the_usual_ways_and_the_bounds(tmp_path):
    printed = _python("bench_packing.py", "--quick", "--out", tmp_path)
    results = json.loads((tmp_path / "packing.json").read_text())
    assert results["machine"].keys() >= {"commit", "device"}
    pack = {row["name"]: row for row in results["pack"]}
    assert pack["lower bound"]["sequences"] <= pack["pack"]["sequences"]
    assert pack["pack"]["sequences"] <= pack["first fit decreasing"]["sequences"]
    assert pack["pack"]["sequences"] < pack["in order"]["sequences"]
    assert all(0 < row["fill"] <= 1 and str(row["sequences"]) in printed for row in pack.values())
    assert results["balance"]
    for row in results["balance"]:
        assert 1 <= row["lower bound"] <= row["balance"] + 1e-9 < row["in turn"]
        assert row["batches"] == results["images"] // row["images"]


def test_a_second_run_takes_the_place_of_the_first(run, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run[0]))
    _python(
        "-c",
        f"""
import json, pathlib, _report
path = pathlib.Path({str(path)!r})
before = json.loads(path.read_text())
again = [dict(b, again=True) for b in before["benchmarks"] if b["params"]["op"] == "rope"]
_report.merge(path, again, [])
after = json.loads(path.read_text())
key = lambda b: b["fullname"]
assert sorted(map(key, after["benchmarks"])) == sorted(map(key, before["benchmarks"]))
assert {{b["params"]["op"] for b in after["benchmarks"] if "again" in b}} == {{"rope"}}
assert all(s["op"] != "rope" for s in after["skipped"])
""",
    )
