"""Qwen2.5-VL's windows and seconds, against outputs of the original code."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack import PackedGrid
from patchpack.systems import qwen2_5_vl, qwen2_vl
from patchpack.systems.qwen2_5_vl import (
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    mrope_position_ids,
    plan,
    plan_video,
    preprocess,
    validate_vision_tokens,
    vision_tokens,
    windows,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
TEXT = 10


def golden(function):
    """All cases of ``qwen25vl.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"qwen25vl.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


# Windows -----------------------------------------------------------------------------------------


@golden("window_index")
def test_windows_are_the_originals(inputs, outputs):
    grid = PackedGrid(inputs["grid_thw"], inputs["merge"])
    window_index, cu_window_seqlens = windows(
        grid, window_size=inputs["window_size"], patch_size=inputs["patch"]
    )
    assert window_index.tolist() == outputs["window_index"]
    assert cu_window_seqlens.tolist() == outputs["cu_window_seqlens"]
    assert all(map(torch.equal, windows(grid), (window_index, cu_window_seqlens)))


SIDES = st.integers(1, 10)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), max_size=4))
def test_tokens_of_a_window_are_neighbours_of_one_frame(sizes):
    grid = PackedGrid([(t, 2 * h, 2 * w) for t, h, w in sizes], 2)
    window_index, cu_window_seqlens = windows(grid)

    # what is known of a token, taken along into window order
    frame = torch.bucketize(torch.arange(grid.num_tokens), grid.cu_seqlens[1:], right=True)
    known = torch.cat([frame[:, None], grid.position_ids // 8], dim=1)  # 112 pixels are 8 patches
    order = known.unflatten(0, (-1, 4))[window_index].flatten(0, 1)
    runs, lengths = order.unique_consecutive(dim=0, return_counts=True)
    assert torch.equal(cu_window_seqlens.diff(), lengths.int())
    assert len(runs.unique(dim=0)) == len(runs)  # no window is in two pieces
    # frames stay where they are: full attention needs no other bounds
    assert torch.equal(order[:, 0], frame)
    # and merged tokens return
    merged = torch.arange(grid.num_tokens // 4)
    assert torch.equal(merged[window_index][window_index.argsort()], merged)


def test_windows_are_on_the_device_of_the_grid():
    # meta tensors have no values to read
    grid = PackedGrid([(2, 20, 12), (1, 8, 8)], 2)
    for got, want in zip(windows(grid.to("meta")), windows(grid), strict=True):
        assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([(4, 4)],), TypeError, "grid must be a PackedGrid, got list"),
        (
            (PackedGrid([(16, 16)], 16),),
            ValueError,
            "window_size must be at least the 224 pixels of a merged token, got 112",
        ),
    ],
)
def test_windows_name_what_they_refuse(arguments, error, message):
    with pytest.raises(error) as raised:
        windows(*arguments)
    assert str(raised.value) == message


# Seconds -----------------------------------------------------------------------------------------


@golden("get_rope_index_time")
def test_positions_count_seconds_as_the_original(inputs, outputs):
    assert inputs["parts"] == "2 text + video(4,2,2) + 2 text"
    assert inputs["tokens_per_second"] == qwen2_5_vl.TOKENS_PER_SECOND
    call = {
        "input_ids": torch.tensor(
            [TEXT, TEXT, VISION_START, *[VIDEO_PAD] * 4, VISION_END, TEXT, TEXT]
        ),
        "video_grid_thw": torch.tensor([[4, 2, 2]]),
    }
    validate_vision_tokens(**call)
    seconds = torch.tensor([inputs["second_per_grid_t"]])
    position_ids, deltas = mrope_position_ids(**call, second_per_grid_ts=seconds)
    assert position_ids.tolist() == outputs["v4_49"]
    assert deltas.tolist() == [[position_ids.max() + 1 - 10]]
    if inputs["second_per_grid_t"] == 1:
        assert torch.equal(mrope_position_ids(**call)[0], position_ids)


@pytest.mark.parametrize(
    ("seconds", "times"), [(0.25, [3, 3, 4, 4, 5, 6, 7]), (1.5, [3, 6, 9, 12, 13, 14, 15])]
)
def test_parts_of_seconds_are_counted_as_by_the_original(seconds, times):
    ids = torch.tensor([TEXT, TEXT, VISION_START, *[VIDEO_PAD] * 4, VISION_END, TEXT, TEXT])
    grid, second_per_grid_ts = torch.tensor([[4, 2, 2]]), torch.tensor([seconds])
    got, _ = mrope_position_ids(ids, None, grid, second_per_grid_ts=second_per_grid_ts)
    assert got[0].tolist() == [0, 1, 2, *times]


def test_an_image_has_qwen2_vls_plan_and_pixels():
    assert plan(480, 640) == qwen2_vl.plan(480, 640)
    image = np.arange(61 * 95 * 3, dtype=np.uint8).reshape(61, 95, 3)
    plans = [plan(61, 95), plan_video(4, 8.0, 61, 95)]
    pixels, grid = preprocess([image, [image] * plans[1].num_frames], plans)
    assert grid.grid_thw.tolist() == [list(p.grid_thw) for p in plans]
    assert pixels.shape == (grid.num_tokens, 1176)


@pytest.mark.parametrize(
    ("arguments", "options", "seconds"),
    [
        ((300, 30, 480, 640), {}, 1.0),  # 20 frames of 10 seconds
        ((300, 30, 480, 640), {"fps": 4.0}, 0.5),
        ((300, 30, 480, 640), {"nframes": 8}, 2.5),
        ((90_000, 30, 480, 640), {}, 3000 / 384),  # 768 at most
        ((64, None, 480, 640), {}, 1.0),  # chosen already
        ((8, 4.0, 480, 640), {"nframes": 8}, 0.5),  # chosen at 4 a second
    ],
)
def test_a_plan_knows_the_seconds_between_frames(arguments, options, seconds):
    p = plan_video(*arguments, **options)
    assert p.second_per_grid == pytest.approx(seconds, rel=1e-15)
    # all else is Qwen2-VL's
    before = qwen2_vl.plan_video(*arguments, **options)
    assert vars(p) == {**vars(before), "second_per_grid": p.second_per_grid}


SIZES = st.integers(1, 20_000)


@settings(deadline=None)
@given(st.integers(1, 5000), st.sampled_from([1, 10, 23.976, 25, 30, 60]), SIZES, SIZES)
def test_every_video_has_a_consistent_plan_or_qwen2_vls_error(total, fps, height, width):
    try:
        before = qwen2_vl.plan_video(total, fps, height, width)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            plan_video(total, fps, height, width)
        return
    p = plan_video(total, fps, height, width)
    # of the frames that are used, over the whole video
    assert p.second_per_grid * p.grid_thw[0] == pytest.approx(total / fps)
    assert math.prod(p.grid_thw) == p.vit_tokens == 4 * p.llm_tokens
    assert p.grid_thw == before.grid_thw


def test_the_seconds_are_those_of_transformers():
    video_utils = pytest.importorskip("transformers.video_utils")
    for total, fps in itertools.product([10, 37, 300, 1801], [10, 23.976, 30]):
        p = plan_video(total, fps, 240, 320)
        metadata = video_utils.VideoMetadata(
            total_num_frames=total, fps=fps, frames_indices=list(p.frame_indices)
        )
        assert p.second_per_grid == 2 / metadata.sampled_fps


@pytest.mark.parametrize(
    ("video_fps", "error", "message"),
    [
        (0, ValueError, "video_fps must be above 0, got 0"),
        ("fast", TypeError, "video_fps must be a number, got 'fast'"),
    ],
)
def test_a_rate_that_qwen2_vl_does_not_need_is_checked(video_fps, error, message):
    with pytest.raises(error) as raised:
        plan_video(300, video_fps, 480, 640, nframes=8)
    assert str(raised.value) == message


def test_a_plan_a_prompt_and_its_positions_fit_together():
    plans = [plan(61, 95), plan_video(64, 8.0, 61, 95), plan_video(300, 30, 61, 95, fps=1.0)]
    ids = torch.tensor([token for p in plans for token in vision_tokens(p)])
    call = {
        "image_grid_thw": torch.tensor([plans[0].grid_thw]),
        "video_grid_thw": torch.tensor([p.grid_thw for p in plans[1:]]),
    }
    validate_vision_tokens(ids, **call)
    seconds = torch.tensor([p.second_per_grid for p in plans[1:]])
    assert seconds.tolist() == [1.0, 2.0]
    position_ids, _ = mrope_position_ids(ids, **call, second_per_grid_ts=seconds)
    begins = itertools.accumulate(p.total_tokens for p in plans[:-1])
    for p, begin in zip(plans[1:], begins, strict=True):
        run = position_ids[0, begin + 1 : begin + 1 + p.llm_tokens].view(p.grid_thw[0], -1)
        assert (run == run[:, :1]).all()
        assert (run[:, 0].diff() == 2 * p.second_per_grid).all()
