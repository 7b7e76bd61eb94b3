"""``resize_images``: the bytes of Pillow, views, sums that leave 0..255, messages."""

import PIL
import PIL.Image
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from patchpack import available, resize_images
from patchpack._resampling import BITS, height_first, resampling_weights

IMPLS = ("reference", "triton", "native")
RUN = [impl for impl in IMPLS if available("resize_images", impl) is None]
FILTERS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
}
PILLOW = int(PIL.__version__.partition(".")[0])


def noise(*shape, seed=0):
    """Black and white pixels, the hardest to resize."""
    generator = torch.Generator().manual_seed(seed)
    return 255 * torch.randint(2, shape, dtype=torch.uint8, generator=generator)


def by_pillow(image, size, mode):
    """One channel of an image ``[H, W]``."""
    resized = PIL.Image.fromarray(image.numpy()).resize(size[::-1], FILTERS[mode])
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size)


sides = st.one_of(st.integers(1, 8), st.integers(1, 300))


@settings(max_examples=200)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.sampled_from(list(FILTERS)))
def test_bytes_are_those_of_pillow(before, after, mode):
    assume(PILLOW >= 13 or not height_first(before, after))  # older ones resize the width first
    image = noise(*before)
    (got,) = resize_images([image[None]], [after], mode=mode, impl="reference")
    assert torch.equal(got[0], by_pillow(image, after, mode))


@pytest.mark.parametrize("mode", FILTERS)
def test_the_kernel_gives_the_bytes_of_pillow(mode):
    images = [noise(3, 37, 53), noise(1, 200, 9), noise(2, 3, 60, 44), noise(4, 5, 300)]
    sizes = [(28, 56), (211, 4), (90, 20), (5, 31)]
    got = resize_images(images, sizes, mode=mode, impl="triton")
    for x, y, size in zip(images, got, sizes, strict=True):
        assert y.shape == (*x.shape[:-2], *size)
        planes, resized = x.flatten(0, -3), y.flatten(0, -3)
        for plane, part in zip(planes, resized, strict=True):
            assert torch.equal(part, by_pillow(plane, size, mode))


@pytest.mark.skipif(PILLOW < 13, reason="resizes the width first")
@pytest.mark.parametrize(
    ("before", "after"), [((60, 60), (20, 100)), ((60, 60), (20, 40)), ((60, 60), (19, 40))]
)
def test_the_height_goes_first_where_it_loses_more(before, after):
    image = noise(1, *before)
    want = by_pillow(image[0], after, "bicubic")
    for impl in RUN:
        assert torch.equal(resize_images([image], [after], impl=impl)[0][0], want)


@given(sides, sides, st.sampled_from(list(FILTERS)))
def test_weights_add_up_and_read_what_is_there(num_in, num_out, mode):
    first, weights = resampling_weights(num_in, num_out, mode)
    assert first.min() >= 0
    assert (first < num_in).all()
    past = first + torch.arange(len(weights))[:, None] >= num_in
    assert not weights[past].any()
    assert ((weights.sum(0) - 2**BITS).abs() <= len(weights) / 2).all()
    # and a sum of 32 bits holds them
    assert weights.abs().sum(0).max() * 255 + 2 ** (BITS - 1) < 2**31


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", FILTERS)
def test_an_image_of_the_same_size_is_a_copy(mode, impl):
    image = noise(3, 13, 17)
    (same,) = resize_images([image], [(13, 17)], mode=mode, impl=impl)
    assert torch.equal(same, image)
    assert same.data_ptr() != image.data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_colour_stays(impl):
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 31, 20)
    (resized,) = resize_images([image], [(17, 50)], impl=impl)
    assert torch.equal(resized, image[:, :1, :1].expand(3, 17, 50))


SHAPES = [  # height and width before and after: ratios, sides of one pixel, blocks not full
    ((1, 1), (1, 1)),
    ((1, 300), (40, 1)),
    ((300, 1), (1, 40)),
    ((129, 65), (33, 131)),
    ((700, 30), (3, 29)),
    ((30, 700), (31, 3)),
    ((2, 3), (150, 210)),
    ((66, 400), (128, 97)),
    ((257, 260), (64, 130)),
    ((90, 120), (90, 64)),
    ((64, 16), (65, 16)),
]


@pytest.mark.skipif(PILLOW < 13, reason="resizes the width first")
@pytest.mark.parametrize("mode", FILTERS)
def test_native_gives_the_bytes_of_pillow(mode, cpu_capability):
    for seed, (before, after) in enumerate(SHAPES):
        channels = (1, 3, 4, 2, 5)[seed % 5]
        photo = noise(*before, channels, seed=seed)
        crop = noise(before[0] + 2, 2 * before[1] + 1, channels + 1, seed=seed)
        crop[1:-1, 1::2, :channels] = photo
        image = photo.permute(2, 0, 1)
        views = [
            image,  # pixels in a row
            image.contiguous(),
            crop[1:-1, 1::2, :channels].permute(2, 0, 1),
            photo.transpose(0, 1).contiguous().permute(2, 1, 0),  # lying down
        ]
        want = torch.stack([by_pillow(plane.contiguous(), after, mode) for plane in image])
        for got in resize_images(views, [after] * len(views), mode=mode, impl="native"):
            assert torch.equal(got, want), (before, after)


@pytest.mark.cpp
@settings(max_examples=200)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.sampled_from(list(FILTERS)))
def test_native_is_the_reference_at_any_size(before, after, mode):
    image = noise(*before, 3).permute(2, 0, 1)
    (got,) = resize_images([image], [after], mode=mode, impl="native")
    (want,) = resize_images([image], [after], mode=mode, impl="reference")
    assert torch.equal(got, want)


@pytest.mark.cpp
def test_strips_of_any_number_of_threads_meet():
    images = [noise(300, 40, 3).permute(2, 0, 1), noise(2, 3, 170, 33), noise(1, 900, 20)]
    sizes = [(290, 61), (333, 30), (200, 19)]
    want = resize_images(images, sizes, impl="reference")
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            got = resize_images(images, sizes, impl="native")
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, got, want))


def test_views_of_any_strides_have_the_bits_of_their_copies():
    photo = noise(40, 50, 4)
    views = [
        photo.permute(2, 0, 1)[:3],
        photo.permute(2, 0, 1)[1:, 3:37, 5::2],
        photo.permute(2, 1, 0),
        noise(6, 9, 20, 3).permute(0, 3, 1, 2)[::2],
        photo[:, :, 0].expand(3, -1, -1),
    ]
    sizes = [(20, 60), (50, 11), (7, 7), (18, 10), (41, 49)]
    want = resize_images([x.contiguous() for x in views], sizes, impl="reference")
    for impl in RUN:
        for x, y in zip(resize_images(views, sizes, impl=impl), want, strict=True):
            assert x.is_contiguous()
            assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_has_no_pixels_stays_so(impl):
    assert resize_images([], [], impl=impl) == []
    (clip,) = resize_images([noise(0, 3, 5, 5)], [(2, 4)], impl=impl)
    assert clip.shape == (0, 3, 2, 4)


IMAGE = noise(3, 8, 12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGE}, TypeError, r"images must be a list of tensors, got Tensor"),
        ({"images": [IMAGE[0]]}, ValueError, r"images\[0\] must have shape \[\*, \*, \*\]"),
        ({"images": [IMAGE.float()]}, TypeError, r"images\[0\] must be uint8, got float32"),
        ({"images": [IMAGE[:, :0]]}, ValueError, r"images\[0\] must have pixels, got \[3, 0, 12\]"),
        ({"sizes": []}, ValueError, r"sizes must be one for each of 1 images, got 0"),
        ({"sizes": [(0, 4)]}, ValueError, r"sizes\[0\] must be a height and a width .*\(0, 4\)"),
        ({"sizes": [(2**40, 4)]}, ValueError, r"sizes\[0\] must be a height and a width from 1"),
        ({"sizes": [(4, 4, 4)]}, ValueError, r"sizes\[0\] must be a height and a width"),
        ({"sizes": [(4, 4.0)]}, TypeError, r"sizes\[0\] must be a list or tuple of integers"),
        ({"sizes": (4, 4), "images": [IMAGE] * 2}, TypeError, r"sizes\[0\] must be a list"),
        ({"sizes": 4}, TypeError, r"sizes must be a list of pairs, got int"),
        ({"mode": "nearest"}, ValueError, r"mode must be one of 'bilinear', 'bicubic'"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        resize_images(**{"images": [IMAGE], "sizes": [(4, 4)], **change}, impl=impl)
