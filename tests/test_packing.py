"""The data model: a packed grid follows from its sizes alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack import PackedGrid, interpolate_tokens
from patchpack.packing import validate_cu_seqlens

pytestmark = pytest.mark.usefixtures("with_and_without_extension")

SIDES = st.integers(1, 6)


@st.composite
def grids(draw):
    m = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), max_size=6))
    sizes = [(t, h * m, w * m) for t, h, w in sizes]
    return PackedGrid(sizes, m, draw(st.booleans())), sizes


def _cells_in_order(sizes, m):
    """Row and column of every token by plain loops in the order that the design names."""
    return [
        [row + i, col + j]
        for t, h, w in sizes
        for _ in range(t)
        for row in range(0, h, m)
        for col in range(0, w, m)
        for i in range(m)
        for j in range(m)
    ]


@given(grids())
def test_tokens_are_in_merge_block_order(drawn):
    grid, sizes = drawn
    want = torch.tensor(_cells_in_order(sizes, grid.spatial_merge_size)).reshape(-1, 2)
    assert torch.equal(grid.position_ids, want)


@given(grids())
def test_segments_cover_the_tokens(drawn):
    grid, sizes = drawn
    frames = 1 if grid.merge_temporal else None
    lengths = [(t if frames else 1) * h * w for t, h, w in sizes for _ in range(frames or t)]
    assert grid.cu_seqlens.dtype == torch.int32
    assert grid.cu_seqlens.diff().tolist() == lengths
    assert grid.cu_seqlens[-1] == grid.num_tokens == sum(t * h * w for t, h, w in sizes)
    assert grid.num_segments == len(lengths)
    assert grid.max_seqlen == max(lengths, default=0)
    grid.validate()
    validate_cu_seqlens(grid.cu_seqlens, grid.num_tokens)


@given(grids())
def test_geometry_says_where_images_start(drawn):
    grid, sizes = drawn
    begins = [sum(t * h * w for t, h, w in sizes[:i]) for i in range(len(sizes) + 1)]
    assert grid.geometry[:, 0].tolist() == begins
    assert grid.geometry[:-1, 1:].tolist() == [[h, w] for _, h, w in sizes]
    assert grid.num_grids == len(sizes)


@given(grids())
def test_merging_leaves_one_token_a_block(drawn):
    grid, sizes = drawn
    m = grid.spatial_merge_size
    merged = grid.merged()
    assert merged.grid_thw.tolist() == [[t, h // m, w // m] for t, h, w in sizes]
    assert merged.spatial_merge_size == 1
    assert merged.merge_temporal == grid.merge_temporal
    # token i of the merged grid is the block of tokens i m^2 to (i + 1) m^2
    blocks = grid.position_ids.reshape(-1, m * m, 2)
    assert torch.equal(blocks[:, 0] // m, merged.position_ids)
    assert torch.equal(blocks[:, -1] // m, merged.position_ids)


@pytest.mark.parametrize("order", [1, 2, 6])
def test_any_order_merges_to_raster_order(order):
    grid = PackedGrid([(2, 6, 12), (1, 6, 6)], order, merge_temporal=True)
    merged = grid.merged(3)
    assert merged.grid_thw.tolist() == [[2, 2, 4], [1, 2, 2]]
    assert (merged.spatial_merge_size, merged.merge_temporal) == (1, True)
    assert grid.num_blocks(3) == merged.num_tokens == 20
    assert grid.merged(1).grid_thw.tolist() == grid.grid_thw.tolist()


def test_what_does_not_divide_is_not_merged():
    grid = PackedGrid([(4, 4), (4, 6)])
    message = r"grid must have rows and columns that divide by 4, got \[1, 4, 6\] in grid_thw\[1\]"
    for merge in (grid.merged, grid.num_blocks):
        with pytest.raises(ValueError, match=message):
            merge(4)
    with pytest.raises(ValueError, match="merge_size must be at least 1"):
        grid.merged(0)
    with pytest.raises(TypeError, match=r"merge_size must be an int, got 2\.0"):
        grid.merged(2.0)


@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 4, 6), (1, 2, 2)],
        [(4, 6), (2, 2)],
        ((4, 6), (1, 2, 2)),
        torch.tensor([[1, 4, 6], [1, 2, 2]]),
        torch.tensor([[4, 6], [2, 2]], dtype=torch.int32),
        torch.tensor([[1, 4, 6], [1, 2, 2]]).numpy(),
    ],
    ids=["rows", "pairs", "mixed", "tensor", "tensor of pairs", "array"],
)
def test_sizes_come_as_rows_or_as_a_tensor(sizes):
    grid = PackedGrid(sizes, 2)
    assert grid.grid_thw.tolist() == [[1, 4, 6], [1, 2, 2]]
    assert grid.grid_thw.dtype == torch.int64
    assert grid.cu_seqlens.tolist() == [0, 24, 28]


def test_golden_segments_are_frames():
    assert PackedGrid([(2, 2, 4), (1, 4, 2), (3, 2, 2)]).cu_seqlens.tolist() == [
        *(0, 8, 16, 24, 28, 32, 36)
    ]


def test_golden_order_of_a_4_by_6_grid():
    assert PackedGrid([(1, 4, 6)], 2).position_ids[:8].tolist() == [
        *([0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3])
    ]


def test_no_images_make_no_tokens():
    grid = PackedGrid([], 2)
    assert (grid.num_tokens, grid.num_segments, grid.num_grids, grid.max_seqlen) == (0, 0, 0, 0)
    assert grid.cu_seqlens.tolist() == [0]
    assert grid.position_ids.shape == (0, 2)
    assert grid.merged().num_tokens == 0


def test_it_is_frozen_and_does_not_follow_its_source():
    sizes = torch.tensor([[1, 4, 4]])
    grid = PackedGrid(sizes)
    sizes[0, 1] = 9
    assert grid.grid_thw.tolist() == [[1, 4, 4]]
    with pytest.raises(AttributeError):
        grid.num_tokens = 3


def test_position_ids_are_built_once():
    grid = PackedGrid([(4, 4)])
    assert grid.position_ids is grid.position_ids


def test_moving_keeps_what_is_there_already():
    grid = PackedGrid([(4, 4)], 2)
    assert grid.to("cpu") is grid
    there = grid.to("meta")
    assert there.geometry.device.type == there.cu_seqlens.device.type == "meta"
    assert there.position_ids.device.type == there.device.type == "meta"
    assert there.grid_thw.device.type == "cpu"
    assert PackedGrid([(4, 4)], device="meta").cu_seqlens.device.type == "meta"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal(clone):
    grid = PackedGrid([(2, 4, 6)], 2, merge_temporal=True)
    twin = clone(grid)
    twin.validate()
    assert torch.equal(twin.position_ids, grid.position_ids)
    assert twin.merge_temporal
    assert twin.spatial_merge_size == 2


@settings(deadline=None, max_examples=5)
@given(grids())
def test_it_can_be_built_inside_a_compiled_function(drawn):
    _, sizes = drawn
    if not sizes:
        return

    @torch.compile(fullgraph=True, backend="eager")
    def build(grid_thw):
        grid = PackedGrid(grid_thw)
        return grid, grid.cu_seqlens + 1

    grid, shifted = build(torch.tensor(sizes))
    assert grid.num_tokens == sum(t * h * w for t, h, w in sizes)
    assert grid.max_seqlen == max(h * w for _, h, w in sizes)
    assert torch.equal(shifted, PackedGrid(sizes).cu_seqlens + 1)


def test_a_default_device_changes_nothing():
    """What the host knows stays there, as under ``torch.set_default_device("cuda")``."""
    with torch.device("meta"):
        grid = PackedGrid([(2, 4, 6), (1, 2, 2)], 2)
        derived = [grid.merged(), grid.resized((2, 4)), grid.resized([(4, 2), (2, 2)])]
        moved = PackedGrid([(4, 4)], device="meta").to("cpu")
    for each in (grid, *derived, moved):
        each.validate()
        assert each.cu_seqlens.device.type == "cpu"


def test_moving_to_the_host_reads_no_device():
    PackedGrid([(4, 4)], 2, device="meta").to("cpu").validate()  # meta tensors hold no values


def test_numpy_integers_are_integers():
    grid = PackedGrid([(np.int32(4), np.uint8(4))], np.int64(2))
    assert type(grid.spatial_merge_size) is int
    assert grid.resized((np.int64(2), np.int64(4))).grid_thw.tolist() == [[1, 2, 4]]


def test_a_grid_from_inference_mode_serves_training():
    with torch.inference_mode():
        grid = PackedGrid([(4, 4)])
        assert grid.position_ids.shape == (16, 2)
    assert not grid.geometry.is_inference()
    assert not grid.position_ids.is_inference()


def test_what_is_made_of_a_grid_keeps_its_segments():
    for merge_temporal in (False, True):
        grid = PackedGrid([(3, 4, 4), (1, 2, 2)], 2, merge_temporal)
        made = grid.merged(), grid.resized((4, 6)), grid.to("meta"), grid.to("meta").to("cpu")
        for each in made:
            assert each.merge_temporal is merge_temporal
            assert each.num_segments == (2 if merge_temporal else 4)


def test_changing_the_sizes_that_it_shows_changes_nothing_else():
    grid = PackedGrid([(1, 4, 4)])
    grid.grid_thw[0, 0] = 100_000
    for each in (grid.merged(), grid.resized((2, 2)), grid.to("meta").to("cpu")):
        assert each.grid_thw[0, 0] == 1
    with pytest.raises(
        ValueError, match=r"grid_thw\[0\] must be \[1, 4, 4\], got \[100000, 4, 4\]"
    ):
        grid.validate()


def test_ops_follow_a_grid_that_a_compiled_function_makes():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def shrink(x, grid):
        tokens = x.unflatten(0, (-1, 4)).mean(dim=1)
        return interpolate_tokens(tokens, grid.merged(), (2, 2), impl="triton")[0]

    for sizes in ([(1, 4, 4), (1, 8, 4)], [(2, 4, 4), (1, 8, 8), (1, 4, 12)]):
        grid = PackedGrid(sizes, 2)
        x = torch.arange(grid.num_tokens * 3.0).view(-1, 3)
        want, _ = interpolate_tokens(
            x.unflatten(0, (-1, 4)).mean(dim=1), grid.merged(), (2, 2), impl="triton"
        )
        assert torch.equal(shrink(x, grid), want)


def test_validate_sees_a_changed_tensor():
    grid = PackedGrid([(4, 4), (2, 2)])
    grid.cu_seqlens[1] = 7
    with pytest.raises(ValueError, match=r"cu_seqlens\[1\] must be 16, got 7"):
        grid.validate()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([(0, 4, 4)],), ValueError, r"grid_thw\[0\] must be at least 1 on every axis, got \[0, 4"),
        (([(4, 4), (-2, 4)],), ValueError, r"grid_thw\[1\] must be at least 1 .*got \[1, -2, 4\]"),
        (([(4, 6), (4, 7)], 2), ValueError, r"grid_thw\[1\] .*spatial_merge_size=2, got \[1, 4, 7"),
        (([(4,)],), ValueError, r"grid_thw\[0\] must be \(t, h, w\) or \(h, w\), got \(4,\)"),
        (([(4.0, 4)],), TypeError, r"grid_thw\[0\] must hold integers, got \(4.0, 4\)"),
        (([(True, 4)],), TypeError, r"grid_thw\[0\] must hold integers, got \(True, 4\)"),
        ((torch.ones(2, 3),), TypeError, r"grid_thw must have an integer dtype, got torch.float32"),
        ((torch.ones(3, dtype=int),), ValueError, r"shape \[G, 3\] or \[G, 2\], got \[3\]"),
        ((torch.ones(3, 4, dtype=int),), ValueError, r"\[G, 3\] or \[G, 2\], got \[3, 4\]"),
        (([(4, -(2**70))],), ValueError, r"grid_thw\[0\] must be below 2\*\*31 on every axis, got"),
        ((np.array(3),), ValueError, r"grid_thw must have shape \[G, 3\] or \[G, 2\], got \[\]"),
        ((torch.ones(1, 3, dtype=int, device="meta"),), ValueError, r"must hold values, got a ten"),
        (([(4, 4)], 2**63), ValueError, r"spatial_merge_size must be at least 1 and below 2\*\*31"),
        (([(4, 4)], 0), ValueError, r"spatial_merge_size must be at least 1 .*, got 0"),
        (([(4, 4)], 2.0), TypeError, r"spatial_merge_size must be an int, got 2.0"),
        (([(1, 65536, 65536)],), ValueError, r"fewer than 2\*\*31 tokens, got 4294967296"),
        (([(1, 2**15, 2**16)],), ValueError, r"fewer than 2\*\*31 tokens, got 2147483648"),
        (([(2**64, 4, 4)],), ValueError, r"grid_thw\[0\] must be below 2\*\*31 on every axis, got"),
        ((torch.tensor([[2**62, 4, 4]]),), ValueError, r"fewer than 2\*\*31 tokens"),
        (([4, 6],), ValueError, r"grid_thw\[0\] must be \(t, h, w\) or \(h, w\), got \(4,\)"),
        ((5,), TypeError, r"grid_thw must be rows of integers or a tensor, got 5"),
        ((None,), TypeError, r"grid_thw must be rows of integers or a tensor, got None"),
        (([(4, 4)], 1, "no"), TypeError, r"merge_temporal must be a bool, got 'no'"),
        ((torch.ones(1, 3, dtype=int), 1, 1), TypeError, r"merge_temporal must be a bool, got 1"),
    ],
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        PackedGrid(*arguments)


@pytest.mark.parametrize("device", ["nowhere", 3.5])
def test_a_bad_device_is_named(device):
    for make in (PackedGrid([(2, 2)]).to, lambda device: PackedGrid([(2, 2)], device=device)):
        with pytest.raises(ValueError, match=f"device must be a device of torch, got {device!r}"):
            make(device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 2), 0), r"^spatial_merge_size must be at least 1"),
        (((2, 2), 2**64), r"^spatial_merge_size must be at least 1 and below 2\*\*31"),
        (((-(2**70), 3),), r"^target_hw must be below 2\*\*31"),
        (((0, 3),), r"^target_hw does not fit: grid_thw\[0\] must be at least 1"),
    ],
)
def test_bad_targets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedGrid([(4, 4)]).resized(*arguments)


@pytest.mark.parametrize("merge_temporal", [False, True])
@pytest.mark.parametrize("make", [list, torch.tensor], ids=["list", "tensor"])
def test_a_resized_grid_is_that_of_its_sizes(make, merge_temporal):
    grid = PackedGrid([(2, 4, 4), (1, 4, 6)], 2, merge_temporal)
    resized = grid.resized(make([[3, 6], [9, 3]]), spatial_merge_size=3)
    want = PackedGrid([(2, 3, 6), (1, 9, 3)], 3, merge_temporal)
    for name in ("grid_thw", "geometry", "cu_seqlens", "position_ids"):
        assert torch.equal(getattr(resized, name), getattr(want, name)), name
    for name in ("num_tokens", "max_seqlen", "spatial_merge_size", "merge_temporal", "device"):
        assert getattr(resized, name) == getattr(want, name), name
    resized.grid_thw.zero_()  # it is there to be looked at
    assert torch.equal(resized.merged(3).grid_thw, want.merged(3).grid_thw)


def test_a_target_may_be_the_grid_it_gives():
    grid = PackedGrid([(2, 4, 4), (1, 4, 6)], spatial_merge_size=2)
    target = grid.resized([(2, 4), (6, 2)], spatial_merge_size=1)
    assert grid.resized(target) is target
    assert grid.resized(target, 1) is target


@pytest.mark.parametrize(
    ("target", "merge", "message"),
    [
        (PackedGrid([(4, 4)]), None, r"the frames of grid, \[2, 1\], got \[1\]"),
        (PackedGrid([(1, 4, 4), (2, 4, 4)]), None, r"\[2, 1\], got \[1, 2\]"),
        (PackedGrid([(2, 4, 4), (4, 4)]), 2, r"a grid of spatial_merge_size=2, got 1"),
        (
            PackedGrid([(2, 4, 4), (4, 4)], device="meta"),
            None,
            r"the device of grid, cpu, got meta",
        ),
    ],
)
def test_a_grid_that_is_no_target_is_refused(target, merge, message):
    with pytest.raises(ValueError, match=f"^target_hw must be .*{message}"):
        PackedGrid([(2, 4, 4), (4, 6)]).resized(target, merge)


@pytest.mark.parametrize("frames", [2, 3])
def test_a_compiled_function_reads_no_further_than_its_grid(frames):
    """It cannot compare frames, so those of a target that is none do not count."""
    grid, target = PackedGrid([(2, 4, 4)]), PackedGrid([(frames, 2, 3)])
    x = torch.randn(grid.num_tokens, 8)
    resize = torch.compile(interpolate_tokens, backend="eager", fullgraph=True)
    got, made = resize(x, grid, target)
    want, _ = interpolate_tokens(x, grid, (2, 3))
    assert torch.equal(got, want)
    assert made.num_tokens == want.shape[0]


def test_targets_may_be_arrays():
    grid = PackedGrid([(4, 4), (4, 6)])
    for target in (np.array([3, 5]), np.array([[3, 5], [3, 5]], dtype=np.int32)):
        assert grid.resized(target).grid_thw.tolist() == [[1, 3, 5]] * 2


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 4], r"must start with 0, got \[1\]"),
        ([0, 4, 3], r"must not decrease, got 4, 3 at 1"),
        ([0, 4, 11], r"must end at or before num_tokens=10, got 11"),
    ],
)
def test_bad_cu_seqlens_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        validate_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), 10)


@pytest.mark.parametrize(
    "bounds", [[0, 4], torch.tensor(0), torch.tensor([[0, 4]]), torch.tensor([0.0, 4.0])]
)
def test_cu_seqlens_of_another_kind_are_refused(bounds):
    with pytest.raises(TypeError, match="cu_seqlens must be"):
        validate_cu_seqlens(bounds, 10)
