"""Oryx's plans, pixels and token path, against outputs of the original code and plain loops."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack.systems import oryx
from patchpack.systems.oryx import frame_indices, plan, plan_video

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]


def golden(function):
    """All cases of ``oryx.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"oryx.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


# Arbitrary resolution ----------------------------------------------------------------------------


@golden("image_sizes")
def test_the_views_of_an_image_are_the_originals(inputs, outputs):
    p = plan(inputs["height"], inputs["width"])
    assert [*p.low] == outputs["low_hw"]
    assert [*p.high] == outputs["high_hw"]
    assert p.grids == ((1, *outputs["low_grid"]), (1, *outputs["high_grid"]))
    assert p.llm_tokens == p.total_tokens == outputs["image_tokens_total"]


@golden("video_sizes")
def test_the_frames_of_a_video_are_the_originals(inputs, outputs):
    size = (inputs["height"], inputs["width"])
    p = plan_video(1000, 30, *size)
    assert [*p.high] == outputs["video_hw"]
    assert p.grids == ((64, *outputs["grid"]),)
    assert p.llm_tokens == outputs["total_64_frames"]
    assert (
        plan_video(1, 30, *size).llm_tokens == 2 + outputs["tokens_per_frame_4x_incl_newline_sep"]
    )
    if "long_error" in outputs:
        message = (
            "height and width must leave 128 pixels a side in modality 'video_long',"
            f" got {size[0]} x {size[1]}, resized to 896 x 0"
        )
        with pytest.raises(ValueError, match=message):
            plan_video(1000, 30, *size, modality="video_long")
        return
    p = plan_video(1000, 30, *size, modality="video_long", frames_upbound=200)
    assert [*p.high] == outputs["video_long_hw"]
    assert p.num_frames == 200
    assert p.llm_tokens == 2 + 200 * outputs["tokens_per_frame_16x_incl_newline_sep"]


@golden("frame_indices")
def test_frame_indices_are_the_originals(inputs, outputs):
    indices = frame_indices(inputs["n_frames"], inputs["upbound"])
    assert len(indices) == outputs["n"]
    assert [*indices[:8]] == outputs["first8"]
    assert [*indices[-4:]] == outputs["last4"]
    assert len(set(indices)) == outputs["n_unique"]
    p = plan_video(inputs["n_frames"], None, 480, 640, frames_upbound=inputs["upbound"])
    assert p.frame_indices == indices


@golden("projector_tokens")
def test_the_tokens_of_a_map_are_the_originals(inputs, outputs):
    low, high = ([16 * side for side in inputs.get(view, (0, 0))] for view in ("low", "high"))
    if inputs["modality"] == "image":
        p = oryx.Plan(1, 1, "image", (1, 1), tuple(high), tuple(low))
    else:  # maps are given after compression by 4
        frame = tuple(2 * side for side in high)
        p = oryx.Plan(1, 1, "video", (1, 1), frame, frame_indices=tuple(range(inputs["T"])))
    assert p.llm_tokens == outputs["tokens"]


SIZES = st.integers(1, 20_000)


def is_empty(height, width):
    """Whether a view of an image would have no pixels, from what the shorter side becomes."""
    short, long = sorted([height, width])
    if short < 32:
        short, long = 64, int(long * (64 / short))
    shrink = min(1, math.sqrt(1536**2 / (short * long)))
    short, long = int(short * shrink) // 32 * 32, int(long * shrink) // 32 * 32
    return short == 0 or math.sqrt(384**2 * short / long) < 32


@settings(max_examples=300)
@given(SIZES, SIZES)
def test_every_image_has_a_consistent_plan_or_a_clear_error(height, width):
    if is_empty(height, width):
        with pytest.raises(ValueError, match="must leave 32 pixels a side of both views, got"):
            plan(height, width)
        return
    p = plan(height, width)
    assert all(side % 32 == 0 and side > 0 for side in (*p.low, *p.high))
    assert math.prod(p.high) <= 1536**2
    assert math.prod(p.low) <= 384**2
    if min(height, width) >= 32 and height * width <= 1536**2:
        assert p.high == (height // 32 * 32, width // 32 * 32)
    (_, hl, wl), (_, hh, wh) = p.grids
    assert p.vit_tokens == hl * wl + hh * wh
    assert p.llm_tokens == 1 + hl * (wl + 1) + 1 + hh * (wh + 1) + 1
    assert p.kept_tokens == min(p.llm_tokens, 16_384)
    assert p.num_frames == 1


@settings(max_examples=300)
@given(st.integers(1, 1000), SIZES, SIZES, st.sampled_from(["video", "video_long"]))
def test_every_video_has_a_consistent_plan_or_a_clear_error(total, height, width, modality):
    stride, r, bound = (64, 2, 64) if modality == "video" else (128, 4, 256)
    area = min(max(height * width, 288**2), 480**2)
    shortest = math.sqrt(area * min(height, width) / max(height, width))
    if math.floor(shortest * (1 + 1e-12)) < stride:
        with pytest.raises(ValueError, match=f"must leave {stride} pixels a side in modality"):
            plan_video(total, None, height, width, modality=modality)
        return
    p = plan_video(total, None, height, width, modality=modality)
    assert all(side % stride == 0 and side > 0 for side in p.high)
    assert math.prod(p.high) <= 480**2
    assert p.num_frames == min(total, bound)
    assert p.frame_indices[0] == 0
    assert p.frame_indices[-1] == total - 1
    assert list(p.frame_indices) == sorted(set(p.frame_indices))
    ((t, h, w),) = p.grids
    assert p.vit_tokens == t * h * w
    assert p.maps == ((t, h // r, w // r),)
    assert p.llm_tokens == 2 + t * (h // r * (w // r + 1) + 1)
    assert p.kept_tokens == min(p.llm_tokens, 16_384)


def test_a_sequence_holds_16384_tokens():
    p = plan_video(100, None, 480, 480, frames_upbound=100)
    assert p.llm_tokens == 21_102
    assert p.kept_tokens == 16_384


def test_the_limits_of_areas_may_be_others():
    assert plan(480, 640, maxres=320).high == (256, 352)
    assert plan(480, 640, minres=1024).high == (864, 1152)
    assert plan(480, 640, lowres=256).low == (192, 288)
    assert plan_video(1, None, 480, 640, maxres=1024).high == (448, 640)
    assert plan_video(1, None, 480, 640, maxres=1024, minres=1024).high == (832, 1152)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"maxres": 0}, ValueError, "maxres must be at least 1, got 0"),
        ({"minres": -1}, ValueError, "minres must be at least 0, got -1"),
        ({"lowres": True}, TypeError, "lowres must be an integer, got True"),
        (
            {"height": 1, "width": 20_000},
            ValueError,
            "height and width must leave 32 pixels a side of both views, got 1 x 20000,"
            " resized to 0 x 217216 and 0 x 0",
        ),
        (
            {"height": 32, "width": 20_000},
            ValueError,
            "height and width must leave 32 pixels a side of both views, got 32 x 20000,"
            " resized to 32 x 20000 and 0 x 9600",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_frames": 0}, ValueError, "total_frames must be at least 1, got 0"),
        ({"video_fps": 0}, ValueError, "video_fps must be above 0, got 0"),
        ({"video_fps": "fast"}, TypeError, "video_fps must be a number, got 'fast'"),
        ({"frames_upbound": 0}, ValueError, "frames_upbound must be at least 1, got 0"),
        (
            {"modality": "image"},
            ValueError,
            "modality must be one of 'video', 'video_long', got 'image'",
        ),
        (
            {"width": 10},
            ValueError,
            "height and width must leave 64 pixels a side in modality 'video', got 480 x 10,"
            " resized to 1984 x 0",
        ),
    ],
)
def test_plan_video_names_what_it_refuses(arguments, error, message):
    call = {"total_frames": 300, "video_fps": 30, "height": 480, "width": 640, **arguments}
    with pytest.raises(error) as raised:
        plan_video(**call)
    assert str(raised.value) == message
