"""``merge_tokens``: InternVL's own values, torch's LayerNorm, hand-made cases, messages."""

import json
import math
from pathlib import Path

import pytest
import torch
from marks import slow
from torch.nn import functional

from patchpack import PackedGrid, merge_tokens
from patchpack.testing import compiled
from patchpack.testing.compare import assert_as_accurate, measure_model

IMPLS = ("reference", "triton", "native")
KERNELS = IMPLS[1:]
GOLDEN = [
    case
    for case in json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
    if case["function"] == "internvl.pixel_shuffle"
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["inputs"]["ps_version"])
def test_internvl_shuffles_pixels_with_it(case, impl):
    b, rows, cols, width = case["outputs"]["shape"]
    by_column = case["inputs"]["ps_version"] == "v1"  # whose output is transposed
    rows, cols = (cols, rows) if by_column else (rows, cols)
    grid = PackedGrid([(b, 2 * rows, 2 * cols)])
    x = torch.arange(grid.num_tokens * width / 4).reshape(grid.num_tokens, -1)
    y = merge_tokens(x, grid, order="column" if by_column else "row", impl=impl)
    assert y.flatten().tolist() == torch.tensor(case["outputs"]["y"]).flatten().tolist()


def by_loops(x, grid, m, order):
    """Merged tokens, one by one; ``x`` is in raster order."""
    merged, first = [], 0
    for t, h, w in grid.grid_thw.tolist():
        for _ in range(t):
            places = [(i, j) for i in range(h // m) for j in range(w // m)]
            if order == "column":
                places.sort(key=lambda place: place[::-1])
            for i, j in places:
                block = [(i * m + r) * w + j * m + c for r in range(m) for c in range(m)]
                merged.append(torch.cat([x[first + token] for token in block]))
            first += h * w
    return torch.stack(merged)


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize(("merge", "m"), [(1, 2), (2, 2), (1, 3), (2, 3), (3, 2), (6, 1), (1, 6)])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_order_gives_the_tokens_of_plain_loops(merge, m, order, impl):
    grid = PackedGrid([(2, 6, 12), (1, 12, 6)], merge)
    raster = torch.randn(grid.num_tokens, 3)
    row, col = grid.position_ids.T
    first = torch.arange(grid.num_tokens) // 72 * 72
    tokens = raster[first + row * torch.where(first < 144, 12, 6) + col]
    got = merge_tokens(tokens, grid, order=order, merge_size=m, impl=impl)
    assert torch.equal(got, by_loops(raster, grid, m, order))
    if order == "row":
        assert grid.merged(m).num_tokens == len(got)


@pytest.mark.parametrize("impl", IMPLS)
def test_merge_blocks_are_reshaped(impl):
    grid = PackedGrid([(4, 6), (2, 2)], 2)
    x = torch.randn(28, 5)
    assert torch.equal(merge_tokens(x, grid, impl=impl), x.reshape(7, 20))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("params", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_is_that_of_torch(params, size, impl):
    grid = PackedGrid([(2, 4, 6), (1, 8, 2)])
    given = {name: torch.randn(size * 24) for name in params}
    arguments = {"x": 3 * torch.randn(64, 24) + 1, **given}
    results = []
    for merged in (True, False):
        leaves = {name: p.clone().requires_grad_() for name, p in arguments.items()}
        x, affine = leaves["x"], [leaves.get(name) for name in ("weight", "bias")]
        if merged:
            y = merge_tokens(x, grid, weight=affine[0], bias=affine[1], eps=1e-3, impl=impl)
        elif size == 1:
            normed = functional.layer_norm(x, (24,), *affine, 1e-3)
            y = by_loops(normed, grid, 2, "row")
        else:
            y = functional.layer_norm(by_loops(x, grid, 2, "row"), (96,), *affine, 1e-3)
        y.backward(torch.sin(torch.arange(y.numel()).reshape(y.shape)))
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("impl", KERNELS)
def test_a_large_mean_costs_less_than_in_torch(size, impl):
    grid, offset = PackedGrid([(8, 8)], 2), 1000.0
    x = torch.randn(64, 48) + offset
    weight = torch.ones(size * 48)
    exact = functional.layer_norm(x.double().reshape(-1, size * 48), (size * 48,))
    eager = functional.layer_norm(x.reshape(-1, size * 48), (size * 48,)) - exact
    got = merge_tokens(x, grid, weight=weight, eps=1e-5, impl=impl).reshape(exact.shape) - exact
    assert got.abs().max() < 0.7 * eager.abs().max()


@pytest.mark.parametrize("params", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", KERNELS)
def test_weights_keep_their_dtype(params, impl):
    grid = PackedGrid([(4, 4)])
    x = torch.randn(16, 8).bfloat16().requires_grad_()
    weight = torch.randn(32, dtype=params, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    y = merge_tokens(x, grid, weight=weight, bias=bias, impl=impl)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == params
    assert bias.grad.tolist() == [4.0] * 32


@pytest.mark.parametrize("impl", KERNELS)
def test_weights_may_be_strided(impl):
    grid, x = PackedGrid([(4, 4)]), torch.randn(16, 8)
    weight, bias = torch.randn(32, 2).unbind(1)
    got = merge_tokens(x, grid, weight=weight, bias=bias, impl=impl)
    want = merge_tokens(x, grid, weight=weight.contiguous(), bias=bias.contiguous(), impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", KERNELS)
def test_sums_of_weights_do_not_depend_on_who_is_asked(impl):
    grid = PackedGrid([(40, 40)], 2)
    x, cotangent = torch.randn(1600, 8), torch.randn(400, 32)
    grads = []
    for wants in (("weight",), ("weight", "bias")):
        affine = {name: torch.ones(32, requires_grad=name in wants) for name in ("weight", "bias")}
        merge_tokens(x, grid, **affine, impl=impl).backward(cotangent)
        grads.append(affine["weight"].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", ["native", *slow(["triton"])])
def test_many_partial_sums_are_summed(impl):
    grid = PackedGrid([(144, 256)], 2)
    x, cotangent = torch.randn(36864, 32), torch.randn(9216, 128)
    affine = {name: torch.ones(32, requires_grad=True) for name in ("weight", "bias")}
    merge_tokens(x, grid, **affine, impl=impl).backward(cotangent)
    cotangent = cotangent.double().reshape(-1, 32)
    normed = functional.layer_norm(x.double(), (32,), eps=1e-6)
    close = {"rtol": 1e-5, "atol": 1e-3}
    torch.testing.assert_close(affine["bias"].grad.double(), cotangent.sum(0), **close)
    torch.testing.assert_close(affine["weight"].grad.double(), (cotangent * normed).sum(0), **close)


def differentiate(x, grid, affine, impl, dtype, **options):
    """The merged tokens and all gradients, computed in ``dtype``."""
    leaves = {name: p.to(dtype, copy=True).requires_grad_() for name, p in affine.items()}
    x = x.to(dtype, copy=True).requires_grad_()
    y = merge_tokens(x, grid, **leaves, impl=impl, **options)
    y.backward(torch.sin(torch.arange(y.numel())).reshape(y.shape).to(dtype))
    return {"y": y, "x": x.grad, **{name: leaf.grad for name, leaf in leaves.items()}}


def results(x, grid, affine, impl, **options):
    """What ``impl`` gives, eager, and an oracle."""
    return [
        differentiate(x, grid, affine, i, dtype, **options)
        for i, dtype in (
            (impl, torch.float32),
            ("reference", torch.float32),
            ("reference", torch.float64),
        )
    ]


def assert_accuracy(x, grid, affine, impl, **options):
    got, eager, oracle = results(x, grid, affine, impl, **options)
    for name, value in got.items():
        assert_as_accurate(name, value, eager[name], oracle[name])


@pytest.mark.parametrize(
    ("channels", "m", "size", "rows", "cols"),
    [(c, 2, size, 4, 34) for c in (2, 3, 15, 16, 31, 65, 513, 1153) for size in (1, 4)]
    + [(3, 64, 64**2, 64, 128), (17, 1, 1, 65, 67), (33, 2, 1, 128, 130)],
)
@pytest.mark.parametrize("impl", ["native"])
def test_rows_of_any_length_are_normalised(channels, m, size, rows, cols, impl):
    grid = PackedGrid([(rows, cols), (m, m)])
    x = torch.randn(grid.num_tokens, channels) + 3
    affine = {name: torch.randn(size * channels) for name in ("weight", "bias")}
    # the gradient of a bias of few channels is few numbers
    for accuracy in measure_model(*results(x, grid, affine, impl, merge_size=m, eps=1e-3)):
        assert accuracy.passed, accuracy


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("impl", KERNELS)
def test_channels_that_stand_out_cost_no_accuracy(size, impl):
    grid = PackedGrid([(8, 8)], 2)
    x = torch.randn(64, 48) + 1
    x[:, 0] += 3000  # as encoders have them
    x[:, 17] -= 500
    affine = {name: torch.randn(size * 48) for name in ("weight", "bias")}
    assert_accuracy(x, grid, affine, impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["native"])
def test_without_a_norm_every_bit_is_copied_there_and_back(dtype, impl):
    grid = PackedGrid([(3, 34, 46), (2, 2), (1, 70, 2)])
    bits = torch.randint(-(2**15), 2**15, (grid.num_tokens, 37), dtype=torch.int16)
    if dtype == torch.float32:
        bits = bits.int() * 65537
    x = bits.view(dtype).requires_grad_()  # NaN with payloads among them
    y = merge_tokens(x, grid, impl=impl)
    want = by_loops(bits, grid, 2, "row")
    assert torch.equal(y.detach().view(bits.dtype), want)
    (back,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(back.view(bits.dtype), bits)


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [512, 524])  # whole cache lines in all dtypes, and not
@pytest.mark.parametrize("normed", [True, False])
def test_more_than_caches_hold_has_the_bits_of_each_map(
    normed, channels, dtype, cpu_capability, impl
):
    sizes = [(1, 64, 50)] * (3 if dtype == torch.float32 else 6)
    grid, alone = PackedGrid(sizes), PackedGrid(sizes[:1])
    norm = {"weight": torch.randn(channels), "bias": torch.randn(channels)} if normed else {}
    x = torch.randn(grid.num_tokens, channels).to(dtype).requires_grad_()
    y = merge_tokens(x, grid, **norm, impl=impl)
    grad = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    for i in range(len(sizes)):
        part = x.detach()[3200 * i :][:3200].requires_grad_()
        got = merge_tokens(part, alone, **norm, impl=impl)
        assert torch.equal(got, y[800 * i :][:800])
        (got,) = torch.autograd.grad(got, part, grad[800 * i :][:800])
        assert torch.equal(got, grad_x[3200 * i :][:3200])


@pytest.mark.parametrize(
    ("channels", "size", "launches"), [(40, None, (1, 1)), (1280, 1, (1, 2)), (1024, 4, (1, 2))]
)
def test_launches_are_few_and_wide(channels, size, launches):
    grid = PackedGrid([(4, 6), (8, 2)])
    x = torch.zeros(40, channels, dtype=torch.bfloat16, requires_grad=True)
    affine = {
        n: torch.ones(size * channels, requires_grad=True) for n in ("weight", "bias") if size
    }
    with compiled.session("sm_90") as forward:
        y = merge_tokens(x, grid, **affine, impl="triton")
    with compiled.session("sm_90") as backward:
        y.backward(torch.zeros_like(y))
    assert (len(forward), len(backward)) == launches
    for launch in (forward[0], backward[0]):
        assert launch.wide_loads
        assert launch.wide_stores


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_are_known_on_meta(impl):
    grid = PackedGrid([(4, 4)], device="meta")
    x = torch.empty(16, 8, device="meta")
    out = merge_tokens(x, grid, impl=impl)
    assert out.device.type == "meta"
    assert len(out) == 4


def test_a_second_derivative_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    y = merge_tokens(x, PackedGrid([(2, 2)]), weight=torch.ones(12), impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="merge_tokens_backward has no gradient"):
        grad.sum().backward()


def test_maps_of_odd_size_are_refused_in_a_compiled_graph():
    compiled = torch.compile(merge_tokens, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"grid must have rows and columns that divide by 2"):
        compiled(torch.zeros(15, 4), PackedGrid([(3, 5)]), impl="triton")


X = torch.zeros(24, 4)
GRID = PackedGrid([(4, 6)], 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a tensor, got list"),
        ({"x": X[0]}, ValueError, r"x must have shape \[\*, \*\], got \[4\]"),
        ({"x": X.int()}, TypeError, r"x must be float32 or .*got int32"),
        ({"x": X[:5]}, ValueError, r"x must have the 24 tokens of grid, got \[5, 4\]"),
        ({"x": X[:, :0]}, ValueError, r"x must have at least one channel, got \[24, 0\]"),
        ({"grid": [(4, 6)]}, TypeError, r"grid must be a PackedGrid, got list"),
        ({"order": "v1"}, ValueError, r"order must be one of 'row', 'column', got 'v1'"),
        (
            {"merge_size": 4},
            ValueError,
            r"grid must have rows and columns that divide by 4, got \[1, 4, 6\] in grid_thw\[0\]",
        ),
        ({"merge_size": 0}, ValueError, r"merge_size must be at least 1, got 0"),
        ({"merge_size": 65}, ValueError, r"merge_size must be at most 64, got 65"),
        ({"merge_size": 2.0}, TypeError, r"merge_size must be an integer, got 2.0"),
        ({"weight": X}, ValueError, r"weight must have shape \[\*\], got \[24, 4\]"),
        (
            {"weight": X[0, :3]},
            ValueError,
            r"weight must have the 4 channels of x or the 16 of a merged token, got 3",
        ),
        ({"bias": X[:2].flatten()}, ValueError, r"bias must have the 4 channels .* got 8"),
        ({"weight": X[0], "bias": X[:4].flatten()}, ValueError, r"bias must have shape \[4\]"),
        ({"weight": X[0].int()}, TypeError, r"weight must be float32 or .*got int32"),
        ({"weight": 1.0}, TypeError, r"weight must be a tensor, got float"),
        ({"weight": X[0].to("meta")}, ValueError, r"weight must be on the device of x, cpu"),
        ({"eps": 0.0}, ValueError, r"eps must be above 0, got 0.0"),
        ({"eps": math.nan}, ValueError, r"eps must be above 0, got nan"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        merge_tokens(**{"x": X, "grid": GRID, **change}, impl=impl)
