"""The image processor of Qwen2-VL, called as a collate function calls it, on one and two threads.

All that a call does is timed, also reading images out of Pillow and making its options out. Photos
are channels last, as Pillow and NumPy hold them. The limit is to read them and write the patches.
"""

from __future__ import annotations

from collections.abc import Callable

import PIL.Image
import torch
from torch import Tensor

import patchpack
from _harness import Bench, Floor, Provider, UnavailableError, photo
from patchpack.systems import qwen2_vl
from patchpack.testing.catalogue import Inputs

MAX_PIXELS = 1003520


def _make_inputs(dtype, device, sizes, num_threads=1, pillow=False) -> Inputs:
    torch.set_num_threads(num_threads)  # the harness puts back what it was
    photos = [photo(height, width, device) for height, width in sizes]
    return {"images": photos, "pillow": pillow, "dtype": dtype}


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read the photos, write the patches."""
    plans = [qwen2_vl.plan(*x.shape[1:], max_pixels=MAX_PIXELS) for x in inputs["images"]]
    num_values = sum(plan.vit_tokens for plan in plans) * 3 * 2 * 14 * 14
    return sum(x.numel() for x in inputs["images"]) + num_values * inputs["dtype"].itemsize


def _flops(inputs: Inputs, backward: bool) -> int:
    """A product and a sum for each of four pixels under the cubic, of rows then columns."""
    operations = 0
    for image in inputs["images"]:
        channels, rows, columns = image.shape
        height, width = qwen2_vl.plan(rows, columns, max_pixels=MAX_PIXELS).resized
        operations += 8 * channels * (rows * max(columns, width) + width * max(rows, height))
    return operations


def _called(processor: Callable, inputs: Inputs) -> Provider:
    images = [x.permute(1, 2, 0).numpy() for x in inputs["images"]]
    if inputs["pillow"]:
        images = [PIL.Image.fromarray(x) for x in images]

    def call(dtype: torch.dtype, **_) -> Tensor:
        return processor(images, return_tensors="pt")["pixel_values"].to(dtype)

    return call


def _pil_backend(inputs: Inputs) -> Provider:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # pyright: ignore[reportMissingImports]

    return _called(Qwen2VLImageProcessorPil(max_pixels=MAX_PIXELS), inputs)


def _torchvision_backend(inputs: Inputs) -> Provider:
    import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor  # pyright: ignore[reportMissingImports]

    return _called(Qwen2VLImageProcessor(max_pixels=MAX_PIXELS), inputs)


def _ours(inputs: Inputs) -> Provider:
    if reason := patchpack.available("patchify", "native"):
        raise UnavailableError(reason)
    from patchpack.integrations.transformers import ImageProcessor

    return _called(ImageProcessor(max_pixels=MAX_PIXELS, dtype=inputs["dtype"]), inputs)


ONE = [(960, 1280)]
EIGHT = [
    *((480, 640), (640, 480), (1080, 1920), (768, 1024)),
    *((960, 1280), (600, 800), (1200, 900), (333, 500)),
]
PIL_BACKEND, TORCHVISION_BACKEND = "transformers, PIL", "transformers, torchvision"

BENCH = Bench(
    op="image_processor",
    shapes={
        "1280x960": {"sizes": ONE},
        "1280x960, Pillow's": {"sizes": ONE, "pillow": True},
        "1280x960, 2 threads": {"sizes": ONE, "num_threads": 2},
        "8 photos": {"sizes": EIGHT},
        "8 photos, Pillow's": {"sizes": EIGHT, "pillow": True},
        "8 photos, 2 threads": {"sizes": EIGHT, "num_threads": 2},
    },
    tiny={"sizes": [(60, 80)]},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={
        PIL_BACKEND: _pil_backend,
        TORCHVISION_BACKEND: _torchvision_backend,
        "patchpack": _ours,
    },
    backward=False,
    floors=(
        Floor("1280x960", "float32", "forward", TORCHVISION_BACKEND, 3.5, "patchpack"),
        Floor("1280x960", "float32", "forward", PIL_BACKEND, 10, "patchpack"),
    ),
    threads=1,
    max_relative_rms=2e-2,  # torch rounds the weights of bytes to 16 bits
)
