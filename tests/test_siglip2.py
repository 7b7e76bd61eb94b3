"""SigLIP 2's sizes, patches, positions and pooling, against outputs of the original code."""

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
from patchpack.systems.siglip2 import Embeddings, PoolingHead, image_size, plan, preprocess

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
CASES = [case for case in GOLDEN if case["function"] == "siglip2.image_size"]
SIZES = st.integers(1, 20_000)


@pytest.mark.parametrize("case", CASES)
def test_the_size_of_an_image_is_the_originals(case):
    inputs, outputs = case["inputs"], case["outputs"]
    options = {"patch_size": inputs["patch"], "max_num_patches": inputs["max_num_patches"]}
    size = inputs["height"], inputs["width"]
    assert list(image_size(*size, **options)) == outputs["hw"]
    p = plan(*size, **options)
    assert list(p.resized) == outputs["hw"]
    assert p.vit_tokens == p.llm_tokens == p.total_tokens == outputs["patches"]


def test_other_images_have_the_originals_size():
    assert image_size(1080, 1920, max_num_patches=1024) == (384, 672)
    assert image_size(800, 1300, max_num_patches=576) == (304, 480)
    assert image_size(333, 500, patch_size=14, max_num_patches=729) == (308, 462)


@settings(max_examples=40)
@given(SIZES, SIZES, st.sampled_from([14, 16]), st.integers(1, 4096))
def test_every_size_is_that_of_transformers(height, width, patch_size, budget):
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    want = module.get_image_size_for_max_num_patches(height, width, patch_size, budget)
    p = plan(height, width, patch_size=patch_size, max_num_patches=budget)
    assert p.resized == want
    ((t, rows, cols),) = p.grids
    assert (t, rows * patch_size, cols * patch_size) == (1, *p.resized)
    assert p.vit_tokens == math.prod(p.resized) // patch_size**2 <= budget


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"patch_size": True}, TypeError, "patch_size must be an integer, got True"),
        ({"max_num_patches": 0}, ValueError, "max_num_patches must be at least 1, got 0"),
        (
            {"height": 10**10},
            ValueError,
            "height and width must fit into max_num_patches=256 at a scale of 1e-06,"
            " got 10000000000 x 640",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message


# Patches -----------------------------------------------------------------------------------------


def photos():
    """Pictures of several sizes, one of them thin."""
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "coffee.png", "chelsea.png")
    images = [PIL.Image.open(folder / name).convert("RGB") for name in names]
    return [*images, images[0].crop((3, 5, 63, 410)), images[1].crop((7, 7, 8, 9))]


def test_preprocess_matches_transformers_without_its_padding():
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "Siglip2ImageProcessorPil", None)
    if kind is None:
        pytest.skip("this version of transformers needs torchvision")
    want = kind()(images=photos(), return_tensors="np")
    pixels, grid = preprocess(photos())
    assert grid.grid_thw[:, 1:].tolist() == want["spatial_shapes"].tolist()
    assert grid.spatial_merge_size == 1
    mask = want["pixel_attention_mask"].astype(bool)
    assert np.array_equal(pixels.numpy(), want["pixel_values"][mask])


def test_preprocess_is_what_its_words_say():
    image = photos()[2]
    p = plan(image.height, image.width, patch_size=14, max_num_patches=60)
    height, width = p.resized
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    values = np.asarray(resized, np.float32) / 255 * 2 - 1
    pixels, grid = preprocess([image], [p])
    _, rows, cols = grid.grid_thw[0].tolist()
    assert (rows, cols) == (height // 14, width // 14)
    for i in (0, 1, cols, rows * cols - 1):
        y, x = i // cols * 14, i % cols * 14
        patch = torch.from_numpy(values[y : y + 14, x : x + 14].copy()).flatten()
        torch.testing.assert_close(pixels[i], patch, atol=1e-6, rtol=0)


def test_a_packed_batch_is_its_images_one_after_the_other():
    pixels, grid = preprocess(photos(), dtype=torch.bfloat16)
    alone = [preprocess([image]) for image in photos()]
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


# Positions and pooling ---------------------------------------------------------------------------

GRIDS = [(3, 5), (6, 6), (8, 2), (1, 1)]
LENGTHS = [h * w for h, w in GRIDS]


@pytest.fixture
def original():
    """The embeddings and the pooling head of transformers, small, with weights that matter."""
    pytest.importorskip("transformers")
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2 import modeling_siglip2 as module

    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, patch_size=4, num_patches=36
    )
    config._attn_implementation = "eager"
    embeddings = module.Siglip2VisionEmbeddings(config)
    head = module.Siglip2MultiheadAttentionPoolingHead(config)
    for parameter in (*embeddings.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return embeddings, head


def padded(x):
    """Packed ``[T, C]`` to a batch ``[G, L, C]``, and where it holds something."""
    batch = torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True)
    return batch, torch.arange(batch.shape[1]) < torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_embeddings_are_those_of_transformers(original, impl):
    embeddings = Embeddings(32, patch_size=4, table_side=6, impl=impl)
    embeddings.load_state_dict(original[0].state_dict())
    pixels = torch.randn(sum(LENGTHS), 48)
    batch, mask = padded(pixels)
    want = original[0](batch, torch.tensor(GRIDS))[mask]
    torch.testing.assert_close(embeddings(pixels, PackedGrid(GRIDS)), want)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_pooling_is_that_of_transformers(original, impl):
    head = PoolingHead(32, num_heads=4, mlp_size=48, impl=impl)
    head.load_state_dict(original[1].state_dict())
    x = torch.randn(sum(LENGTHS), 32, requires_grad=True)
    batch, mask = padded(x)
    want = original[1](batch, mask.long())
    got = head(x, PackedGrid(GRIDS))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(want)
    names = list(dict(head.named_parameters()))
    leaves = [
        [x, *(module.get_parameter(name) for name in names)] for module in (head, original[1])
    ]
    grads = [torch.autograd.grad(y, z, grad) for y, z in zip((got, want), leaves, strict=True)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
