"""``mrope``: invariants, the original code's values, messages."""

import json
import math
from pathlib import Path

import pytest
import torch

from patchpack import PackedGrid, mrope, rope_2d
from patchpack.testing import compiled

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
IMPLS = ("reference", "triton", "native")


def golden(function):
    (case,) = (case for case in GOLDEN if case["function"] == function)
    return case


def wave(function, step, *shape):
    """``function(step * i)`` over the flat index ``i``, as the golden cases define their inputs."""
    count = math.prod(shape)
    return function(step * torch.arange(count, dtype=torch.float64)).float().reshape(shape)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_qwen2_vl(impl):
    case = golden("qwen2vl.mrope_apply")
    given, want = case["inputs"], case["outputs"]
    q = wave(torch.sin, 0.7, 2, 4, 128).transpose(0, 1)
    k = wave(torch.cos, 0.3, 1, 4, 128).transpose(0, 1)
    q, k = mrope(
        q,
        k,
        torch.tensor(given["position_ids"]),
        mrope_section=given["mrope_section"],
        base=given["theta"],
        impl=impl,
    )
    for name, channels in (
        ("first4", slice(4)),
        ("14_18", slice(14, 18)),
        ("38_42", slice(38, 42)),
        ("62_66", slice(62, 66)),
        ("78_82", slice(78, 82)),
        ("102_106", slice(102, 106)),
    ):
        values = torch.tensor(want[f"q_h1_tok2_{name}"])
        torch.testing.assert_close(q[2, 1, channels], values, rtol=0, atol=case["tol"])
    values = torch.tensor(want["k_tok2_last4"])
    torch.testing.assert_close(k[2, 0, -4:], values, rtol=0, atol=case["tol"])


def axis_of_pairs(impl, head_dim, **options):
    """Which axis turns each pair: move along one axis at a time and see which pairs move."""
    x = torch.ones(3, 1, head_dim)
    y, _ = mrope(x, x, torch.eye(3, dtype=torch.int64) * 3, impl=impl, **options)
    moved = (y != 1)[:, 0, : head_dim // 2].int()  # [axis, R]
    assert (moved.sum(dim=0) == 1).all()
    return moved.argmax(dim=0).tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_sections_of_qwen2_vl(impl):
    want = golden("qwen2vl.mrope_axis_map")["outputs"]["axis_per_channel"][:64]
    assert axis_of_pairs(impl, 128, mrope_section=(16, 24, 24), base=100.0) == want


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_interleaving_of_qwen3_vl(impl):
    want = golden("qwen3vl.mrope_axis_map")["outputs"]["axis_per_freq"]
    options = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "base": 100.0}
    assert axis_of_pairs(impl, 128, **options) == want


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("start", [0, 1_000, 131_000, 4_000_000, -5_000])
def test_angles_are_exact_at_every_position(start, impl):
    position = torch.arange(start, start + 200)
    x = torch.zeros(200, 1, 128)
    x[..., :64] = 1
    y, _ = mrope(x, x, position.expand(3, -1), mrope_section=(16, 24, 24), impl=impl)
    angle = position.double()[:, None] * 1e6 ** -(torch.arange(64, dtype=torch.float64) / 64)
    assert (y[:, 0, :64] - angle.cos()).abs().max() < 1e-7
    assert (y[:, 0, 64:] - angle.sin()).abs().max() < 1e-7


def test_equal_positions_make_it_ordinary_rope():
    q = torch.randn(9, 2, 64)
    position = torch.arange(9).expand(3, -1)
    results = [
        mrope(q, q, position, mrope_section=s, mrope_interleaved=i, impl="triton")[0]
        for s, i in (((8, 12, 12), False), ((32, 0, 0), False), ((12, 10, 10), True))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_text_row_is_ignored_and_dtypes_agree():
    q = torch.randn(6, 2, 64)
    ids = torch.randint(0, 99, (4, 6))
    want = mrope(q, q, ids[1:], mrope_section=(8, 12, 12), impl="triton")[0]
    for same in (ids, ids.int(), ids.T.contiguous().T):
        got = mrope(q, q, same, mrope_section=(8, 12, 12), impl="triton")[0]
        assert torch.equal(got, want)


def test_it_is_not_rope_2d_with_other_frequencies():
    """The sections of one axis go on where those of the axis before ended."""
    grid = PackedGrid([(4, 4)])
    q = torch.randn(16, 1, 64)
    ids = torch.cat([torch.zeros(1, 16, dtype=torch.int64), grid.position_ids.T])
    got = mrope(q, q, ids, mrope_section=(0, 16, 16), base=1e4, impl="triton")[0]
    assert not torch.allclose(got, rope_2d(q, q, grid, impl="triton")[0])


Q = torch.zeros(5, 4, 64)
IDS = torch.zeros(3, 5, dtype=torch.int64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must have shape \[\*, \*, \*\], got \[4, 64\]"),
        ({"k": Q[:, :, :32]}, ValueError, r"k must have shape \[5, \*, 64\], got \[5, 4, 32\]"),
        ({"k": Q.bfloat16()}, TypeError, r"k must have the dtype of q"),
        ({"position_ids": IDS[:2]}, ValueError, r"position_ids must have 3 or 4 rows, got 2"),
        ({"position_ids": IDS[:, :4]}, ValueError, r"must have shape \[\*, 5\], got \[3, 4\]"),
        ({"position_ids": IDS.float()}, TypeError, r"must be int32 or int64, got float32"),
        (
            {"position_ids": IDS.to("meta")},
            ValueError,
            r"must be on the device of q, cpu, got meta",
        ),
        ({"mrope_section": (16, 16)}, ValueError, r"half the head size, 32, got \[16, 16\]"),
        ({"mrope_section": (16, 16, 16)}, ValueError, r"half the head size, 32, got \[16, 16, 16"),
        ({"mrope_section": (-8, 20, 20)}, ValueError, r"mrope_section must be three counts"),
        ({"mrope_section": (0, 0, 0)}, ValueError, r"sum to 1 or more"),
        ({"mrope_section": (8, 12, 12.0)}, TypeError, r"list or tuple of integers, got \(8, 12"),
        ({"base": -1.0}, ValueError, r"base must be above 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    arguments = {"q": Q, "k": Q, "position_ids": IDS, "mrope_section": (8, 12, 12), **change}
    with pytest.raises(error, match=message):
        mrope(**arguments, impl=impl)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_q_and_k_in_one_launch_without_spills(target):
    q, k = torch.zeros(64, 32, 128, dtype=torch.bfloat16).split([28, 4], dim=1)
    ids = torch.zeros(3, 64, dtype=torch.int64)
    with compiled.session(target) as launches:
        mrope(q, k, ids, mrope_section=(16, 24, 24), impl="triton")
    (launch,) = launches
    assert launch.stack == launch.spills == 0
    assert launch.registers <= 96
    assert launch.wide_stores == launch.stores
