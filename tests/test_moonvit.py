"""MoonViT's sizes, pixels, positions and tokens, against the original code and plain loops."""

import ast
import functools
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack import PackedGrid, rope_2d
from patchpack.systems.moonvit import plan, plan_video

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
SIZES = st.integers(1, 20_000)


@functools.cache
def navit_resize():
    """The function of transformers, out of a module that cannot be imported without torchvision."""
    pytest.importorskip("transformers")
    name = "transformers.models.kimi_k25"
    folder = importlib.util.find_spec("transformers.models").submodule_search_locations[0]
    path = Path(folder, "kimi_k25", "image_processing_kimi_k25.py")
    if not path.exists():
        pytest.skip(f"no {name} in this version of transformers")
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) == "navit_resize"]
    namespace = {"math": math}
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace["navit_resize"]


# Native resolution -------------------------------------------------------------------------------


@settings(max_examples=300)
@given(SIZES, SIZES, st.sampled_from([64, 4096, 16_384]), st.sampled_from([31, 512]))
def test_every_size_is_that_of_transformers(height, width, max_patches, max_side_patches):
    p = plan(height, width, max_patches=max_patches, max_side_patches=max_side_patches)
    assert (p.resized, p.padded) == navit_resize()(
        height, width, 14, 2, max_patches, max_side_patches
    )
    ((t, rows, cols),) = p.grids
    assert t == 1
    assert rows % 2 == cols % 2 == 0
    assert (rows * 14, cols * 14) == p.padded
    assert p.vit_tokens == rows * cols == 4 * p.llm_tokens
    assert p.markup_tokens == 3
    assert all(0 <= b - a < 28 for a, b in zip(p.resized, p.padded, strict=True))


@pytest.mark.parametrize(
    ("size", "resized", "padded", "tokens"),
    [
        ((224, 224), (224, 224), (224, 224), 64),
        ((32, 32), (32, 32), (56, 56), 4),
        ((1, 1), (1, 1), (28, 28), 1),
        ((480, 640), (480, 640), (504, 644), 414),
        ((4000, 3000), (2073, 1554), (2100, 1568), 4200),  # by hand: 285 * 214 patches
        ((1, 20_000), (1, 7168), (28, 7168), 256),
    ],
)
def test_sizes_by_hand(size, resized, padded, tokens):
    p = plan(*size)
    assert p.resized == resized
    assert p.padded == padded
    assert p.llm_tokens == tokens


# Video -------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 3000), st.sampled_from([2, 10, 23.976, 30, 60]), SIZES, SIZES)
def test_every_video_has_a_consistent_plan(total, video_fps, height, width):
    p = plan_video(total, video_fps, height, width)
    count = max(1, int(total / video_fps * 2))
    assert p.frame_indices == tuple(i * total // count for i in range(count))
    assert (p.resized, p.padded) == navit_resize()(height, width, 14, 2, 4096, 512)
    assert sum(t for t, _, _ in p.grids) == p.num_frames == count
    assert all(t == 4 for t, _, _ in p.grids[:-1])
    rows, cols = (side // 14 for side in p.padded)
    assert {grid[1:] for grid in p.grids} == {(rows, cols)}
    assert p.vit_tokens == count * rows * cols
    assert p.llm_tokens == math.ceil(count / 4) * rows * cols // 4
    assert p.markup_tokens == 3 * math.ceil(count / 4)


def test_frames_chosen_beforehand_are_all_used():
    p = plan_video(9, None, 56, 56)
    assert p.frame_indices == tuple(range(9))
    assert p.grids == ((4, 4, 4), (4, 4, 4), (1, 4, 4))
    assert p.llm_tokens == 12


@pytest.mark.parametrize(
    ("call", "arguments", "error", "message"),
    [
        (plan, {"height": 0}, ValueError, "height must be at least 1, got 0"),
        (plan, {"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        (plan, {"max_patches": 0}, ValueError, "max_patches must be at least 1, got 0"),
        (plan, {"merge_size": "2"}, TypeError, "merge_size must be an integer, got '2'"),
        (plan_video, {"total_frames": 0}, ValueError, "total_frames must be at least 1, got 0"),
        (plan_video, {"video_fps": -1}, ValueError, "video_fps must be above 0, got -1"),
        (
            plan_video,
            {"video_fps": 1.5},
            ValueError,
            "fps=2.0 must take at most the 30 frames of the video at video_fps=1.5, got 40",
        ),
    ],
)
def test_plans_name_what_they_refuse(call, arguments, error, message):
    video = {"total_frames": 30, "video_fps": 30} if call is plan_video else {}
    with pytest.raises(error) as raised:
        call(**{"height": 480, "width": 640, **video, **arguments})
    assert str(raised.value) == message


# Positions ---------------------------------------------------------------------------------------


def test_rotary_angles_are_the_originals():
    (case,) = [case for case in GOLDEN if case["function"] == "moonvit.rope_freqs_cis"]
    inputs, outputs = case["inputs"], case["outputs"]
    grid = PackedGrid([(inputs["h"] + 1, inputs["w"] + 1)])
    x = torch.tensor([1.0, 0.0]).repeat(inputs["head_dim"] // 2).expand(grid.num_tokens, 1, -1)
    options = {"base": inputs["theta"], "interleaved": True, "axes": "paired"}
    cos, sin = rope_2d(x, x, grid, **options)[0][-1, 0].view(-1, 2)[:6].unbind(1)
    torch.testing.assert_close(cos, torch.tensor(outputs["cos_first6"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, torch.tensor(outputs["sin_first6"]), atol=1e-6, rtol=0)
    angle = torch.tensor(outputs["angle_pairs_first6"])
    torch.testing.assert_close(cos, angle.cos(), atol=1e-6, rtol=0)
