"""Qwen2-VL's plans, pixels and positions, against outputs of the original code and plain loops."""

import functools
import importlib
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from patchpack import PackedGrid, patchify
from patchpack.systems import _images, qwen2_vl
from patchpack.systems.qwen2_vl import (
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    frame_indices,
    max_frame_pixels,
    mrope_position_ids,
    plan,
    plan_video,
    preprocess,
    smart_nframes,
    smart_resize,
    validate_vision_tokens,
    vision_tokens,
)
from patchpack.testing import contract

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
TEXT = 10


def golden(function):
    """All cases of ``qwen2vl.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"qwen2vl.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


def picture(height, width, mode="RGB", seed=0):
    """A smooth image with noise, so that neither filter nor rounding goes unseen."""
    rng = np.random.default_rng(seed)
    bands = len(PIL.Image.new(mode, (1, 1)).getbands())
    y, x, c = np.ogrid[:height, :width, :bands]
    wave = 127 + 100 * np.sin(y / 9 + c) * np.cos(x / 13 - c)
    pixels = (wave + rng.integers(-27, 28, wave.shape)).astype(np.uint8)
    return PIL.Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode=None)


# Naive dynamic resolution ------------------------------------------------------------------------


@golden("smart_resize")
def test_smart_resize_is_the_originals(inputs, outputs):
    calls = {
        "hf_4_57_1_default": {},
        "hf_4_45_2_default": {"variant": "transformers_4_45"},
        "utils_default_4_to_16384_tokens": {"variant": "qwen_vl_utils"},
        "hf_4_57_1_256_1280": {"min_pixels": 256 * 784, "max_pixels": 1280 * 784},
        "factor32_qwen3": {"variant": "qwen_vl_utils", "factor": 32},
    }
    assert outputs.keys() == calls.keys()
    for name, options in calls.items():
        if isinstance(outputs[name], str):
            with pytest.raises(ValueError, match="height and width must be"):
                smart_resize(**inputs, **options)
            continue
        height, width = smart_resize(**inputs, **options)
        assert [height, width] == outputs[name]["hw"]
        assert height * width // options.get("factor", 28) ** 2 == outputs[name]["llm_tokens"]


@pytest.mark.parametrize(
    ("height", "width", "options", "resized"),
    [
        (57, 5600, {}, (56, 5600)),
        (4000, 3000, {}, (1148, 840)),
        (4000, 3000, {"variant": "qwen_vl_utils"}, (4004, 2996)),
        (4000, 3000, {"variant": "qwen_vl_utils", "factor": 32}, (4000, 3008)),
        (800, 1300, {}, (784, 1260)),
        (800, 1300, {"variant": "qwen_vl_utils"}, (812, 1288)),
        (1, 100, {}, (28, 560)),
        (1, 100, {"variant": "qwen_vl_utils"}, (28, 112)),
        (1, 100, {"min_pixels": 256 * 784}, (56, 4480)),
        (1, 100, {"variant": "qwen_vl_utils", "factor": 32}, (32, 640)),
    ],
)
def test_other_sizes_are_resized_as_by_the_original(height, width, options, resized):
    assert smart_resize(height, width, **options) == resized


@golden("smart_resize_extreme")
def test_smart_resize_of_thin_images_is_the_originals(inputs, outputs):
    assert list(smart_resize(**inputs)) == outputs["hf_4_57_1"]
    assert list(smart_resize(**inputs, variant="qwen_vl_utils")) == outputs["utils_0_0_8"]
    assert outputs["utils_0_0_8"] == outputs["utils_0_0_14"]


def test_plan_refuses_the_empty_image_that_smart_resize_can_give():
    options = {"min_pixels": 3136, "max_pixels": 100352, "variant": "qwen_vl_utils"}
    assert smart_resize(30, 6000, **options) == (0, 4480)
    message = (
        "height and width must leave at least one token a side in variant 'qwen_vl_utils',"
        " got 30 x 6000, resized to 0 x 4480"
    )
    with pytest.raises(ValueError, match=message):
        plan(30, 6000, **options)
    with pytest.raises(ValueError, match="must leave at least one token a side"):
        plan_video(768, None, 60, 12000, nframes=768)
    options = {"max_pixels": 100352, "variant": "transformers_4_45"}
    assert smart_resize(28, 5600, **options) == (0, 4480)
    with pytest.raises(ValueError, match="must leave at least one token a side"):
        plan(28, 5600, **options)


@golden("token_count")
def test_an_image_of_224_takes_66_tokens(inputs, outputs):
    p = plan(inputs["height"], inputs["width"])
    assert p.vit_tokens == outputs["patches"]
    assert p.llm_tokens == outputs["merged"]
    assert p.total_tokens == p.llm_tokens + p.markup_tokens == outputs["with_start_end"] == 66
    assert p.grid_thw == (1, 16, 16)
    assert p.resized == (p.height, p.width) == (224, 224)
    assert p.num_frames == 1
    assert p.frame_indices is None


SIZES = st.integers(1, 20_000)


@settings(deadline=None, max_examples=300)
@given(SIZES, SIZES, st.sampled_from(sorted(qwen2_vl.IMAGE_TOKENS)))
def test_every_size_has_a_consistent_plan_or_a_clear_error(height, width, variant):
    too_thin = max(height, width) > 200 * min(height, width)
    too_small = variant == "transformers_4_45" and min(height, width) < 28
    if too_thin or too_small:
        with pytest.raises(ValueError, match=r"height and width must be .*, got \d+ x \d+"):
            plan(height, width, variant=variant)
        return
    p = plan(height, width, variant=variant)
    t, rows, cols = p.grid_thw
    least, most = (tokens * 28**2 for tokens in qwen2_vl.IMAGE_TOKENS[variant])
    area = math.prod(p.resized)
    assert (t * 14 // 14, rows * 14, cols * 14) == (1, *p.resized)
    assert rows % 2 == cols % 2 == 0
    assert p.vit_tokens == t * rows * cols == 4 * p.llm_tokens
    assert p.llm_tokens == area // 28**2
    assert area <= most or min(p.resized) == 28
    assert area >= least


AREAS = st.integers(1, 2_000_000)


@settings(deadline=None, max_examples=300)
@given(SIZES, SIZES, AREAS, AREAS)
def test_limits_may_cross_as_in_transformers(height, width, least, most):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    if max(height, width) <= 200 * min(height, width):
        want = module.smart_resize(height, width, 28, least, most)
        assert smart_resize(height, width, min_pixels=least, max_pixels=most) == want


def test_too_many_pixels_are_looked_for_before_too_few():
    limits = {"min_pixels": 100 * 784, "max_pixels": 25 * 784}
    for variant in qwen2_vl.IMAGE_TOKENS:
        assert smart_resize(280, 280, **limits, variant=variant) == (140, 140)
        assert smart_resize(112, 112, **limits, variant=variant) == (280, 280)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_numpy_integers_are_as_good_as_pythons(kind):
    sizes = {"height": 50_000, "width": 60_000, "patch_size": 14}
    p = plan(**{name: kind(n) for name, n in sizes.items()}, max_pixels=kind(50_000))
    assert p == plan(**sizes, max_pixels=50_000)
    numbers = (p.height, p.width, *p.resized, *p.grid_thw, p.patch_size)
    assert all(type(n) is int for n in numbers)
    p = plan_video(kind(1000), kind(30), kind(480), kind(640), min_frames=kind(2))
    assert p == plan_video(1000, 30, 480, 640, min_frames=2)
    assert all(type(n) is int for n in (p.height, p.width, *p.frame_indices, *p.grid_thw))
    assert max_frame_pixels(kind(100), factor=kind(28)) == max_frame_pixels(100)
    assert smart_nframes(kind(1000), kind(30), max_frames=kind(9)) == 8
    assert frame_indices(kind(1000), kind(4)) == frame_indices(1000, 4)


def test_any_real_number_is_a_rate_or_a_limit():
    for fps in (np.float32(29.97), np.float64(29.97), Fraction(30_000, 1001)):
        assert plan_video(300, fps, 480, 640) == plan_video(300, 29.97, 480, 640)
    assert smart_nframes(300, 30, fps=Fraction(1, 2)) == smart_nframes(300, 30, fps=0.5)
    for total in (np.float32(10**6), np.int32(10**6), Fraction(10**6)):
        limit = max_frame_pixels(10, total_pixels=total)
        assert limit == 200_000
        assert type(limit) is float
    assert smart_resize(480, 640, max_pixels=Fraction(10**6, 3)) == smart_resize(
        480, 640, max_pixels=10**6 / 3
    )


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("merge_size", [1, 2, 4])
def test_a_plan_follows_patch_and_merge_size(patch_size, merge_size):
    p = plan(480, 640, patch_size=patch_size, merge_size=merge_size, temporal_patch_size=3)
    factor = patch_size * merge_size
    assert p.resized == smart_resize(480, 640, factor=factor)
    assert p.grid_thw == (1, p.resized[0] // patch_size, p.resized[1] // patch_size)
    assert p.llm_tokens == math.prod(p.resized) // factor**2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"height": True}, TypeError, "height must be an integer, got True"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"merge_size": "2"}, TypeError, "merge_size must be an integer, got '2'"),
        ({"min_pixels": 0}, ValueError, "min_pixels must be above 0, got 0"),
        ({"max_pixels": math.nan}, ValueError, "max_pixels must be above 0, got nan"),
        ({"min_pixels": "many"}, TypeError, "min_pixels must be a number, got 'many'"),
        ({"min_pixels": math.inf}, ValueError, "min_pixels must be below 2**127, got inf"),
        ({"height": 2**63}, ValueError, f"height must be below 2**63, got {2**63}"),
        (
            {"height": 10**200, "width": 10**200},
            ValueError,
            f"height must be below 2**63, got {10**200}",
        ),
        (
            {"variant": "qwen"},
            ValueError,
            "variant must be one of 'transformers', 'transformers_4_45', 'qwen_vl_utils',"
            " got 'qwen'",
        ),
        (
            {"height": 10, "width": 2001},
            ValueError,
            "height and width must be within a ratio of 200, got 10 x 2001",
        ),
        (
            {"height": 27, "width": 1000, "variant": "transformers_4_45"},
            ValueError,
            "height and width must be at least factor=28 in variant 'transformers_4_45',"
            " got 27 x 1000",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message


# Video -------------------------------------------------------------------------------------------


@golden("smart_nframes")
def test_smart_nframes_is_the_originals(inputs, outputs):
    for version, count in outputs.items():
        variant = f"qwen_vl_utils_{version[1:]}"
        arguments = (inputs["total_frames"], inputs["video_fps"])
        assert smart_nframes(*arguments, **inputs["ele"], variant=variant) == count
        p = plan_video(*arguments, 240, 320, **inputs["ele"], variant=variant)
        assert p.num_frames == count
        assert p.grid_thw[0] == count // 2


@pytest.mark.parametrize(
    ("total", "video_fps", "options", "count"),
    [
        (3000, 30, {}, 200),
        (3, 1, {}, 2),
        (1801, 30, {"max_frames": 128}, 120),
        (100, 30, {"nframes": 9}, 8),
    ],
)
def test_other_videos_have_the_originals_number_of_frames(total, video_fps, options, count):
    for version in ("0_0_8", "0_0_14"):
        variant = f"qwen_vl_utils_{version}"
        assert smart_nframes(total, video_fps, **options, variant=variant) == count


@pytest.mark.parametrize(
    ("count", "height", "width", "tokens", "resized", "llm_tokens"),
    [
        (128, 720, 1280, 24_576, (392, 728), 23_296),
        (256, 720, 1280, 24_576, (280, 504), 23_040),
        (768, 720, 1280, 24_576, (224, 420), 46_080),
        (64, 1080, 1920, 16_384, (448, 840), 15_360),
    ],
)
def test_other_videos_have_the_originals_budget(count, height, width, tokens, resized, llm_tokens):
    p = plan_video(count, None, height, width, total_pixels=tokens * 28**2)
    assert (p.resized, p.llm_tokens) == (resized, llm_tokens)


@golden("frame_indices")
def test_frame_indices_are_the_originals(inputs, outputs):
    assert list(frame_indices(**inputs)) == outputs["idx"]
    p = plan_video(inputs["total_frames"], None, 240, 320, nframes=inputs["nframes"])
    assert list(p.frame_indices) == outputs["idx"]


@golden("video_pixels")
def test_the_budget_of_a_video_is_the_originals(inputs, outputs):
    limits = {name: inputs[name] for name in ("min_pixels", "total_pixels")}
    assert inputs["cap"] == 768 * 28**2
    assert max_frame_pixels(inputs["nframes"], **limits) == outputs["max_pixels"]
    n = inputs["nframes"]
    p = plan_video(n, None, inputs["height"], inputs["width"], nframes=n, **limits)
    assert list(p.resized) == outputs["hw"]
    assert list(p.grid_thw) == outputs["grid_thw"]
    assert p.llm_tokens == outputs["llm_tokens"]


def test_the_versions_of_the_sampler_differ_where_they_should():
    # 5 frames are wanted: halves round to even, and down
    assert smart_nframes(75, 30) == 4
    # 7 frames are wanted
    assert smart_nframes(105, 30, variant="qwen_vl_utils_0_0_8") == 8
    assert smart_nframes(105, 30, variant="qwen_vl_utils_0_0_14") == 6
    # a limit above the length of the video: only the later version caps it
    with pytest.raises(ValueError, match="must be from frame_factor=2 to total_frames=10, got 20"):
        smart_nframes(10, 1, max_frames=20, variant="qwen_vl_utils_0_0_8")
    assert smart_nframes(10, 1, max_frames=20, variant="qwen_vl_utils_0_0_14") == 10
    # a limit of the user above the budget: only the later version keeps the budget
    sizes = {
        variant: plan_video(
            300, 30, 1080, 1920, max_pixels=1024 * 784, variant=f"qwen_vl_utils_{variant}"
        ).resized
        for variant in ("0_0_8", "0_0_14")
    }
    assert sizes == {"0_0_8": (672, 1176), "0_0_14": (560, 1008)}
    # and below the budget both keep to it
    for variant in qwen2_vl.VIDEO_TOKENS:
        p = plan_video(300, 30, 1080, 1920, max_pixels=200 * 784, variant=variant)
        assert p.resized == (280, 504)
    # limits that cross: only the later version refuses them
    limits = {"max_pixels": 50_176, "variant": "qwen_vl_utils_0_0_8"}
    assert plan_video(300, 30, 1080, 1920, **limits).resized == (168, 280)
    message = (
        "max_pixels must be at least min_pixels=100352 in variant 'qwen_vl_utils_0_0_14', got 50176"
    )
    with pytest.raises(ValueError, match=message):
        plan_video(300, 30, 1080, 1920, max_pixels=50_176, variant="qwen_vl_utils_0_0_14")
    # a share need not be whole
    assert max_frame_pixels(100) == 385_351.68
    # 0.9 of 128000 tokens
    assert max_frame_pixels(600, variant="qwen_vl_utils_0_0_14") == 115_200 * 784 / 300
    with pytest.raises(ValueError, match="variant must be one of 'qwen_vl_utils_0_0_8'"):
        max_frame_pixels(4, variant="transformers")


@settings(deadline=None)
@given(st.integers(1, 200))
def test_frames_chosen_beforehand_are_all_used(total_frames):
    p = plan_video(total_frames, None, 480, 640)
    assert p.frame_indices == tuple(range(total_frames))
    assert p.grid_thw[0] == math.ceil(total_frames / 2)


def test_frames_chosen_beforehand_share_the_budget_of_a_video():
    for variant in ("qwen_vl_utils_0_0_8", "qwen_vl_utils_0_0_14"):
        chosen = plan_video(128, None, 720, 1280, variant=variant)
        assert chosen == plan_video(128, None, 720, 1280, nframes=128, variant=variant)
    assert plan_video(128, None, 720, 1280).resized == (392, 728)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_frames": 16},
            "min_frames and max_frames must be left out where all frames are used, got 4 and 16",
        ),
        (
            {"min_frames": 8},
            "min_frames and max_frames must be left out where all frames are used, got 8 and None",
        ),
    ],
)
def test_limits_that_chosen_frames_do_not_have_are_refused(options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        plan_video(64, None, 480, 640, **options)
    assert str(raised.value) == message


def test_the_default_device_and_dtype_do_not_matter():
    image, video = picture(61, 95), [picture(61, 95, seed=i) for i in range(3)]
    calls = [
        lambda: frame_indices(2**24 + 11, 4),  # 24 bits round these
        lambda: plan_video(300, 30, 480, 640),
        lambda: preprocess([image, video]),
        lambda: preprocess([torch.zeros(3, 56, 56, device="cpu")]),
    ]
    want = [call() for call in calls]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = [call() for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
    assert got[:2] == want[:2]
    for (pixels, grid), (want_pixels, want_grid) in zip(got[2:], want[2:], strict=True):
        assert torch.equal(pixels, want_pixels)
        assert torch.equal(grid.cu_seqlens, want_grid.cu_seqlens)


@settings(deadline=None)
@given(
    st.integers(1, 5000),
    st.sampled_from([1, 10, 23.976, 25, 30, 60]),
    SIZES,
    SIZES,
    st.sampled_from(sorted(qwen2_vl.VIDEO_TOKENS)),
)
def test_every_video_has_a_consistent_plan_or_a_clear_error(total, fps, height, width, variant):
    call = functools.partial(plan_video, total, fps, height, width, variant=variant)
    if total < 2:
        with pytest.raises(ValueError, match="frame_factor=2 to total_frames=1, got 0"):
            call()
        return
    limits = (
        128 * 784,
        max_frame_pixels(smart_nframes(total, fps, variant=variant), variant=variant),
    )
    if max(height, width) > 200 * min(height, width) or 0 in smart_resize(
        height, width, min_pixels=limits[0], max_pixels=limits[1], variant="qwen_vl_utils"
    ):
        with pytest.raises(ValueError, match=r"height and width must .*, got"):
            call()
        return
    p = call()
    assert p.num_frames % 2 == 0
    assert p.frame_indices[0] == 0
    assert p.frame_indices[-1] == total - 1
    assert all(a < b for a, b in itertools.pairwise(p.frame_indices))
    assert p.grid_thw == (p.num_frames // 2, p.resized[0] // 14, p.resized[1] // 14)
    assert p.vit_tokens == 4 * p.llm_tokens
    # what is below the budget grows, and rounding up can then pass a narrow one
    nearest = math.prod(max(round(side / 28), 1) * 28 for side in (height, width))
    area = math.prod(p.resized)
    assert area <= limits[1] or min(p.resized) == 28 or nearest < limits[0] <= area
    assert p.total_tokens == len(vision_tokens(p))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fps": 1.0, "nframes": 8}, ValueError, "fps must be None where nframes=8 is given"),
        ({"nframes": 400}, ValueError, "frame_factor=2 to total_frames=300, got 400"),
        ({"nframes": 1}, ValueError, "frame_factor=2 to total_frames=300, got 0"),
        ({"nframes": 7.5}, TypeError, "nframes must be an integer, got 7.5"),
        ({"video_fps": 0}, ValueError, "video_fps must be above 0, got 0"),
        ({"video_fps": None, "fps": 2.0}, ValueError, "video_fps or nframes must be given"),
        ({"total_frames": 0}, ValueError, "total_frames must be at least 1, got 0"),
        ({"max_frames": 0}, ValueError, "max_frames must be at least 1, got 0"),
        ({"total_pixels": -1}, ValueError, "total_pixels must be above 0, got -1"),
        ({"max_pixels": "many"}, TypeError, "max_pixels must be a number, got 'many'"),
        ({"total_frames": 10**200}, ValueError, r"total_frames must be below 2\*\*63, got 1000"),
        ({"video_fps": "fast"}, TypeError, "video_fps must be a number, got 'fast'"),
        ({"variant": "qwen_vl_utils"}, ValueError, "variant must be one of 'qwen_vl_utils_0_0_8'"),
    ],
)
def test_plan_video_names_what_it_refuses(arguments, error, message):
    call = {"total_frames": 300, "video_fps": 30, "height": 480, "width": 640, **arguments}
    with pytest.raises(error, match=message):
        plan_video(**call)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "total_frames must be at least 1, got 0"),
        ((300, -6), ValueError, "nframes must be at least 1, got -6"),
        ((300.0, 4), TypeError, "total_frames must be an integer, got 300.0"),
    ],
)
def test_frame_indices_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        frame_indices(*arguments)


def test_no_frame_lies_past_the_last():
    assert frame_indices(16_777_220, 2) == (0, 16_777_219)  # which float32 rounds up


# Patches -----------------------------------------------------------------------------------------


@golden("cu_seqlens")
def test_every_frame_is_a_segment(inputs, outputs):
    cu_seqlens = PackedGrid(inputs["grid_thw"], 2).cu_seqlens
    assert cu_seqlens.tolist() == outputs["cu_seqlens"]
    assert str(cu_seqlens.dtype) == f"torch.{outputs['dtype']}"


SMALL = [(56, 84), (100, 60), (37, 200), (224, 224), (300, 411)]


def test_preprocess_matches_transformers():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if kind is None:
        kind = transformers.Qwen2VLImageProcessor
    images = [picture(h, w, seed=i) for i, (h, w) in enumerate(SMALL)]
    images.append(picture(90, 70, "L"))
    images.append(picture(64, 100).convert("P"))
    images.append(picture(120, 80, "RGBA"))
    want = kind()(images=images, return_tensors="np")
    pixels, grid = preprocess(images)
    assert grid.grid_thw.tolist() == want["image_grid_thw"].tolist()
    assert grid.spatial_merge_size == 2
    assert np.array_equal(pixels.numpy(), want["pixel_values"])


def test_preprocess_undone_gives_pillows_pixels():
    image = picture(61, 95)
    p = plan(61, 95)
    pixels, grid = preprocess([image], [p])
    mean, std = (torch.tensor(v).view(3, 1) for v in (qwen2_vl.CLIP_MEAN, qwen2_vl.CLIP_STD))
    bytes_ = ((pixels.view(p.vit_tokens, 3, -1) * std + mean) * 255).round().to(torch.uint8)
    height, width = p.resized
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    options = {"patch_size": 14, "temporal_patch_size": 2, "mean": [0] * 3, "std": [1 / 255] * 3}
    want = patchify([torch.from_numpy(np.array(resized)).permute(2, 0, 1)], grid, **options)
    assert torch.equal(bytes_.flatten(1), want.round().to(torch.uint8))


def test_every_kind_of_image_gives_the_same_pixels():
    image = picture(61, 95)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    same = [image, array, np.flip(array, 0)[::-1], tensor, tensor / 255, tensor.double() / 255]
    for one in same:
        assert torch.equal(preprocess([one])[0], preprocess([image])[0])
    # 0.501 is 127.755 of 255, and rounds to 128
    near, byte = torch.full((3, 61, 95), 0.501), torch.full((3, 61, 95), 128, dtype=torch.uint8)
    assert torch.equal(preprocess([near])[0], preprocess([byte])[0])
    grey = picture(61, 95, "L")
    array = np.array(grey)
    want = preprocess([grey.convert("RGB")])[0]
    for one in (grey, array, array[..., None], torch.from_numpy(array), array / 255):
        assert torch.equal(preprocess([one])[0], want)


def clear():
    """Images of which nothing can be seen, by what makes them so."""
    image = picture(56, 56, "RGBA")
    image.putalpha(0)
    colour = PIL.Image.new("P", (56, 56), 7)
    colour.info["transparency"] = 7
    return {
        **{mode: image.convert(mode) for mode in ("RGBA", "RGBa", "LA")},
        "La": image.convert("LA").convert("La"),
        "transparent colour": colour,
        "RGBA palette": image.quantize(64),
    }


@pytest.mark.parametrize("kind", clear())
def test_transparency_becomes_white(kind):
    white = preprocess([PIL.Image.new("RGB", (56, 56), "white")])[0]
    assert torch.equal(preprocess([clear()[kind]])[0], white)


def test_half_transparency_is_half_white():
    image = PIL.Image.new("LA", (56, 56), (100, 128))
    grey = PIL.Image.new("L", (56, 56), round(100 * 128 / 255 + 127))
    for one in (image, image.convert("La")):
        got = preprocess([one], mean=(0, 0, 0), std=(1, 1, 1))[0]
        want = preprocess([grey], mean=(0, 0, 0), std=(1, 1, 1))[0]
        assert (got - want).abs().max() < 1.5 / 255


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_floats_are_rounded_once(dtype):
    tensor = torch.linspace(0, 1, 56 * 56, dtype=torch.float64).to(getattr(torch, dtype))
    tensor = tensor.view(56, 56)
    tensor[0, 0] = (127.5 - 1e-6) / 255  # only float64 tells it from 127.5
    byte = (tensor.double() * 255).round().to(torch.uint8)
    want = preprocess([byte])[0]
    assert torch.equal(preprocess([tensor])[0], want)
    if dtype != "bfloat16":
        assert torch.equal(preprocess([tensor.numpy()])[0], want)


def test_images_and_plans_may_be_any_iterable():
    images = [picture(56, 84, seed=i) for i in range(2)]
    plans = [plan(56, 84, min_pixels=10_000)] * 2
    want, _ = preprocess(images, plans)
    array = np.stack([np.array(image) for image in images])
    for some in (tuple(images), iter(images), array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(preprocess(some, iter(plans))[0], want)


def test_every_kind_of_video_gives_the_same_pixels():
    frames = [picture(61, 95, seed=i) for i in range(3)]
    want, grid = preprocess([frames])
    assert grid.grid_thw.tolist() == [list(plan_video(3, None, 61, 95).grid_thw)]
    assert grid.num_segments == 2
    array = np.stack([np.array(frame) for frame in frames])
    for one in (tuple(frames), array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(preprocess([one])[0], want)
    # the last frame is repeated: a video of four whose last two are equal
    assert torch.equal(preprocess([[*frames, frames[-1]]])[0], want)


def test_a_packed_batch_is_its_images_one_after_the_other():
    items = [picture(*size, seed=i) for i, size in enumerate(SMALL)]
    items.insert(2, [picture(61, 95, seed=i) for i in range(4)])
    pixels, grid = preprocess(items)
    alone = [preprocess([item]) for item in items]
    assert torch.equal(pixels, torch.cat([one for one, _ in alone]))
    assert torch.equal(grid.grid_thw, torch.cat([one.grid_thw for _, one in alone]))
    empty, grid = preprocess([])
    assert empty.shape == (0, 1176)
    assert grid.num_grids == 0


def test_preprocess_follows_its_plans():
    image, video = picture(61, 95), [picture(61, 95, seed=i) for i in range(4)]
    plans = [
        plan(61, 95, min_pixels=100_000, patch_size=16, temporal_patch_size=4),
        plan_video(4, None, 61, 95, patch_size=16, temporal_patch_size=4),
    ]
    pixels, grid = preprocess([image, video], plans, mean=(0, 0, 0), std=(1, 1, 1))
    assert grid.grid_thw.tolist() == [list(p.grid_thw) for p in plans]
    assert pixels.shape == (sum(p.vit_tokens for p in plans), 3 * 4 * 16 * 16)
    assert pixels.amin() >= 0
    assert pixels.amax() <= 1
    still = pixels[: plans[0].vit_tokens].view(-1, 3, 4, 256)
    assert torch.equal(still, still[:, :, :1].expand_as(still))


def test_an_rgb_image_is_not_copied():
    image = picture(61, 95)
    assert _images.to_rgb("image", image) is image


@pytest.mark.parametrize(
    "name", ["internvl", "llava_onevision", "oryx", "qwen3_vl", "siglip2", "moonvit", "pixtral"]
)
def test_every_system_takes_any_floating_dtype_and_three_numbers(name):
    system = importlib.import_module(f"patchpack.systems.{name}")
    images = [picture(64, 96)]
    want = system.preprocess(images)[0].double()
    assert torch.equal(system.preprocess(images, dtype=torch.float64)[0], want)
    for options, message in (
        ({"mean": [0.5]}, r"mean must have 3 numbers, got \[0\.5\]"),
        ({"std": (1, 0, 1)}, r"std must be above 0, got \(1, 0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            system.preprocess(images, **options)
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch\.int32"):
        system.preprocess(images, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_preprocess_rounds_once(dtype):
    images = [picture(56, 84)]
    assert torch.equal(preprocess(images, dtype=dtype)[0], preprocess(images)[0].to(dtype))


IMAGE = np.zeros((56, 56, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (
            ["cat.png"],
            {},
            TypeError,
            r"images\[0\] must be a Pillow image, array or tensor, got str",
        ),
        (
            [IMAGE.astype(np.int64)],
            {},
            TypeError,
            r"images\[0\] must be uint8 or floating, got int64",
        ),
        ([IMAGE, IMAGE + 2.0], {}, ValueError, r"images\[1\] must be in 0..1, got 2..2"),
        ([IMAGE * math.nan], {}, ValueError, r"images\[0\] must be in 0..1, got nan..nan"),
        ([IMAGE[..., :2]], {}, ValueError, r"of 1, 3 or 4 channels, got \[56, 56, 2\]"),
        ([IMAGE[:0]], {}, ValueError, r"of 1, 3 or 4 channels, got \[0, 56, 3\]"),
        ([torch.zeros(5)], {}, ValueError, r"of 1, 3 or 4 channels, got \[5\]"),
        ([torch.zeros(3, 56, 56, device="meta")], {}, ValueError, "must be on the CPU, got meta"),
        ([PIL.Image.new("I;16", (56, 56))], {}, ValueError, "8 bits a channel, got .*'I;16'"),
        ([PIL.Image.new("F", (56, 56))], {}, ValueError, "8 bits a channel, got .*'F'"),
        ([[IMAGE, IMAGE[:28]]], {}, ValueError, r"images\[0\] must have frames of one size, got"),
        ([[]], {}, ValueError, r"images\[0\] must have frames of one size, got \[\]"),
        ([[IMAGE, "x"]], {}, TypeError, r"images\[0\]\[1\] must be a Pillow image"),
        ([IMAGE], {"plans": []}, ValueError, "plans must be one for each of 1 images, got 0"),
        (
            [IMAGE],
            {"plans": [plan(56, 84)]},
            ValueError,
            r"images\[0\] must have the frames, height and width of plans\[0\], \(1, 56, 84\),"
            r" got \(1, 56, 56\)",
        ),
        (
            [[IMAGE] * 3],
            {"plans": [plan_video(4, None, 56, 56)]},
            ValueError,
            r"of plans\[0\], \(4, 56, 56\), got \(3, 56, 56\)",
        ),
        (
            [IMAGE] * 2,
            {"plans": [plan(56, 56), plan(56, 56, merge_size=1)]},
            ValueError,
            r"plans must share patch, temporal and merge size, got \[\(14, 2, 1\), \(14, 2, 2\)\]",
        ),
        (
            PIL.Image.new("RGB", (56, 56)),
            {},
            TypeError,
            "images must be a sequence of images, got one image, Image",
        ),
        *(
            (one, {}, TypeError, "images must be a sequence of images, got one image, ")
            for one in (IMAGE, IMAGE[..., 0], torch.from_numpy(IMAGE).permute(2, 0, 1))
        ),
        ([IMAGE], {"plans": plan(56, 56)}, TypeError, "sequence of plans, got one plan, Plan"),
        ([IMAGE], {"plans": [(1, 4, 4)]}, TypeError, r"plans\[0\] must be a Plan, got tuple"),
        ([IMAGE], {"dtype": torch.uint8}, TypeError, "dtype must be floating, got torch.uint8"),
        ([IMAGE], {"dtype": "float32"}, TypeError, "dtype must be floating, got 'float32'"),
        ([IMAGE], {"std": (1, 1)}, ValueError, r"std must have 3 numbers, got \(1, 1\)"),
        ([IMAGE], {"mean": "abc"}, ValueError, "mean must have 3 numbers, got 'abc'"),
        ([IMAGE], {"std": [[1], 1, 1]}, ValueError, r"std must have 3 numbers, got \[\[1\], 1"),
        ([torch.zeros(30, 40, 3)], {}, ValueError, r"3 or 4 channels, got \[30, 40, 3\]"),
        ([IMAGE], {"mean": 0.5}, ValueError, "mean must have 3 numbers, got 0.5"),
        ([IMAGE], {"mean": (0, 0, math.nan)}, ValueError, "mean must have 3 numbers, got"),
        ([IMAGE], {"std": (1, 0, 1)}, ValueError, r"std must be above 0, got \(1, 0, 1\)"),
        ([IMAGE], {"std": (1, -1, 1)}, ValueError, r"std must be above 0, got \(1, -1, 1\)"),
    ],
)
def test_preprocess_names_what_it_refuses(images, options, error, message):
    with pytest.raises(error, match=message):
        preprocess(images, **options)


# Multimodal rotary position embedding ------------------------------------------------------------


def positions_by_loops(kinds):
    """Positions of one sample, in the paper's words, from its parts: text or (t, h, w) in tokens.

    Text has one position on all axes. Vision counts frames, rows and columns from where the
    modality before it ended: each modality starts at the largest position so far plus one.
    """
    positions, start = [], 0
    for part in kinds:
        if part == "text":
            positions.append((start, start, start))
        else:
            positions += [
                (start + t, start + h, start + w)
                for t, h, w in itertools.product(*map(range, part))
            ]
        start = max(map(max, positions)) + 1
    return positions, start


class Sample:
    """One sample: runs of text, images and videos, with ``VISION_START`` and ``_END`` around."""

    def __init__(self, parts):
        self.ids, self.images, self.videos, kinds = [], [], [], []
        for kind, size in parts:
            if kind == "text":
                self.ids += [TEXT] * size
                kinds += ["text"] * size
                continue
            t, h, w = size
            pad = IMAGE_PAD if kind == "image" else VIDEO_PAD
            self.ids += [VISION_START, *[pad] * (t * h * w), VISION_END]
            (self.images if kind == "image" else self.videos).append((t, 2 * h, 2 * w))
            kinds += ["text", size, "text"]
        self.positions, self.next = positions_by_loops(kinds)


EXTENT = st.integers(1, 4)
SAMPLES = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.integers(1, 4)),
        st.tuples(st.just("image"), st.tuples(st.just(1), EXTENT, EXTENT)),
        st.tuples(st.just("video"), st.tuples(EXTENT, EXTENT, EXTENT)),
    ),
    min_size=1,
    max_size=6,
).map(Sample)
BATCHES = st.lists(SAMPLES, min_size=1, max_size=4)


def grids_of(samples):
    images, videos = (
        [grid for sample in samples for grid in getattr(sample, name)]
        for name in ("images", "videos")
    )
    return {
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor(videos) if videos else None,
    }


@settings(deadline=None)
@given(BATCHES, st.integers(0, 3), st.booleans(), st.sampled_from([torch.int64, torch.int32]))
def test_a_padded_batch_has_the_positions_of_the_loop(samples, extra, left, dtype):
    length = max(len(sample.ids) for sample in samples) + extra
    ids = torch.zeros(len(samples), length, dtype=dtype)
    mask = torch.zeros(len(samples), length, dtype=torch.bool)
    want = torch.ones(3, len(samples), length, dtype=torch.int64)
    for i, sample in enumerate(samples):
        n = len(sample.ids)
        place = slice(length - n, length) if left else slice(0, n)
        ids[i, place] = torch.tensor(sample.ids, dtype=dtype)
        mask[i, place] = True
        want[:, i, place] = torch.tensor(sample.positions).T
    validate_vision_tokens(ids, **grids_of(samples), attention_mask=mask)
    for one in (mask, mask.long()):
        positions, deltas = mrope_position_ids(ids, **grids_of(samples), attention_mask=one)
        assert positions.dtype == deltas.dtype == torch.int64
        assert torch.equal(positions, want)
        assert deltas.tolist() == [[sample.next - length] for sample in samples]


@settings(deadline=None)
@given(BATCHES, st.integers(0, 3))
def test_packed_samples_have_the_positions_of_the_loop(samples, tail):
    ids = [token for sample in samples for token in sample.ids]
    bounds = [0, *itertools.accumulate(len(sample.ids) for sample in samples)]
    want = torch.tensor([at for sample in samples for at in sample.positions] + [(1, 1, 1)] * tail)
    call = {
        "input_ids": torch.tensor(ids + [IMAGE_PAD] * tail),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        **grids_of(samples),
    }
    validate_vision_tokens(**call)
    positions, deltas = mrope_position_ids(**call)
    assert torch.equal(positions, want.T)
    assert deltas.tolist() == [[sample.next - len(sample.ids)] for sample in samples]


@settings(deadline=None)
@given(SAMPLES, st.data())
def test_padding_inside_a_sample_is_left_out(sample, data):
    holes = data.draw(st.lists(st.booleans(), max_size=30))
    places = [i for i, hole in enumerate(holes) if not hole]
    places += range(len(holes), len(holes) + len(sample.ids) - len(places))
    places = places[: len(sample.ids)]
    filler = data.draw(st.sampled_from([TEXT, VISION_START, IMAGE_PAD, VIDEO_PAD]))
    ids = torch.full((len(holes) + len(sample.ids),), filler)
    mask = torch.zeros_like(ids)
    ids[places], mask[places] = torch.tensor(sample.ids), 1
    validate_vision_tokens(ids, **grids_of([sample]), attention_mask=mask)
    positions, _ = mrope_position_ids(ids, **grids_of([sample]), attention_mask=mask)
    assert torch.equal(positions[:, places], torch.tensor(sample.positions).T)
    assert (positions[:, mask == 0] == 1).all()


@golden("get_rope_index")
def test_positions_are_the_originals(inputs, outputs):
    ids = inputs["ids"]
    assert [ids["vision_start"], ids["vision_end"]] == [VISION_START, VISION_END]
    assert [ids["image"], ids["video"]] == [IMAGE_PAD, VIDEO_PAD]
    parts = [part for part in inputs["parts"] if isinstance(part, list)]
    grids = {
        name: torch.tensor([part[1] for part in parts if part[0] == kind])
        for name, kind in (("image_grid_thw", "I"), ("video_grid_thw", "V"))
    }
    grids = {name: grid for name, grid in grids.items() if grid.numel()}
    input_ids = torch.tensor(inputs["input_ids"])
    positions, deltas = mrope_position_ids(input_ids, **grids)
    assert positions.tolist() == outputs["thw"]
    assert deltas.tolist() == [[outputs["delta"]]]
    batched, _ = mrope_position_ids(input_ids[None], **grids)
    assert torch.equal(batched[:, 0], positions)


@golden("get_rope_index_padded")
def test_positions_of_a_padded_batch_are_the_originals(inputs, outputs):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    positions, deltas = mrope_position_ids(**tensors)
    assert positions.tolist() == outputs["thw"]
    assert deltas.flatten().tolist() == outputs["delta"]


def test_text_alone_counts_tokens():
    positions, deltas = mrope_position_ids(torch.full((2, 5), TEXT))
    assert torch.equal(positions, torch.arange(5).expand(3, 2, 5))
    assert deltas.tolist() == [[0], [0]]
    positions, deltas = mrope_position_ids(torch.empty(2, 0, dtype=torch.int64))
    assert positions.shape == (3, 2, 0)
    assert deltas.tolist() == [[0], [0]]


def test_no_sample_is_all_padding():
    positions, deltas = mrope_position_ids(
        IDS[0], GRID, cu_seqlens=torch.zeros(1, dtype=torch.int32)
    )
    assert positions.tolist() == [[1] * 4] * 3
    assert deltas.shape == (0, 1)


def test_vision_tokens_are_the_markup_around_the_pads():
    assert vision_tokens(plan(56, 56)) == [VISION_START, *[IMAGE_PAD] * 4, VISION_END]
    # a video of one temporal patch is no image
    p = plan_video(2, None, 56, 56)
    assert p.grid_thw[0] == 1
    assert vision_tokens(p) == [VISION_START, *[VIDEO_PAD] * p.llm_tokens, VISION_END]


def test_other_token_ids_have_the_same_positions():
    other = {VISION_START: 3, VISION_END: 0, IMAGE_PAD: 1, VIDEO_PAD: 2}
    names = {
        "vision_start_token_id": other[VISION_START],
        "image_token_id": other[IMAGE_PAD],
        "video_token_id": np.int64(other[VIDEO_PAD]),
    }
    for p in (plan(56, 56), plan_video(2, None, 56, 56)):
        got = vision_tokens(p, **names, vision_end_token_id=other[VISION_END])
        assert got == [other[token] for token in vision_tokens(p)]
    for call in calls().values():
        want = mrope_position_ids(**call)
        ids = call["input_ids"]
        # the usual ids are text now
        shuffled = torch.where(ids == TEXT, VISION_START, ids)
        for old, new in other.items():
            shuffled = torch.where(ids == old, new, shuffled)
        call = {**call, **names, "input_ids": shuffled}
        validate_vision_tokens(**call)
        for a, b in zip(mrope_position_ids(**call), want, strict=True):
            assert torch.equal(a, b)


def test_more_images_than_grids_read_nothing_out_of_bounds():
    ids = torch.tensor([VISION_START, IMAGE_PAD, VISION_END] * 5)
    positions, deltas = mrope_position_ids(ids, GRID)
    assert positions.shape == (3, 15)
    assert deltas.shape == (1, 1)


def test_a_plan_a_prompt_and_its_positions_fit_together():
    plans = [plan(61, 95), plan_video(3, None, 61, 95), plan(224, 224)]
    # images next to each other, a video between them, no text but the markup
    ids = torch.tensor([token for p in plans for token in vision_tokens(p)])
    assert len(ids) == sum(p.total_tokens for p in plans)
    grids = {
        "image_grid_thw": torch.tensor([plans[0].grid_thw, plans[2].grid_thw]),
        "video_grid_thw": torch.tensor([plans[1].grid_thw]),
    }
    validate_vision_tokens(ids, **grids)
    positions, _ = mrope_position_ids(ids, **grids)
    want, _ = positions_by_loops(
        itertools.chain(
            *(["text", (t, h // 2, w // 2), "text"] for t, h, w in (p.grid_thw for p in plans))
        )
    )
    assert torch.equal(positions, torch.tensor(want).T)


class _NeverWait(TorchDispatchMode):
    """Fails on every operator whose result, or the size of it, the host must read from a device."""

    WAITS = (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "repeat_interleave", "bincount"),
        *("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        moves = name == "_to_copy" and (kwargs or {}).get("device") is not None
        waits = moves or name in self.WAITS
        assert not waits, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "index by a mask"
        return func(*args, **(kwargs or {}))


BATCH = [
    Sample([("text", 2), ("image", (1, 2, 3)), ("image", (1, 4, 1)), ("video", (3, 2, 2))]),
    Sample([("video", (2, 1, 2)), ("text", 1), ("image", (1, 2, 2))]),
]


def calls():
    """A padded batch and a packed one."""
    length = max(len(sample.ids) for sample in BATCH)
    rows = [sample.ids + [0] * (length - len(sample.ids)) for sample in BATCH]
    lengths = [len(sample.ids) for sample in BATCH]
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    flat = torch.tensor([token for sample in BATCH for token in sample.ids])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "padded": {"input_ids": torch.tensor(rows), "attention_mask": mask, **grids_of(BATCH)},
        "packed": {"input_ids": flat, "cu_seqlens": cu_seqlens, **grids_of(BATCH)},
    }


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_positions_never_wait_for_the_device(layout):
    with _NeverWait():
        mrope_position_ids(**calls()[layout])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.max().item(),
        lambda x: int(x[0]),
        lambda x: bool((x > 2).any()),
        lambda x: x[x > 2],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 2),
        lambda x: x.repeat_interleave(x),
        lambda x: x.unique_consecutive(),
        lambda x: x.to("meta"),
    ],
)
def test_the_check_for_waiting_can_fail(wait):
    with _NeverWait(), pytest.raises(AssertionError, match=r"waits|mask"):
        wait(torch.arange(4))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_positions_stay_on_the_device(layout):
    # meta tensors have no values to read, and refuse to meet a tensor of the CPU
    call = calls()[layout]
    want = mrope_position_ids(**call)
    got = mrope_position_ids(**{name: x.to("meta") for name, x in call.items()})
    for meta, out in zip(got, want, strict=True):
        assert meta.device.type == "meta"
        assert meta.shape == out.shape
        assert meta.dtype == out.dtype


IDS = torch.tensor([[TEXT, VISION_START, IMAGE_PAD, VISION_END]])
GRID = torch.tensor([[1, 2, 2]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a tensor, got list"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got float32"),
        (
            {"input_ids": IDS[None]},
            ValueError,
            "input_ids must have shape [L] or [B, L], got [1, 1, 4]",
        ),
        (
            {"image_grid_thw": GRID[0]},
            ValueError,
            "image_grid_thw must have shape [*, 3], got [3]",
        ),
        (
            {"video_grid_thw": GRID.float()},
            TypeError,
            "video_grid_thw must be int64 or int32, got float32",
        ),
        (
            {"image_grid_thw": GRID.to("meta")},
            ValueError,
            "image_grid_thw must be on the device of input_ids, cpu, got meta",
        ),
        (
            {"attention_mask": torch.ones(4)},
            ValueError,
            "attention_mask must have shape [1, 4], got [4]",
        ),
        (
            {"attention_mask": torch.ones(1, 4)},
            TypeError,
            "attention_mask must be bool or int64 or int32, got float32",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
            ValueError,
            "input_ids must have shape [*], got [1, 4]",
        ),
        (
            {"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 4])},
            TypeError,
            "cu_seqlens must be int32, got int64",
        ),
        (
            {"input_ids": IDS[0], "cu_seqlens": torch.empty(0, dtype=torch.int32)},
            ValueError,
            "cu_seqlens must have at least one bound, got []",
        ),
        ({"merge_size": 0}, ValueError, "merge_size must be at least 1, got 0"),
        ({"image_token_id": None}, TypeError, "image_token_id must be an integer, got None"),
        ({"video_token_id": -1}, ValueError, "video_token_id must be at least 0, got -1"),
        (
            {"vision_start_token_id": 0.5},
            TypeError,
            "vision_start_token_id must be an integer, got 0.5",
        ),
    ],
)
@pytest.mark.parametrize("function", [mrope_position_ids, validate_vision_tokens])
def test_mrope_position_ids_names_what_it_refuses(arguments, error, message, function):
    with pytest.raises(error) as raised:
        function(**{"input_ids": IDS, "image_grid_thw": GRID, **arguments})
    assert str(raised.value) == message


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (IDS, {}, "image tokens of the lengths that image_grid_thw says, [], got [1]"),
        (IDS, {"image_grid_thw": 2 * GRID}, "image_grid_thw says, [8], got [1]"),
        (IDS, {"image_grid_thw": GRID.repeat(2, 1)}, "image_grid_thw says, [1, 1], got [1]"),
        (IDS, {"video_grid_thw": GRID}, "image_grid_thw says, [], got [1]"),
        (
            IDS,
            {"image_grid_thw": GRID, "video_grid_thw": GRID},
            "video tokens of the lengths that video_grid_thw says, [1], got []",
        ),
        (
            IDS[:, [0, 2, 3]],
            {"image_grid_thw": GRID},
            "input_ids must have 151652 before a run of image tokens, got 10",
        ),
        # where nothing is before the run, the last token is not
        (
            torch.tensor([IMAGE_PAD, VISION_END, TEXT, VISION_START]),
            {"image_grid_thw": GRID},
            "input_ids must have 151652 before a run of image tokens, got none",
        ),
        # nor is the row before, or the sample
        (
            torch.tensor([[TEXT, VISION_START], [IMAGE_PAD, VISION_END]]),
            {"image_grid_thw": GRID},
            "input_ids must have 151652 before a run of image tokens, got none",
        ),
        (
            torch.tensor([TEXT, VISION_START, IMAGE_PAD, VISION_END]),
            {"image_grid_thw": GRID, "cu_seqlens": bounds(0, 2, 4)},
            "input_ids must have 151652 before a run of image tokens, got none",
        ),
        # and no run goes on in the next
        (
            torch.tensor([[VISION_START, IMAGE_PAD, IMAGE_PAD], [IMAGE_PAD, IMAGE_PAD, TEXT]]),
            {"image_grid_thw": torch.tensor([[1, 4, 4]])},
            "image_grid_thw says, [4], got [2, 2]",
        ),
        (
            torch.tensor([VISION_START, *[VIDEO_PAD] * 4, TEXT]),
            {"video_grid_thw": torch.tensor([[1, 4, 4]]), "cu_seqlens": bounds(0, 3, 6)},
            "video_grid_thw says, [4], got [2, 2]",
        ),
        (
            IDS[0],
            {"image_grid_thw": GRID, "cu_seqlens": bounds(0, 2)},
            "image_grid_thw says, [1], got []",
        ),
        *(
            (
                IDS[0],
                {"image_grid_thw": GRID, "cu_seqlens": bounds(*values)},
                "cu_seqlens must rise from 0 to at most 4, the length of input_ids,"
                f" got {list(values)}",
            )
            for values in ((1, 4), (0, 5), (0, 3, 2, 4))
        ),
        *(
            (
                IDS,
                {"image_grid_thw": torch.tensor([[1, 2, 2], grid])},
                "image_grid_thw[1] must be at least 1 on every axis, with rows and columns that"
                f" divide by merge_size=2, got {grid}",
            )
            for grid in ([1, 1, 4], [1, 4, 1], [1, 0, 2], [-1, -2, 2])
        ),
    ],
)
def test_validate_vision_tokens_names_what_does_not_fit(ids, arguments, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        validate_vision_tokens(ids, **arguments)
    assert str(raised.value).endswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_grid_thw": torch.tensor([[1, 1, 4]])},
        {"image_grid_thw": torch.zeros(1, 3, dtype=torch.int64)},
        {"cu_seqlens": bounds(0, 9)},
        {"cu_seqlens": bounds(-4, 2)},
    ],
    ids=str,
)
def test_values_that_do_not_fit_end_no_process(arguments):
    """On a CUDA device an index out of bounds would."""
    position_ids, _ = mrope_position_ids(IDS[0], **arguments)
    assert position_ids.shape == (3, 4)
    with pytest.raises(ValueError, match="must"):
        validate_vision_tokens(IDS[0], **arguments)


def test_no_sample_has_no_tokens_to_validate():
    validate_vision_tokens(torch.empty(0, 5, dtype=torch.int64))
    validate_vision_tokens(IDS[0], cu_seqlens=bounds(0))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_positions_on_a_gpu_are_those_of_the_host(layout):
    call = calls()[layout]
    want = mrope_position_ids(**call)
    on_device = {name: x.cuda() for name, x in call.items()}
    with contract.no_sync():
        got = mrope_position_ids(**on_device)
    for device_out, out in zip(got, want, strict=True):
        assert torch.equal(device_out.cpu(), out)
