"""``rope_2d``: invariants, the original code's values, messages, and the compiled kernel."""

import json
import math
from pathlib import Path

import pytest
import torch

from patchpack import PackedGrid, _dispatch, available, rope_2d
from patchpack.testing import compiled

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
IMPLS = ("reference", "triton", "native")


def golden(function):
    return [case for case in GOLDEN if case["function"] == function]


def wave(function, step, *shape):
    """``function(step * i)`` over the flat index ``i``, as the golden cases define their inputs."""
    count = math.prod(shape)
    return function(step * torch.arange(count, dtype=torch.float64)).float().reshape(shape)


def turned(grid, head_dim, impl, **options):
    """Cosine and sine of every token's angles ``[T, R]``: what the pairs (1, 0) become."""
    x = torch.zeros(grid.num_tokens, 1, head_dim)
    half = head_dim // 2
    first = slice(None, None, 2) if options.get("interleaved") else slice(half)
    second = slice(1, None, 2) if options.get("interleaved") else slice(half, None)
    x[..., first] = 1
    y, _ = rope_2d(x, x, grid, impl=impl, **options)
    return y[:, 0, first], y[:, 0, second]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", golden("qwen2vl.vision_rope_apply"), ids=["D8", "D80"])
def test_golden_qwen2_vl(case, impl):
    given, want = case["inputs"], case["outputs"]
    grid = PackedGrid(given["grid_thw"], 2)
    shape = (grid.num_tokens, given["heads"], given["head_dim"])
    q, k = wave(torch.sin, 0.7, *shape), wave(torch.cos, 0.3, *shape)
    q, k = rope_2d(q, k, grid, impl=impl)
    tolerance = {"rtol": 0, "atol": case.get("tol", 1e-6)}
    if given["head_dim"] == 8:
        torch.testing.assert_close(q[:, 0], torch.tensor(want["q"]), **tolerance)
    else:
        row = torch.tensor(want["q_row7_head1_first10"])
        torch.testing.assert_close(q[7, 1, :10], row, **tolerance)
        row = torch.tensor(want["q_row30_head0_40to50"])
        torch.testing.assert_close(q[30, 0, 40:50], row, **tolerance)
        row = torch.tensor(want["k_row39_head1_last5"])
        torch.testing.assert_close(k[39, 1, -5:], row, **tolerance)


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_heads_may_lie_2_to_the_31_elements_apart(impl):
    num_heads, head_dim, apart = 9, 16, 2**28 + 1  # odd, so that no kernel counts in larger units
    grid = PackedGrid([(2, 2)])
    near = torch.randn(grid.num_tokens, num_heads, head_dim).bfloat16()
    far = torch.empty((num_heads - 1) * apart + grid.num_tokens * head_dim, dtype=torch.bfloat16)
    far = far.as_strided(near.shape, (head_dim, apart, 1)).copy_(near)
    got, _ = rope_2d(far, far, grid, impl=impl)
    want, _ = rope_2d(near, near, grid, impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_qwen2_vl_angles(impl):
    (case,) = golden("qwen2vl.vit_freqs")
    cos, sin = turned(PackedGrid(case["inputs"]["grid_thw"], 2), 80, impl)
    for row in (5, 23):
        angle = torch.tensor(case["outputs"][f"row{row}"])
        torch.testing.assert_close(cos[row], angle.cos(), rtol=0, atol=1e-6)
        torch.testing.assert_close(sin[row], angle.sin(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_qwen2_vl_frequencies(impl):
    (case,) = golden("qwen2vl.vit_inv_freq")
    cos, sin = turned(PackedGrid([(2, 2)]), case["inputs"]["head_dim"], impl)
    angle = torch.tensor(case["outputs"]["inv_freq"]).repeat(2)
    torch.testing.assert_close(cos[-1], angle.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin[-1], angle.sin(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_pixtral_angles(impl):
    (case,) = golden("pixtral.freqs")
    row, col = case["inputs"]["h"], case["inputs"]["w"]
    cos, sin = turned(PackedGrid([(row + 1, col + 1)]), 64, impl, axes="even_odd")
    angle = torch.tensor(case["outputs"]["freqs_first32"])
    torch.testing.assert_close(cos[-1], angle.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[-1], angle.sin(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_moonvit_angles(impl):
    (case,) = golden("moonvit.rope_freqs_cis")
    row, col = case["inputs"]["h"], case["inputs"]["w"]
    grid = PackedGrid([(row + 1, col + 1)])
    cos, sin = turned(grid, 72, impl, axes="paired", interleaved=True)
    want = case["outputs"]
    torch.testing.assert_close(cos[-1, :6], torch.tensor(want["cos_first6"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[-1, :6], torch.tensor(want["sin_first6"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axes", ["split", "even_odd", "paired"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distances_alone(axes, interleaved):
    grid = PackedGrid([(6, 7)])
    q, k = torch.randn(2, 64)
    q, k = q.expand(42, 1, 64), k.expand(42, 1, 64)
    q, k = rope_2d(q, k, grid, axes=axes, interleaved=interleaved, impl="triton")
    scores = (q[:, 0] @ k[:, 0].T).reshape(6, 7, 6, 7)
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:])


def test_norms_are_kept():
    grid = PackedGrid([(2, 5, 3), (1, 4, 4)])
    q = torch.randn(grid.num_tokens, 3, 96)
    for y in rope_2d(q, q[:, :1], grid, impl="triton"):
        torch.testing.assert_close(y.norm(dim=-1), q[:, : y.shape[1]].norm(dim=-1))


def test_the_first_patch_of_every_frame_stays():
    grid = PackedGrid([(2, 4, 6), (1, 2, 2)], 2)
    q = torch.randn(grid.num_tokens, 2, 64)
    y, _ = rope_2d(q, q, grid, impl="triton")
    first = grid.cu_seqlens[:-1].long()
    assert torch.equal(y[first], q[first])


def test_frames_of_a_clip_share_their_angles():
    q = torch.randn(12, 2, 32)
    clip, _ = rope_2d(
        q.repeat(3, 1, 1), q.repeat(3, 1, 1), PackedGrid([(3, 2, 6)], 2), impl="triton"
    )
    frame, _ = rope_2d(q, q, PackedGrid([(2, 6)], 2), impl="triton")
    assert torch.equal(clip, frame.repeat(3, 1, 1))


def test_angles_are_exact_far_from_the_origin():
    grid = PackedGrid([(1, 10_000)])
    cos, sin = turned(grid, 32, "triton")
    col = torch.arange(10_000, dtype=torch.float64)[:, None]
    angle = col * 10_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    assert (cos[:, 8:] - angle.cos()).abs().max() < 1e-7
    assert (sin[:, 8:] - angle.sin()).abs().max() < 1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strided_last_dimension_is_copied(impl):
    grid = PackedGrid([(3, 5)])
    q = torch.randn(15, 32, 2).transpose(1, 2)
    assert q.stride(-1) != 1
    got, want = (rope_2d(x, x, grid, impl=impl) for x in (q, q.contiguous()))
    assert torch.equal(got[0], want[0])


def test_the_default_on_a_cpu_is_native_where_it_is_built():
    default = "reference" if available("rope_2d", "native") else "native"
    assert _dispatch.resolve("rope_2d", None, q=torch.randn(15, 2, 32)) == default
    assert _dispatch.resolve("rope_2d", None, q=torch.randn(15, 2, 32).double()) == "reference"


Q = torch.zeros(12, 2, 32)
GRID = PackedGrid([(3, 4)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must have shape \[\*, \*, \*\], got \[2, 32\]"),
        ({"q": Q.tolist()}, TypeError, r"q must be a tensor, got list"),
        ({"k": Q[:5]}, ValueError, r"k must have shape \[12, \*, 32\], got \[5, 2, 32\]"),
        ({"k": Q[..., :16]}, ValueError, r"k must have shape \[12, \*, 32\], got \[12, 2, 16\]"),
        ({"q": Q.int(), "k": Q.int()}, TypeError, r"q must be float32 or bfloat16 .* got int32"),
        (
            {"k": Q.half()},
            TypeError,
            r"k must have the dtype of q, torch.float32, got torch.float16",
        ),
        ({"k": Q.to("meta")}, ValueError, r"k must be on the device of q, cpu, got meta"),
        ({"grid": [(3, 4)]}, TypeError, r"grid must be a PackedGrid, got list"),
        (
            {"grid": PackedGrid([(3, 5)])},
            ValueError,
            r"q must have the 15 tokens of grid, got \[12",
        ),
        ({"grid": GRID.to("meta")}, ValueError, r"grid must be on the device of q, cpu, got meta"),
        ({"q": Q[..., :6], "k": Q[..., :6]}, ValueError, r"head size that divides by 4, got 6"),
        ({"q": Q[..., :0], "k": Q[..., :0]}, ValueError, r"head size that divides by 4, got 0"),
        ({"base": 0}, ValueError, r"base must be above 0, got 0"),
        ({"base": float("inf")}, ValueError, r"base must be below 2\*\*127, got inf"),
        ({"interleaved": "x"}, TypeError, r"interleaved must be a bool, got 'x'"),
        ({"base": "1"}, TypeError, r"base must be a number, got '1'"),
        (
            {"axes": "hw"},
            ValueError,
            r"axes must be one of 'split', 'even_odd', 'paired', got 'hw'",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        rope_2d(**{"q": Q, "k": Q, "grid": GRID, **change}, impl=impl)


def test_no_op_has_a_name_that_is_no_string():
    with pytest.raises(ValueError, match=r"op must be one of .*, got \['rope'\]"):
        available(["rope"], "triton")


def test_an_implementation_never_falls_back(monkeypatch):
    monkeypatch.setitem(_dispatch._UNAVAILABLE["rope_2d"], "native", "it is not built")
    with pytest.raises(ValueError, match=r"impl='native' of rope_2d is not available: it is not"):
        rope_2d(Q, Q, GRID, impl="native")
    with pytest.raises(ValueError, match=r"impl must be None or one of .*, got 'numpy'"):
        rope_2d(Q, Q, GRID, impl="numpy")
    with pytest.raises(TypeError, match=r"q must be float32 or bfloat16 or float16, got float64"):
        rope_2d(Q.double(), Q.double(), GRID, impl="triton")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_one_launch_without_spills_and_with_wide_accesses(target, head_dim):
    grid = PackedGrid([(16, 16)], 2)
    qkv = torch.zeros(256, 3, 16, head_dim, dtype=torch.bfloat16)
    with compiled.session(target) as launches:
        rope_2d(qkv[:, 0], qkv[:, 1], grid, impl="triton")
    (launch,) = launches
    assert launch.stack == launch.spills == 0
    assert launch.registers <= 96
    if head_dim % 16 == 0:  # else a half head does not start on 128 bits
        assert launch.wide_stores == launch.stores
        assert launch.wide_loads >= 4
