"""A photo as it comes from a file to the patches that Qwen2-VL takes, on one thread.

It is what a worker of a data loader does: resize, normalise, cut. The photo is channels last, as
Pillow and NumPy hold it. The limit is to read it and to write the patches.
"""

from __future__ import annotations

import functools

import PIL.Image
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import patchpack
from _harness import Bench, Floor, Provider, UnavailableError, photo
from patchpack import PackedGrid, reference
from patchpack.systems.qwen2_vl import smart_resize
from patchpack.testing.catalogue import Inputs

MAX_PIXELS = 1003520
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "mean": MEAN, "std": STD}


def _make_inputs(dtype, device, height, width) -> Inputs:
    size = smart_resize(height, width, max_pixels=MAX_PIXELS)
    grid = PackedGrid([(size[0] // 14, size[1] // 14)], spatial_merge_size=2)
    return {"image": photo(height, width, device), "size": size, "grid": grid}


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read the photo, write the patches in float32."""
    return inputs["image"].numel() + inputs["grid"].num_tokens * 3 * 2 * 14 * 14 * 4


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for each of four pixels under the cubic, of rows then columns."""
    (_, rows, columns), (height, width) = inputs["image"].shape, inputs["size"]
    return 8 * 3 * (rows * max(columns, width) + width * max(rows, height))


def _reference(inputs: Inputs) -> Provider:
    def preprocess(image: Tensor, size: tuple[int, int], grid: PackedGrid) -> Tensor:
        return reference.patchify(reference.resize_images([image], [size]), grid, **PATCHES)

    return preprocess


def _ours(inputs: Inputs) -> Provider:
    if reason := patchpack.available("patchify", "native"):
        raise UnavailableError(reason)

    def preprocess(image: Tensor, size: tuple[int, int], grid: PackedGrid) -> Tensor:
        return patchpack.patchify([image], grid, **PATCHES, resample="bicubic", impl="native")

    return preprocess


def _torch(inputs: Inputs) -> Provider:
    """``F.interpolate`` of bytes, which is what torchvision calls, and a chain of ops."""

    def preprocess(image: Tensor, size: tuple[int, int], grid: PackedGrid) -> Tensor:
        resized = F.interpolate(image[None], size, mode="bicubic", antialias=True)
        mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
        values = (resized.float() - mean) / std
        h, w = size[0] // 14, size[1] // 14
        cut = values.view(1, 3, h // 2, 2, 14, w // 2, 2, 14).permute(2, 5, 3, 6, 1, 0, 4, 7)
        return cut.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(h * w, -1)

    return preprocess


def _pil_backend(inputs: Inputs) -> Provider:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # pyright: ignore[reportMissingImports]

    picture = PIL.Image.fromarray(inputs["image"].permute(1, 2, 0).numpy())
    return _processor(Qwen2VLImageProcessorPil(max_pixels=MAX_PIXELS), picture)


def _torchvision_backend(inputs: Inputs, channels_first: bool) -> Provider:
    import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor  # pyright: ignore[reportMissingImports]

    image = inputs["image"]
    image = image.contiguous() if channels_first else image.permute(1, 2, 0).numpy()
    return _processor(Qwen2VLImageProcessor(max_pixels=MAX_PIXELS), image)


def _processor(processor, image) -> Provider:
    return lambda **_: processor(image, return_tensors="pt")["pixel_values"]


PHOTO = "1280x960 to 1148x840"
PIL_BACKEND, TORCHVISION_BACKEND = "transformers, PIL", "transformers, torchvision"

BENCH = Bench(
    op="preprocess",
    shapes={PHOTO: {"height": 960, "width": 1280}},
    tiny={"height": 60, "width": 80},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={
        "reference": _reference,
        "native": _ours,
        "F.interpolate, torch": _torch,
        PIL_BACKEND: _pil_backend,
        TORCHVISION_BACKEND: functools.partial(_torchvision_backend, channels_first=False),
        # it is faster with a photo that was transposed before
        f"{TORCHVISION_BACKEND}, CHW": functools.partial(_torchvision_backend, channels_first=True),
    },
    backward=False,
    dtypes=("float32",),
    floors=(
        Floor(PHOTO, "float32", "forward", TORCHVISION_BACKEND, 3.5),
        Floor(PHOTO, "float32", "forward", PIL_BACKEND, 10),
    ),
    threads=1,
    max_relative_rms=2e-2,  # torch rounds the weights of bytes to 16 bits
)
