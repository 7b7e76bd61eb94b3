"""``region_attention``: Oryx's own values, hand-computed ones, invariants, messages."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from patchpack import PackedGrid, region_attention
from patchpack.testing.compare import assert_as_accurate

IMPLS = ("reference", "triton", "native")
KERNELS = IMPLS[1:]
GOLDEN = [
    case
    for case in json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
    if case["function"] == "oryx.dynamic_compressor"
]


def sine(b, *shape):
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (0.2 * torch.sin(b * i + b)).float().reshape(shape).requires_grad_()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["inputs"]["forward_type"])
def test_oryx_compresses_with_it(case, impl):
    inputs, want = case["inputs"], case["outputs"]
    t, h, w, c = (inputs[name] for name in "THWC")
    r = {"image": 1, "video": 2, "video_long": 4}[inputs["forward_type"]]
    i = torch.arange(t * h * w * c, dtype=torch.float64)
    x = torch.cos(0.37 * i).float().reshape(-1, c).requires_grad_()
    weight_q, bias_q, weight_k = sine(0.3, 256, c), sine(0.7, 256), sine(1.1, 256, c)

    pooled = x.reshape(t, h // r, r, w // r, r, c).mean(dim=(2, 4)).reshape(-1, c)
    query = functional.linear(pooled, weight_q, bias_q) @ weight_k
    grid = PackedGrid([(t, h, w)])
    y = region_attention(query, x, grid, r, softmax_scale=1 / 16, impl=impl)
    assert grid.merged(r).grid_thw.tolist() == [[t, *want["size"]]]
    close = {"rtol": 0, "atol": case["tol"]}
    torch.testing.assert_close(y.reshape(t, -1, c), torch.tensor(want["y"]), **close)

    i = torch.arange(y.numel(), dtype=torch.float64)
    y.backward(torch.sin(0.11 * i).float().reshape(y.shape))
    torch.testing.assert_close(x.grad.flatten()[:8], torch.tensor(want["grad_x_first8"]), **close)
    assert x.grad.sum().item() == pytest.approx(want["grad_x_sum"], abs=1e-4)
    assert weight_q.grad.norm().item() == pytest.approx(want["grad_qw_l2"], abs=1e-5)
    assert weight_k.grad.norm().item() == pytest.approx(want["grad_kw_l2"], abs=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_picks_the_token_it_points_at(impl):
    tokens = torch.eye(4)
    query = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    y = region_attention(query, tokens, PackedGrid([(2, 2)]), 2, softmax_scale=500.0, impl=impl)
    assert y.tolist() == [[0.25, 0.25, 1.25, 0.25]]
    y = region_attention(0 * query, tokens, PackedGrid([(2, 2)]), 2, impl=impl)
    assert y.tolist() == [[0.5, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_cell_of_one_is_doubled_exactly(dtype, impl):
    query, tokens = torch.randn(2, 6, 24).to(dtype).requires_grad_().unbind()
    query.retain_grad()
    y = region_attention(query, tokens, PackedGrid([(2, 3)]), 1, impl=impl)
    assert torch.equal(y, 2 * tokens)
    y.backward(torch.randn(6, 24).to(dtype))
    assert not query.grad.any()


@pytest.mark.parametrize("region", [2, 3, 6])
@pytest.mark.parametrize("merge", [2, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_orders_of_tokens_change_nothing_else(region, merge, impl):
    raster, blocks = PackedGrid([(2, 6, 12)]), PackedGrid([(2, 6, 12)], merge)
    tokens, query = torch.randn(144, 5), torch.randn(144 // region**2, 5)
    row, col = blocks.position_ids.T
    order = torch.arange(144) // 72 * 72 + row * 12 + col
    want = region_attention(query, tokens, raster, region, impl=impl)
    got = region_attention(query, tokens[order], blocks, region, impl=impl)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if impl == "reference" else 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_whole_map_may_be_one_cell(impl):
    tokens, query = torch.randn(400, 8), torch.randn(1, 8)
    y = region_attention(query, tokens, PackedGrid([(20, 20)]), 20, impl=impl)
    p = (tokens @ query[0] * 8**-0.5).softmax(0)
    torch.testing.assert_close(y[0], tokens.mean(0) + p @ tokens)


@pytest.mark.parametrize("impl", KERNELS)
def test_a_constant_added_to_all_scores_of_a_cell_changes_nothing(impl):
    tokens = torch.randn(16, 8)
    tokens[:, 0] = 1.0
    query = torch.randn(4, 8)
    far = query + torch.tensor([1e4, *[0.0] * 7])
    grid = PackedGrid([(4, 4)])
    y, shifted = (region_attention(q, tokens, grid, 2, impl=impl) for q in (query, far))
    torch.testing.assert_close(shifted, y, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("channels", "region", "merge"),
    [(c, 2, 2) for c in (1, 3, 15, 16, 63, 65, 513, 1153)]
    + [(33, r, m) for r in (1, 3, 6) for m in (1, 2, 3)]
    + [(5, 64, 1), (5, 64, 4)],
)
@pytest.mark.parametrize("impl", ["native"])
def test_cells_and_channels_of_any_number(channels, region, merge, impl):
    side = 64 if region == 64 else 6
    grid = PackedGrid([(2, side, 2 * side), (1, side, side)], merge)
    tokens = torch.randn(grid.num_tokens, channels)
    query = torch.randn(grid.num_blocks(region), channels)
    results = []
    for i, dtype in (
        (impl, torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        q, x = (leaf.to(dtype, copy=True).requires_grad_() for leaf in (query, tokens))
        y = region_attention(q, x, grid, region, impl=i)
        y.backward(torch.cos(torch.arange(y.numel())).reshape(y.shape).to(dtype))
        results.append((y, q.grad, x.grad))
    for name, *values in zip(("y", "grad_query", "grad_tokens"), *results, strict=True):
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_are_known_on_meta(impl):
    grid = PackedGrid([(4, 4)], device="meta")
    x = torch.empty(16, 8, device="meta")
    out = region_attention(x[:4], x, grid, 2, impl=impl)
    assert out.device.type == "meta"
    assert len(out) == 4


def test_a_second_derivative_is_refused():
    query, tokens = torch.randn(1, 4), torch.randn(4, 4, requires_grad=True)
    y = region_attention(query, tokens, PackedGrid([(2, 2)]), 2, impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="region_attention_backward has no gradient"):
        grad.sum().backward()


def test_maps_of_odd_size_are_refused_in_a_compiled_graph():
    compiled = torch.compile(region_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"grid must have rows and columns that divide by 2"):
        compiled(torch.zeros(3, 4), torch.zeros(15, 4), PackedGrid([(3, 5)]), 2, impl="triton")


X = torch.zeros(24, 4)
GRID = PackedGrid([(4, 6)], 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, r"query must be a tensor, got list"),
        ({"query": X[0]}, ValueError, r"query must have shape \[\*, \*\], got \[4\]"),
        ({"query": X[:5]}, ValueError, r"query must have the 6 cells of grid, got \[5, 4\]"),
        ({"query": X[:6, :0], "tokens": X[:, :0]}, ValueError, r"query must have at least one"),
        ({"query": X[:6].half()}, TypeError, r"tokens must have the dtype of query"),
        ({"tokens": X[:, :3]}, ValueError, r"tokens must have shape \[\*, 4\], got \[24, 3\]"),
        ({"tokens": X[:5]}, ValueError, r"tokens must have the 24 tokens of grid, got \[5, 4\]"),
        ({"tokens": X.int(), "query": X[:6].int()}, TypeError, r"query must be float32 or .*int32"),
        ({"grid": [(4, 6)]}, TypeError, r"grid must be a PackedGrid, got list"),
        (
            {"region": 4},
            ValueError,
            r"grid must have rows and columns that divide by 4, got \[1, 4, 6\] in grid_thw\[0\]",
        ),
        ({"region": 0}, ValueError, r"region must be at least 1, got 0"),
        ({"region": 65}, ValueError, r"region must be at most 64, got 65"),
        ({"region": 2.0}, TypeError, r"region must be an integer, got 2.0"),
        ({"softmax_scale": 0}, ValueError, r"softmax_scale must be above 0, got 0"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    arguments = {"query": X[:6], "tokens": X, "grid": GRID, "region": 2, **change}
    with pytest.raises(error, match=message):
        region_attention(**arguments, impl=impl)


@pytest.mark.parametrize("impl", KERNELS)
def test_alike_neighbours_do_not_cancel(impl):
    grid = PackedGrid([(1, 8, 12)])
    tokens = torch.randn(40) + 0.05 * torch.randn(grid.num_tokens, 40)
    query, grad = torch.randn(2, grid.num_tokens // 4, 40)
    grads = {}
    for name, i, dtype in (
        ("fused", impl, torch.float32),
        ("eager", "reference", torch.float32),
        ("oracle", "reference", torch.float64),
    ):
        leaf = query.to(dtype, copy=True).requires_grad_()
        region_attention(leaf, tokens.to(dtype), grid, 2, impl=i).backward(grad.to(dtype))
        grads[name] = leaf.grad.double()
    fused, eager = ((grads[name] - grads["oracle"]).norm() for name in ("fused", "eager"))
    assert fused < 0.02 * eager
