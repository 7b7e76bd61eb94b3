"""``interpolate_tokens``: torch's own values, hand-computed ones, the adjoint, messages."""

import pytest
import torch
from marks import slow
from torch.nn import functional

from patchpack import PackedGrid, _dispatch, interpolate_tokens, reference
from patchpack.testing.compare import assert_as_accurate

IMPLS = ("reference", "triton", "native")
KERNELS = ("triton", "native")
MODES = [
    ("bilinear", {}),
    ("bilinear", {"align_corners": True}),
    ("bilinear", {"antialias": True}),
    ("bicubic", {}),
    ("bicubic", {"align_corners": True}),
    ("bicubic", {"antialias": True}),
    ("bicubic", {"align_corners": True, "antialias": True}),
    ("area", {}),
    ("max", {}),
    ("nearest", {}),
]


def by_torch(frame, size, mode, **options):
    if mode == "max":
        return functional.adaptive_max_pool2d(frame, size)
    return functional.interpolate(frame, size, mode=mode, **options)


@pytest.mark.parametrize("impl", ["native", *slow(["triton"])])
def test_coordinates_past_32_bits(impl):
    rows, target = 100_000, 15_000
    x = torch.randn(rows, 1).requires_grad_()
    out, _ = interpolate_tokens(x, PackedGrid([(rows, 1)]), (target, 1), impl=impl)
    out.backward(cotangent := torch.randn(target, 1))

    twice = (2 * torch.arange(target) + 1) * rows - target  # the coordinate, in 2 * target parts
    first, weight = twice // (2 * target), (twice % (2 * target)) / (2 * target)
    weight = weight[:, None].double()
    want = (1 - weight) * x[first].double() + weight * x[first + 1].double()
    torch.testing.assert_close(out, want.float())
    grad = torch.zeros(rows, 1).double()
    grad.index_add_(0, first, (1 - weight) * cotangent).index_add_(0, first + 1, weight * cotangent)
    torch.testing.assert_close(x.grad, grad.float())


@pytest.mark.parametrize(("mode", "options"), MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_frame_gets_the_values_of_torch(mode, options, impl):
    sizes, targets = [(1, 9, 13), (2, 5, 4), (1, 1, 7)], [(4, 20), (5, 3), (1, 3)]
    grid = PackedGrid(sizes)
    x = torch.randn(grid.num_tokens, 6)
    got, small = interpolate_tokens(x, grid, targets, mode=mode, **options, impl=impl)
    assert small.grid_thw.tolist() == [
        [t, *hw] for (t, _, _), hw in zip(sizes, targets, strict=True)
    ]
    frames = [
        (hw, target) for (t, *hw), target in zip(sizes, targets, strict=True) for _ in range(t)
    ]
    maps = x.split([h * w for (h, w), _ in frames])
    want = [
        by_torch(tokens.T.reshape(1, 6, h, w), target, mode, **options)[0].flatten(1).T
        for tokens, ((h, w), target) in zip(maps, frames, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_27_to_14_as_llava_onevision_pools_video(impl):
    x = torch.arange(27.0).repeat(27)[:, None]
    y, _ = interpolate_tokens(x, PackedGrid([(27, 27)]), (14, 14), impl=impl)
    row = [2 * o + (13 - 2 * o) / 28 for o in range(7)]  # the pairs (0, 1), (2, 3), ...
    torch.testing.assert_close(y[:7, 0], torch.tensor(row))
    torch.testing.assert_close(y[:14, 0].flip(0), 26 - y[:14, 0])


@pytest.mark.parametrize(("mode", "options"), [m for m in MODES if m[0] != "max"])
@pytest.mark.parametrize("impl", KERNELS)
def test_the_gradient_is_the_adjoint(mode, options, impl):
    grid = PackedGrid([(1, 9, 7), (2, 3, 4)])
    x = torch.randn(grid.num_tokens, 3, requires_grad=True)
    y, _ = interpolate_tokens(x, grid, [(4, 9), (5, 2)], mode=mode, **options, impl=impl)
    cotangent = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close((y * cotangent).sum(), (x * grad).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("mode", "options"), MODES)
@pytest.mark.parametrize("impl", KERNELS)
def test_targets_planned_before_are_the_same(mode, options, impl):
    grid = PackedGrid([(2, 4, 6), (8, 2)], spatial_merge_size=2)
    sizes = [(3, 4), (5, 3)]
    x = torch.randn(grid.num_tokens, 40)
    want, target = interpolate_tokens(
        x, grid, sizes, mode=mode, **options, spatial_merge_size=1, impl=impl
    )
    got, same = interpolate_tokens(x, grid, target, mode=mode, **options, impl=impl)
    assert same is target
    assert torch.equal(got, want)


@pytest.mark.parametrize(("mode", "options"), MODES)
@pytest.mark.parametrize("impl", KERNELS)
def test_constants_stay(mode, options, impl):
    grid = PackedGrid([(5, 7), (1, 1)])
    x = torch.full((36, 2), 3.5)
    y, _ = interpolate_tokens(x, grid, [(8, 3), (4, 4)], mode=mode, **options, impl=impl)
    torch.testing.assert_close(y, torch.full_like(y, 3.5))


@pytest.mark.parametrize("impl", IMPLS)
def test_orders_of_tokens_change_nothing_else(impl):
    raster, blocks = PackedGrid([(2, 6, 4)]), PackedGrid([(2, 6, 4)], 2)
    x = torch.randn(6, 4, 2, 5)  # row, column, frame, channel
    in_raster = x.permute(2, 0, 1, 3).reshape(-1, 5)
    row, col = blocks.position_ids.T
    in_blocks = x[row, col, torch.arange(48) // 24]
    want, _ = interpolate_tokens(in_raster, raster, (4, 2), impl=impl)
    got, _ = interpolate_tokens(in_blocks, blocks, (4, 2), spatial_merge_size=1, impl=impl)
    assert torch.equal(got, want)
    got, small = interpolate_tokens(in_blocks, blocks, (4, 2), impl=impl)
    assert small.spatial_merge_size == 2
    row, col = small.position_ids.T
    order = torch.arange(16) // 8 * 8 + row * 2 + col
    assert torch.equal(got, want[order])


@pytest.mark.parametrize("impl", KERNELS)
def test_the_first_maximum_gets_the_gradient_and_nan_wins(impl):
    x = torch.tensor([[1.0], [2.0], [2.0], [0.0]], requires_grad=True)
    y, _ = interpolate_tokens(x, PackedGrid([(2, 2)]), (1, 1), mode="max", impl=impl)
    y.backward()
    assert x.grad.flatten().tolist() == [0, 1, 0, 0]
    x = torch.tensor([[1.0], [float("nan")], [2.0], [0.0]])
    y, _ = interpolate_tokens(x, PackedGrid([(2, 2)]), (1, 1), mode="max", impl=impl)
    assert y.isnan().all()


@pytest.mark.parametrize(("mode", "options"), MODES)
@pytest.mark.parametrize("impl", KERNELS)
def test_a_weight_of_zero_keeps_nan_out(mode, options, impl):
    x = torch.randn(25, 3)
    x[12, 1] = float("nan")
    y, _ = interpolate_tokens(x, PackedGrid([(5, 5)]), (5, 5), mode=mode, **options, impl=impl)
    assert y.isnan().nonzero().tolist() == [[12, 1]]


@pytest.mark.parametrize("mode", ["bilinear", "max"])
@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_refused(mode, impl):
    x = torch.randn(12, 2, requires_grad=True)
    y, _ = interpolate_tokens(x, PackedGrid([(3, 4)]), (2, 2), mode=mode, impl=impl)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"interpolate_tokens_backward.* has no gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize(("mode", "options"), MODES)
def test_what_backward_needs_is_what_triton_saves(mode, options, impl):
    grid, small = PackedGrid([(2, 6, 8), (1, 4, 2)], 2), PackedGrid([(2, 4, 3), (1, 5, 1)])
    x = torch.randint(3, (grid.num_tokens, 19)).float()  # every maximum occurs again
    x[::7], x[3::11] = float("nan"), -float("inf")
    if mode != "max":
        x = x.nan_to_num()
    arguments = (x, grid.geometry, small.geometry, small.num_tokens, 2, 1, mode)
    flags = [options.get(name, False) for name in ("align_corners", "antialias")]
    _, want = _dispatch.operator("interpolate_tokens", "triton")(*arguments, *flags)
    _, got = _dispatch.operator("interpolate_tokens", impl)(*arguments, *flags)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize(("mode", "options"), MODES)
@pytest.mark.parametrize("channels", [1, 15, 17, 66, 200])
def test_any_number_of_channels(mode, options, channels, impl):
    grid = PackedGrid([(1, 20, 6), (2, 4, 2)], 2)

    def differentiated(op, dtype, **implementation):
        x = torch.randn(grid.num_tokens, channels, generator=torch.Generator().manual_seed(0))
        x = x.to(dtype).requires_grad_()
        y, _ = op(x, grid, [(3, 4), (8, 9)], mode=mode, **options, spatial_merge_size=1,
                  **implementation)  # fmt: skip
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))
        return y.detach(), x.grad

    actual = differentiated(interpolate_tokens, torch.float32, impl=impl)
    eager = differentiated(reference.interpolate_tokens, torch.float32)
    oracle = differentiated(reference.interpolate_tokens, torch.float64)
    for name, *values in zip(("y", "grad_x"), actual, eager, oracle, strict=True):
        assert_as_accurate(name, *values)


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize(("mode", "options"), MODES)
def test_rows_that_threads_share_have_the_same_bits(mode, options, impl):
    grid = PackedGrid([(1, 3, 700), (1, 1, 900)])
    x, results = torch.randn(grid.num_tokens, 70, requires_grad=True), []
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            y, _ = interpolate_tokens(x, grid, (2, 333), mode=mode, **options, impl=impl)
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [512, 520])  # whole cache lines in all dtypes, and not
def test_more_than_caches_hold_has_the_bits_of_each_map(channels, dtype, cpu_capability, impl):
    sizes = [(1, 120, 100)] * (2 if dtype == torch.float32 else 4)
    grid, alone = PackedGrid(sizes), PackedGrid(sizes[:1])
    x = torch.randn(grid.num_tokens, channels).to(dtype).requires_grad_()
    y, _ = interpolate_tokens(x, grid, (60, 51), impl=impl)
    grad = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    for i in range(len(sizes)):
        tokens = x.detach()[i * 12000 : (i + 1) * 12000].requires_grad_()
        part, _ = interpolate_tokens(tokens, alone, (60, 51), impl=impl)
        (grad_part,) = torch.autograd.grad(part, tokens, grad[i * 3060 : (i + 1) * 3060])
        assert torch.equal(y[i * 3060 : (i + 1) * 3060], part)
        assert torch.equal(grad_x[i * 12000 : (i + 1) * 12000], grad_part)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        interpolate_tokens([[1.0]], PackedGrid([(1, 1)]), (1, 1))


X = torch.zeros(24, 4)
GRID = PackedGrid([(4, 6)], 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \[\*, \*\], got \[4\]"),
        ({"x": X.int()}, TypeError, r"x must be float32 or .*got int32"),
        ({"x": X[:5]}, ValueError, r"x must have the 24 tokens of grid, got \[5, 4\]"),
        ({"grid": [(4, 6)]}, TypeError, r"grid must be a PackedGrid, got list"),
        ({"target_hw": (3, 4)}, ValueError, r"target_hw .*spatial_merge_size=2, got \[1, 3, 4\]"),
        ({"target_hw": (0, 4)}, ValueError, r"target_hw .*at least 1"),
        ({"target_hw": (2.0, 4)}, TypeError, r"target_hw must"),
        ({"target_hw": [(2, 2), (2, 2)]}, ValueError, r"target_hw must have shape \[1, 2\]"),
        ({"target_hw": (2**70, 2)}, ValueError, r"target_hw must be below 2\*\*31 on every axis"),
        ({"x": X[:, :0]}, ValueError, r"x must have at least one channel, got \[24, 0\]"),
        ({"align_corners": 1}, TypeError, r"align_corners must be a bool, got 1"),
        ({"mode": "linear"}, ValueError, r"mode must be one of 'bilinear'.*got 'linear'"),
        (
            {"mode": "area", "antialias": True},
            ValueError,
            r"antialias is for mode .*got mode 'area'",
        ),
        ({"mode": "max", "align_corners": True}, ValueError, r"align_corners is for mode"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        interpolate_tokens(**{"x": X, "grid": GRID, "target_hw": (2, 2), **change}, impl=impl)
