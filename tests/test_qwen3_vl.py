"""Qwen3-VL's plans, text and positions, against outputs of the original code."""

import itertools
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchpack
from patchpack.systems import qwen3_vl
from patchpack.systems.qwen3_vl import (
    IMAGE_PAD,
    IMAGE_PIXELS,
    VIDEO_PAD,
    VIDEO_PIXELS,
    VISION_END,
    VISION_START,
    mrope_position_ids,
    plan,
    plan_video,
    preprocess,
    sample_frames,
    validate_vision_tokens,
    video_smart_resize,
    vision_text,
    vision_tokens,
)

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
TEXT = 10


def golden(function):
    """All cases of ``qwen3vl.<function>``: what goes in, what the original code gave."""
    cases = [case for case in GOLDEN if case["function"] == f"qwen3vl.{function}"]
    assert cases, f"no golden case of {function}"
    return pytest.mark.parametrize(
        ("inputs", "outputs"), [(case["inputs"], case["outputs"]) for case in cases]
    )


def theirs(module, name):
    """An attribute of a module or class of transformers, also of one that lacks a dependency."""
    module, _, kind = module.partition(":")
    found = pytest.importorskip(f"transformers.models.{module}")
    return getattr(found, kind).__dict__[name] if kind else getattr(found, name)


# Images ------------------------------------------------------------------------------------------


SIZES = st.integers(1, 20_000)


@settings(deadline=None, max_examples=300)
@given(SIZES, SIZES)
def test_every_size_has_the_plan_of_transformers_or_a_clear_error(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="height and width must be within a ratio of 200"):
            plan(height, width)
        return
    resize = theirs("qwen2_vl.image_processing_pil_qwen2_vl", "smart_resize")
    p = plan(height, width)
    assert p.resized == resize(height, width, 32, *IMAGE_PIXELS)
    assert p.grid_thw == (1, p.resized[0] // 16, p.resized[1] // 16)
    assert p.llm_tokens == math.prod(p.resized) // 32**2
    assert p.total_tokens == p.llm_tokens + 2
    assert p.timestamps == ()


def test_an_image_of_256_takes_66_tokens():
    p = plan(256, 256)
    assert (p.resized, p.grid_thw, p.total_tokens) == ((256, 256), (1, 16, 16), 66)
    assert plan(224, 224) != plan(224, 224, min_pixels=4096)
    assert plan(224, 224, min_pixels=4096).llm_tokens == 49


def test_preprocess_matches_transformers():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if kind is None:
        pytest.skip("no processor without torchvision")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(40, 90), (300, 280)]]
    least, most = IMAGE_PIXELS
    processor = kind(
        patch_size=16,
        image_mean=qwen3_vl.MEAN,
        image_std=qwen3_vl.STD,
        size={"shortest_edge": least, "longest_edge": most},
    )
    want = processor(images=images, return_tensors="np")
    pixels, grid = preprocess(images)
    assert grid.grid_thw.tolist() == want["image_grid_thw"].tolist()
    assert grid.spatial_merge_size == 2
    assert np.array_equal(pixels.numpy(), want["pixel_values"])


def test_preprocess_plans_what_has_no_plan():
    frames = np.zeros((3, 40, 90, 3), np.uint8)
    plans = [plan_video(3, None, 40, 90), plan(40, 90)]
    pixels, grid = preprocess(iter([frames, frames[0]]))
    want, _ = preprocess([frames, frames[0]], plans)
    assert grid.grid_thw.tolist() == [list(p.grid_thw) for p in plans]
    assert torch.equal(pixels, want)
    assert (pixels == -1).all()  # black
    empty, grid = preprocess([])
    assert (empty.shape, grid.num_tokens) == ((0, 1536), 0)


# Video -------------------------------------------------------------------------------------------


@golden("video_smart_resize")
def test_video_smart_resize_is_the_originals(inputs, outputs):
    limits = {name: outputs["explicit_min_max"][name] for name in ("min_pixels", "max_pixels")}
    for variant in ("transformers_4_57", "transformers"):
        assert list(video_smart_resize(**inputs, variant=variant)) == outputs["function_defaults"]
        got = video_smart_resize(**inputs, **limits, variant=variant)
        assert list(got) == outputs["explicit_min_max"]["hw"]


def test_golden_size_of_many_frames():
    assert video_smart_resize(16, 1080, 1920) == (640, 1152)
    assert video_smart_resize(64, 720, 1280) == (320, 576)
    assert video_smart_resize(768, 720, 1280) == (96, 160)


COUNTS = st.integers(1, 900)
AREAS = st.integers(1, 30_000_000)


@settings(deadline=None, max_examples=300)
@given(COUNTS, SIZES, SIZES, AREAS, AREAS)
def test_every_video_has_the_size_of_transformers_or_a_clear_error(frames, height, width, a, b):
    limits = {"min_pixels": a, "max_pixels": b}
    resize = theirs("qwen3_vl.video_processing_qwen3_vl", "smart_resize")
    want = None
    try:
        want = resize(frames, height, width, factor=32, **limits)
    except ValueError:
        with pytest.raises(ValueError, match=r"num_frames must be at least|within a ratio of 200"):
            video_smart_resize(frames, height, width, **limits, variant="transformers")
    else:
        got = video_smart_resize(frames, height, width, **limits, variant="transformers")
        assert got == want
    if min(height, width) >= 32 and want is not None:
        assert video_smart_resize(frames, height, width, **limits) == want
    else:
        with pytest.raises(ValueError, match=r"must be (at least|within)"):
            video_smart_resize(frames, height, width, **limits)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 30_000),
    st.sampled_from([1, 10, 23.976, 25, 30, 60]),
    st.one_of(st.none(), st.floats(0.1, 8)),
)
def test_frames_are_those_of_transformers(total, video_fps, fps):
    sample = theirs("qwen3_vl.video_processing_qwen3_vl:Qwen3VLVideoProcessor", "sample_frames")
    processor = types.SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    metadata = types.SimpleNamespace(total_num_frames=total, fps=video_fps)
    want = sample(processor, metadata, fps=fps).tolist()
    assert list(sample_frames(total, video_fps, fps=fps)) == want
    nframes = min(total, 7)
    want = sample(processor, metadata, num_frames=nframes).tolist()
    assert list(sample_frames(total, video_fps, nframes=nframes)) == want


@settings(deadline=None)
@given(st.integers(1, 3000), st.sampled_from([None, 10, 23.976, 30]), SIZES, SIZES, st.booleans())
def test_every_video_has_a_consistent_plan_or_a_clear_error(total, fps, height, width, cap):
    options = {"variant": "transformers", "cap_pixels_per_frame": cap}
    frames = len(sample_frames(total, fps))
    if frames < 2:
        with pytest.raises(
            ValueError, match="num_frames must be at least temporal_factor=2, got 1"
        ):
            plan_video(total, fps, height, width, **options)
        return
    try:
        p = plan_video(total, fps, height, width, **options)
    except ValueError as error:
        assert max(height, width) > 200 * min(height, width) * 0.9
        assert "height and width must be within a ratio of 200" in str(error)  # noqa: PT017
        return
    t, rows, cols = p.grid_thw
    assert p.frame_indices == sample_frames(total, fps)
    assert t == len(p.timestamps) == math.ceil(frames / 2)
    assert (rows * 16, cols * 16) == p.resized
    assert rows % 2 == cols % 2 == 0
    assert p.vit_tokens == t * rows * cols == 4 * p.llm_tokens
    even = round(frames / 2) * 2  # halves to even
    assert min(p.resized) == 32 or even * math.prod(p.resized) <= VIDEO_PIXELS[1] * even / frames
    assert all(a < b for a, b in itertools.pairwise(p.timestamps))
    assert p.timestamps[-1] < total / (24 if fps is None else fps)
    text = vision_text(p)
    assert text.count("<|video_pad|>") == p.llm_tokens
    assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == t
    # one token for each digit and sign, and for the word
    tokens = vision_tokens(p, lambda stamp: [TEXT] * len(stamp.replace(" seconds", "s")))
    assert len(tokens) == p.total_tokens


def test_a_few_frames_take_the_whole_budget_unless_they_are_capped():
    assert plan_video(2, None, 1080, 1920).resized == (1088, 1920)
    capped = plan_video(2, None, 1080, 1920, cap_pixels_per_frame=True)
    assert capped.resized == (640, 1152)  # 720 tokens
    assert capped.llm_tokens == 720
    # the cap is an even share where there are many frames
    many = plan_video(768, None, 720, 1280, cap_pixels_per_frame=True)
    assert many.resized == plan_video(768, None, 720, 1280).resized
    # and not below 1.05 of the least
    least = plan_video(
        100, None, 720, 1280, min_pixels=600_000, max_pixels=1000, cap_pixels_per_frame=True
    )
    assert least.resized == video_smart_resize(
        100, 720, 1280, min_pixels=600_000, max_pixels=63_000_000
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 2000), st.sampled_from([None, 10, 23.976, 30]), st.integers(1, 3))
def test_the_text_of_a_video_is_that_of_transformers(total, fps, temporal_patch_size):
    processing = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    replace = processing.Qwen3VLProcessor.replace_video_token
    p = plan_video(max(total, 3), fps, 64, 96, temporal_patch_size=temporal_patch_size)
    processor = types.SimpleNamespace(
        video_processor=types.SimpleNamespace(
            merge_size=2, temporal_patch_size=temporal_patch_size
        ),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *a: processing.Qwen3VLProcessor._calculate_timestamps(
            None, *a
        ),
    )
    metadata = types.SimpleNamespace(fps=fps, frames_indices=list(p.frame_indices))
    inputs = {"video_grid_thw": torch.tensor([p.grid_thw]), "video_metadata": [metadata]}
    assert vision_text(p) == replace(processor, inputs, 0)


def test_the_text_of_a_video_by_hand():
    p = plan_video(90, 30, 64, 64, max_pixels=6 * 64 * 64)
    assert p.frame_indices == (0, 18, 36, 53, 71, 89)
    assert p.timestamps == ((0 + 0.6) / 2, (1.2 + 53 / 30) / 2, (71 / 30 + 89 / 30) / 2)
    run = f"<|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>"
    assert vision_text(p) == f"<0.3 seconds>{run}<1.5 seconds>{run}<2.7 seconds>{run}"
    assert p.markup_tokens == 3 * (6 + 2)
    assert p.total_tokens == 36
    image = plan(256, 256)
    assert vision_text(image) == f"<|vision_start|>{'<|image_pad|>' * 64}<|vision_end|>"
    assert vision_tokens(image, list) == [VISION_START, *[IMAGE_PAD] * 64, VISION_END]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fps": 1.0, "nframes": 8}, ValueError, "fps must be None where nframes=8 is given"),
        ({"nframes": 301}, ValueError, "nframes must be at most total_frames=300, got 301"),
        ({"nframes": 1}, ValueError, "num_frames must be at least temporal_factor=2, got 1"),
        ({"video_fps": 0}, ValueError, "video_fps must be above 0, got 0"),
        ({"video_fps": None, "fps": 2.0}, ValueError, "video_fps or nframes must be given"),
        ({"video_fps": "fast", "nframes": 4}, TypeError, "video_fps must be a number, got 'fast'"),
        ({"total_frames": 0}, ValueError, "total_frames must be at least 1, got 0"),
        ({"max_frames": 0}, ValueError, "max_frames must be at least 1, got 0"),
        ({"max_pixels": -1}, ValueError, "max_pixels must be above 0, got -1"),
        ({"min_pixels": "few"}, TypeError, "min_pixels must be a number, got 'few'"),
        ({"patch_size": 16.0}, TypeError, "patch_size must be an integer, got 16.0"),
        (
            {"cap_pixels_per_frame": None},
            TypeError,
            "cap_pixels_per_frame must be a bool, got None",
        ),
        (
            {"height": 31},
            ValueError,
            "height and width must be at least factor=32 in variant 'transformers_4_57',"
            " got 31 x 640",
        ),
        (
            {"height": 32, "width": 6401},
            ValueError,
            "height and width must be within a ratio of 200, got 32 x 6401",
        ),
        (
            {"variant": "qwen"},
            ValueError,
            "variant must be one of 'transformers_4_57', 'transformers', got 'qwen'",
        ),
    ],
)
def test_plan_video_names_what_it_refuses(arguments, error, message):
    call = {"total_frames": 300, "video_fps": 30, "height": 480, "width": 640, **arguments}
    with pytest.raises(error) as raised:
        plan_video(**call)
    assert str(raised.value).startswith(message)


def test_only_a_plan_has_text():
    for function in (vision_text, lambda p: vision_tokens(p, list)):
        with pytest.raises(TypeError, match="plan must be a Plan, got tuple"):
            function((1, 4, 4))


# Positions ---------------------------------------------------------------------------------------


@golden("get_rope_index_video")
def test_positions_are_the_originals(inputs, outputs):
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    validate_vision_tokens(**tensors)
    position_ids, deltas = mrope_position_ids(**tensors)
    assert position_ids.tolist() == outputs["thw"]
    assert deltas.tolist() == [[outputs["delta"]]]


@golden("mrope_axis_map")
def test_frequencies_are_dealt_to_axes_as_in_the_original(inputs, outputs):
    assert list(qwen3_vl.MROPE_SECTION) == inputs["mrope_section"]
    # only one axis turns at a time: the frequencies that turn are its own
    half = inputs["half_dim"]
    q = torch.ones(3, 1, 2 * half)
    out, _ = patchpack.mrope(
        q,
        q,
        torch.eye(3, dtype=torch.int64),
        mrope_section=qwen3_vl.MROPE_SECTION,
        mrope_interleaved=True,
        base=qwen3_vl.MROPE_BASE,
    )
    turned = (out != 1)[:, 0, half:]  # [axis, frequency]
    assert (turned.sum(0) == 1).all()
    assert turned.int().argmax(0).tolist() == outputs["axis_per_freq"]


def test_a_plan_a_prompt_and_its_positions_fit_together():
    plans = [plan(61, 95), plan_video(90, 30, 64, 96), plan(300, 200)]
    ids = torch.tensor([token for p in plans for token in vision_tokens(p, lambda s: [TEXT] * 6)])
    assert len(ids) == sum(p.total_tokens for p in plans)
    grids = {
        "image_grid_thw": torch.tensor([plans[0].grid_thw, plans[2].grid_thw]),
        "video_grid_thw": torch.tensor([plans[1].grid_thw]),
    }
    validate_vision_tokens(ids, **grids)
    position_ids, _ = mrope_position_ids(ids, **grids)
    # a frame has one time, and text goes on after the largest position
    starts = (ids == VISION_START).nonzero().flatten().tolist()
    for start in starts:
        end = start + (ids[start:] == VISION_END).nonzero()[0].item()
        run = position_ids[:, start + 1 : end]
        assert (run[0] == position_ids[0, start] + 1).all()
        assert (position_ids[:, end] == run.max() + 1).all()
    assert (ids == VIDEO_PAD).sum() == plans[1].llm_tokens


def test_constants_are_those_of_the_model():
    module = pytest.importorskip("transformers.models.qwen3_vl.configuration_qwen3_vl")
    config, vision, p = module.Qwen3VLConfig(), module.Qwen3VLVisionConfig(), plan(256, 256)
    assert math.prod(qwen3_vl.POSITION_TABLE) == vision.num_position_embeddings
    assert tuple(vision.deepstack_visual_indexes) == qwen3_vl.DEEPSTACK_LAYERS
    assert p.patch_size == vision.patch_size
    assert p.temporal_patch_size == vision.temporal_patch_size
    assert p.merge_size == vision.spatial_merge_size
    ids = [f"{name}_token_id" for name in ("vision_start", "vision_end", "image", "video")]
    ours = [VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD]
    assert ours == [getattr(config, name) for name in ids]
