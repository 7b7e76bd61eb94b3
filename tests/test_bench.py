"""The benchmarks run, count right, and refuse what is wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import patchpack
from patchpack.testing.catalogue import SPECS

BENCH = Path(__file__).parents[1] / "bench"
FORWARD_ONLY = ("patchify", "resize_images")  # of bytes
BENCHES = (*SPECS, "image_processor", "metadata", "preprocess", "transformers")
LIMITS = dict.fromkeys(BENCHES, "copy") | {"varlen_attention": "matmul"}


def _python(*arguments, status=0) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    """Results of one quick run of every bench file, and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    options = ("--quick", "--device", "cpu", "--dtype", "float32", "--out", out)
    printed = _python("run.py", *BENCHES, *options)
    (path,) = out.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 0
    return json.loads(path.read_text()), " ".join(printed.split())


def _of(rows: list[dict], op: str, direction: str) -> list[dict]:
    params = [(row, row.get("params", row)) for row in rows]
    return [row for row, p in params if (p["op"], p["direction"]) == (op, direction)]


def test_a_provider_can_be_left_out(tmp_path):
    options = ("--quick", "--device", "cpu", "--dtype", "float32", "--out", tmp_path)
    _python("run.py", "rope", *options, "--without", "transformers", "--without", "native")
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert "native" not in {b["name"] for b in results["benchmarks"]}
    reasons = {s["provider"]: s["reason"] for s in results["skipped"]}
    assert reasons["native"] == reasons["transformers"] == "it was left out with --without"


@pytest.mark.slow
@pytest.mark.parametrize("op", SPECS)
def test_every_provider_is_timed_or_says_why_not(run, op):
    results, printed = run
    directions = ("forward",) if op in FORWARD_ONLY else ("forward", "forward+backward")
    for direction in directions:
        timed = {b["name"]: b for b in _of(results["benchmarks"], op, direction)}
        reasons = {s["provider"]: s["reason"] for s in _of(results["skipped"], op, direction)}
        assert "reference" in timed
        assert {"reference, compiled", "triton"} <= reasons.keys()
        assert ("native" in timed) == (patchpack.available(op, "native") is None)
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
        assert timed[LIMITS[op]]["extra_info"]["of_limit"] == 1


@pytest.mark.slow
def test_all_ops_of_a_run_are_of_the_commit_it_began_at(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHPACK_COMMIT", "said where there is no git")
    options = ("--quick", "--device", "cpu", "--dtype", "float32", "--out", tmp_path)
    _python("run.py", "patchify", "scatter_tokens", *options)
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["benchmarks"]
    assert {row["params"]["op"] for row in rows} == {"patchify", "scatter_tokens"}
    assert {row["extra_info"]["commit"] for row in rows} == {"said where there is no git"}


@pytest.mark.slow
def test_peers_that_are_installed_are_timed(run):
    peers = {
        "rope": {"transformers"},
        "rope_2d": {"transformers"},
        "mrope": {"transformers"},
        "interpolate_tokens": {"F.interpolate loop", "F.interpolate loop of views", "gather"},
        "add_pos_embed": {"F.interpolate loop", "transformers, embedding_bag"},
        "merge_tokens": {"views, F.layer_norm"},
        "region_attention": {"gather, bmm", "permute, bmm"},
        "patchify": {"torch, image by image", "NumPy, image by image"},
        "resize_images": {"Pillow, image by image", "F.interpolate, image by image"},
        "assemble": {"the original's chain"},
        "scatter_tokens": {"masked_scatter", "index_copy"},
        "varlen_attention": {"SDPA loop", "eager loop"},
        "metadata": {"transformers", "patchpack"},
        "preprocess": {"transformers, PIL", "F.interpolate, torch"},
        "image_processor": {"transformers, PIL", "transformers, torchvision"},
        "transformers": {"transformers, eager", "transformers, sdpa"},
    }
    assert peers.keys() == set(BENCHES)
    for op, names in peers.items():
        timed = {b["name"] for b in _of(run[0]["benchmarks"], op, "forward")}
        missing = {s["provider"] for s in run[0]["skipped"] if "not installed" in s["reason"]}
        assert names <= timed | missing, op


@pytest.mark.slow
def test_a_data_loader_has_one_thread(run):
    for op in ("image_processor", "metadata", "preprocess"):
        timed = _of(run[0]["benchmarks"], op, "forward")
        assert {b["extra_info"]["threads"] for b in timed} == {1}


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
    # bounds of 2 images, twice, and of 2 windows; 7 blocks; 28 rows and columns, twice; 111 tokens
    "metadata": (2 * 3 * 4 + 3 * 4 + 7 * 8 + 2 * 28 * 2 * 8 + (3 * 111 + 1) * 8, 0),
    "preprocess": (3 * 60 * 80 + 24 * 1176 * 4, 8 * 3 * (60 * 84 + 84 * 60)),
    "image_processor": (3 * 60 * 80 + 24 * 1176 * 4, 8 * 3 * (60 * 84 + 84 * 60)),
    # patches, two blocks with their norms, weights and biases, and the merger; of 16 and 12 tokens
    "transformers": (
        (28 * 1176 + 1176 * 320) * 4
        + 2 * (4 * 320 + 321 * 960 + 321 * 320 + 321 * 1280 + 1281 * 320) * 4
        + (2 * 320 + 1281 * 1280 + 1281 * 512 + 7 * 512) * 4,
        2 * 28 * 1176 * 320
        + 2 * (2 * 28 * 320 * (960 + 320 + 2 * 1280) + 4 * 320 * (16**2 + 12**2))
        + 2 * 7 * 1280 * (1280 + 512),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", BENCHES)
def test_the_work_is_what_a_hand_counts(run, op):
    (forward,) = {
        (b["extra_info"]["bytes"], b["extra_info"]["flops"])
        for b in run[0]["benchmarks"]
        if (b["params"]["op"], b["params"]["direction"]) == (op, "forward")
    }
    assert forward == WORK[op]


def test_floors_name_cases_and_providers_that_exist():
    _python(
        "-c",
        """
import run
for op in run.OPS:
    bench = run.bench_of(op)
    for floor in bench.floors:
        assert floor.shape in bench.shapes, floor
        assert floor.dtype in (bench.dtypes or run.DTYPES), floor
        assert floor.direction in ("forward", "forward+backward")[: 1 + bench.backward], floor
        assert {floor.provider, floor.peer} <= {"native", bench.bound, *bench.peers}, floor
""",
    )


FLOORS = """
import dataclasses, sys
import bench_rope, run
from _harness import Floor

bench = bench_rope.BENCH
floors = [
    Floor("tiny", "float32", "forward", "transformers", 1e-9, "reference"),
    Floor("tiny", "float32", "forward", "copy", 1e9, "reference"),
    Floor("tiny", "float32", "forward+backward", "copy", 1e-9, "triton"),
    Floor("tiny", "float32", "forward+backward", "Liger", 1e-9, "reference"),
    Floor("tiny", "bfloat16", "forward", "copy", 1e9, "reference"),
]
chosen = tuple(floors[int(i)] for i in sys.argv.pop())
bench_rope.BENCH = dataclasses.replace(bench, floors=chosen)
run.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "met"), [("03", [True, None]), ("012", [True, False, False])])
def test_a_missed_floor_fails(tmp_path, chosen, met):
    options = ("--quick", "--check", "--device", "cpu", "--dtype", "float32", "--out", tmp_path)
    status = 1 if False in met else 0
    printed = _python("-c", FLOORS, "rope", *options, chosen, status=status)
    words = {True: "met", False: "missed", None: "no peer"}
    assert all(words[m] in printed for m in met)
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert [floor["met"] for floor in results["floors"]] == met
    medians = {
        (b["params"]["direction"], b["name"]): b["stats"]["median"] for b in results["benchmarks"]
    }
    for floor in results["floors"]:
        ours = medians.get((floor["direction"], floor["provider"]))
        theirs = medians.get((floor["direction"], floor["peer"]))
        assert floor["measured"] == (theirs / ours if ours and theirs else None)


def test_slow_providers_have_fewer_rounds_spread_over_all():
    _python(
        "-c",
        """
import _harness
_harness.SECONDS, turns = 10, []
def clock(name, seconds):
    return lambda: turns.append(name) or seconds
clocks = {"reference": clock("r", 9.0), "slow": clock("s", 0.9), "fast": clock("f", 1e-3)}
stats = {}
_harness._interleave(clocks, stats, 1, *_harness.ROUNDS)
assert list(stats) == list(clocks)
assert [stats[name].rounds for name in clocks] == [2, 11, 100]
assert stats["slow"].median == 0.9
order = "".join(turns)
assert order.startswith("rsf")  # to know how slow they are
order = order[3:]
half = order.index("r") + 1
assert 5 <= order[:half].count("s") <= 6 and 45 <= order[:half].count("f") <= 55
""",
    )


@pytest.mark.slow
def test_a_case_that_memory_bounds_is_timed_at_several_places():
    _python(
        "-c",
        """
import dataclasses
import torch, _harness
from bench_patchify import BENCH
at = []
def limit(case, *work):
    def seconds():
        at.append(len(places))
        return 1e-3
    places.append(seconds)
    return seconds
places, _harness._limit, _harness.SECONDS = [], limit, 0.01
bench = dataclasses.replace(BENCH, shapes={"small": BENCH.tiny})
case = _harness.Case(bench, "small", torch.float32, False, "cpu")
rows = _harness.run_case(case, quick=False)["benchmarks"]
assert len(places) == _harness.PLACES
share = -(-10 // _harness.PLACES)
assert [at.count(place + 1) for place in range(3)] == 3 * [1 + share]  # one to know how slow it is
assert {row["name"]: row["stats"]["rounds"] for row in rows}["copy"] == 3 * share
""",
    )


@pytest.mark.slow
def test_cost_is_measured_along_tokens_and_images(tmp_path):
    options = ("--quick", "--impl", "reference", "--out", tmp_path)
    printed = _python("scaling.py", "rope_2d", "scatter_tokens", *options)
    assert "rope_2d" in printed
    assert (tmp_path / "scaling.png").stat().st_size > 0
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert results["machine"].keys() >= {"commit", "device"}
    rows = {(row["op"], row["axis"]): row for row in results["scaling"]}
    assert rows.keys() == {
        (o, a) for o in ("rope_2d", "scatter_tokens") for a in ("tokens", "images")
    }
    for (_, axis), row in rows.items():
        assert row["tokens"] == ([4, 8] if axis == "tokens" else [16, 16])
        assert row["images"] == ([1, 2] if axis == "tokens" else [1, 4])
        assert set(row["seconds"]) == {"1", "2"}
        assert all(s > 0 for seconds in row["seconds"].values() for s in seconds)


@pytest.mark.slow
def test_scaling_covers_every_op_and_fits_exponents():
    _python(
        "-c",
        """
import scaling
from patchpack.testing.catalogue import SPECS
assert scaling.SHAPES.keys() == SPECS.keys()
sizes = [2**n for n in range(10, 19)]
seconds = [1e-3 + 1e-6 * n if n < 2**14 else 1e-9 * n**1.5 for n in sizes]
assert abs(scaling.exponent(sizes, seconds, 2**14) - 1.5) < 1e-9
assert all(t == 2**14 for count, side in scaling.points(False)["images"] for t in [count * side**2])
""",
    )


@pytest.mark.slow
def test_results_are_read_by_pytest_benchmark(run, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run[0]))
    compare = ("-m", "pytest_benchmark", "compare", path, "--columns=median,iqr")
    assert "rope_2d, tiny, float32, forward" in _python(*compare, "--group-by=group")


@pytest.mark.slow
def test_a_wrong_provider_is_refused():
    _python(
        "-c",
        """
import dataclasses, torch
import _harness, bench_rope
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject


def turned_too_far(inputs):
    return lambda q, k, cos, sin: SPECS["rope"].reference(q, k * 1.001, cos, sin)


right = SPECS["rope"]
wrong = lambda q, k, cos, sin, impl, **_: right.op(q, k, cos, -sin, impl=impl, **_)
SPECS["rope"] = dataclasses.replace(right, op=wrong)
bench = dataclasses.replace(bench_rope.BENCH, peers={"turned too far": turned_too_far})
_harness._ours = lambda case, impl, inputs: _harness._check_accuracy(Subject("rope", "one image"))
for backward in (False, True):
    case = _harness.Case(bench, "tiny", torch.float32, backward, "cpu")
    found = _harness.run_case(case, True)
    assert [row["name"] for row in found["benchmarks"]] == ["reference", "copy"]
    skipped = {row["provider"]: row for row in found["skipped"]}
    for name, reason in (
        ("turned too far", "it does not compute rope: result 1 errs by 1.0e-03"),
        ("triton", "it is not as accurate as eager in 'one image': output 0"),
    ):
        assert skipped[name]["failed"]
        assert skipped[name]["reason"].startswith(reason), skipped[name]
""",
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_ranks_send_each_other_is_counted(tmp_path):
    printed = _python("bench_packing.py", "distributed", "--quick", "--out", tmp_path)
    assert (tmp_path / "distributed.png").stat().st_size > 0
    assert not (tmp_path / "packing.json").exists()
    results = json.loads((tmp_path / "distributed.json").read_text())
    model, rows = results["model"], results["rows"]
    assert 6.6e8 < model["parameters"] < 6.8e8  # of Qwen2-VL-7B
    assert [row["ranks"] for row in rows] == [1, 2, 4, 8, 16]
    for row in rows:
        n = row["ranks"]
        assert row["batches"] == 1000 // (32 * n)
        assert 1 <= row["balance"] <= row["at home"]
        assert row["fully_shard"] == 3 * 2 * model["parameters"] * (n - 1) / n
        # of all patches leave home that do not stay by chance: 1176 numbers, and 2 x 3584 / 4 back
        most = row["patches"] * (1176 + 2 * 3584 / 4) * 2
        assert most * 0.6 * (n - 1) / n <= row["encode_images"] <= most * (n > 1)
        assert row["encode_images"] <= row["encode_images, most"]
        # 32 layers of q, k, v, the output and their gradients
        wanted = row["patches"] * 32 * 8 * 1280 * 2 * (n - 1) / n
        assert math.isclose(row["sequence_parallel"], wanted)
        assert f"{row['encode_images'] / 1e6:.0f}" in printed


def test_two_ranks_send_what_is_not_at_home():
    _python(
        "-c",
        """
import numpy as np
import bench_packing

bench_packing.IMAGES_A_RANK = 2
step = bench_packing._step(np.array([40, 48, 4, 8]), np.array([5.0, 4.0, 1.0, 1.0]), 2)
# the second image is encoded on the other rank, and the last one
assert step["balance"] == 6 / 5.5 and step["at home"] == 9 / 5.5 and step["patches"] == 50
assert step["encode_images"] == 56 * 1176 + 2 * 14 * 3584
assert step["encode_images, most"] == 2 * (48 * 1176 + 12 * 3584 + 2 * 3584)
""",
    )


@pytest.mark.slow
def test_a_second_run_takes_the_place_of_the_first(run, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run[0]))
    _python(
        "-c",
        f"""
import json, pathlib, _report
path = pathlib.Path({str(path)!r})
before = json.loads(path.read_text())
again = [dict(b, param="again") for b in before["benchmarks"] if b["params"]["op"] == "rope"]
_report.merge(path, {{"benchmarks": again, "skipped": [], "floors": []}})
after = json.loads(path.read_text())
key = lambda b: b["fullname"]
assert sorted(map(key, after["benchmarks"])) == sorted(map(key, before["benchmarks"]))
assert {{b["params"]["op"] for b in after["benchmarks"] if b["param"] == "again"}} == {{"rope"}}
assert all(s["op"] != "rope" for s in after["skipped"])
""",
    )


@pytest.mark.slow
def test_a_part_of_the_compiled_rows_is_made_anew(tmp_path):
    _python(
        "-c",
        f"""
import json, pathlib
from compiled import report

folder = pathlib.Path({str(tmp_path)!r})
stored = json.loads(pathlib.Path("results/compiled.json").read_text())
versions = {{name: stored[name] for name in ("commit", "date", "triton", "torch")}}
row = next(row for row in stored["rows"] if row["op"] == "mrope" and "case" not in row)
asked = [(op, target, dtype) for op in ("mrope", "rope") for target in ("sm_80", "sm_90")
         for dtype in ("bfloat16", "float16")]
rows = [dict(row, op=op, target=target, inputs=dtype, registers=1) for op, target, dtype in asked]
everything = ["mrope", "rope"], ["sm_80", "sm_90"], ["bfloat16", "float16"], ["kernels"]
report.write(folder, versions, {{"rows": rows, "traffic": [], "missing": []}}, *everything)
new = {{"rows": [dict(rows[1], registers=2)], "traffic": [], "missing": []}}
part = ["mrope"], ["sm_80"], ["float16"], ["kernels"]
report.write(folder, dict(versions, commit="b"), new, *part)
found = json.loads((folder / "compiled.json").read_text())
assert {{(r["op"], r["target"], r["inputs"]) for r in found["rows"]}} == set(asked)
assert [asked[1]] == [
    (r["op"], r["target"], r["inputs"]) for r in found["rows"] if r["registers"] == 2
]
assert found["commits"] == {{"mrope": "b", "rope": stored["commit"]}}
""",
    )


# a library of the right shape: q and k become zeros, and gradients ones
LIGER = """
import torch, triton
import triton.language as tl

@triton.jit
def _fill_kernel(x_ptr, value, N: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * N + tl.arange(0, N), value)

def fill(x, value):
    y = torch.empty_like(x)
    _fill_kernel[(x.numel() // 128,)](y, value, 128)
    return y

class LigerRopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        return fill(q, 0), fill(k, 0)

    @staticmethod
    def backward(ctx, dq, dk):
        return fill(dq, 1), fill(dk, 1), None, None
"""


@pytest.mark.slow
def test_peers_are_found_and_compiled_and_missing_ones_reported(tmp_path):
    file = tmp_path / "Liger-Kernel/src/liger_kernel/ops/rope.py"
    file.parent.mkdir(parents=True)
    file.write_text(LIGER)
    other = tmp_path / "flash-attention/flash_attn/ops/triton/rotary.py"
    other.parent.mkdir(parents=True)
    other.touch()  # of no version
    version = tmp_path / "Liger-Kernel/src/liger_kernel-1.2.dist-info/METADATA"
    version.parent.mkdir()
    version.write_text("Metadata-Version: 2.1\nName: liger-kernel\nVersion: 1.2\n")
    _python(
        "-c",
        f"""
from pathlib import Path
from compiled.peers import CASES, Missing, Peer, ours, peers
from compiled.tasks import follow
from patchpack.testing import compiled

def passes(peer, session):
    with session as launches:
        backward = peer.run()
        forward = len(launches)
        backward()
    return launches[:forward], launches[forward:]

found = list(peers("gfx942", Path({str(tmp_path)!r})))
assert len({{(peer.name, peer.op, peer.case) for peer in found}}) == len(found)
without = {{("resize_images", "photo")}}  # no one else has kernels for it
assert {{(peer.op, peer.case) for peer in found}} == CASES.keys() - without
here = {{peer.name for peer in found if isinstance(peer, Peer)}}
assert here == {{"Liger, bfloat16 tables", "Liger, float32 tables"}}
reasons = {{peer.name: peer.reason for peer in found if isinstance(peer, Missing)}}
assert "vllm/model_executor/layers/rotary_embedding/mrope.py" in reasons["vLLM"]
assert "neither pip nor git" in reasons["flash-attn"]
assert "got 'gfx942'" in reasons["FlexAttention"]
nowhere = [peer for peer in peers("sm_90", None) if peer.name == "Triton tutorial"]
assert nowhere and all("was named" in peer.reason for peer in nowhere)

peer = next(peer for peer in found if peer.case == "language")
assert (peer.op, peer.version) == ("rope", "1.2")
forward, backward = passes(peer, compiled.session("gfx942"))
assert [launch.grid for launch in forward] == [(256 * heads, 1, 1) for heads in (28, 4)]
assert [launch.kernel for launch in forward + backward] == 4 * ["_fill_kernel"]
assert all(launch.stores > 0 == launch.loads for launch in forward)
traced = follow(peer)["forward"]
assert [launch.written for launch in traced] == [256 * heads * 128 * 2 for heads in (28, 4)]

forward, backward = passes(ours("rope", "language"), compiled.session("gfx942"))
assert len(forward) == len(backward) == 1
""",
    )


@pytest.mark.slow
def test_inductor_writes_code_for_a_gpu_that_is_not_there():
    _python(
        "-c",
        """
import torch
from torch.utils._triton import has_triton
from compiled import inductor
from patchpack.testing import compiled

def function(x, y):
    rows = torch.arange(len(x), device=x.device)[:, None]
    return torch.cat([x * 2 + rows, y.sigmoid()], dim=1), (x * y).sum(1)

def gradients(function):
    x, y = torch.randn(2, 192, 640, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = function(x, y)
    cotangents = [torch.linspace(-1, 1, x.numel()).view_as(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, (x, y), cotangents)]

methods, there = torch.Tensor.copy_, has_triton()
want = gradients(function)
for target in ("sm_80", "sm_90"):
    torch._dynamo.reset()
    with compiled.session(target, run=True) as launches:
        got = gradients(torch.compile(function, backend=inductor.backend(target)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert len(launches) >= 3
    assert {launch.target for launch in launches} == {target}
    assert all(launch.kernel.startswith("triton_") for launch in launches)
assert (torch.Tensor.copy_, has_triton()) == (methods, there)
try:
    inductor.check("gfx942")
except ValueError as error:
    assert "target must be one of sm_80" in str(error)
else:
    raise SystemExit("not refused")
""",
    )


@pytest.mark.slow
def test_flex_attention_as_compiled_has_the_gradients_of_a_gpu():
    _python(
        "-c",
        """
import torch
from compiled import peers
from patchpack.reference import varlen_attention
from patchpack.testing import compiled
from patchpack.testing.compare import MAX_RELATIVE_RMS

case = peers.CASES["varlen_attention", "attention-64"]
case |= {"lengths": [100, 28], "num_heads": (1, 1)}
flex = next(peer for peer in peers.peers("sm_90", None) if peer.name == "FlexAttention")
cotangent = torch.randn(128, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
peers.torch.randn_like = lambda x: cotangent.view_as(x)
with compiled.session("sm_90", run=True) as launches:
    got = flex.run()()
assert len(launches) == 3 and launches[-1].code.macs > 0

inputs = peers.inputs_of(flex.op, flex.case)
leaves = [inputs[name].float().requires_grad_() for name in ("q", "k", "v")]
out = varlen_attention(*leaves, inputs["cu_seqlens_q"])
for a, b in zip(got, torch.autograd.grad(out, leaves, cotangent.float()), strict=True):
    assert (a - b).norm() <= 2 * MAX_RELATIVE_RMS[torch.bfloat16] * b.norm()
""",
    )


@pytest.mark.slow
def test_compiled_results_have_rows_and_tables_and_keep_other_targets(tmp_path):
    options = ("--op", "resize_images", "--dtype", "bfloat16", "--jobs", "1", "--out", tmp_path)
    _python("-m", "compiled", "--target", "sm_90", *options)
    _python("-m", "compiled", "--target", "gfx942", *options, "--part", "kernels")
    results = json.loads((tmp_path / "compiled.json").read_text())
    assert results["commits"].keys() == {"resize_images"}
    rows = results["rows"]
    assert {row["kernel"] for row in rows} == {"_resize_axis_kernel"}
    for row in rows:
        assert row["spills"] == row["stack"] == 0
        assert 0 < row["registers"] <= 255
        assert 0 < row["occupancy"] <= 1
    shipped = [row for row in rows if row.get("configurations")]
    assert {row["target"] for row in shipped} == {"sm_90", "gfx942"}
    assert {row["target"] for row in rows if row.get("case") == "photo"} == {"sm_90"}
    (moved,) = results["traffic"]
    assert moved["launches"] == 2
    assert moved["out_of_bounds"] == moved["uninitialised"] == moved["races"] == 0
    tables = (tmp_path / "compiled.md").read_text()
    assert "| `resize_images` _resize_axis_kernel | sm_90 |" in tables
    assert "| `resize_images` | photo | forward | patchpack | 2 |" in tables


def test_a_kernel_that_spills_or_does_not_compile_is_not_fine():
    _python(
        "-c",
        """
from compiled.__main__ import fine
assert fine({"spills": 0, "stack": 0})
assert not fine({"spills": 2, "stack": 8})
assert not fine({"spills": 0, "stack": 8})
assert not fine({"error": "OutOfResources"})
""",
    )


def test_the_model_knows_the_busiest_pipe_and_what_other_warps_hide():
    _python(
        "-c",
        """
from collections import Counter
from dataclasses import replace
from compiled import model
from patchpack.testing._machine_code import Code
from patchpack.testing.compiled import Launch

loop = Counter({"HMMA.16816.F32.BF16": 64, "MUFU.EX2": 16, "FFMA": 32, "LDSM.16.M88.4": 8})
code = Code(128, 0, loop, loop, 64 * 2048 * 4)
launch = Launch("", "", (1, 1, 1), "sm_80", "bfloat16", {}, 4, 2, 0, 0, code)
pipes = model.pipes(launch)
assert pipes["tensor"] == 64 * 2048 * 4 / 1024
assert pipes["special"] == 16 * 128 / 16
assert pipes["fp32"] == 32 * 128 / 64
assert pipes["shared"] == 8 * 16 * 128 / 128
assert pipes["issue"] == loop.total()
assert model.cycles(launch) == pipes["tensor"]  # four blocks hide the rest
alone = replace(launch, shared=150 * 1024)
rest = sum(pipes.values()) - pipes["issue"] + model.LOAD_LATENCY / 2
assert alone.resident_blocks == 1
assert abs(model.cycles(alone) - rest) < 1e-6
""",
    )
