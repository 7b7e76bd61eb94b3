"""MoonViT's sizes, pixels, positions and tokens, against the original code and plain loops."""

import ast
import functools
import importlib.util
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
from patchpack.systems.moonvit import (
    Projector,
    add_position,
    mean_of_frames,
    plan,
    plan_video,
    preprocess,
    rotate,
)

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


# Patches -----------------------------------------------------------------------------------------


def photo(name="astronaut.png"):
    skimage = pytest.importorskip("skimage")
    return PIL.Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def patches_by_hand(image, padded):
    """The patches of a Pillow image on a black ground, one after the other."""
    canvas = PIL.Image.new("RGB", (padded[1], padded[0]))
    canvas.paste(image, (0, 0))
    pixels = (np.asarray(canvas, np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    return np.stack(
        [
            pixels[y : y + 14, x : x + 14].transpose(2, 0, 1).ravel()
            for y in range(0, padded[0], 14)
            for x in range(0, padded[1], 14)
        ]
    )


def test_images_are_shrunk_and_padded():
    images = [photo().crop((0, 0, 300, 211)), photo("coffee.png").crop((0, 0, 9, 33))]
    plans = [plan(211, 300, max_patches=60), plan(33, 9)]
    assert plans[0].resized == (92, 130)
    assert plans[1].resized == (33, 9)
    want = []
    for image, p in zip(images, plans, strict=True):
        resized = image.resize(p.resized[::-1], PIL.Image.Resampling.BICUBIC)
        want.append(patches_by_hand(resized, p.padded))
    pixels, grid = preprocess(images, plans)
    assert np.array_equal(pixels.numpy(), np.concatenate(want))
    assert grid.grid_thw.tolist() == [list(p.grids[0]) for p in plans]
    assert grid.spatial_merge_size == 1
    assert pixels[-1].eq(-1).all()  # all of it is padding


def test_a_clip_is_one_segment():
    frames = [photo().crop((i, 2 * i, 50 + i, 70 + 2 * i)) for i in range(6)]
    pixels, grid = preprocess([frames])
    assert grid.grid_thw.tolist() == [[4, 6, 4], [2, 6, 4]]
    assert grid.cu_seqlens.tolist() == [0, 96, 144]
    want = np.concatenate([patches_by_hand(frame, (84, 56)) for frame in frames])
    assert np.array_equal(pixels.numpy(), want)


def test_a_packed_batch_is_its_images_one_after_the_other():
    frames = [photo().crop((i, i, 40 + i, 30 + i)) for i in range(5)]
    items = [photo().crop((0, 0, 100, 70)), frames, photo("coffee.png").crop((0, 0, 9, 33))]
    pixels, grid = preprocess(items)
    alone = [preprocess([item]) for item in items]
    assert torch.equal(pixels, torch.cat([one for one, _ in alone]))
    assert torch.equal(grid.grid_thw, torch.cat([one.grid_thw for _, one in alone]))
    assert grid.num_segments == 4
    empty, grid = preprocess([])
    assert empty.shape == (0, 588)
    assert grid.num_grids == 0


def test_preprocess_names_what_it_refuses():
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"frames, height and width of plans\[0\], \(3, 64, 64\)"):
        preprocess([[image, image]], [plan_video(3, None, 64, 64)])
    with pytest.raises(ValueError, match=r"plans must share patch_size, got \[14, 16\]"):
        preprocess([image, image], [plan(64, 64), plan(64, 64, patch_size=16)])
    with pytest.raises(TypeError, match=r"plans\[0\] must be a Plan, got tuple"):
        preprocess([image], [(4, 4)])


# Positions ---------------------------------------------------------------------------------------


def test_rotary_angles_are_the_originals():
    (case,) = [case for case in GOLDEN if case["function"] == "moonvit.rope_freqs_cis"]
    inputs, outputs = case["inputs"], case["outputs"]
    assert inputs["theta"] == 10_000
    grid = PackedGrid([(inputs["h"] + 1, inputs["w"] + 1)])
    x = torch.tensor([1.0, 0.0]).repeat(inputs["head_dim"] // 2).expand(grid.num_tokens, 1, -1)
    cos, sin = rotate(x, x, grid)[0][-1, 0].view(-1, 2)[:6].unbind(1)
    torch.testing.assert_close(cos, torch.tensor(outputs["cos_first6"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, torch.tensor(outputs["sin_first6"]), atol=1e-6, rtol=0)
    angle = torch.tensor(outputs["angle_pairs_first6"])
    torch.testing.assert_close(cos, angle.cos(), atol=1e-6, rtol=0)


GRIDS = [(1, 4, 6), (3, 2, 4), (4, 6, 2), (1, 10, 8), (2, 2, 2)]


@pytest.fixture
def original():
    """The encoder and the projector of transformers, small, with weights that matter."""
    module = pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")
    from transformers.models.kimi_k25 import configuration_kimi_k25 as configs

    vision = configs.Kimi_K25VisionConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        patch_size=2,
        pos_emb_height=8,
        pos_emb_width=8,
    )
    text = {"model_type": "llama", "hidden_size": 24, "num_attention_heads": 4}
    config = configs.Kimi_K25Config(
        vision_config=vision, text_config=text, projection_hidden_size=48
    )
    encoder = module.Kimi_K25VisionModel(vision)
    projector = module.Kimi_K25MultimodalProjection(config)
    for parameter in (*encoder.parameters(), *projector.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder, projector, module.apply_rotary_pos_emb_vision


def test_positions_are_those_of_transformers(original):
    encoder, _, apply_rotary = original
    positions = encoder.patch_embed.pos_emb
    grid_thw = torch.tensor(GRIDS)
    grid = PackedGrid(grid_thw, merge_temporal=True)
    x = torch.randn(grid.num_tokens, 48)
    got = add_position(x, positions.position_embeddings, grid)
    torch.testing.assert_close(got, positions(x, grid_thw), atol=1e-5, rtol=1e-5)
    images = PackedGrid(GRIDS[:1])
    got = add_position(x[:24], positions.position_embeddings, images)
    torch.testing.assert_close(got, positions(x[:24], grid_thw[:1]), atol=1e-5, rtol=1e-5)

    cos, sin = encoder.rotary_emb(x, grid.position_ids)
    q, k = torch.randn(2, grid.num_tokens, 4, 12)
    torch.testing.assert_close(rotate(q, k, grid, interleaved=False), apply_rotary(q, k, cos, sin))


def test_a_clip_has_four_frames_at_most():
    grid = PackedGrid([(1, 2, 2), (5, 2, 2)])
    with pytest.raises(ValueError, match="grid must have clips of at most 4 frames, got 5"):
        add_position(torch.zeros(24, 4), torch.zeros(8, 8, 4), grid)


# Merging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_tokens_are_those_of_transformers(original, impl):
    encoder, theirs, _ = original
    ours = Projector(48, 24, impl=impl)
    ours.load_state_dict(theirs.state_dict())
    grid = PackedGrid(GRIDS, merge_temporal=True)
    x = torch.randn(grid.num_tokens, 48, requires_grad=True)
    got = ours(x, grid)
    want = theirs(encoder.temporal_merge(x, grid.grid_thw, 2, 2))[:, 0]
    assert len(got) == sum(h * w for _, h, w in GRIDS) // 4
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(want)
    names = list(dict(ours.named_parameters()))
    leaves = [[x, *(module.get_parameter(name) for name in names)] for module in (ours, theirs)]
    grads = [torch.autograd.grad(y, z, grad) for y, z in zip((got, want), leaves, strict=True)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_frames_are_averaged():
    grid = PackedGrid([(3, 1, 2), (1, 2, 1)], merge_temporal=True)
    x = torch.tensor([0.0, 9.0, 3.0, 9.0, 6.0, 0.0, 5.0, 7.0])[:, None]
    y, still = mean_of_frames(x, grid)
    assert y.flatten().tolist() == [3, 6, 5, 7]
    assert still.grid_thw.tolist() == [[1, 1, 2], [1, 2, 1]]
    images = PackedGrid([(2, 4)])
    assert mean_of_frames(x, images)[0] is x
    with pytest.raises(ValueError, match="grid must have spatial_merge_size=1, got 2"):
        mean_of_frames(x, PackedGrid([(2, 4)], 2))
