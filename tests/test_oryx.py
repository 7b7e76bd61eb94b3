"""Oryx's plans, pixels and token path, against outputs of the original code and plain loops."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from patchpack import PackedGrid
from patchpack.systems import oryx
from patchpack.systems.oryx import (
    DynamicCompressor,
    SimpleMlp,
    TokenPath,
    add_position,
    frame_indices,
    layout,
    plan,
    plan_video,
    preprocess,
)

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


@pytest.mark.parametrize(
    ("width", "height", "low", "high", "llm_tokens"),
    [
        (1536, 1536, (384, 384), (1536, 1536), 9915),
        (4000, 500, (128, 1088), (480, 4000), 8085),
    ],
)
def test_other_images_have_the_views_of_the_original(width, height, low, high, llm_tokens):
    p = plan(height, width)
    assert (p.low, p.high, p.llm_tokens) == (low, high, llm_tokens)


def test_another_video_has_the_frames_of_the_original():
    p = plan_video(64, None, 200, 200)
    assert (p.high, p.grids, p.llm_tokens) == ((256, 256), ((64, 16, 16),), 4674)
    assert plan_video(64, None, 200, 200, modality="video_long").high == (256, 256)


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


# Patches -----------------------------------------------------------------------------------------


def photo(name="astronaut.png"):
    skimage = pytest.importorskip("skimage")
    return PIL.Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def patches_by_hand(image):
    """The patches of a Pillow image whose sides divide by 16, one after the other."""
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    height, width, _ = pixels.shape
    return np.stack(
        [
            pixels[y : y + 16, x : x + 16].transpose(2, 0, 1).ravel()
            for y in range(0, height, 16)
            for x in range(0, width, 16)
        ]
    )


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("astronaut.png", (0, 0, 300, 211)),
        ("coffee.png", (100, 50, 433, 70)),  # 20 rows, enlarged to 64 x 1065 first
        ("chelsea.png", (9, 9, 20, 31)),
    ],
)
def test_views_are_resized_one_after_the_other(name, box):
    image = photo(name).crop(box)
    p = plan(image.height, image.width)
    steps = [image]
    for height, width in (p.enlarged, p.high, p.low):
        steps.append(steps[-1].resize((width, height), PIL.Image.Resampling.BICUBIC))
    want = np.concatenate([patches_by_hand(steps[3]), patches_by_hand(steps[2])])
    pixels, grid = preprocess([image])
    assert np.array_equal(pixels.numpy(), want)
    assert grid.grid_thw.tolist() == [list(g) for g in p.grids]
    assert grid.spatial_merge_size == 1
    assert grid.num_segments == 2


@pytest.mark.parametrize("modality", ["video", "video_long"])
def test_frames_of_a_video_follow_each_other(modality):
    frames = [photo().crop((i, 2 * i, 150 + i, 170 + 2 * i)) for i in range(3)]
    p = plan_video(3, 1.0, 170, 150, modality=modality)
    height, width = p.high
    want = np.concatenate([patches_by_hand(frame.resize((width, height))) for frame in frames])
    pixels, grid = preprocess([frames], [p])
    assert np.array_equal(pixels.numpy(), want)
    assert grid.num_segments == 3
    if modality == "video":
        assert torch.equal(preprocess([frames])[0], pixels)


def test_a_packed_batch_is_its_images_one_after_the_other():
    frames = [photo().crop((i, i, 80 + i, 90 + i)) for i in range(65)]
    items = [photo().crop((0, 0, 100, 70)), frames, photo("coffee.png").crop((0, 0, 9, 33))]
    pixels, grid = preprocess(items)
    alone = [preprocess([item]) for item in items]
    assert torch.equal(pixels, torch.cat([one for one, _ in alone]))
    assert torch.equal(grid.grid_thw, torch.cat([one.grid_thw for _, one in alone]))
    assert grid.grid_thw[2].tolist() == [65, 16, 16]  # frames chosen beforehand are all used
    empty, grid = preprocess([])
    assert empty.shape == (0, 768)
    assert grid.num_grids == 0


def test_preprocess_names_what_it_refuses():
    image = np.zeros((64, 64, 3), np.uint8)
    message = r"images\[0\] must have the frames, height and width of plans\[0\], \(1, 64, 65\)"
    with pytest.raises(ValueError, match=message):
        preprocess([image], [plan(64, 65)])
    with pytest.raises(TypeError, match=r"plans\[0\] must be a Plan, got tuple"):
        preprocess([image], [(64, 64)])
    with pytest.raises(
        ValueError, match="must leave 32 pixels a side of both views, got 1 x 20000"
    ):
        preprocess([np.zeros((1, 20_000, 3), np.uint8)])


def test_positions_come_from_a_table_of_128_x_128():
    grid = PackedGrid([(1, 24, 24), (1, 4, 6)])
    stored = torch.randn(1, 128 * 128, 3)  # as in the original's checkpoint
    x = torch.randn(grid.num_tokens, 3)
    maps = [
        nn.functional.interpolate(
            stored.view(1, 128, 128, 3).permute(0, 3, 1, 2), (h, w), mode="bilinear"
        )
        for _, h, w in grid.grid_thw.tolist()
    ]
    want = x + torch.cat([m[0].flatten(1).T for m in maps])
    torch.testing.assert_close(add_position(x, stored, grid, impl="reference"), want)
    assert torch.equal(
        add_position(x, stored.view(128, 128, 3), grid), add_position(x, stored, grid)
    )


# On-demand compression ---------------------------------------------------------------------------


def wave(b, *shape):
    """The golden cases' numbers: ``sin(b i + b)`` of the flat index."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (b * i + b).sin().float().view(shape)


def golden_compressor():
    compressor = DynamicCompressor(8)
    with torch.no_grad():
        for parameter, b in zip(compressor.parameters(), (0.3, 0.7, 1.1, 1.9), strict=True):
            parameter.copy_(0.2 * wave(b, *parameter.shape))
    return compressor


def golden_tokens(*shape):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.37 * i).cos().float().view(-1, shape[-1])


@golden("dynamic_compressor")
def test_the_compressor_is_the_originals(inputs, outputs):
    compressor = golden_compressor()
    t, h, w = (inputs[axis] for axis in "THW")
    x = golden_tokens(t, h, w, 8).requires_grad_()
    region = oryx.REGION[inputs["forward_type"]]
    y, grid = compressor(x, PackedGrid([(t, h, w)]), region)
    assert grid.grid_thw.tolist() == [[t, *outputs["size"]]]
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(y.view(t, -1, 8), torch.tensor(outputs["y"]), **close)
    i = torch.arange(y.numel(), dtype=torch.float64)
    y.backward((0.11 * i).sin().float().view_as(y))
    first = torch.tensor(outputs["grad_x_first8"])
    torch.testing.assert_close(x.grad.flatten()[:8], first, **close)
    assert x.grad.sum().item() == pytest.approx(outputs["grad_x_sum"], abs=1e-5)
    for name, l2 in (("query", "grad_qw_l2"), ("key", "grad_kw_l2")):
        grad = getattr(compressor, f"vlm_{name}_projector").weight.grad
        norm = 0 if grad is None else grad.norm().item()
        assert norm == pytest.approx(outputs[l2], abs=1e-5)


def test_a_long_video_is_compressed_by_16():
    # what the original gave for weights and tokens of the golden cases, to 7 digits
    y, grid = golden_compressor()(golden_tokens(1, 8, 4, 8), PackedGrid([(1, 8, 4)]), 4)
    assert grid.grid_thw.tolist() == [[1, 2, 1]]
    want = torch.tensor([0.1227218, 0.1049924, 0.0730527, 0.0312258])
    torch.testing.assert_close(y[0, :4], want, atol=1e-5, rtol=0)


@golden("dynamic_compressor_odd")
def test_odd_maps_are_refused_as_by_the_original(inputs, outputs):
    assert "RuntimeError" in outputs["error"]
    h, w = inputs["H"], inputs["W"]
    with pytest.raises(ValueError, match="rows and columns that divide by region=2, got 3 x 5"):
        golden_compressor()(torch.zeros(h * w, 8), PackedGrid([(1, h, w)]), 2)


def compress_by_hand(compressor, x, t, h, w, r):
    """The original's steps: queries of means, keys of patches, values as they are."""
    cells = x.view(t, h // r, r, w // r, r, -1).transpose(2, 3).reshape(-1, r * r, x.shape[1])
    mean = cells.mean(1)
    query = compressor.vlm_query_projector(mean)[:, None]
    key = compressor.vlm_key_projector(cells)
    p = (query @ key.mT / 16).softmax(-1)
    return mean + (p @ cells)[:, 0]


def test_one_patch_becomes_twice_itself():
    compressor = golden_compressor()
    x, grid = torch.randn(12, 8, requires_grad=True), PackedGrid([(1, 3, 4)])
    y, same = compressor(x, grid, 1)
    assert torch.equal(y, 2 * x)
    assert same is grid
    torch.testing.assert_close(compress_by_hand(compressor, x, 1, 3, 4, 1), y)
    y.sum().backward()
    assert all(parameter.grad is None for parameter in compressor.parameters())


def test_the_bias_of_keys_does_not_matter():
    compressor, x, grid = golden_compressor(), torch.randn(32, 8), PackedGrid([(2, 4, 4)])
    y, _ = compressor(x, grid, 2)
    with torch.no_grad():
        compressor.vlm_key_projector.bias += 100
    assert torch.equal(compressor(x, grid, 2)[0], y)
    y.sum().backward()
    assert compressor.vlm_key_projector.bias.grad is None


# The sequence ------------------------------------------------------------------------------------


@golden("projector_layout")
def test_the_layout_is_the_originals(inputs, outputs):
    mlp = SimpleMlp(1, 1)
    mlp.proj = nn.Identity()
    with torch.no_grad():
        for name in ("newline", "begin", "end", "sep"):
            getattr(mlp, f"image_{name}").fill_(inputs[name])
    if inputs["modality"] == "image":
        p = oryx.Plan(1, 1, "image", (1, 1), high=(32, 48), low=(32, 32))
        x = torch.tensor([*range(4), *range(10, 16)])
    else:
        p = oryx.Plan(1, 1, "video", (1, 1), high=(64, 64), frame_indices=(0, 1))
        x = torch.tensor(range(10, 18))
    sequence = mlp(x[:, None].float(), layout([p]))
    assert sequence.flatten().tolist() == outputs["seq"]
    assert len(sequence) == p.llm_tokens


# an image, a video of either kind, and an image again: views of a few patches
BATCH = [
    oryx.Plan(1, 1, "image", (1, 1), high=(32, 64), low=(64, 32)),
    oryx.Plan(1, 1, "video_long", (1, 1), high=(128, 128), frame_indices=(0, 1)),
    oryx.Plan(1, 1, "video", (1, 1), high=(64, 128), frame_indices=(0, 1, 2)),
    oryx.Plan(1, 1, "image", (1, 1), high=(64, 64), low=(32, 32)),
]


def token_path_by_hand(path, x, plans):
    """Loops over plans, views and rows."""
    mlp, sequence = path.mm_projector, []
    for p in plans:
        sequence.append(mlp.image_begin[None])
        for i, (t, h, w) in enumerate(p.grids):
            compressed = compress_by_hand(path.vision_resampler, x[: t * h * w], t, h, w, p.region)
            x = x[t * h * w :]
            for frame in mlp.proj(compressed).view(t, h // p.region, w // p.region, -1):
                for row in frame:
                    sequence += [row, mlp.image_newline[None]]
                if p.low is None or i == 0:
                    sequence.append(mlp.image_sep[None])
        sequence.append(mlp.image_end[None])
    return torch.cat(sequence)


@settings(max_examples=10)
@given(st.lists(st.sampled_from(BATCH), max_size=5))
def test_the_token_path_is_loops_over_rows(plans):
    path = TokenPath(4, 6).double()
    x = torch.randn(sum(p.vit_tokens for p in plans), 4, dtype=torch.float64)
    sequence = path(x, plans)
    assert len(sequence) == layout(plans).num_tokens == sum(p.llm_tokens for p in plans)
    if plans:
        torch.testing.assert_close(sequence, token_path_by_hand(path, x, plans))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("plans", [BATCH[:1], BATCH[2:3], BATCH], ids=["image", "video", "both"])
def test_gradients_reach_all_of_the_token_path(plans, impl):
    path = TokenPath(8, 16, impl=impl)
    x = torch.randn(sum(p.vit_tokens for p in plans), 8, requires_grad=True)
    sequence = path(x, plans)
    grad = torch.randn_like(sequence)
    leaves = {"x": x, **dict(path.named_parameters())}
    bias = "vision_resampler.vlm_key_projector.bias"
    leaves.pop(bias)
    got = torch.autograd.grad(sequence, leaves.values(), grad, allow_unused=True)
    want = token_path_by_hand(path, x, plans)
    torch.testing.assert_close(sequence, want)
    want = torch.autograd.grad(want, leaves.values(), grad, allow_unused=True)
    for name, one, other in zip(leaves, got, want, strict=True):
        if plans == BATCH[:1] and "vision_resampler" in name:  # by hand there are zeros
            assert one is None
            assert other.abs().max() < 1e-6
        else:
            assert one.abs().max() > 1e-3, name
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_parameters_are_named_as_in_the_original():
    names = [
        f"vision_resampler.vlm_{n}_projector.{p}"
        for n in ("query", "key")
        for p in ("weight", "bias")
    ]
    names += [f"mm_projector.image_{name}" for name in ("newline", "begin", "end", "sep")]
    names += [f"mm_projector.proj.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    assert sorted(TokenPath(4, 6).state_dict()) == sorted(names)


def test_vectors_take_the_dtype_of_tokens():
    path = TokenPath(4, 6).to(torch.bfloat16)
    x = torch.randn(BATCH[0].vit_tokens, 4, dtype=torch.bfloat16)
    assert path(x, BATCH[:1]).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert TokenPath(4, 6)(x.float(), BATCH[:1]).dtype == torch.bfloat16
        every = torch.randn(sum(p.vit_tokens for p in BATCH), 4)
        assert TokenPath(4, 6)(every, BATCH).dtype == torch.bfloat16


def test_the_token_path_names_what_it_refuses():
    path = TokenPath(4, 6)
    with pytest.raises(ValueError, match=r"x must have shape \[16, 4\], got \[15, 4\]"):
        path(torch.zeros(15, 4), BATCH[:1])
    with pytest.raises(TypeError, match=r"plans\[1\] must be a Plan, got tuple"):
        path(torch.zeros(16, 4), [BATCH[0], (1, 2)])
    with pytest.raises(TypeError, match="plans must be a sequence of plans, got Plan"):
        layout(BATCH[0])
    with pytest.raises(TypeError, match=r"region must be an integer, got 2\.0"):
        path.vision_resampler(torch.zeros(16, 4), PackedGrid([(1, 4, 4)]), 2.0)
