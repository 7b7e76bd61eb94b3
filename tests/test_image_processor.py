"""The image processor of transformers on fused kernels, against the one it stands in for."""

import json
import pickle
import re

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.utils import logging

from patchpack.integrations.transformers import ImageProcessor
from patchpack.systems import qwen2_vl

Original = ImageProcessor.__base__  # the one with Pillow's backend

QWEN3 = {
    "patch_size": 16,
    "size": {"shortest_edge": 65536, "longest_edge": 2**20},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SIZES = [
    *((28, 28), (1, 1), (1, 100), (100, 1), (7, 9), (56, 56), (57, 55), (224, 224), (112, 448)),
    *((14, 14), (29, 29), (41, 42), (84, 84), (2, 399), (399, 2), (20, 3980), (3980, 20)),
    *((30, 5970), (5970, 30), (600, 61), (61, 600), (97, 101), (250, 999), (333, 517)),
    *((480, 640), (640, 480), (500, 2000), (1500, 400), (1000, 1001), (960, 1280), (1600, 1200)),
]
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def assert_same(images, call=None, **options):
    """Bit for bit, and in dtypes and sizes, what the original gives."""
    call = {"return_tensors": "pt", **(call or {})}
    got = ImageProcessor(**options)(images, **call)
    try:
        want = Original(**options)(images, **call)
    except ValueError as error:  # of one or four channels, which early versions do not take
        if not re.search("channel dimension format|mean must have 1 elements", str(error)):
            raise
        pytest.skip("the original refuses such images")
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(autouse=True)
def _without_advice():
    """transformers logs, at every call, that shapes are ambiguous or images scaled already."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


# Equal to the original ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_size_are_the_originals(size):
    assert_same(noise(*size), {"input_data_format": "channels_last"})


@pytest.mark.parametrize("size", SIZES[::4], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        QWEN3,
        {"resample": 2},
        {"size": {"shortest_edge": 3136, "longest_edge": 200_000}},
        {"temporal_patch_size": 1, "merge_size": 3},
    ],
    ids=["Qwen3-VL", "bilinear", "limits", "sizes"],
)
def test_options_are_the_originals(options, size):
    assert_same(noise(*size), {"input_data_format": "channels_last"}, **options)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_black_and_white_noise_of_any_size_is_the_originals(height, width, seed):
    if max(height, width) <= 200 * min(height, width):
        image = (noise(height, width, seed=seed) > 127).astype(np.uint8) * np.uint8(255)
        assert_same(image, {"input_data_format": "channels_last"})


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_are_the_originals(name):
    assert_same(PIL.Image.fromarray(getattr(skimage.data, name)()))


A, RGBA = noise(61, 90), noise(61, 90, 4)
FLOATS = np.random.default_rng(1).random((61, 90, 4), np.float32)
PILLOW = PIL.Image.fromarray(A)


def transparent(image, info):
    image = image.copy()
    image.info["transparency"] = info
    return image


KINDS = {
    "rows first": A,
    "channels first": A.transpose(2, 0, 1),
    "tensor": torch.from_numpy(A).permute(2, 0, 1),
    "tensor, rows first": torch.from_numpy(A),
    "of one channel": A[..., :1],
    "RGBA array": RGBA,
    "RGBA tensor": torch.from_numpy(RGBA).permute(2, 0, 1),
    "flipped": A[::-1, ::-1],
    "read only": np.frombuffer(A.tobytes(), np.uint8).reshape(A.shape),
    "int64": A.astype(np.int64),
    "uint16": A.astype(np.uint16),
    "bool": A > 127,
    "floats of bytes": A.astype(np.float32),
    "black": np.zeros((61, 90, 3), np.float32),
    "RGB": PILLOW,
    "L": PILLOW.convert("L"),
    "1": PILLOW.convert("1"),
    "P": PILLOW.quantize(37),
    "P, transparent": transparent(PILLOW.quantize(37), 3),
    "RGB, transparent": transparent(PILLOW, tuple(A[0, 0].tolist())),
    "RGBA": PIL.Image.fromarray(RGBA),
    "LA": PIL.Image.fromarray(RGBA).convert("LA"),
    "PA": PIL.Image.fromarray(RGBA).convert("PA"),
    "CMYK": PILLOW.convert("CMYK"),
    "HSV": PILLOW.convert("HSV"),
    "I;16": PIL.Image.fromarray(A[..., 0].astype(np.uint16)),
    "list": [A, A[:40], PILLOW],
    "nested": [[A], [PILLOW, A[:40]]],
    "nested, empty": [[A], []],
    "batch": np.stack([A, A[::-1]]),
    "list of batches": [np.stack([A, A[::-1]]), np.stack([A])],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images_are_the_originals(kind):
    assert_same(KINDS[kind])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_floats_are_resized_in_the_bytes_of_the_original(channels, dtype):
    image = FLOATS[..., :channels].astype(dtype)
    assert_same(image, do_rescale=False)
    assert_same(image, do_normalize=False)
    assert_same(torch.from_numpy(image).movedim(-1, 0), do_rescale=False)


def test_a_bfloat16_tensor_is_as_if_it_were_float32():
    image = torch.from_numpy(FLOATS[..., :3]).movedim(-1, 0).bfloat16()
    processor = ImageProcessor(do_rescale=False)
    assert torch.equal(processor(image)["pixel_values"], processor(image.float())["pixel_values"])


ROUNDED = {
    "bytes, not scaled": (A, {"do_rescale": False}),
    "bytes as they are": (A, {"do_rescale": False, "do_normalize": False}),
    "bytes, scaled to -1..1": (
        A,
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    ),
    "floats, scaled twice": (FLOATS[..., :3], {}),
    "mixed": ([FLOATS[..., :3], np.ones((60, 61, 3), np.float32), A], {"do_rescale": False}),
    "floats as they are": (FLOATS[:56, :84, :3], {"do_resize": False, "do_rescale": False}),
    "floats of bytes": (A[:56, :84].astype(np.float32), {"do_resize": False}),
    "bytes as large as they are": (A[:56, :84], {"do_resize": False}),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_other_scales_differ_from_the_original_by_rounding(case):
    images, options = ROUNDED[case]
    want = Original(**options)(images, return_tensors="pt")
    got = ImageProcessor(**options)(images)
    assert torch.equal(got.image_grid_thw, want.image_grid_thw)
    largest = want.pixel_values.abs().max().item()
    error = (got.pixel_values - want.pixel_values).abs().max().item()
    assert error <= 4 * torch.finfo(torch.float32).eps * largest


def test_a_batch_is_its_images_one_by_one():
    photos = [noise(*size, seed=i) for i, size in enumerate(SIZES[7:15])]
    processor = ImageProcessor()
    batch = processor(photos, input_data_format="channels_last")
    alone = [processor(photo, input_data_format="channels_last") for photo in photos]
    assert torch.equal(batch.pixel_values, torch.cat([x.pixel_values for x in alone]))
    assert torch.equal(batch.image_grid_thw, torch.cat([x.image_grid_thw for x in alone]))


def test_nothing_is_modified():
    images = [A.copy(), torch.from_numpy(A.copy()), FLOATS.copy(), PILLOW.copy()]
    before = pickle.dumps([np.asarray(image) for image in images])
    for image in images:
        ImageProcessor()(image)
    assert pickle.dumps([np.asarray(image) for image in images]) == before


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("image", [A, FLOATS[..., :3]], ids=["bytes", "floats"])
def test_patches_are_rounded_once_to_a_dtype(dtype, image):
    want = ImageProcessor()(image).pixel_values.to(dtype)
    name = str(dtype).removeprefix("torch.")
    for got in (
        ImageProcessor(dtype=dtype)(image),
        ImageProcessor(dtype=name)(image),
        ImageProcessor()(image, dtype=name),
    ):
        assert got.pixel_values.dtype == dtype
        assert torch.equal(got.pixel_values, want)


def test_tensors_are_returned_as_asked():
    for return_tensors, kind in ((None, torch.Tensor), ("pt", torch.Tensor), ("np", np.ndarray)):
        got = ImageProcessor()(A, return_tensors=return_tensors)
        assert all(isinstance(x, kind) for x in got.values())
        assert got["pixel_values"].shape == (24, 3 * 2 * 14 * 14)
        assert got["image_grid_thw"].tolist() == [[1, 4, 6]]
        assert str(got["image_grid_thw"].dtype).endswith("int64")


def test_limits_of_a_call_go_before_those_of_the_processor():
    processor, image = ImageProcessor(max_pixels=28 * 28 * 16), noise(500, 700)

    def patches(**options):
        got = processor(image, **options).image_grid_thw.prod().item()
        assert got == processor.get_number_of_image_patches(500, 700, options)
        return got

    def planned(**limits):
        return qwen2_vl.plan(500, 700, **limits).vit_tokens

    assert patches() == planned(max_pixels=28 * 28 * 16)
    assert patches(max_pixels=28 * 28 * 40) == planned(max_pixels=28 * 28 * 40)
    assert patches(min_pixels=1e6, max_pixels=2e6) == planned(min_pixels=1e6, max_pixels=2e6)
    size = {"shortest_edge": 28 * 28 * 600, "longest_edge": 28 * 28 * 1280}
    assert patches(size=size) == planned(min_pixels=28 * 28 * 600)
    assert patches(size=size, min_pixels=28 * 28) == planned(min_pixels=28 * 28)
    assert patches(size=None, patch_size=None) == patches()
    processor.max_pixels = 28 * 28 * 20  # older versions have it beside size
    assert patches() == planned(max_pixels=28 * 28 * 20)
    assert patches(size=size) == planned(min_pixels=28 * 28 * 600)
    assert processor.get_number_of_image_patches(500, 700) == patches()
    assert processor.get_number_of_image_patches(56, 84, {"do_resize": False}) == 24


def test_limits_are_those_of_one_processor():
    size = {"shortest_edge": 3136, "longest_edge": 50_000}
    first = ImageProcessor(size=size, max_pixels=70_000)
    assert size == {"shortest_edge": 3136, "longest_edge": 50_000}
    second, third = ImageProcessor(max_pixels=90_000), ImageProcessor()
    edges = [processor.size["longest_edge"] for processor in (first, second, third)]
    assert edges == [70_000, 90_000, 28 * 28 * 1280]


def test_what_has_no_effect_in_the_original_has_none_here():
    assert_same(A, do_center_crop=True, crop_size={"height": 20, "width": 20})


# Settings ----------------------------------------------------------------------------------------


def test_settings_are_saved_under_the_name_of_the_original(tmp_path):
    ours = ImageProcessor(**QWEN3, dtype=torch.bfloat16, do_convert_rgb=False)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["image_processor_type"], saved["dtype"]) == ("Qwen2VLImageProcessor", "bfloat16")
    again = ImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict()
    assert again.dtype == torch.bfloat16
    assert ImageProcessor.from_pretrained(tmp_path, dtype="float16").dtype == torch.float16
    original = Original.from_pretrained(tmp_path)
    want = original(A, return_tensors="pt").pixel_values
    assert torch.equal(again(A).pixel_values, want.bfloat16())


def test_settings_are_taken_over():
    original = Original(**QWEN3, do_convert_rgb=False, rescale_factor=1 / 127.5)
    ours = ImageProcessor.from_processor(original, dtype="bfloat16")
    settings = original.to_dict()
    assert ours.to_dict() == {**settings, "dtype": "bfloat16"}
    assert ImageProcessor.from_processor(ours).to_dict() == ours.to_dict()
    other = ImageProcessor.from_processor(original, patch_size=14)
    assert (other.patch_size, other.image_std, other.size) == (
        14,
        original.image_std,
        original.size,
    )


def test_it_is_pickled():
    ours = ImageProcessor(max_pixels=50_000, dtype="bfloat16")
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(A).pixel_values, ours(A).pixel_values)


# In its place ------------------------------------------------------------------------------------


def test_workers_of_a_loader_process_images():
    photos = [noise(*size) for size in ((60, 80), (224, 224), (100, 30), (90, 61))]
    processor = ImageProcessor(dtype="bfloat16")
    loader = DataLoader(photos, batch_size=2, collate_fn=processor, num_workers=1)
    for got, batch in zip(loader, (photos[:2], photos[2:]), strict=True):
        want = processor(batch)
        assert torch.equal(got["pixel_values"], want["pixel_values"])
        assert torch.equal(got["image_grid_thw"], want["image_grid_thw"])


WORDS = ["?", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "see", "this"]


@pytest.mark.parametrize("kind", [Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor])
def test_a_processor_takes_it(kind):
    class Processor(kind):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name != "video_processor":  # none can be made without torchvision
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.add_special_tokens(WORDS[1:5])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?")
    processor = Processor(ImageProcessor(), tokenizer, None)

    text = "see this <|vision_start|><|image_pad|><|vision_end|>"
    photos = [noise(224, 224), noise(100, 300)]
    got = processor(text=[text], images=photos[:1], return_tensors="pt")
    assert (got.input_ids == 1).sum() == 64
    assert torch.equal(got.pixel_values, Original()(photos[0], return_tensors="pt").pixel_values)

    size = {"shortest_edge": 784, "longest_edge": 784 * 9}
    options = {"dtype": torch.bfloat16, "size": size}
    got = processor(text=[text + text], images=photos, images_kwargs=options, return_tensors="pt")
    want = Original(size=size)(photos, return_tensors="pt")
    assert torch.equal(got.image_grid_thw, want.image_grid_thw)
    assert torch.equal(got.pixel_values, want.pixel_values.bfloat16())
    assert (got.input_ids == 1).sum() == want.image_grid_thw.prod(dim=1).sum() // 4


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([], {}, ValueError, r"images must have at least one image, got none"),
        ([[]], {}, ValueError, r"images must have at least one image, got none"),
        (
            A,
            {"do_sing": True},
            TypeError,
            r"options must be those of Qwen2VLImageProcessor, got do_",
        ),
        (A, {"resample": 0}, ValueError, r"resample must be one of .*, got 'nearest'"),
        (A, {"resample": "area"}, ValueError, r"resample must be one of .*, got 'area'"),
        (A, {"dtype": "int64"}, TypeError, r"dtype must be floating, got 'int64'"),
        (A, {"dtype": "float99"}, TypeError, r"dtype must be floating, got 'float99'"),
        (
            A,
            {"dtype": "bfloat16", "return_tensors": "np"},
            TypeError,
            r"dtype must be one of NumPy's with return_tensors='np', got bfloat16",
        ),
        (
            A,
            {"size": {"height": 3, "width": 3}},
            ValueError,
            r"size must have a shortest_edge and a",
        ),
        (A, {"size": 224}, ValueError, r"size must have a shortest_edge and a .*, got 224"),
        (A, {"patch_size": 0}, ValueError, r"patch_size must be .*, got 0"),
        (A, {"image_mean": [0.5]}, ValueError, r"mean must have 3 numbers, got "),
        (A, {"image_std": 0.0}, ValueError, r"std must be above 0, got "),
        (A, {"rescale_factor": 0.0}, ValueError, r"rescale_factor must be above 0, got 0"),
        (
            A,
            {"do_resize": False},
            ValueError,
            r"images\[0\] must have sides that divide by .* = 28",
        ),
        (
            noise(2, 401),
            {},
            ValueError,
            r"height and width must be within a ratio of 200, got 2 x 401",
        ),
        (
            [A, RGBA],
            {"do_convert_rgb": False},
            ValueError,
            r"images\[1\] must have 3 channels, got \[4",
        ),
        (
            [A, FLOATS[..., :3] + 1],
            {},
            ValueError,
            r"images\[1\] must be in 0\.\.1, got 1\.\d+\.\.1",
        ),
        (FLOATS - 1, {}, ValueError, r"images\[0\] must be in 0\.\.1, got -"),
        (A.astype(int) - 1, {}, ValueError, r"images\[0\] must be in 0\.\.255, got -1\.\.254"),
        (A.astype(complex), {}, TypeError, r"images\[0\] must be of numbers, got complex128"),
    ],
)
def test_what_does_not_fit_is_refused(images, options, error, message):
    with pytest.raises(error, match=message):
        ImageProcessor()(images, **options)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match="resample must be one of 'bilinear', 'bicubic', got 'lanczos'"
    ):
        ImageProcessor(resample=1)
    with pytest.raises(ValueError, match=r"resample must be one of .*, got 'box'"):
        ImageProcessor.from_processor(Original(resample=4))
    with pytest.raises(TypeError, match="dtype must be floating, got 3"):
        ImageProcessor(dtype=3)
    with pytest.raises(TypeError, match="processor must be a Qwen2VLImageProcessor, got dict"):
        ImageProcessor.from_processor({})
