"""``patchify``: the original code's patches, convolutions, the grid's order, strides, messages."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from patchpack import PackedGrid, available, patchify, resize_images

IMPLS = ("reference", "triton", "native")
RUN = [impl for impl in IMPLS if available("patchify", impl) is None]
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]


def golden(function):
    cases = [case for case in GOLDEN if case["function"] == f"qwen2vl.{function}"]
    assert cases, f"no golden case of {function}"
    return cases


def plain(channels, **options):
    """Options that leave floating pixels as they are."""
    return {"mean": [0] * channels, "std": [1] * channels, **options}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", golden("patchify"), ids=lambda case: case["inputs"]["image"])
def test_patches_are_the_originals(case, impl):
    inputs, outputs = case["inputs"], case["outputs"]
    shape = {
        "arange(32).reshape(1,1,4,8) (T=1,C=1,H=4,W=8)": (1, 1, 4, 8),
        "arange(96).reshape(3,2,4,4) (T=3,C=2,H=4,W=4)": (3, 2, 4, 4),
    }[inputs["image"]]
    frames = torch.arange(math.prod(shape)).reshape(shape).float()
    grid = PackedGrid([outputs["grid_thw"]], inputs["merge_size"])
    sizes = {name: inputs[name] for name in ("patch_size", "temporal_patch_size")}
    rows = patchify([frames], grid, **plain(shape[1]), **sizes, impl=impl)
    assert rows.tolist() == outputs["rows"]


@pytest.mark.parametrize("impl", IMPLS)
def test_patches_lie_where_the_grid_says(impl):
    # images whose pixels are their own row and column, one pixel to a patch
    grid = PackedGrid([(1, 4, 6), (2, 2, 8), (1, 2, 2)], 2)
    images = [
        torch.from_numpy(np.indices((h, w), np.float32)).expand(t, 2, h, w)
        for t, h, w in grid.grid_thw.tolist()
    ]
    assert torch.equal(
        patchify(images, grid, **plain(2), patch_size=1, impl=impl), grid.position_ids.float()
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_product_with_the_patches_is_the_convolution(impl):
    images = [torch.randn(3, 23, 17), torch.randn(3, 9, 30)]  # neither side divides
    weight = torch.randn(5, 3, 4, 4)
    grid = PackedGrid([(5, 4), (2, 7)])
    for layout, flat in (("ctpp", weight), ("ppc", weight.permute(0, 2, 3, 1))):
        rows = patchify(images, grid, **plain(3), patch_size=4, layout=layout, impl=impl)
        want = [functional.conv2d(image, weight, stride=4).flatten(1).T for image in images]
        torch.testing.assert_close(rows @ flat.flatten(1).T, torch.cat(want), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_product_with_the_patches_is_the_convolution_over_time(impl):
    (case,) = golden("conv3d_equals_linear")
    embed, in_dim = case["inputs"]["embed"], case["inputs"]["in_dim"]
    clip, weight = torch.randn(4, 3, 28, 28), torch.randn(embed, 3, 2, 14, 14) / in_dim**0.5
    options = plain(3, patch_size=14, temporal_patch_size=2)
    rows = patchify([clip], PackedGrid([(2, 2, 2)]), **options, impl=impl)
    assert rows.shape == (8, in_dim)
    want = functional.conv3d(clip.transpose(0, 1)[None], weight, stride=(2, 14, 14))
    got = rows @ weight.flatten(1).T
    assert (got - want[0].flatten(1).T).abs().max() < case["tol"]


@pytest.mark.parametrize("impl", IMPLS)
def test_every_byte_is_scaled_and_normalised_as_in_numpy(impl):
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 16, 256)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    rows = patchify([pixels], PackedGrid([(1, 16)]), patch_size=16, mean=mean, std=std, impl=impl)
    got = rows.view(16, 3, 16, 16)[:, :, 0].transpose(0, 1).reshape(3, 256)
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    want = [(values - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    assert np.array_equal(got.numpy(), np.stack(want))


@pytest.mark.parametrize("floating", [False, True])
def test_views_of_any_strides_have_the_bits_of_their_copies(floating):
    photo = torch.randint(256, (40, 50, 4), dtype=torch.uint8)
    clip = torch.randint(256, (6, 30, 20, 3), dtype=torch.uint8)
    if floating:
        photo, clip = photo / 255, clip / 255
    views = [
        photo.permute(2, 0, 1)[:3],  # rows of pixels
        photo.permute(2, 0, 1)[1:, 3:37, 5::2],  # a crop with a strided last dimension
        photo.permute(2, 1, 0)[:3],  # lying down
        clip.permute(0, 3, 1, 2)[::2],
        photo[:, :, :1].permute(2, 0, 1).expand(3, -1, -1),  # grey
    ]
    options = {"patch_size": 4, "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3}
    grid = PackedGrid(
        [(x.shape[0] if x.ndim == 4 else 1, *(n // 4 for n in x.shape[-2:])) for x in views]
    )
    want = patchify([x.contiguous() for x in views], grid, **options, impl="reference")
    for impl in RUN:
        assert torch.equal(patchify(views, grid, **options, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_counts_the_copies_of_a_pixel(impl):
    clip = torch.randn(4, 2, 5, 7, requires_grad=True)  # a row and a column are left out
    still = torch.randn(2, 4, 4, requires_grad=True)
    grid = PackedGrid([(2, 2, 3), (1, 2, 2)])
    options = {"patch_size": 2, "temporal_patch_size": 3, "mean": [1, 2], "std": [0.5, 4]}
    patchify([clip, still], grid, **options, impl=impl).sum().backward()
    want = torch.zeros_like(clip)
    want[:, 0, :4, :6], want[:, 1, :4, :6] = 1 / 0.5, 1 / 4
    want[3] *= 3  # fills what is left of the second patch
    assert torch.equal(clip.grad, want)
    assert torch.equal(still.grad[:, 0, 0], 3 * torch.tensor([1 / 0.5, 1 / 4]))


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_and_nan_stay_where_they_are(impl):
    image = torch.zeros(1, 4, 4)
    image[0, 1, 2], image[0, 3, 3] = math.inf, math.nan
    rows = patchify([image], PackedGrid([(2, 2)]), mean=[0.5], std=[0.3], patch_size=2, impl=impl)
    assert rows.isinf().nonzero().tolist() == [[1, 2]]
    assert rows.isnan().nonzero().tolist() == [[3, 3]]


def test_images_that_need_no_gradient_get_none():
    images = [torch.randn(1, 2, 2, requires_grad=True), torch.randn(1, 2, 2)]
    grid = PackedGrid([(1, 1), (1, 1)])
    patchify(images, grid, **plain(1), patch_size=2, impl="triton").sum().backward()
    assert torch.equal(images[0].grad, torch.ones(1, 2, 2))
    assert images[1].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_no_images_are_no_patches(impl):
    rows = patchify([], PackedGrid([]), **plain(3), patch_size=14, dtype=torch.bfloat16, impl=impl)
    assert rows.shape == (0, 588)
    assert rows.dtype == torch.bfloat16


MOMENTS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.mark.parametrize("size", [1, 3, 8, 14, 16, 17, 32])
def test_native_patches_of_any_size_at_any_capability(size, cpu_capability):
    clip = torch.randint(256, (3, 2 * size + size // 2, 5 * size, 3), dtype=torch.uint8)
    bytes_ = clip.movedim(-1, 1)
    floats = (clip / 255).movedim(-1, 1)
    for x, layout, frames in ((bytes_, "ctpp", 2), (floats, "ctpp", 2), (bytes_, "ppc", 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            options = {"patch_size": size, "temporal_patch_size": frames, "layout": layout}
            grid = PackedGrid([(-(-3 // frames), 2, 5)])
            for y in (x, x.contiguous()):
                got, want = (
                    patchify([y], grid, **MOMENTS, **options, dtype=dtype, impl=impl)
                    for impl in ("native", "reference")
                )
                assert torch.equal(got, want)


@pytest.mark.parametrize("size", [1, 256])  # tails, and whole vectors
def test_native_rounds_to_bfloat16_as_torch_does(size, cpu_capability):
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16  # every bfloat16, and NaN
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = (upper | lower[:, None]).view(torch.float32).view(1, 6 * 256, 256)
    grid = PackedGrid([(6 * 256 // size, 256 // size)])
    options = {**plain(1), "patch_size": size, "dtype": torch.bfloat16}
    got = patchify([x], grid, **options, impl="native")
    want = x.bfloat16().flatten() if size == 256 else x.bfloat16().view(-1, 1)
    assert torch.equal(got.isnan(), want.view_as(got).isnan())
    bits = got.view(torch.int16), want.view_as(got).view(torch.int16)
    assert torch.equal(*(x.masked_fill(got.isnan(), 0) for x in bits))


@pytest.mark.cpp
def test_native_patches_past_the_caches_are_the_same():
    image = torch.randint(256, (700, 1400, 3), dtype=torch.uint8).movedim(-1, 0)
    options = {"patch_size": 14, **MOMENTS}
    large, small = PackedGrid([(50, 100)]), PackedGrid([(5, 100)])
    for dtype in (torch.float32, torch.bfloat16):
        got = patchify([image], large, **options, dtype=dtype, impl="native")
        assert got.numel() > 2**20  # more than csrc keeps in the caches
        for i in range(10):
            part = patchify(
                [image[:, 70 * i : 70 * (i + 1)]], small, **options, dtype=dtype, impl="native"
            )
            assert torch.equal(got[500 * i : 500 * (i + 1)], part)


def ragged(seed):
    """Images and clips of any strides, and a grid that they are resized to."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape):
        image = torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator)
        return image.movedim(-1, -3)

    images = [
        pixels(37, 53),
        pixels(3, 90, 20).contiguous(),
        pixels(400, 31),  # loses its height first
        pixels(1, 1),
        pixels(70, 90)[:, 3:-5, ::2],
    ]
    return images, PackedGrid([(1, 4, 6), (2, 2, 8), (1, 2, 2), (1, 2, 4), (1, 10, 2)], 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_resampling_is_resizing_first(resample, impl):
    images, grid = ragged(0)
    options = {"patch_size": 4, "temporal_patch_size": 2, **MOMENTS}
    sizes = [(4 * h, 4 * w) for _, h, w in grid.grid_thw.tolist()]
    resized = resize_images(images, sizes, mode=resample, impl=impl)
    want = patchify(resized, grid, **options, impl=impl)
    assert torch.equal(patchify(images, grid, **options, resample=resample, impl=impl), want)


@pytest.mark.parametrize("layout", ["ctpp", "ppc"])
def test_native_resampling_at_any_capability(layout, cpu_capability):
    images, grid = ragged(1)
    images[1] = images[1][:2]
    options = {"patch_size": 14, "layout": layout, "resample": "bicubic", **MOMENTS}
    want = patchify(images, grid, **options, impl="reference")
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(patchify(images, grid, **options, impl="native"), want)
        finally:
            torch.set_num_threads(before)


@pytest.mark.cpp
def test_the_fused_operator_is_well_formed():
    images, grid = ragged(2)
    args = (grid.geometry, images, grid.num_tokens, 2, 4, [0.5] * 3, [0.5] * 3, 2, "ctpp")
    op = torch.ops.patchpack.resize_patchify.native
    torch.library.opcheck(op, (*args, torch.float32, False, "bicubic"))
    with pytest.raises(RuntimeError, match=r"it is not of images\[1\]"):
        op(grid.geometry, images[::-1], *args[2:], torch.float32, False, "bicubic")
    with pytest.raises(ValueError, match="op must be one of"):
        available("resize_patchify", "native")  # no op by itself


@pytest.mark.cpp
def test_native_patchify_lets_other_threads_run():
    image = torch.randint(256, (3000, 4000, 3), dtype=torch.uint8).movedim(-1, 0)
    grid = PackedGrid([(200, 280)])
    inside, counts = threading.Event(), []

    def count():
        inside.wait()
        while inside.is_set():
            counts.append(None)

    counter = threading.Thread(target=count)
    counter.start()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"patch_size": 14, **MOMENTS, "resample": "bicubic", "impl": "native"}
        ticks = []
        for _ in range(5):
            inside.set()
            start = len(counts)
            op = torch.ops.patchpack.resize_patchify.native
            op(
                *(grid.geometry, [image], grid.num_tokens, 1, 14, [0.5] * 3, [0.5] * 3, 1),
                *("ctpp", torch.float32, False, "bicubic"),
            )
            ticks.append(len(counts) - start)
        patchify([image], grid, **options)
    finally:
        inside.clear()
        counter.join()
        torch.set_num_threads(before)
    # holding the lock, the op would stop the other thread but for the moment of a switch
    assert max(ticks) > 20_000


@pytest.mark.cpp
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_and_threads_cut_the_same_patches(context):
    sizes = [(200, 300), (97, 180), (40, 700), (300, 20)]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    grid = PackedGrid([(3, 5), (2, 4)])
    cut = partial(patchify, grid=grid, patch_size=14, **MOMENTS, resample="bicubic")
    want = [cut(images[:2]), cut(images[2:])]  # this process has used its threads
    loader = DataLoader(
        images, batch_size=2, collate_fn=cut, num_workers=2, multiprocessing_context=context
    )
    assert all(map(torch.equal, loader, want))
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(cut, [images[:2], images[2:]]), want))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory can be pinned here")
@pytest.mark.parametrize("impl", IMPLS)
def test_memory_is_pinned_only_for_an_accelerator(impl):
    with pytest.raises(ValueError, match="pin_memory needs an accelerator"):
        patchify(
            [IMAGE], PackedGrid([(2, 3)]), **plain(3), patch_size=4, pin_memory=True, impl=impl
        )


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no memory can be pinned here")
@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("resample", [None, "bicubic"])
def test_pinned_patches_are_the_same(resample, impl):
    image = torch.randint(256, (3, 28, 42), dtype=torch.uint8)
    options = {"patch_size": 14, "resample": resample, "impl": impl, **MOMENTS}
    pinned = patchify([image], PackedGrid([(2, 3)]), **options, pin_memory=True)
    assert pinned.is_pinned()
    assert torch.equal(pinned, patchify([image], PackedGrid([(2, 3)]), **options))


IMAGE = torch.zeros(3, 8, 12)
BYTES = IMAGE.to(torch.uint8)
CALL = {"images": [IMAGE], "grid": PackedGrid([(2, 3)]), "patch_size": 4, **plain(3)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGE}, TypeError, r"images must be a list of tensors, got Tensor"),
        ({"images": [IMAGE[0]]}, ValueError, r"images\[0\] must have shape \[\*, \*, \*\]"),
        ({"images": [IMAGE.numpy()]}, TypeError, r"images\[0\] must be a tensor, got ndarray"),
        ({"images": []}, ValueError, r"images must be one for each of 1 grids, got 0"),
        ({"images": [IMAGE.int()]}, TypeError, r"images\[0\] must be float32 or .*got int32"),
        (
            {"images": [IMAGE, BYTES], "grid": PackedGrid([(2, 3)] * 2)},
            TypeError,
            r"images\[1\] must have the dtype of images\[0\]",
        ),
        (
            {"images": [BYTES, IMAGE], "grid": PackedGrid([(2, 3)] * 2)},
            TypeError,
            r"images\[1\] must be uint8, got float32",
        ),
        ({"images": [IMAGE.to("meta")]}, ValueError, r"images\[0\] must be on the device of grid"),
        ({"images": [IMAGE[:2]]}, ValueError, r"images\[0\] must have a channel for each of 3"),
        ({"images": [IMAGE[:, :7]]}, ValueError, r"\(1, 1, 3\) of images\[0\], got \(1, 2, 3\)"),
        ({"images": [IMAGE.expand(2, 3, 8, 12)]}, ValueError, r"\(2, 2, 3\) of images\[0\]"),
        ({"grid": [(2, 3)]}, TypeError, r"grid must be a PackedGrid, got list"),
        ({"patch_size": 0}, ValueError, r"patch_size must be at least 1, got 0"),
        ({"temporal_patch_size": 1.0}, TypeError, r"temporal_patch_size must be an integer"),
        ({"mean": [0, 0]}, ValueError, r"mean and std must be one for each channel"),
        ({"mean": [], "std": []}, ValueError, r"mean and std must be one for each channel"),
        ({"mean": [0, 0, math.nan]}, ValueError, r"mean must be finite"),
        ({"mean": 0.5}, TypeError, r"mean must be numbers, got 0.5"),
        ({"mean": "123"}, TypeError, r"mean must be numbers, got '123'"),
        ({"mean": [True] * 3}, TypeError, r"mean must be numbers, got \[True, True, True\]"),
        ({"std": torch.ones(3)}, TypeError, r"std must be numbers, got tensor"),
        ({"std": [torch.ones(())] * 3}, TypeError, r"std must be numbers, got \[tensor"),
        ({"std": [1, 0, 1]}, ValueError, r"std must be above 0, got 0"),
        ({"std": [1, 1, 1e-39]}, ValueError, r"std must be at least 2\*\*-126, got 1e-39"),
        ({"layout": np.ones(2)}, ValueError, r"layout must be one of 'ctpp', 'ppc', got array"),
        ({"layout": "cpp"}, ValueError, r"layout must be one of 'ctpp', 'ppc', got 'cpp'"),
        (
            {"layout": "ppc", "temporal_patch_size": 2},
            ValueError,
            r"temporal_patch_size must be 1 in layout 'ppc', got 2",
        ),
        ({"resample": "nearest"}, ValueError, r"resample must be one of 'bilinear', 'bicubic'"),
        ({"resample": "bicubic"}, TypeError, r"images\[0\] to resample must be uint8, got float32"),
        (
            {"images": [BYTES[:, :0]], "resample": "bicubic"},
            ValueError,
            r"images\[0\] must have pixels",
        ),
        (
            {"images": [BYTES.expand(2, 3, 8, 12)], "resample": "bicubic"},
            ValueError,
            r"\(2, 2, 3\) of images\[0\], got \(1, 2, 3\)",
        ),
        ({"pin_memory": 1}, TypeError, r"pin_memory must be a bool, got 1"),
        ({"dtype": torch.uint8}, TypeError, r"dtype must be .*, got torch.uint8"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        patchify(**{**CALL, **change}, impl=impl)
