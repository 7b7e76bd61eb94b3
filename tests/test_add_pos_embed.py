"""``add_pos_embed``: original models' values, torch's own, the adjoint, long sums, messages."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from patchpack import PackedGrid, add_pos_embed, reference
from patchpack.testing.compare import assert_as_accurate

IMPLS = ("reference", "triton", "native")
KERNELS = ("triton", "native")
OPTIONS = [
    {},
    {"align_corners": True},
    {"antialias": True},
    {"align_corners": True, "antialias": True},
    {"mode": "bicubic"},
    {"mode": "bicubic", "align_corners": True},
    {"mode": "bicubic", "antialias": True},
    {"mode": "bicubic", "align_corners": True, "antialias": True},
]
MODELS = {
    "oryx.rescale_positional_embedding": {},
    "qwen3vl.fast_pos_embed_interpolate": {"align_corners": True},
    "siglip2.resize_pos_embed": {"antialias": True},
    "moonvit.pos_embed": {"mode": "bicubic"},
    "bicubic_impulse": {"mode": "bicubic"},
}
GOLDEN = [
    case
    for case in json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
    if case["function"] in MODELS
]


def golden_table(inputs):
    """The table of a case, ``[rows, cols, 1]``."""
    if "x" in inputs:
        assert inputs["x"] == "one-hot index 3 of 8, 1x8"
        return functional.one_hot(torch.tensor([3]), 8)[:, :, None].float()
    side = inputs.get("num_grid_per_side")
    if side is None:
        count = re.match(r"arange\((\d+)", inputs.get("table") or inputs["pos_embed"])[1]
        side = {"128": 128, "256": 16, "4096": 64}[count]
    return torch.arange(side * side, dtype=torch.float32).view(side, side, 1)


def golden_values(y, rows, cols):
    """Everything that a case says of the resized table, by its names."""
    corners = y.view(-1, rows, cols)[0, [0, 0, -1, -1], [0, -1, 0, -1]]
    return {
        "y": y,
        "corners": corners,
        "first_row_first6": y[: min(cols, 6)],
        "first6": y[:6],
        "first5": y[:5],
        "center": y[rows // 2 * cols + cols // 2],
        "mid": y[rows * cols // 2],
        "last": y[-1],
        "last_valid": y[-1],
        "pad_value": y[0],  # SigLIP 2 pads with the first embedding
    }


def test_there_are_golden_values_of_every_model():
    assert {case["function"] for case in GOLDEN} == set(MODELS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["function"].partition(".")[0])
def test_values_of_the_original_models(case, impl):
    inputs, outputs = case["inputs"], case["outputs"]
    size = next(inputs[n] for n in ("out_hw", "hw", "size", "grid_thw") if n in inputs)
    grid = PackedGrid(size if "grid_thw" in inputs else [size], inputs.get("merge", 1))
    x = torch.zeros(grid.num_tokens, 1)
    table = golden_table(inputs)
    y = add_pos_embed(x, table, grid, **MODELS[case["function"]], impl=impl)[:, 0]
    got = golden_values(y, *grid.grid_thw[0, 1:].tolist())
    for name, want in outputs.items():
        want = torch.tensor(want)
        torch.testing.assert_close(got[name], want, rtol=0, atol=case["tol"], msg=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_frame_gets_the_values_of_torch(options, impl):
    sizes = [(1, 3, 8), (2, 5, 4), (1, 7, 9), (1, 1, 2)]
    grid = PackedGrid(sizes)
    x, table = torch.randn(grid.num_tokens, 6), torch.randn(5, 6, 6)
    got = add_pos_embed(x, table, grid, **options, impl=impl)
    options = {"mode": "bilinear", **options}
    maps = table.permute(2, 0, 1)[None]
    resized = [functional.interpolate(maps, hw, **options) for t, *hw in sizes for _ in range(t)]
    want = x + torch.cat([frame[0].flatten(1).T for frame in resized])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_image_of_the_size_of_the_table_gets_it_as_it_is(options, impl):
    x, table = torch.randn(60, 3), torch.randn(5, 6, 3)
    if impl != "reference":  # kernels read no cell of weight zero
        table[1, 2, 0] = float("nan")
    y = add_pos_embed(x, table, PackedGrid([(2, 5, 6)]), **options, impl=impl)
    want = x + table.flatten(0, 1).repeat(2, 1)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_orders_of_tokens_change_nothing_else(impl):
    raster, blocks = PackedGrid([(2, 4, 6), (1, 2, 8)]), PackedGrid([(2, 4, 6), (1, 2, 8)], 2)
    table = torch.randn(3, 5, 4)
    x = torch.zeros(64, 4)
    want = add_pos_embed(x, table, raster, impl=impl)
    got = add_pos_embed(x, table, blocks, impl=impl)
    first = torch.tensor([0, 24, 48]).repeat_interleave(torch.tensor([24, 24, 16]))
    cols = torch.tensor([6, 6, 8]).repeat_interleave(torch.tensor([24, 24, 16]))
    row, col = blocks.position_ids.T
    assert torch.equal(got, want[first + row * cols + col])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", KERNELS)
def test_the_gradient_is_the_adjoint(options, impl):
    grid = PackedGrid([(1, 7, 3), (2, 2, 4)])
    x = torch.zeros(grid.num_tokens, 3, requires_grad=True)
    table = torch.randn(4, 5, 3, requires_grad=True)
    y = add_pos_embed(x, table, grid, **options, impl=impl)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    torch.testing.assert_close((y * cotangent).sum(), (table * table.grad).sum(), atol=1e-4, rtol=0)
    assert torch.equal(x.grad, cotangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", KERNELS)
def test_a_table_of_its_own_dtype_has_a_gradient_of_that(dtype, impl):
    grid = PackedGrid([(4, 3)])
    x = torch.randn(12, 8, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(2, 2, 8, dtype=dtype, requires_grad=True)
    y = add_pos_embed(x, table, grid, impl=impl)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x.grad.dtype, table.grad.dtype) == (torch.bfloat16, torch.bfloat16, dtype)
    torch.testing.assert_close(table.grad.sum(dim=(0, 1)), torch.full((8,), 12, dtype=dtype))


@pytest.mark.parametrize("impl", KERNELS)
def test_a_frozen_table_costs_no_backward_pass(monkeypatch, impl):
    monkeypatch.setattr(torch.ops.patchpack, "add_pos_embed_backward", None)
    x = torch.randn(6, 2, requires_grad=True)
    y = add_pos_embed(x, torch.randn(2, 2, 2), PackedGrid([(3, 2)]), impl=impl)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 2))


@pytest.mark.parametrize(
    "view",
    [
        lambda table: table.mT.contiguous().mT,  # channels first, strided: copied
        lambda table: table.transpose(0, 1).contiguous().transpose(0, 1),
        lambda table: torch.cat([table, table], dim=1).flatten(0, 1)[:30].view(3, 10, 16)[:, :5],
    ],
)
@pytest.mark.parametrize("impl", KERNELS)
def test_strides_of_the_table_change_nothing(view, impl):
    grid, x, table = PackedGrid([(4, 6)]), torch.randn(24, 16), torch.randn(3, 5, 16)
    want = add_pos_embed(x, table, grid, impl=impl)
    assert not view(table).is_contiguous()
    assert torch.equal(add_pos_embed(x, view(table), grid, impl=impl), want)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("sizes", [[(200, 1, 1)], [(1, 1, 1)] * 200])
def test_a_sum_over_many_frames_does_not_lose_digits(sizes, impl):
    grid = PackedGrid(sizes)  # all of them read the middle of the table
    x, cotangent = torch.zeros(200, 64), torch.rand(200, 64)

    def gradient(op, dtype, **options):
        table = torch.zeros(1, 31, 64, dtype=dtype, requires_grad=True)
        y = op(x.to(dtype), table, grid, **options)
        return torch.autograd.grad(y, table, cotangent.to(dtype))[0]

    actual = gradient(add_pos_embed, torch.float32, impl=impl)
    eager = gradient(reference.add_pos_embed, torch.float32)
    assert_as_accurate("table", actual, eager, gradient(reference.add_pos_embed, torch.float64))


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"mode": "bicubic", "antialias": True}])
def test_many_images_and_clips_of_any_dtype(options, dtype, table_dtype, impl):
    grid = PackedGrid([(1 + i % 3, 2 + i % 7, 1 + i % 5) for i in range(40)])
    generator = torch.Generator().manual_seed(0)
    x, cotangent = torch.randn(2, grid.num_tokens, 21, generator=generator).to(dtype)
    table = torch.randn(4, 3, 21, generator=generator).to(table_dtype)

    def differentiated(op, widen=None, **implementation):
        leaf = table.to(widen or table_dtype).detach().requires_grad_()
        y = op(x.to(widen or dtype), leaf, grid, **options, **implementation)
        y.backward(cotangent.to(widen or dtype))
        return y.detach(), leaf.grad

    actual = differentiated(add_pos_embed, impl=impl)
    eager = differentiated(reference.add_pos_embed)
    oracle = differentiated(reference.add_pos_embed, torch.float64)
    for name, *values in zip(("y", "grad_table"), actual, eager, oracle, strict=True):
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [512, 520])  # whole cache lines in all dtypes, and not
def test_more_than_caches_hold_has_the_bits_of_each_image(channels, dtype, cpu_capability, impl):
    sizes = [(1, 64, 50)] * (3 if dtype == torch.float32 else 6)
    grid, alone = PackedGrid(sizes), PackedGrid(sizes[:1])
    x, table = torch.randn(grid.num_tokens, channels).to(dtype), torch.randn(9, 9, channels)
    y = add_pos_embed(x, table, grid, impl=impl)
    for tokens, part in zip(x.split(3200), y.split(3200), strict=True):
        assert torch.equal(part, add_pos_embed(tokens, table, alone, impl=impl))


@pytest.mark.parametrize("impl", KERNELS)
def test_an_infinite_gradient_stays_infinite(impl):
    table = torch.randn(1, 1, 3, requires_grad=True)
    out = add_pos_embed(torch.randn(4, 3), table, PackedGrid([(4, 1, 1)]), impl=impl)
    grad = torch.ones(4, 3)
    grad[1, 0] = float("inf")
    out.backward(grad)
    assert table.grad.flatten().tolist() == [float("inf"), 4, 4]


@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_refused(impl):
    table = torch.randn(2, 2, 2, requires_grad=True)
    y = add_pos_embed(torch.randn(12, 2), table, PackedGrid([(3, 4)]), impl=impl)
    (grad,) = torch.autograd.grad(y.square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match=r"add_pos_embed_backward.* has no gradient"):
        grad.sum().backward()


X, TABLE = torch.zeros(24, 4), torch.zeros(3, 3, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \[\*, \*\], got \[4\]"),
        ({"x": X.int()}, TypeError, r"x must be float32 or .*got int32"),
        ({"x": X[:5]}, ValueError, r"x must have the 24 tokens of grid, got \[5, 4\]"),
        ({"x": [[1.0]]}, TypeError, r"x must be a tensor, got list"),
        ({"table": TABLE[0]}, ValueError, r"table must have shape \[\*, \*, 4\], got \[3, 4\]"),
        ({"table": TABLE[..., :2]}, ValueError, r"table must .* 4\], got \[3, 3, 2\]"),
        ({"table": TABLE[:0]}, ValueError, r"table must have at least one row.*got \[0, 3, 4\]"),
        ({"table": TABLE.long()}, TypeError, r"table must be float32 or .*got int64"),
        ({"table": TABLE.to("meta")}, ValueError, r"table must be on the device of x, cpu"),
        ({"grid": [(4, 6)]}, TypeError, r"grid must be a PackedGrid, got list"),
        ({"mode": "area"}, ValueError, r"mode must be one of 'bilinear', 'bicubic', got 'area'"),
        ({"align_corners": 1}, TypeError, r"align_corners must be a bool, got 1"),
        ({"antialias": None}, TypeError, r"antialias must be a bool, got None"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    arguments = {"x": X, "table": TABLE, "grid": PackedGrid([(4, 6)], 2), **change}
    with pytest.raises(error, match=message):
        add_pos_embed(**arguments, impl=impl)
