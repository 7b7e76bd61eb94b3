"""LLaVA-OneVision's plans, crops and tokens, against outputs of the original code and its steps."""

import json
import math
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from patchpack import assemble
from patchpack.layout import FeatureMap, TokenLayout
from patchpack.systems.llava_onevision import (
    NEWLINES,
    POOLINGS,
    Projector,
    frame_indices,
    layout,
    merge_patches,
    plan,
    plan_video,
    preprocess,
    resolutions_of,
    select_best_resolution,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]


def golden(function):
    """All cases of ``llava_ov.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"llava_ov.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


# Higher AnyRes -----------------------------------------------------------------------------------


@golden("anyres_max")
def test_plans_are_the_originals(inputs, outputs):
    p = plan(
        inputs["height"],
        inputs["width"],
        pinpoints=inputs["pinpoints"].replace("..", ",...,"),
        max_tiles=inputs["max_num"],
        image_size=inputs["tile"],
    )
    assert p.side == inputs["patches_per_side"]
    assert list(p.canvas[::-1]) == outputs["best_wh"]
    assert list(p.tiles[::-1]) == outputs["grid_wh"]
    assert p.num_crops == outputs["n_crops_incl_base"]
    assert p.grids == ((1, 27, 27),) * p.num_crops
    if outputs["pasted_bbox_ltrb"] is not None:
        top, left, height, width = p.letterbox
        assert [left, top, left + width, top + height] == outputs["pasted_bbox_ltrb"]
    assert [27 * n for n in p.tiles] == outputs["feature_hw"]
    assert list(p.crop[2:]) == outputs["unpadded_hw"]
    rows, cols = p.crop[2:]
    times = math.sqrt(rows * cols / (inputs["max_num"] * 27**2))
    assert times == pytest.approx(outputs["times"], abs=1e-8)
    assert (p.target_hw != p.crop[2:]) == outputs["interpolated"]
    assert list(p.target_hw) == outputs["out_hw"]
    assert p.llm_tokens == p.total_tokens == outputs["tokens_incl_base_and_newlines"]
    assert layout([p]).num_tokens == p.llm_tokens


OFFICIAL = [(384 * w, 384 * h) for w in range(1, 7) for h in range(1, 7)]  # width and height


def test_pinpoints_have_three_forms():
    want = tuple((h, w) for w, h in OFFICIAL)
    assert resolutions_of("(1x1),...,(6x6)") == resolutions_of() == want
    assert resolutions_of(OFFICIAL) == resolutions_of(str(OFFICIAL)) == want
    assert resolutions_of([[w, h] for w, h in OFFICIAL]) == want
    # width first, and only the first and the last pair count
    assert resolutions_of("(1x2),(9x9),(2x3)") == ((768, 384), (1152, 384), (768, 768), (1152, 768))
    assert resolutions_of("(1x2),(1x2)", image_size=336) == ((672, 336),)
    assert resolutions_of([(384, np.int64(768))]) == ((768, 384),)
    assert plan(800, 100, pinpoints="[(384, 768)]").tiles == (2, 1)


def best_in_plain_words(height, width):
    """The original's loop, with width and height in its order."""
    best, most, least = None, 0, math.inf
    for w, h in OFFICIAL:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = w * h - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (h, w), kept, wasted
    return best


SIZES = st.integers(1, 20_000)


@settings(max_examples=300)
@given(SIZES, SIZES)
def test_every_size_has_a_consistent_plan(height, width):
    p = plan(height, width)
    assert p.canvas == best_in_plain_words(height, width)
    assert p.canvas == tuple(384 * n for n in p.tiles)
    top, left, h, w = p.letterbox
    assert min(top, left) >= 0 < min(h, w)
    assert h == p.canvas[0] or w == p.canvas[1]
    for begin, size, whole in zip((top, left), (h, w), p.canvas, strict=True):
        assert 0 <= whole - size - 2 * begin <= 1
    y, x, rows, cols = p.crop
    for begin, size, whole in zip((y, x), (rows, cols), p.tiles, strict=True):
        assert size >= 1
        assert 2 * begin + size == 27 * whole
    assert min(p.target_hw) >= 1
    assert math.prod(p.target_hw) <= 1.21 * 9 * 729
    assert p.num_crops == 1 + math.prod(p.tiles) == len(p.grids)
    assert p.vit_tokens == 729 * p.num_crops
    assert p.llm_tokens == 729 + p.target_hw[0] * (p.target_hw[1] + 1)
    assert p.llm_tokens == layout([p]).num_tokens
    assert layout([p]).num_source_tokens == p.vit_tokens
    assert p.num_frames == 1
    assert p.frame_indices is None


@settings(max_examples=300)
@given(SIZES, SIZES)
def test_counts_are_those_of_transformers(height, width):
    pytest.importorskip("transformers")
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor as Processor,
    )
    from transformers.models.llava_onevision.processing_llava_onevision import (
        select_best_resolution,
    )

    pinpoints = [(h, w) for w, h in OFFICIAL]
    p = plan(height, width)
    assert select_best_resolution((height, width), pinpoints) == p.canvas

    class Fake:
        vision_aspect_ratio = "anyres_max_9"
        _get_unpadded_features = Processor._get_unpadded_features

    got = Processor._get_unpadded_features(Fake(), height, width, 27, 27, *p.tiles)
    assert p.llm_tokens == 729 + sum(got)


def test_small_images_are_not_scaled_up_further_than_needed():
    assert plan(300, 300).tiles == (1, 1)
    assert plan(384, 385).tiles == (1, 2)
    assert plan(385, 385).tiles == (2, 2)


@pytest.mark.parametrize(
    ("width", "height", "tiles", "unpadded", "target_hw", "llm_tokens"),
    [
        (800, 1300, (4, 3), (108, 67), (108, 67), 8073),
        (1920, 1080, (3, 5), (75, 135), (60, 108), 7269),
        (2000, 1500, (4, 6), (108, 144), (70, 93), 7309),
    ],
)
def test_other_sizes_have_the_maps_of_the_original(
    width, height, tiles, unpadded, target_hw, llm_tokens
):
    p = plan(height, width)
    assert (p.tiles, p.crop[2:]) == (tiles, unpadded)
    assert (p.target_hw, p.llm_tokens) == (target_hw, llm_tokens)


def test_maps_are_shrunk_only_beyond_the_slack():
    # 81 x 81 tokens are the limit
    assert plan(1152, 1152).target_hw == (81, 81)
    assert plan(896, 1344).target_hw == (73, 108)  # 1.0962 times too large a side
    assert plan(1080, 1920).crop[2:] == (75, 135)  # 1.2423 times
    assert plan(1080, 1920).target_hw == (60, 108)
    assert plan(1080, 1920, max_tiles=None).target_hw == (75, 135)
    assert plan(1080, 1920, max_tiles=1).target_hw == (20, 36)
    # the largest of the published sizes: above the documented 7290
    assert plan(1389, 1152).llm_tokens == 8765


def test_without_unpadding_the_map_is_kept():
    p = plan(1080, 1920, unpad=False)
    assert p.crop == (0, 0, 81, 135)
    assert p.target_hw == (81, 135)
    assert p.llm_tokens == 16 * 729 == layout([p]).num_tokens


def test_an_image_among_others_is_one_crop():
    p = plan(480, 640, num_images=2)
    assert p.grids == ((1, 27, 27),)
    assert p.canvas == (640, 640)
    assert p.letterbox == (80, 0, 480, 640)
    assert p.llm_tokens == p.total_tokens == 730
    assert plan(480, 640, num_images=2, unpad=False).llm_tokens == 729
    assert plan(480, 640, num_images=2) == plan(480, 640, num_images=9)
    assert plan(640, 480, num_images=2).letterbox == (0, 80, 640, 480)
    assert plan(641, 480, num_images=2).letterbox == (0, 80, 641, 480)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_numpy_integers_are_as_good_as_pythons(kind):
    p = plan(kind(50_000), kind(60_000), max_tiles=kind(9), image_size=kind(384))
    assert p == plan(50_000, 60_000)
    assert all(type(n) is int for n in (p.height, *p.tiles, *p.letterbox, *p.crop, *p.target_hw))
    p = plan_video(kind(1000), kind(30), kind(480), kind(640), frames_upbound=kind(8))
    assert p == plan_video(1000, 30, 480, 640, frames_upbound=8)
    assert all(type(n) is int for n in p.frame_indices)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1, got 0"),
        ({"max_tiles": 0}, ValueError, "max_tiles must be at least 1, got 0"),
        ({"max_tiles": 1.5}, TypeError, "max_tiles must be an integer, got 1.5"),
        ({"unpad": 1}, TypeError, "unpad must be a bool, got 1"),
        ({"patch_size": 385}, ValueError, "patch_size must be at most image_size=384, got 385"),
        *(
            (
                {"pinpoints": pinpoints},
                ValueError,
                "pinpoints must be like '(1x1),...,(6x6)' or pairs of width and height,"
                f" got {pinpoints!r}",
            )
            for pinpoints in (
                "",
                "1x1",
                "(2x2),(1x1)",
                [],
                7,
                "[1, 2]",
                [(384, 384.0)],
                [(1, 2, 3)],
            )
        ),
        *(
            (
                {"pinpoints": pinpoints},
                ValueError,
                "pinpoints must be positive multiples of image_size=384,"
                f" got width {width} and height {height}",
            )
            for pinpoints, width, height in (
                ([(384, 336)], 384, 336),
                ([(384, 384), (0, 384)], 0, 384),
                ("(0x1),(1x1)", 0, 384),
                ([(-384, 384)], -384, 384),
            )
        ),
        # the original keeps an empty map of it
        (
            {"height": 5, "width": 2000, "pinpoints": [(768, 768)]},
            ValueError,
            "height and width must leave at least one token a side, got 5 x 2000,"
            " 0 x 54 tokens without padding and 0 x 54 after resizing",
        ),
        # the original fails when it resizes it
        (
            {"height": 1, "width": 5000, "pinpoints": [(384 * 40, 384)], "max_tiles": 1},
            ValueError,
            "height and width must leave at least one token a side, got 1 x 5000,"
            " 1 x 1080 tokens without padding and 0 x 887 after resizing",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message


def test_there_must_be_a_resolution_to_choose():
    with pytest.raises(ValueError, match="resolutions must be at least one, got"):
        select_best_resolution(480, 640, ())


# Video -------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    st.integers(1, 10_000),
    st.floats(0.6, 240),
    st.integers(1, 64) | st.none(),
    st.booleans(),
)
def test_frame_indices_are_the_originals(total, video_fps, most, force):
    assume(most is not None or not force)
    want = list(range(0, total, round(video_fps / 1)))
    if most is not None and (len(want) > most or force):
        want = np.linspace(0, total - 1, most, dtype=int).tolist()
    got = frame_indices(total, video_fps, frames_upbound=most, force_sample=force)
    assert list(got) == want
    assert all(0 <= i < total for i in got)


def test_frames_are_one_a_second_up_to_a_limit():
    assert frame_indices(100, 29.97) == (0, 30, 60, 90)
    assert frame_indices(100, 29.97, fps=2) == tuple(range(0, 100, 15))
    # 2.5 frames apart: half to even
    assert frame_indices(7, 2.5) == (0, 2, 4, 6)
    assert frame_indices(33 * 30, 30, frames_upbound=3) == (0, 494, 989)
    assert frame_indices(33 * 30, 30, frames_upbound=None) == tuple(range(0, 990, 30))
    assert len(frame_indices(33 * 30, 30)) == 32
    assert frame_indices(3, 30, frames_upbound=5, force_sample=True) == (0, 0, 1, 1, 2)


@golden("video_tokens")
def test_tokens_of_a_video_are_the_originals(inputs, outputs):
    for newline, want in outputs.items():
        p = plan_video(inputs["frames"], None, 480, 640, pooling=inputs["pool"], newline=newline)
        assert p.num_frames == p.num_crops == inputs["frames"]
        assert p.grids == ((1, 27, 27),) * p.num_frames
        assert p.llm_tokens == p.total_tokens == want == layout([p]).num_tokens
    p = plan_video(inputs["frames"], None, 480, 640, pooling=inputs["pool"], unpad=False)
    assert p.llm_tokens == outputs["no_token"] == layout([p]).num_tokens


def test_frames_chosen_beforehand_are_all_used():
    assert plan_video(100, None, 480, 640).frame_indices == tuple(range(100))
    assert plan_video(100, 10, 480, 640).frame_indices == tuple(range(0, 100, 10))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_frames": 0}, ValueError, "total_frames must be at least 1, got 0"),
        ({"total_frames": 0, "video_fps": None}, ValueError, "total_frames must be at least 1"),
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"video_fps": 0.5}, ValueError, "video_fps must be above half of fps=1.0, got 0.5"),
        ({"video_fps": "1"}, TypeError, "video_fps must be a number, got '1'"),
        ({"frames_upbound": 0}, ValueError, "frames_upbound must be at least 1, got 0"),
        (
            {"frames_upbound": None, "force_sample": True},
            ValueError,
            "frames_upbound must be given with force_sample, got None",
        ),
        ({"force_sample": 1}, TypeError, "force_sample must be a bool, got 1"),
        ({"pooling": "mean"}, ValueError, "pooling must be one of 'bilinear', 'average', 'max'"),
        ({"newline": "row"}, ValueError, "newline must be one of 'one_token', 'frame', 'grid'"),
        (
            {"newline": "grid", "unpad": False},
            ValueError,
            "newline must be 'one_token' or 'no_token' without unpad, got 'grid'",
        ),
        (
            {"pooling": "max", "image_size": 14},
            ValueError,
            "pooling 'max' must have 2 patches a side, got 1",
        ),
    ],
)
def test_plan_video_names_what_it_refuses(arguments, error, message):
    video = {"total_frames": 100, "video_fps": 10, "height": 480, "width": 640}
    with pytest.raises(error, match=re.escape(message)):
        plan_video(**{**video, **arguments})


# From crops to language-model tokens -------------------------------------------------------------


def original_tokens(tokens, newline, p):
    """The original's steps on one image or video, in its order, on maps ``[C, rows, columns]``."""
    n = p.side
    crops = tokens.view(p.num_crops, n * n, -1)

    def end_rows(maps):
        return torch.cat([maps, newline[:, None, None].expand(*maps.shape[:-1], 1)], dim=-1)

    if p.pooling is not None:
        maps = crops.view(-1, n, n, crops.shape[-1]).permute(0, 3, 1, 2)
        if p.pooling == "bilinear":
            maps = F.interpolate(maps, [math.ceil(n / 2)] * 2, mode="bilinear")
        else:
            maps = {"average": F.avg_pool2d, "max": F.max_pool2d}[p.pooling](maps, 2)
        if p.newline == "grid":
            return end_rows(maps.transpose(0, 1).flatten(1, 2)).flatten(1).T
        frames = maps.flatten(2).mT
        if p.newline == "frame":
            frames = torch.cat([frames, newline.expand(len(frames), 1, -1)], dim=1)
        frames = frames.flatten(0, 1)
        one = p.newline == "one_token" and p.unpad
        return torch.cat([frames, newline[None]]) if one else frames
    if p.tiles is None:
        return torch.cat([crops[0], newline[None]]) if p.unpad else crops[0]
    rows, cols = p.tiles
    tiles = crops[1:].view(rows, cols, n, n, -1)
    if not p.unpad:
        return torch.cat([crops[0], tiles.transpose(1, 2).flatten(0, 3)])
    maps = tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    _, h, w = maps.shape
    if p.width / p.height > w / h:
        cut = (h - int(p.height * (w / p.width))) // 2
        maps = maps[:, cut : h - cut]
    else:
        cut = (w - int(p.width * (h / p.height))) // 2
        maps = maps[:, :, cut : w - cut]
    _, h, w = maps.shape
    if p.max_tiles is not None and (times := math.sqrt(h * w / (p.max_tiles * n**2))) > 1.1:
        maps = F.interpolate(maps[None], [int(h // times), int(w // times)], mode="bilinear")[0]
    return torch.cat([crops[0], end_rows(maps).flatten(1).T])


SMALL = {"image_size": 70, "patch_size": 14}  # 5 x 5 patches, as odd as 27 x 27
SMALL_PINPOINTS = {**SMALL, "pinpoints": "(1x1),...,(3x3)"}


def small_plans():
    """Every path: padding above and beside, shrunk or not, several images, all kinds of video."""
    sizes = [(70, 70), (100, 150), (150, 100), (70, 180), (30, 300), (211, 200), (5, 400)]
    plans = [plan(h, w, **SMALL_PINPOINTS, max_tiles=2) for h, w in sizes]
    plans.append(plan(150, 100, **SMALL_PINPOINTS, max_tiles=None))
    plans.append(plan(100, 150, **SMALL_PINPOINTS, unpad=False))
    plans += [plan(100, 150, num_images=2, unpad=unpad, **SMALL) for unpad in (True, False)]
    plans += [
        plan_video(frames, None, 48, 64, pooling=pooling, newline=newline, **SMALL)
        for frames, pooling in zip((3, 2, 1), POOLINGS, strict=True)
        for newline in NEWLINES
    ]
    plans.append(plan_video(2, None, 48, 64, unpad=False, **SMALL))
    return plans


def test_small_plans_have_every_path():
    images = [p for p in small_plans() if p.tiles is not None and p.unpad]
    assert {p.target_hw == p.crop[2:] for p in images} == {True, False}
    assert {(p.crop[0] > 0, p.crop[1] > 0) for p in images} == {
        (False, False),
        (True, False),
        (False, True),
    }


def random_tokens(plans, channels=3, dtype=torch.float32):
    tokens = torch.randn(sum(p.vit_tokens for p in plans), channels, dtype=dtype)
    return tokens, torch.randn(channels, dtype=dtype)


def test_the_token_path_is_the_originals():
    for p in small_plans():
        tokens, newline = random_tokens([p])
        got = merge_patches(tokens, newline, [p], impl="reference")
        want = original_tokens(tokens, newline, p)
        assert got.shape == want.shape == (p.llm_tokens, 3)
        torch.testing.assert_close(got, want)


def test_a_batch_is_its_images_and_videos_in_order():
    plans = small_plans()
    tokens, newline = random_tokens(plans)
    got = merge_patches(tokens, newline, iter(plans), impl="reference")
    alone = [
        merge_patches(x, newline, [p], impl="reference")
        for x, p in zip(tokens.split([p.vit_tokens for p in plans]), plans, strict=True)
    ]
    assert torch.equal(got, torch.cat(alone))
    assert layout(plans).num_tokens == len(got) == sum(p.llm_tokens for p in plans)
    # crop by crop, as an encoder leaves them
    crops = tokens.view(-1, 25, 3)
    assert torch.equal(merge_patches(crops, newline, plans, impl="reference"), got)
    empty = merge_patches(tokens[:0], newline, [])
    assert empty.shape == (0, 3)


@settings(max_examples=50)
@given(st.lists(st.tuples(SIZES, SIZES, st.integers(1, 2)), max_size=4), st.integers(1, 40))
def test_a_layout_has_the_tokens_of_its_plans(sizes, frames):
    plans = [plan(h, w, num_images=n) for h, w, n in sizes]
    plans += [
        plan_video(frames, None, 480, 640, pooling=pooling, newline=newline)
        for pooling in POOLINGS
        for newline in NEWLINES
    ]
    got = layout(plans)
    assert got.num_tokens == sum(p.llm_tokens for p in plans)
    pooled = sum(169 * p.num_frames for p in plans if p.pooling == "max")  # behind the others
    assert got.num_source_tokens == sum(p.vit_tokens for p in plans) + pooled


@golden("get_2dPool")
def test_pooling_is_the_originals(inputs, outputs):
    side = inputs["side"]
    assert inputs["stride"] == 2
    p = plan_video(
        1, None, 48, 64, pooling=inputs["mode"], newline="no_token", image_size=14 * side
    )
    assert p.target_hw == (outputs["out_side"],) * 2
    tokens = torch.arange(float(side**2))[:, None]
    pooled = merge_patches(tokens, torch.zeros(1), [p], impl="reference")
    assert len(pooled) == outputs["out_tokens"] == p.llm_tokens
    maps = pooled.view(p.target_hw)
    for got, name in ((maps[0], "first_row"), (maps[-1], "last_row"), (maps.flatten(), "all")):
        if name in outputs:
            torch.testing.assert_close(got, torch.tensor(outputs[name]), rtol=0, atol=1e-4)


def test_bilinear_pooling_of_odd_sides_is_the_originals():
    for side, first in ((5, [2, 3.6666667, 5.3333333]), (27, [13, 14.928571, 16.857143])):
        p = plan_video(1, None, 48, 64, newline="no_token", image_size=14 * side)
        pooled = merge_patches(torch.arange(side**2.0)[:, None], None, [p], impl="reference")
        torch.testing.assert_close(pooled[:3, 0], torch.tensor(first), rtol=0, atol=1e-5)


@golden("bilinear_1d_matrix")
def test_bilinear_pooling_has_the_originals_weights(inputs, outputs):
    assert (inputs["n_in"], inputs["n_out"]) == (27, 14)
    p = plan_video(1, None, 48, 64, newline="no_token")
    # channel i is 1 in row i
    tokens = torch.eye(27).repeat_interleave(27, dim=0)
    pooled = merge_patches(tokens, torch.zeros(27), [p], impl="reference").view(14, 14, 27)
    for got, taps, weights in zip(pooled[:, 3], outputs["taps"], outputs["weights"], strict=True):
        assert got.nonzero().flatten().tolist() == taps
        torch.testing.assert_close(got[taps], torch.tensor(weights), rtol=0, atol=1e-5)


def test_a_resized_map_comes_from_its_tiles():
    p = plan(768, 1152, max_tiles=2)
    assert (p.tiles, p.crop, p.target_hw) == ((2, 3), (0, 0, 54, 81), (31, 46))
    tokens, newline = random_tokens([p], channels=1)
    got = merge_patches(tokens, newline, [p], impl="reference")
    torch.testing.assert_close(got, original_tokens(tokens, newline, p))


@golden("interp_values")
def test_resized_maps_are_the_originals(inputs, outputs):
    maps = torch.arange(54.0 * 81).view(2, 27, 3, 27).transpose(1, 2)
    where = TokenLayout([FeatureMap(0, (27, 27), (2, 3), target_hw=tuple(inputs["size"]))])
    got = assemble(maps.reshape(-1, 1), None, where, impl="reference").view(inputs["size"])
    corners = got[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.tensor(outputs["corners"]), rtol=0, atol=1e-2)
    assert got[16, 25].item() == pytest.approx(outputs["mid"], abs=1e-2)
    torch.testing.assert_close(got[0, :5], torch.tensor(outputs["row0_first5"]), rtol=0, atol=1e-2)


@golden("video_newline")
def test_newlines_of_a_video_are_the_originals(inputs, outputs):
    frames, side = inputs["frames"], inputs["side"]
    pooled = torch.arange(float(frames * side**2)).view(frames, side, side)
    maps = pooled.repeat_interleave(2, 1).repeat_interleave(2, 2)  # which pooling undoes
    newline = torch.tensor([float(inputs["newline"])])
    for pooling in POOLINGS:
        p = plan_video(
            *(frames, None, 48, 64),
            pooling=pooling,
            newline=inputs["mode"],
            image_size=14 * 2 * side,
        )
        got = merge_patches(maps.reshape(-1, 1), newline, [p], impl="reference")
        assert got.flatten().tolist() == outputs["seq"]
        assert got.numel() == math.prod(outputs["shape"])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "p",
    [
        plan(100, 150, **SMALL_PINPOINTS, max_tiles=2),
        *(
            plan_video(2, None, 48, 64, pooling=pooling, newline=newline, **SMALL)
            for pooling, newline in zip(POOLINGS, ("grid", "frame", "one_token"), strict=True)
        ),
    ],
    ids=["image", *(f"video, {pooling}" for pooling in POOLINGS)],
)
def test_gradients_reach_the_tokens_the_projector_and_the_newline(p, impl):
    projector = Projector(6, 8)
    x = torch.randn(p.vit_tokens, 6)
    grad = torch.randn(p.llm_tokens, 8)
    ours, originals = (x.clone().requires_grad_() for _ in range(2))
    parameters = dict(projector.named_parameters())
    assert list(parameters) == [
        "image_newline",
        *(f"mm_projector.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")),
    ]
    got = projector(ours, [p], impl=impl)
    got_grads = torch.autograd.grad(got, [ours, *parameters.values()], grad)
    want = original_tokens(projector.mm_projector(originals), projector.image_newline, p)
    want_grads = torch.autograd.grad(want, [originals, *parameters.values()], grad)
    torch.testing.assert_close(got, want)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert got_grad.abs().sum() > 0
        torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": [[1.0]]}, TypeError, "tokens must be a tensor, got list"),
        (
            {"tokens": torch.zeros(729, 2)},
            ValueError,
            "tokens must be the 1458 of plans, got [729, 2]",
        ),
        ({"tokens": torch.zeros(1458)}, ValueError, "tokens must have shape [*, *], got [1458]"),
        ({"plans": [(2, 3)]}, TypeError, "plans[0] must be a Plan, got tuple"),
        ({"plans": plan(384, 384)}, TypeError, "plans must be a sequence of plans, got Plan"),
        ({"newline": torch.zeros(3)}, ValueError, "newline must have shape [2], got [3]"),
        (
            {"newline": None},
            ValueError,
            "newline must be a vector where plans have newlines, got None",
        ),
        ({"newline": torch.zeros(2).double()}, TypeError, "vectors must have the dtype of tokens"),
        ({"impl": "fast"}, ValueError, "impl must be"),
    ],
)
def test_merge_patches_names_what_it_refuses(arguments, error, message):
    given = {"tokens": torch.zeros(2, 729, 2), "newline": torch.zeros(2), "plans": [plan(384, 384)]}
    with pytest.raises(error, match=re.escape(message)):
        merge_patches(**{**given, **arguments})


def test_a_projector_runs_under_autocast():
    plans = [plan(56, 56, image_size=56), plan_video(2, None, 56, 56, image_size=56)]
    x = torch.randn(sum(p.vit_tokens for p in plans), 4)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = Projector(4, 6)(x, plans)
    assert tokens.dtype == torch.bfloat16
    assert len(tokens) == sum(p.llm_tokens for p in plans)


def test_without_newlines_none_is_needed():
    plans = [plan(100, 384, unpad=False), plan_video(2, None, 48, 64, newline="no_token")]
    tokens, newline = random_tokens(plans)
    got = merge_patches(tokens, None, plans)
    assert torch.equal(got, merge_patches(tokens, newline, plans))


# Patches -----------------------------------------------------------------------------------------


def photos():
    """Photographs of several aspect ratios: three of scikit-image's, and a strip of one."""
    data = pytest.importorskip("skimage.data")
    pictures = [data.chelsea(), data.coffee(), data.astronaut(), data.coffee()[:, 190:230]]
    return [PIL.Image.fromarray(pixels) for pixels in pictures]


def original_crops(image, p):
    """The crops in the way of the released code, with Pillow."""
    bicubic = PIL.Image.Resampling.BICUBIC
    if p.tiles is None:
        if p.pooling is None:
            side = max(image.size)
            square = PIL.Image.new("RGB", (side, side), (127, 127, 127))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return [image.resize((384, 384), bicubic)]
    height, width = p.canvas
    canvas = PIL.Image.new("RGB", (width, height), (0, 0, 0))
    across, down = width / image.width, height / image.height
    if across < down:
        size = (width, min(math.ceil(image.height * across), height))
    else:
        size = (min(math.ceil(image.width * down), width), height)
    resized = image.resize(size, bicubic)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    crops = [
        canvas.crop((x, y, x + 384, y + 384))
        for y in range(0, height, 384)
        for x in range(0, width, 384)
    ]
    return [image.resize((384, 384), bicubic), *crops]


def patches_of(crops):
    """Normalised as the original does, and read as the convolution of the vision transformer."""
    values = np.stack([np.asarray(crop) for crop in crops]) / np.float32(255)
    values = (values - np.float32(0.5)) / np.float32(0.5)
    seen = torch.from_numpy(values).permute(0, 3, 1, 2)
    return F.unfold(seen, 14, stride=14).mT.reshape(-1, 588)


def test_preprocess_is_the_originals_recipe():
    images = photos()
    plans = [plan(image.height, image.width) for image in images]
    assert [p.tiles for p in plans] == [(1, 2), (2, 2), (2, 2), (2, 1)]
    plans[2] = plan(512, 512, num_images=2)
    images.append(images[0])
    plans.append(plan(images[0].height, images[0].width, num_images=2))
    images.append([image.resize((64, 48)) for image in images[:2]])
    plans.append(plan_video(2, None, 48, 64))
    pixels, grid = preprocess(images, plans)
    crops = [
        crop
        for image, p in zip(images, plans, strict=True)
        for frame in (image if isinstance(image, list) else [image])
        for crop in original_crops(frame, p)
    ]
    assert torch.equal(pixels, patches_of(crops))
    assert grid.grid_thw.tolist() == [[1, 27, 27]] * sum(p.num_crops for p in plans)
    assert grid.spatial_merge_size == 1
    assert grid.num_tokens == sum(p.vit_tokens for p in plans)


def test_preprocess_matches_transformers():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "LlavaOnevisionImageProcessorPil", None)
    if kind is None:
        pytest.skip("this version has no image processor without torchvision")
    processor = kind(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pad=False)
    images = photos()
    # alone in their samples, and then two of one sample
    want = processor(images=[[images[0]], [images[3]], images[1:3]], return_tensors="np")
    plans = [plan(image.height, image.width) for image in (images[0], images[3])]
    plans += [plan(image.height, image.width, num_images=2) for image in images[1:3]]
    pixels, _ = preprocess([images[0], images[3], *images[1:3]], plans)
    crops = torch.from_numpy(np.concatenate(list(want["pixel_values"])))
    assert torch.equal(pixels, F.unfold(crops, 14, stride=14).mT.reshape(-1, 588))


def test_padding_is_black_before_and_the_mean_beside():
    white = PIL.Image.new("RGB", (384, 96), "white")
    pixels, _ = preprocess([white])
    view, crop = pixels.view(2, 27, 27, 588)
    assert (view == 1).all()
    assert (crop[:10] == -1).all()  # 144 rows above, and the filter's edge is sharp
    assert (crop[11:17] == 1).all()
    assert (crop[-9:] == -1).all()
    (square,) = preprocess([white], [plan(96, 384, num_images=2)])[0].view(1, 27, 27, 588)
    assert square[0].unique().tolist() == [pytest.approx(127 / 127.5 - 1)]
    # the colour follows the mean
    (square,) = preprocess(
        [white], [plan(96, 384, num_images=2)], mean=(0.2, 0.4, 0.6), std=(1, 1, 1)
    )[0].view(1, 27, 27, 588)
    colors = square[0, 0].view(3, -1)[:, 0] + torch.tensor([0.2, 0.4, 0.6])
    torch.testing.assert_close(colors * 255, torch.tensor([51.0, 102.0, 153.0]))


def test_a_batch_is_its_images_in_order():
    one, other, *_ = photos()
    images = [one.resize((300, 200)), other, [image.resize((64, 48)) for image in (one, other)]]
    pixels, grid = preprocess(images)
    alone = [preprocess([image])[0] for image in images]
    assert torch.equal(pixels, torch.cat(alone))
    default = [plan(200, 300), plan(other.height, other.width), plan_video(2, None, 48, 64)]
    assert grid.num_grids == sum(p.num_crops for p in default)
    empty, grid = preprocess([])
    assert empty.shape == (0, 588)
    assert grid.num_grids == 0


SMALL_IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([SMALL_IMAGE], {"plans": [plan(8, 9)]}, ValueError, "plans[0], (1, 8, 9)"),
        ([SMALL_IMAGE], {"plans": [None]}, TypeError, "plans[0] must be a Plan"),
        ([SMALL_IMAGE], {"mean": (0, 0)}, ValueError, "mean must have 3 numbers"),
        ([SMALL_IMAGE], {"std": (0, 1, 1)}, ValueError, "std must be above 0"),
        ([SMALL_IMAGE], {"dtype": torch.int32}, TypeError, "dtype must be floating"),
        (
            [SMALL_IMAGE] * 2,
            {"plans": [plan(8, 8), plan(8, 8, patch_size=16)]},
            ValueError,
            "plans must share their patch size, got [14, 16]",
        ),
    ],
)
def test_preprocess_names_what_it_refuses(images, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        preprocess(images, **options)
