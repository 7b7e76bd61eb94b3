"""The layout of a sequence: its lengths, its tables, and what cannot be laid out."""

import copy
import pickle

import pytest
import torch

from patchpack import TokenLayout, assemble
from patchpack.layout import FeatureMap, Vector, validate_index

PARTS = [
    Vector(2),
    FeatureMap(30, (3, 2), newline=0),
    FeatureMap(4, (2, 3), (2, 2), crop=(1, 0, 3, 5), target_hw=(2, 4)),
    Vector(0),
]


def test_lengths_follow_from_the_parts():
    layout = TokenLayout(PARTS)
    assert layout.num_tokens == 1 + 3 * (2 + 1) + 2 * 4 + 1
    assert layout.num_source_tokens == 30 + 6
    assert layout.num_vectors == 3
    assert layout.parts == tuple(PARTS)


def test_tables_say_where_parts_are():
    layout = TokenLayout(PARTS)
    assert layout.table.tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 2],
        [1, 30, 3, 2, 1, 1, 0, 0, 3, 2, 3, 2, 0],
        [10, 4, 2, 3, 2, 2, 1, 0, 3, 5, 2, 4, -1],
        [18, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0],
        [19, 36, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, -1],
    ]
    assert layout.maps.tolist() == [[4, 2, 24], [30, 1, 6], [36, 4, 0]]
    assert layout.table.dtype == layout.maps.dtype == torch.int64


def test_no_parts_make_no_tokens():
    for layout in (TokenLayout([]), TokenLayout.cat([]), TokenLayout.cat([TokenLayout([])])):
        assert (layout.num_tokens, layout.num_source_tokens, layout.num_vectors) == (0, 0, 0)
        assert layout.table.shape == (1, 13)
        assert layout.maps.shape == (1, 3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_joined_layouts_join_their_sequences(impl):
    layouts = [
        TokenLayout(PARTS),
        TokenLayout([]),
        TokenLayout(PARTS[1:]),
        TokenLayout([Vector(1)]),
    ]
    joined = TokenLayout.cat(layouts)
    tokens, vectors = torch.randn(joined.num_source_tokens, 3), torch.randn(3, 3)
    images = tokens.split([layout.num_source_tokens for layout in layouts])
    want = [
        assemble(image, vectors, layout, impl=impl)
        for image, layout in zip(images, layouts, strict=True)
    ]
    assert torch.equal(assemble(tokens, vectors, joined, impl=impl), torch.cat(want))


def test_it_is_frozen_and_moves_without_reading_a_device():
    layout = TokenLayout(PARTS)
    with pytest.raises(AttributeError):
        layout.num_tokens = 3
    with pytest.raises(AttributeError):
        layout.parts[1].first = 3
    assert layout.to("cpu") is layout
    there = layout.to("meta")
    assert there.table.device.type == there.maps.device.type == "meta"
    assert torch.equal(there.to("cpu").table, layout.table)
    assert TokenLayout(PARTS, device="meta").maps.device.type == "meta"
    assert TokenLayout.cat([there, there]).table.device.type == "meta"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal(clone):
    layout = TokenLayout(PARTS)
    twin = clone(layout)
    assert twin.parts == layout.parts
    assert torch.equal(twin.table, layout.table)
    assert torch.equal(twin.maps, layout.maps)


def test_a_layout_from_inference_mode_serves_training():
    with torch.inference_mode():
        layout = TokenLayout(PARTS)
        there = layout.to("meta")
    assert not layout.table.is_inference()
    assert not there.maps.is_inference()


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        layout = TokenLayout(PARTS)
    assert layout.table.device.type == "cpu"


HW = (2, 3)


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ((0, HW), TypeError, r"parts\[1\] must be a FeatureMap or a Vector, got \(0, \(2, 3\)\)"),
        (Vector(1.0), TypeError, r"parts\[1\].index must be an integer, got 1.0"),
        (Vector(-1), ValueError, r"parts\[1\].index must not be negative, got -1"),
        (FeatureMap("0", HW), TypeError, r"parts\[1\].first must be an integer, got '0'"),
        (FeatureMap(-1, HW), ValueError, r"parts\[1\].first must not be negative, got -1"),
        (FeatureMap(0, 4), TypeError, r"parts\[1\].tile_hw must be 2 integers, got 4"),
        (FeatureMap(0, (0, 3)), ValueError, r"parts\[1\].tile_hw must be at least 1, got \(0, 3\)"),
        (FeatureMap(0, (2, True)), TypeError, r"parts\[1\].tile_hw must be 2 integers"),
        (FeatureMap(0, HW, (1, 2, 3)), TypeError, r"parts\[1\].tiles_hw must be 2 integers"),
        (FeatureMap(0, HW, (1, -1)), ValueError, r"parts\[1\].tiles_hw must be at least 1"),
        (FeatureMap(0, HW, crop=(1, 2)), TypeError, r"parts\[1\].crop must be 4 integers"),
        (FeatureMap(0, HW, crop=(1, 0, 2, 3)), ValueError, r"parts\[1\].crop must be inside the"),
        (FeatureMap(0, HW, crop=(-1, 0, 2, 3)), ValueError, r"parts\[1\].crop must be inside the"),
        (FeatureMap(0, HW, crop=(0, 0, 2, 0)), ValueError, r"parts\[1\].crop must be inside the"),
        (FeatureMap(0, HW, target_hw=(3, 0)), ValueError, r"parts\[1\].target_hw must be at least"),
        (FeatureMap(0, HW, newline=-1), ValueError, r"parts\[1\].newline must not be negative"),
        (FeatureMap(2**31, HW), ValueError, r"parts\[1\] must hold numbers below 2\*\*31, got Fea"),
        (FeatureMap(0, (2**80, 1)), ValueError, r"parts\[1\] must hold numbers below 2\*\*31"),
        (FeatureMap(0, (2**16, 2**15)), ValueError, r"parts must have fewer than 2\*\*31 tokens"),
        (
            FeatureMap(0, (2**30, 1), (2**30, 2**30), crop=(0, 0, 1, 1)),
            ValueError,
            r"parts must have fewer than 2\*\*31 tokens of maps",
        ),
        (FeatureMap(2**31 - 1, HW), ValueError, r"parts must have fewer than 2\*\*31 tokens of ma"),
        (FeatureMap(98, (1, 3)), ValueError, r"parts\[0\] and parts\[1\] must not share tokens"),
        (FeatureMap(105, HW), ValueError, r"parts\[0\] and parts\[1\] must not share tokens"),
    ],
)
def test_what_cannot_be_laid_out_is_named(part, error, message):
    with pytest.raises(error, match=message):
        TokenLayout([FeatureMap(100, HW), part])


def test_a_part_that_is_not_in_a_list_is_named():
    with pytest.raises(TypeError, match=r"parts must be FeatureMaps and Vectors, got Vector"):
        TokenLayout(Vector(0))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1], TypeError, "index must be a tensor, got list"),
        (torch.zeros(2), TypeError, r"index must be int64 or int32 \[N\], got torch.float32 \[2\]"),
        (torch.tensor([[1]]), TypeError, r"index must be int64 or int32 \[N\], got torch.int64"),
        (torch.tensor([0, 5]), ValueError, r"index\[1\] must be a row of num_rows=5, got 5"),
        (torch.tensor([-1, 5]), ValueError, r"index\[0\] must be a row of num_rows=5, got -1"),
        (torch.tensor([3, 1, 0, 3]), ValueError, r"index must name every row once at most, got 3"),
    ],
)
def test_a_bad_index_is_named(index, error, message):
    with pytest.raises(error, match=message):
        validate_index(index, 5)


def test_a_good_index_passes():
    validate_index(torch.tensor([4, 0, 2], dtype=torch.int32), 5)
    validate_index(torch.tensor([], dtype=torch.int64), 0)
