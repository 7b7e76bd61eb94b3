"""``resize_images``, photos to the sizes that Qwen2-VL gives them."""

from __future__ import annotations

import PIL.Image
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from _harness import Bench, Provider, photo
from patchpack.systems.qwen2_vl import smart_resize
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, photos, sizes) -> Inputs:
    return {"images": [photo(h, w, device) for h, w in photos], "sizes": sizes}


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read the images, write the resized ones; bytes have no gradient."""
    return sum(x.numel() for x in inputs["images"]) + 3 * sum(h * w for h, w in inputs["sizes"])


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for each pixel under the cubic, four wide or four output pixels."""
    operations = 0
    for image, (height, width) in zip(inputs["images"], inputs["sizes"], strict=True):
        channels, rows, columns = image.shape
        operations += 8 * channels * (rows * max(columns, width) + width * max(rows, height))
    return operations


def _pillow(inputs: Inputs) -> Provider:
    if inputs["images"][0].device.type != "cpu":
        raise ValueError("Pillow runs on the CPU")

    def resize(images: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        resized = []
        for image, (height, width) in zip(images, sizes, strict=True):
            photo = PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height))
            flat = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
            resized.append(flat.view(height, width, 3).permute(2, 0, 1).contiguous())
        return resized

    return resize


def _interpolate(inputs: Inputs) -> Provider:
    """What torchvision calls."""

    def resize(images: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        return [
            F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
            for image, size in zip(images, sizes, strict=True)
        ]

    return resize


PHOTO = (960, 1280)

BENCH = Bench(
    op="resize_images",
    shapes={
        "4 photos 960x1280, Qwen2-VL": {
            "photos": [PHOTO] * 4,
            "sizes": [smart_resize(*PHOTO, max_pixels=1003520)] * 4,
        }
    },
    tiny={"photos": [(60, 80), (50, 30)], "sizes": [(56, 84), (84, 56)]},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={"Pillow, image by image": _pillow, "F.interpolate, image by image": _interpolate},
    backward=False,
    dtypes=("float32",),  # unused: all are bytes
    max_relative_rms=1e-2,  # F.interpolate rounds its weights to 16 bits
)
