"""InternVL's plans, tiles and tokens, against outputs of the original code and plain loops."""

import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import patchpack
from patchpack import PackedGrid
from patchpack.systems.internvl import (
    PIXEL_SHUFFLE,
    Projector,
    frame_indices,
    plan,
    plan_video,
    preprocess,
    select_tiles,
    target_ratios,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]


def golden(function):
    """All cases of ``internvl.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"internvl.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


# Dynamic high resolution -------------------------------------------------------------------------


@golden("target_ratios")
def test_target_ratios_are_the_originals(inputs, outputs):
    ratios = target_ratios(inputs["min_num"], inputs["max_num"])
    assert len(ratios) == outputs["count"] == 35
    columns_and_rows = [list(reversed(tiles)) for tiles in ratios]
    # the original's order among equal areas is that of a Python set
    assert sorted(columns_and_rows) == sorted(outputs["sorted_by_area"])
    areas = [math.prod(tiles) for tiles in ratios]
    assert areas == [math.prod(tiles) for tiles in outputs["sorted_by_area"]]


@golden("target_ratio_counts")
def test_the_numbers_of_ratios_are_the_originals(inputs, outputs):
    counts = [len(target_ratios(inputs["min_num"], n)) for n in inputs["max_num"]]
    assert counts == outputs["counts"]


def test_target_ratios_are_all_products_within_the_limits():
    for least, most in itertools.combinations_with_replacement(range(1, 41), 2):
        tiles = itertools.product(range(1, most + 1), repeat=2)
        want = {pair for pair in tiles if least <= math.prod(pair) <= most}
        assert set(target_ratios(least, most)) == want


@golden("same_area_ties")
def test_no_two_ratios_of_one_area_are_ever_equally_near(inputs, outputs):
    """So the order among them, which the original leaves to a set, never decides."""
    counts = []
    for most in inputs["max_num"]:
        areas = {}
        for rows, cols in target_ratios(1, most):
            areas.setdefault(Fraction(cols, rows), set()).add(rows * cols)
        counts.append(sum(bool(areas[a] & areas[b]) for a, b in itertools.pairwise(sorted(areas))))
    assert counts == outputs["n_midpoint_ties_with_equal_area"]


@golden("dynamic_preprocess")
def test_plans_are_the_originals(inputs, outputs):
    p = plan(
        inputs["height"],
        inputs["width"],
        min_tiles=inputs["min_num"],
        max_tiles=inputs["max_num"],
        use_thumbnail=inputs["use_thumbnail"],
        image_size=inputs["image_size"],
    )
    assert list(p.tiles[::-1]) == outputs["grid_wh"]
    assert list(p.resized[::-1]) == outputs["resized_wh"]
    assert p.num_tiles == outputs["n_tiles"]
    assert p.llm_tokens == outputs["visual_tokens"]
    assert p.total_tokens == p.llm_tokens + 2
    assert p.grids == ((1, 32, 32),) * p.num_tiles


@golden("tile_boxes")
def test_tile_boxes_are_the_originals(inputs, outputs):
    p = plan(inputs["height"], inputs["width"], max_tiles=inputs["max_num"])
    boxes = [[x, y, x + 448, y + 448] for y, x in p.boxes]
    assert boxes == outputs["boxes_left_top_right_bottom"]


@pytest.mark.parametrize(
    ("width", "height", "limits", "tiles", "llm_tokens"),
    [
        (633, 633, (1, 12), (1, 1), 256),
        (896, 896, (1, 12), (2, 2), 1280),
        (1344, 1344, (1, 12), (3, 3), 2560),
        (7000, 100, (1, 12), (1, 12), 3328),
        (1568, 448, (1, 12), (1, 4), 1280),
        (1920, 1080, (1, 40), (4, 7), 7424),
        (448, 448, (4, 12), (2, 2), 1280),
    ],
)
def test_other_sizes_have_the_tiles_of_the_original(width, height, limits, tiles, llm_tokens):
    p = plan(height, width, min_tiles=limits[0], max_tiles=limits[1])
    assert (p.tiles, p.llm_tokens) == (tiles, llm_tokens)


def test_the_size_of_an_image_decides_only_between_equally_near_ratios():
    # no limit on upscaling where one ratio is nearest
    assert select_tiles(384, 512) == select_tiles(3, 4) == (3, 4)
    # 1:1 from a square on: 2 x 2 above half of their pixels, 3 x 3 likewise
    assert [select_tiles(n, n) for n in (633, 634, 950, 951)] == [(1, 1), (2, 2), (2, 2), (3, 3)]
    # halfway between 3:1 and 4:1, with just half the pixels of 4 tiles or less, and with more
    assert select_tiles(100, 350) == (1, 3)
    assert select_tiles(448, 1568) == (1, 4)
    area = 0.5 * 448**2 * 4
    n = math.isqrt(int(area / 3.5))
    edge = next(h for h in range(n - 9, n + 9) if h % 2 == 0 and h * h * 3.5 > area)
    assert select_tiles(edge, edge * 7 // 2) == (1, 4)
    assert select_tiles(edge - 2, (edge - 2) * 7 // 2) == (1, 3)
    # halfway between 24:1 and 25:1: exactly half the pixels of 25 tiles are not more than half
    assert select_tiles(70, 1715, image_size=98, max_tiles=25) == (1, 24)
    assert select_tiles(72, 1764, image_size=98, max_tiles=25) == (1, 25)


def closest_in_plain_words(height, width, least, most):
    """By exact fractions, where floats cannot be equal for unequal numbers."""
    ratios = sorted(
        (r * c, r, c)
        for r in range(1, most + 1)
        for c in range(1, most + 1)
        if least <= r * c <= most
    )
    distances = {(r, c): abs(Fraction(width, height) - Fraction(c, r)) for _, r, c in ratios}
    near = min(distances.values())
    ties = [(r, c) for _, r, c in ratios if distances[r, c] == near]
    fits = [(r, c) for r, c in ties[1:] if 2 * height * width > 448**2 * r * c]
    return (fits or ties[:1])[-1]


SIZES = st.integers(1, 20_000)


@settings(max_examples=300)
@given(SIZES, SIZES, st.integers(1, 8), st.integers(0, 32))
def test_every_size_has_the_nearest_tiles(height, width, least, more):
    most = least + more
    p = plan(height, width, min_tiles=least, max_tiles=most)
    assert p.tiles == closest_in_plain_words(height, width, least, most)
    count = math.prod(p.tiles)
    assert least <= count <= most
    assert len(p.boxes) == len(set(p.boxes)) == count
    assert p.num_tiles == count + (count > 1) == len(p.grids)
    assert p.vit_tokens == 1024 * p.num_tiles == 4 * p.llm_tokens
    assert p.markup_tokens == 2
    assert p.total_tokens == p.llm_tokens + 2
    assert p.num_frames == 1
    assert p.frame_indices is None


@settings(max_examples=300)
@given(SIZES, SIZES, st.integers(1, 8), st.integers(0, 32))
def test_tiles_are_those_of_transformers(height, width, least, more):
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    want = module.get_optimal_tiled_canvas((height, width), (448, 448), least, least + more)
    got = select_tiles(height, width, min_tiles=least, max_tiles=least + more)
    assert got == tuple(reversed(want))


def test_images_of_one_sample_share_the_tiles():
    def tiles(num_images):
        return plan(800, 1300, num_images=num_images).num_tiles

    assert [tiles(n) for n in (1, 2, 3, 6, 7, 12, 13, 100)] == [7, 7, 3, 3, 1, 1, 1, 1]
    # 12 // 5 tiles
    assert plan(800, 1300, num_images=5) == plan(800, 1300, max_tiles=2)
    assert plan(800, 1300, num_images=5, max_tiles=40) == plan(800, 1300, max_tiles=8)
    with pytest.raises(ValueError, match="max_tiles must be at least min_tiles=4, got 2"):
        plan(800, 1300, num_images=5, min_tiles=4)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_numpy_integers_are_as_good_as_pythons(kind):
    sizes = {"height": 50_000, "width": 60_000, "max_tiles": 40, "image_size": 448}
    p = plan(**{name: kind(n) for name, n in sizes.items()}, num_images=kind(2))
    assert p == plan(**sizes, num_images=2)
    assert all(type(n) is int for n in (p.height, p.width, *p.tiles, *p.resized, p.llm_tokens))
    p = plan_video(kind(1000), kind(30), kind(480), kind(640), num_segments=kind(8))
    assert p == plan_video(1000, 30, 480, 640, num_segments=8)
    assert all(type(n) is int for n in p.frame_indices)


def test_a_plan_follows_the_sizes_of_tiles_patches_and_blocks():
    p = plan(800, 1300, image_size=64, patch_size=8, merge_size=4, use_thumbnail=False)
    assert p.tiles == (2, 3)
    assert p.resized == (128, 192)
    assert p.grids == ((1, 8, 8),) * 6
    assert p.llm_tokens == 6 * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"num_images": 0}, ValueError, "num_images must be at least 1, got 0"),
        ({"max_tiles": 0}, ValueError, "max_tiles must be at least 1, got 0"),
        ({"min_tiles": 13}, ValueError, "max_tiles must be at least min_tiles=13, got 12"),
        ({"min_tiles": True}, TypeError, "min_tiles must be an integer, got True"),
        ({"use_thumbnail": 1}, TypeError, "use_thumbnail must be a bool, got 1"),
        ({"height": 2**63}, ValueError, f"height must be below 2**63, got {2**63}"),
        (
            {"image_size": 434},
            ValueError,
            "image_size must divide by patch_size * merge_size = 28, got 434",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message


# Video -------------------------------------------------------------------------------------------


def original_indices(bound, fps, max_frame, num_segments):
    """The rule of the released code in NumPy's arithmetic."""
    start, end = (-100000, 100000) if bound is None else bound
    first, last = max(0, round(start * fps)), min(round(end * fps), max_frame)
    size = float(last - first) / num_segments
    return tuple(int(first + size / 2 + np.round(size * i)) for i in range(num_segments))


@settings(max_examples=300)
@given(st.data())
def test_frame_indices_are_the_originals(data):
    total = data.draw(st.integers(1, 10_000))
    fps = data.draw(st.floats(1, 120))
    count = data.draw(st.integers(1, 64))
    bound = None
    if data.draw(st.booleans()):
        start = data.draw(st.floats(-1, (total - 1) / fps))
        bound = (start, max(start, 0) + data.draw(st.floats(0, 300)))
    got = frame_indices(total, fps, num_segments=count, bound=bound)
    assert got == original_indices(bound, fps, total - 1, count)
    assert len(got) == count
    assert 0 <= got[0] <= got[-1] < total
    assert list(got) == sorted(got)


def test_a_frame_of_a_video_is_one_tile():
    p = plan_video(300, 30.0, 480, 640, num_segments=8)
    assert p.frame_indices == (18, 55, 93, 130, 168, 205, 242, 280)
    assert p.tiles == (1, 1)
    assert not p.thumbnail
    assert p.grids == ((1, 32, 32),) * 8
    assert p.llm_tokens == 8 * 256
    assert p.markup_tokens == 16
    assert plan_video(300, 30.0, 480, 640).num_frames == 32
    assert plan_video(300, None, 480, 640).frame_indices == tuple(range(300))
    assert plan_video(300, None, 480, 640, num_segments=2).frame_indices == (74, 224)
    assert plan_video(300, 30.0, 480, 640, bound=(2, 4), num_segments=2).frame_indices == (75, 105)
    # frames may have tiles too
    p = plan_video(2, None, 480, 640, max_tiles=6)
    assert p.tiles == (2, 3)
    assert p.num_tiles == len(p.grids) == 14
    assert p.llm_tokens == 14 * 256
    assert p.markup_tokens == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"total_frames": 0}, ValueError, "total_frames must be at least 1, got 0"),
        ({"video_fps": 0}, ValueError, "video_fps must be above 0, got 0"),
        ({"video_fps": -1, "bound": None}, ValueError, "video_fps must be above 0, got -1"),
        ({"video_fps": "9", "bound": None}, TypeError, "video_fps must be a number, got '9'"),
        ({"num_segments": 0}, ValueError, "num_segments must be at least 1, got 0"),
        ({"video_fps": None}, ValueError, "video_fps must be given with bound, got None"),
        ({"bound": 3}, TypeError, "bound must be two numbers of seconds, got 3"),
        ({"bound": (1, 2, 3)}, TypeError, "bound must be two numbers of seconds, got (1, 2, 3)"),
        ({"bound": (2, 1)}, ValueError, "bound must be finite and in order, got (2, 1)"),
        (
            {"bound": (0, math.inf)},
            ValueError,
            "bound must be finite and in order, got (0, inf)",
        ),
        (
            {"bound": (20, 30)},
            ValueError,
            "bound must have a part of the video's 100 frames at 10 a second, got (20, 30)",
        ),
        (
            {"bound": (-30, -20)},
            ValueError,
            "bound must have a part of the video's 100 frames at 10 a second, got (-30, -20)",
        ),
    ],
)
def test_plan_video_names_what_it_refuses(arguments, error, message):
    video = {"total_frames": 100, "video_fps": 10, "height": 480, "width": 640, "bound": (1, 2)}
    with pytest.raises(error) as raised:
        plan_video(**{**video, **arguments})
    assert str(raised.value) == message


# Patches -----------------------------------------------------------------------------------------


def photos():
    """Photographs of several aspect ratios: two of scikit-image's, and a strip of one."""
    data = pytest.importorskip("skimage.data")
    pictures = [data.chelsea(), data.astronaut(), data.coffee()[190:230]]
    return [PIL.Image.fromarray(pixels) for pixels in pictures]


def original_tiles(image, p):
    """The tiles in the way of the released code, with Pillow."""
    height, width = p.resized
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    tiles = [resized.crop((x, y, x + 448, y + 448)) for y, x in p.boxes]
    if p.thumbnail:
        tiles.append(image.resize((448, 448), PIL.Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles])


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def patches_of(tiles):
    """Tiles ``[tiles, height, width, 3]`` of bytes, normalised, as a convolution reads them."""
    values = (tiles / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    cut = values.reshape(len(tiles), 32, 14, 32, 14, 3).transpose(0, 1, 3, 5, 2, 4)
    return torch.from_numpy(cut.reshape(-1, 588))


def test_preprocess_is_the_originals_recipe():
    images = photos()
    plans = [plan(image.height, image.width, max_tiles=6) for image in images]
    assert [p.tiles for p in plans] == [(2, 3), (1, 1), (1, 6)]
    pixels, grid = preprocess(images, plans)
    tiles = [original_tiles(image, p) for image, p in zip(images, plans, strict=True)]
    assert torch.equal(pixels, patches_of(np.concatenate(tiles)))
    assert grid.grid_thw.tolist() == [[1, 32, 32]] * sum(p.num_tiles for p in plans)
    assert grid.spatial_merge_size == 1
    assert grid.num_tokens == sum(p.vit_tokens for p in plans)


def test_preprocess_matches_transformers():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "GotOcr2ImageProcessorPil", None)
    if kind is None:
        pytest.skip("this version has no image processor without torchvision")
    processor = kind(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        max_patches=6,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    images = photos()
    want = processor(images=images, return_tensors="pt")
    plans = [plan(image.height, image.width, max_tiles=6) for image in images]
    assert want["num_patches"].tolist() == [p.num_tiles for p in plans]
    pixels, _ = preprocess(images, plans)
    tiles = want["pixel_values"].unfold(2, 14, 14).unfold(3, 14, 14)
    assert torch.equal(pixels, tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 588))


def test_a_video_is_its_frames():
    frames = [image.resize((100, 48)) for image in photos()[:2]]
    pixels, grid = preprocess([frames])
    assert grid.num_grids == 2
    alone = [preprocess([frame], [plan(48, 100, max_tiles=1)])[0] for frame in frames]
    assert torch.equal(pixels, torch.cat(alone))
    # frames with tiles: every frame's thumbnail follows its tiles
    video = plan_video(2, None, 48, 100, max_tiles=2)
    pixels, grid = preprocess([frames], [video])
    assert grid.num_grids == video.num_tiles == 6
    alone = [preprocess([frame], [plan(48, 100, max_tiles=2)])[0] for frame in frames]
    assert torch.equal(pixels, torch.cat(alone))


def test_a_batch_is_its_images_in_order():
    one, other, *_ = photos()
    images = [one.resize((100, 90)), other.resize((200, 100))]
    pixels, grid = preprocess(images)
    alone = [preprocess([image])[0] for image in images]
    assert torch.equal(pixels, torch.cat(alone))
    # the default plan is that of one image alone in its sample: 1 tile, and 2 with a thumbnail
    assert grid.num_grids == plan(90, 100).num_tiles + plan(100, 200).num_tiles == 4
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
            {"plans": [plan(8, 8), plan(8, 8, patch_size=7)]},
            ValueError,
            "plans must share their patch size, got [7, 14]",
        ),
    ],
)
def test_preprocess_names_what_it_refuses(images, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        preprocess(images, **options)


# Pixel-unshuffle and MLP -------------------------------------------------------------------------


@golden("pixel_shuffle")
def test_pixel_shuffle_is_the_originals(inputs, outputs):
    shape = tuple(map(int, re.search(r"view\(([\d,]+)\)", inputs["x"])[1].split(",")))
    images, rows, cols, channels = shape
    assert (images, inputs["scale"]) == (1, 0.5)
    x = torch.arange(float(math.prod(shape))).view(-1, channels)
    order = PIXEL_SHUFFLE[inputs["ps_version"]]
    y = patchpack.merge_tokens(
        x, PackedGrid([(1, rows, cols)]), order=order, merge_size=2, impl="reference"
    )
    assert y.tolist() == torch.tensor(outputs["y"]).view(len(y), -1).tolist()
    assert y.numel() == math.prod(outputs["shape"])


def original_mlp1(vit, llm):
    """The layers of the original, which a checkpoint's ``mlp1`` has the parameters of."""
    layers = [nn.LayerNorm(4 * vit), nn.Linear(4 * vit, llm), nn.GELU(), nn.Linear(llm, llm)]
    return nn.Sequential(*layers)


def original_projection(x, mlp1, side, transpose):
    """Tokens ``[tiles, side**2, C]`` in the way of the original, one tile after the other."""
    tiles = x.view(len(x), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
    tiles = tiles.transpose(1, 2) if transpose else tiles
    return mlp1(tiles.flatten(3).flatten(1, 2)).flatten(0, 1)


@pytest.mark.parametrize("ps_version", sorted(PIXEL_SHUFFLE))
def test_a_projector_is_the_originals(ps_version):
    mlp1 = original_mlp1(8, 12)
    with torch.no_grad():
        for parameter in mlp1.parameters():
            parameter.copy_(torch.randn_like(parameter))
    projector = Projector(8, 12, ps_version=ps_version)
    projector.load_state_dict(mlp1.state_dict())
    x = torch.randn(3, 36, 8)
    got = projector(x.flatten(0, 1), PackedGrid([(1, 6, 6)] * 3), impl="reference")
    torch.testing.assert_close(got, original_projection(x, mlp1, 6, ps_version == "v1"))


def test_a_projector_names_what_it_refuses():
    with pytest.raises(ValueError, match="ps_version must be one of 'v1', 'v2', got 'v3'"):
        Projector(8, 12, ps_version="v3")
    with pytest.raises(TypeError, match=r"vit_hidden_size must be an integer, got 8\.5"):
        Projector(8.5, 12)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "p",
    [
        plan(90, 60, image_size=56, max_tiles=2),
        plan_video(2, None, 90, 60, image_size=56),
    ],
    ids=["image", "video"],
)
def test_gradients_reach_the_tokens_and_the_projector(p, impl):
    mlp1 = original_mlp1(8, 12)
    projector = Projector(8, 12)
    projector.load_state_dict(mlp1.state_dict())
    x = torch.randn(p.num_tiles, 16, 8)
    grad = torch.randn(p.llm_tokens, 12)
    ours, originals = (x.clone().requires_grad_() for _ in range(2))
    got = projector(ours.flatten(0, 1), PackedGrid(p.grids), impl=impl)
    got.backward(grad)
    want = original_projection(originals, mlp1, 4, False)
    want.backward(grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.grad, originals.grad)
    for parameter, other in zip(projector.parameters(), mlp1.parameters(), strict=True):
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, other.grad)
