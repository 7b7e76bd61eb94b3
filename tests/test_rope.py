"""``rope``: agreement with the ops that make their own angles, transformers' tables, messages."""

import pytest
import torch

from patchpack import PackedGrid, mrope, rope, rope_2d
from patchpack.testing import compiled

IMPLS = ("reference", "triton", "native")


def test_a_quarter_turn_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    for impl in IMPLS:
        y, _ = rope(x, x, cos, sin, impl=impl)
        assert y.flatten().tolist() == [-3, 2, 1, 4]
        y, _ = rope(x, x, cos, sin, interleaved=True, impl=impl)
        assert y.flatten().tolist() == [-2, 1, 3, 4]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_of_the_grid_gives_rope_2d(impl):
    grid = PackedGrid([(4, 6), (2, 8)], 2)
    q, k = torch.randn(2, grid.num_tokens, 4, 80)
    frequency = 10_000.0 ** -(torch.arange(20, dtype=torch.float64) / 20)
    angle = (grid.position_ids[..., None] * frequency).flatten(1)
    table = angle.cos().float(), angle.sin().float()
    for got, want in zip(
        rope(q, k, *table, impl=impl), rope_2d(q, k, grid, impl=impl), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_of_positions_gives_mrope(impl):
    position = torch.arange(7) * 1000
    q, k = torch.randn(7, 4, 64), torch.randn(7, 1, 64)
    angle = position[:, None].double() * 1e6 ** -(torch.arange(32, dtype=torch.float64) / 32)
    got = rope(q, k, angle.cos().float(), angle.sin().float(), impl=impl)
    want = mrope(q, k, position.expand(3, -1), mrope_section=(10, 11, 11), impl="triton")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_what_transformers_computes(impl):
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    q, k = torch.randn(2, 11, 4, 80)
    angle = torch.randn(11, 40).repeat(1, 2)
    got = rope(q, k, angle.cos(), angle.sin(), impl=impl)
    want = modeling.apply_rotary_pos_emb_vision(q, k, angle.cos(), angle.sin())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_backward_pass_keeps_only_the_table():
    q = torch.randn(5, 2, 32, requires_grad=True)
    angle = torch.randn(5, 16)
    y, _ = rope(q, q, angle.cos(), angle.sin(), impl="triton")
    saved = y.grad_fn.saved_tensors
    assert sorted(x.numel() for x in saved) == [80, 80]


def test_turning_back_gives_the_input():
    q = torch.randn(5, 2, 32)
    angle = torch.randn(5, 16)
    there, _ = rope(q, q, angle.cos(), angle.sin(), impl="triton")
    back, _ = rope(there, there, angle.cos(), -angle.sin(), impl="triton")
    torch.testing.assert_close(back, q)


def test_half_of_a_partial_table_of_transformers_is_what_counts():
    q = torch.randn(5, 2, 64)
    angle = torch.randn(5, 8)
    turned, _ = rope(q, q, angle.cos(), angle.sin())
    table = angle.repeat(1, 2)
    whole, _ = rope(q[..., :16], q[..., :16], table.cos(), table.sin())
    torch.testing.assert_close(turned, torch.cat([whole, q[..., 16:]], dim=-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("model", "widen", "halve"),
    [
        ("glm", lambda x: x.repeat(1, 2), lambda x: x[:, :16]),
        ("cohere", lambda x: x.repeat_interleave(2, dim=1), lambda x: x[:, ::2]),
    ],
)
def test_transformers_has_two_tables_for_interleaved_pairs(model, widen, halve, impl):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    q, k = torch.randn(2, 7, 4, 32)
    angle = widen(torch.randn(7, 16))
    cos, sin = angle.cos(), angle.sin()
    heads_first = (x.transpose(0, 1)[None] for x in (q, k))
    want = modeling.apply_rotary_pos_emb(*heads_first, cos[None], sin[None])
    got = rope(q, k, halve(cos), halve(sin), interleaved=True, impl=impl)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y[0].transpose(0, 1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="cos must have 1 to 16 columns if interleaved, got 32"):
        rope(q, k, cos, sin, interleaved=True, impl=impl)


def test_a_table_may_require_a_gradient_where_none_is_taken():
    angle = torch.randn(5, 32, requires_grad=True)
    with torch.no_grad():
        rope(Q, Q, angle.cos(), angle.sin())
        rope(Q, Q, angle, angle)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        rope([1.0], Q, COS, COS)


Q = torch.zeros(5, 4, 64)
COS = torch.zeros(5, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must have shape \[\*, \*, \*\], got \[4, 64\]"),
        ({"k": Q[:3]}, ValueError, r"k must have shape \[5, \*, 64\], got \[3, 4, 64\]"),
        ({"cos": COS[:4]}, ValueError, r"cos must have shape \[5, \*\], got \[4, 32\]"),
        ({"sin": COS[:, :8]}, ValueError, r"sin must have shape \[5, 32\], got \[5, 8\]"),
        (
            {"cos": torch.zeros(5, 33), "sin": torch.zeros(5, 33)},
            ValueError,
            r"cos must have 1 to 32 columns, or an even number up to 64 .*, got 33",
        ),
        ({"cos": torch.zeros(5, 66), "sin": torch.zeros(5, 66)}, ValueError, r"got 66"),
        ({"cos": COS.int(), "sin": COS.int()}, TypeError, r"cos must be float32 .*got int32"),
        ({"sin": COS.half()}, TypeError, r"sin must have the dtype of cos, torch.float32"),
        ({"cos": COS.to("meta")}, ValueError, r"cos must be on the device of q, cpu, got meta"),
        ({"cos": COS.clone().requires_grad_()}, ValueError, r"cos must not require a gradient"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        rope(**{"q": Q, "k": Q, "cos": COS, "sin": COS, **change}, impl=impl)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_one_launch_without_spills(target, interleaved):
    q = torch.zeros(64, 16, 128, dtype=torch.bfloat16)
    table = torch.zeros(64, 64)
    with compiled.session(target) as launches:
        rope(q, q, table, table, interleaved=interleaved, impl="triton")
    (launch,) = launches
    assert launch.stack == launch.spills == 0
    assert launch.wide_loads >= launch.loads - 2  # a row of a table is shorter
    assert launch.wide_stores == launch.stores
