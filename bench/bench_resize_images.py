"""``resize_images``, photos to the sizes that Qwen2-VL gives them."""

from __future__ import annotations

import PIL.Image
import torch
from torch import Tensor

from _harness import Bench, Provider
from patchpack.systems.qwen2_vl import smart_resize
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, photos, max_pixels) -> Inputs:
    """Photos as Pillow and NumPy hold them, channels last: noise, but as smooth as photos are."""
    images = []
    for height, width in photos:
        y = torch.arange(height, device=device)[:, None, None]
        x = torch.arange(width, device=device)[:, None]
        wave = 127 + 90 * torch.sin(y / 31) * torch.cos(x / 47 + torch.arange(3, device=device))
        noise = torch.randint(-30, 31, (height, width, 3), device=device)
        images.append((wave + noise).to(torch.uint8).permute(2, 0, 1))
    return {"images": images, "sizes": [smart_resize(*p, max_pixels=max_pixels) for p in photos]}


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


# F.interpolate(uint8, antialias=True), what torchvision calls, is no peer: it rounds its weights to
# 16 bits, and the harness times nothing that computes something else
BENCH = Bench(
    op="resize_images",
    shapes={"4 photos 960x1280, Qwen2-VL": {"photos": [(960, 1280)] * 4, "max_pixels": 1003520}},
    tiny={"photos": [(60, 80), (50, 30)], "max_pixels": 1003520},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={"Pillow, image by image": _pillow},
    backward=False,
)
