"""Pixtral's sizes, pixels, positions and rows, against outputs of the original code."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack import PackedGrid
from patchpack.systems import pixtral
from patchpack.systems.pixtral import (
    IMG,
    IMG_BREAK,
    IMG_END,
    plan,
    preprocess,
    rotate,
    vision_tokens,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
SIZES = st.integers(1, 20_000)


def golden(function):
    """All cases of ``pixtral.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"pixtral.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


# Resolution and aspect ---------------------------------------------------------------------------


@golden("resize")
def test_the_size_of_an_image_is_the_originals(inputs, outputs):
    options = {"longest_edge": inputs["longest_edge"], "patch_size": inputs["patch"]}
    p = plan(inputs["height"], inputs["width"], **options)
    assert list(p.resized) == outputs["hw"]
    assert p.grids == ((1, *outputs["grid"]),)


@settings(max_examples=200)
@given(SIZES, SIZES, st.sampled_from([(1024, 16), (1540, 14), (1540, 28)]))
def test_every_size_is_that_of_transformers_or_a_clear_error(height, width, limits):
    module = pytest.importorskip("transformers.models.pixtral.image_processing_pil_pixtral")
    edge, patch_size = limits
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    want = module.get_resize_output_image_size(image, edge, patch_size, "channels_first")
    if 0 in want:
        message = f"at least one pixel a side within longest_edge={edge}, got {height} x {width}"
        with pytest.raises(ValueError, match=message):
            plan(height, width, longest_edge=edge, patch_size=patch_size)
        return
    p = plan(height, width, longest_edge=edge, patch_size=patch_size)
    assert p.resized == want
    ((t, rows, cols),) = p.grids
    assert (t, rows * patch_size, cols * patch_size) == (1, *p.resized)
    assert p.llm_tokens == p.vit_tokens == math.prod(want) // patch_size**2
    assert p.total_tokens == rows * (cols + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"longest_edge": -1}, ValueError, "longest_edge must be at least 1, got -1"),
        ({"patch_size": "16"}, TypeError, "patch_size must be an integer, got '16'"),
        (
            {"height": 1, "width": 1025},
            ValueError,
            "height and width must leave at least one pixel a side within longest_edge=1024,"
            " got 1 x 1025",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message


# Patches -----------------------------------------------------------------------------------------


def photos():
    """Pictures of several sizes, one above 1024 pixels."""
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "coffee.png", "retina.jpg")
    images = [PIL.Image.open(folder / name).convert("RGB") for name in names]
    return [images[0].crop((3, 5, 120, 310)), images[1].crop((0, 0, 1, 9)), images[2]]


def patches_of(pixels):
    """The patches of ``[3, height, width]``, in loops."""
    _, height, width = pixels.shape
    return np.stack(
        [
            pixels[:, y : y + 16, x : x + 16].ravel()
            for y in range(0, height, 16)
            for x in range(0, width, 16)
        ]
    )


def test_preprocess_matches_transformers():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "PixtralImageProcessorPil", None)
    if kind is None:
        pytest.skip("this version of transformers needs torchvision")
    want = kind()(images=photos(), return_tensors="np")
    pixels, grid = preprocess(photos())
    assert (16 * grid.grid_thw[:, 1:]).tolist() == want["image_sizes"].tolist()
    sizes = zip(want["pixel_values"], want["image_sizes"], strict=True)
    patches = [patches_of(image[:, :height, :width]) for image, (height, width) in sizes]
    assert np.array_equal(pixels.numpy(), np.concatenate(patches))


def test_preprocess_is_what_its_words_say():
    image = photos()[0]
    height, width = plan(image.height, image.width).resized
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    values = np.asarray(resized, np.float64).transpose(2, 0, 1) / 255
    mean, std = (np.array(x).reshape(3, 1, 1) for x in (pixtral.MEAN, pixtral.STD))
    want = patches_of((values - mean) / std)
    np.testing.assert_allclose(preprocess([image])[0], want, atol=1e-6)


def test_a_packed_batch_is_its_images_one_after_the_other():
    images = photos()[:2]
    pixels, grid = preprocess(images, dtype=torch.bfloat16)
    alone = [preprocess([image]) for image in images]
    assert torch.equal(pixels, torch.cat([one for one, _ in alone]).bfloat16())
    assert torch.equal(grid.grid_thw, torch.cat([one.grid_thw for _, one in alone]))
    empty, grid = preprocess([])
    assert empty.shape == (0, 768)
    assert grid.num_grids == 0


def test_preprocess_names_what_it_refuses():
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="images must be single images, got a video of 2 frames"):
        preprocess([[image, image]])
    with pytest.raises(ValueError, match=r"plans must share patch_size, got \[14, 16\]"):
        preprocess([image, image], [plan(64, 64), plan(64, 64, patch_size=14)])
    with pytest.raises(TypeError, match=r"plans\[0\] must be a Plan, got tuple"):
        preprocess([image], [(4, 4)])


# Positions ---------------------------------------------------------------------------------------


@golden("position_ids")
def test_positions_count_rows_and_columns_from_each_image(inputs, outputs):
    rows, cols = PackedGrid(inputs["grids"]).position_ids.unbind(1)
    assert (rows * inputs["max_width"] + cols).tolist() == outputs["ids"]


@golden("freqs")
def test_rotary_angles_are_the_originals(inputs, outputs):
    d = inputs["head_dim"]
    grid = PackedGrid([(inputs["h"] + 1, inputs["w"] + 1)])
    x = torch.cat([torch.ones(d // 2), torch.zeros(d // 2)]).expand(grid.num_tokens, 1, d)
    assert inputs["theta"] == 10_000
    cos, sin = rotate(x, x, grid)[0][-1, 0].chunk(2)
    angle = torch.tensor(outputs["freqs_first32"])
    torch.testing.assert_close(cos, angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin, angle.sin(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_mistrals_with_either_order_of_channels(interleaved):
    grid, d = PackedGrid([(3, 4), (5, 2)]), 64
    q, k = torch.randn(2, grid.num_tokens, 3, d)
    row, col = grid.position_ids.double().unbind(1)
    frequency = 10_000.0 ** -(torch.arange(0, d, 2).double() / d)
    angle = torch.cat([row[:, None] * frequency[::2], col[:, None] * frequency[1::2]], 1)
    pairs = (
        (lambda x: x.unflatten(2, (-1, 2)))
        if interleaved
        else (lambda x: torch.stack(x.chunk(2, 2), 3))
    )
    for x, y in zip((q, k), rotate(q, k, grid, interleaved=interleaved), strict=True):
        turned = (
            torch.view_as_complex(pairs(x.double()).contiguous())
            * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        want = torch.view_as_real(turned).float()
        torch.testing.assert_close(pairs(y), want, atol=1e-5, rtol=0)


# Rows --------------------------------------------------------------------------------------------


def test_a_token_stands_at_the_end_of_each_row():
    p = plan(33, 40)
    assert p.grids == ((1, 3, 3),)
    row = [IMG, IMG, IMG]
    assert vision_tokens(p) == [*row, IMG_BREAK, *row, IMG_BREAK, *row, IMG_END]
    assert vision_tokens(plan(1, 1)) == [IMG, IMG_END]
    ids = vision_tokens(p, image_token_id=7, image_break_token_id=8, image_end_token_id=0)
    assert ids == [7, 7, 7, 8, 7, 7, 7, 8, 7, 7, 7, 0]


@settings(max_examples=50)
@given(st.integers(10, 2000), st.integers(10, 2000))
def test_the_plan_counts_the_tokens(height, width):
    p = plan(height, width)
    ids = vision_tokens(p)
    assert ids.count(IMG) == p.llm_tokens
    assert len(ids) == p.total_tokens


def test_vision_tokens_names_what_it_refuses():
    with pytest.raises(TypeError, match="plan must be a Plan, got tuple"):
        vision_tokens((1, 2))
    with pytest.raises(ValueError, match="image_end_token_id must be at least 0, got -1"):
        vision_tokens(pixtral.plan(16, 16), image_end_token_id=-1)
