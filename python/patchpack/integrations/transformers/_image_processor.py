"""The image processor of Qwen2-VL to Qwen3-VL in ``transformers``, on the fused kernels."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import infer_channel_dimension_format, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from patchpack import _check
from patchpack._resampling import FILTERS
from patchpack.packing import PackedGrid
from patchpack.systems import _images, qwen2_vl

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil as Original,
    )
except ModuleNotFoundError:  # it had the plain name until the one of torchvision took that
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor as Original,
    )

NAME = "Qwen2VLImageProcessor"
if "return_numpy" in inspect.signature(convert_to_rgb).parameters:  # asked for, or it is logged
    convert_to_rgb = functools.partial(convert_to_rgb, return_numpy=True)


class ImageProcessorKwargs(getattr(Original, "valid_kwargs", ImagesKwargs), total=False):  # pyright: ignore
    dtype: torch.dtype | str


class ImageProcessor(Original):  # pyright: ignore[reportGeneralTypeIssues]
    """``Qwen2VLImageProcessor`` of ``transformers``: the same patches, sooner.

    It goes where that one does, as into ``Qwen2VLProcessor``, ``Qwen2_5_VLProcessor`` and
    ``Qwen3VLProcessor``, and takes the same images and options. Resizing, normalising and cutting
    are one operator, and torchvision is not needed. What it saves names the original, which loads
    it too.

    Args:
        dtype: Dtype of ``pixel_values``, floating, or its name, such as ``"bfloat16"``; computed in
            float32 and rounded once.
        options: Those of the original: ``size`` or ``min_pixels`` and ``max_pixels``, ``resample``,
            ``patch_size``, ``temporal_patch_size``, ``merge_size``, ``rescale_factor``,
            ``image_mean``, ``image_std``, and ``do_convert_rgb``, ``do_resize``, ``do_rescale``,
            ``do_normalize``. What has no effect there has none here.

    Raises:
        ValueError: ``resample`` is neither bicubic nor bilinear.
        TypeError: ``dtype`` is not floating.

    The original has two backends. This one gives the patches of Pillow's, with Pillow 13 as in
    ``patchpack.resize_images``: over 43 sizes from 1 x 1 to 3000 x 2000, aspects up to 199, noise
    and photos, not a bit of float32 differed. Where bytes are not scaled by 1 / 255, and for images
    of floats, which Pillow resizes in 8 bits, values differ by rounding, up to 2**-21 of the
    largest. From torchvision's, which rounds the filter's weights to fewer bits, resizes the width
    first, and floats as they are, photos differed by up to 11 grey levels, or 0.1 once normalised,
    and noise by up to 31, or 0.47. Source: ``patchpack.systems.qwen2_vl``.
    """

    size: ClassVar = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    valid_kwargs = ImageProcessorKwargs

    def __init__(self, *, dtype: torch.dtype | str = torch.float32, **options: Any) -> None:
        size = copy.copy(options.pop("size", None) or self.size)  # originals write limits into it
        super().__init__(size=size, **options)
        self.dtype = _dtype(dtype)
        _filter(self.resample)

    @classmethod
    def from_processor(cls, processor: Any, **options: Any) -> ImageProcessor:
        """One with the settings of a ``Qwen2VLImageProcessor``, whatever its backend.

        Args:
            processor: The image processor: ``image_processor`` of what ``AutoProcessor`` loads.
            options: What is to be different: see the constructor.

        Raises:
            ValueError: An option is not supported.
            TypeError: ``processor`` is of another model, which may have other rules.
        """
        if type(processor).__name__ not in (NAME, f"{NAME}Fast", f"{NAME}Pil", cls.__name__):
            raise TypeError(f"processor must be a {NAME}, got {type(processor).__name__}")
        return cls(**{**processor.to_dict(), **options})

    def to_dict(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {**super().to_dict(), "image_processor_type": NAME, "dtype": dtype}

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Images of different sizes to one packed sequence of normalised patches.

        Args:
            images: An image, or a list of images, nested or not: Pillow images, arrays and tensors
                with channels first or last, paths and addresses. 8-bit RGB arrays and tensors are
                read where they are.
            return_tensors: ``"np"`` for arrays, otherwise tensors.
            input_data_format: ``"channels_first"`` or ``"channels_last"`` of arrays and tensors; by
                default what their shapes say.
            device: Where to compute; by default where images are.
            options: Those of the constructor, for this call; ``None`` is the processor's own.

        Returns:
            ``pixel_values``, ``[T, 3 * temporal_patch_size * patch_size**2]``, ``dtype``, and
            ``image_grid_thw``: frames, rows and columns of each image, in patches, int64
            ``[images, 3]`` on the CPU. Not differentiable. Deterministic.

        Raises:
            ValueError: An image, a size or a number does not fit, or ``resample`` is not supported.
            TypeError: An option is unknown, or a type does not fit.
        """
        known = {f.name for f in fields(_Options)} | self.valid_kwargs.__annotations__.keys()
        unknown = sorted(options.keys() - known)
        if unknown:
            raise TypeError(f"options must be those of {NAME}, got {', '.join(unknown)}")
        chosen = self._choose(options)
        if return_tensors == "np" and chosen.dtype == torch.bfloat16:
            raise TypeError("dtype must be one of NumPy's with return_tensors='np', got bfloat16")
        images = make_flat_list_of_images(self.fetch_images(images))
        if not images:
            raise ValueError("images must have at least one image, got none")

        ready = []
        for i, image in enumerate(images):
            name = f"images[{i}]"
            pixels = _rgb(name, image, chosen.do_convert_rgb, input_data_format)
            pixels = pixels if device is None else pixels.to(device)
            plan = _plan(name, chosen, *pixels.shape[1:])
            ready.append(_Ready(*_in_bytes(name, pixels, chosen.do_resize), plan))
        runs = itertools.groupby(ready, lambda image: (image.pixels.dtype, image.unit))
        patches = [_patches(list(run), chosen) for _, run in runs]  # one run, but for mixed dtypes
        data = {
            "pixel_values": patches[0] if len(patches) == 1 else torch.cat(patches),
            "image_grid_thw": torch.tensor([image.plan.grid_thw for image in ready]),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Patches of an image of a height and width in pixels, with options as of a call."""
        return _plan("the image", self._choose(images_kwargs or {}), height, width).vit_tokens

    def _choose(self, options: Mapping[str, Any]) -> _Options:
        """What a call does, by its own options and those of the processor."""
        given = {name: value for name, value in options.items() if value is not None}
        chosen: dict[str, Any] = {
            f.name: given.get(f.name, getattr(self, f.name, None)) for f in fields(_Options)
        }
        size: Any = given.get("size", self.size)
        edges = {} if isinstance(size, (int, list, tuple)) else dict(size)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if edges.get(edge) is None:
                raise ValueError(f"size must have a shortest_edge and a longest_edge, got {size}")
            if name not in given and ("size" in given or chosen[name] is None):
                chosen[name] = edges[edge]
        chosen["resample"] = _filter(chosen["resample"])
        if chosen["do_rescale"]:
            _check.positive("rescale_factor", chosen["rescale_factor"])
        chosen["dtype"] = _dtype(chosen["dtype"])
        return _Options(**chosen)


@dataclass(frozen=True)
class _Options:
    do_convert_rgb: bool
    do_resize: bool
    min_pixels: float
    max_pixels: float
    resample: str
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Ready:
    """An image ``[3, H, W]``, what stands for 1 in it once bytes are divided by 255, its plan."""

    pixels: Tensor
    unit: float
    plan: qwen2_vl.Plan


def _dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype!r}")
    return found


def _filter(resample: Any) -> str:
    """The name of a filter of Pillow, of its number, or of one of torchvision."""
    name = getattr(resample, "value", resample)  # of an enumeration
    if name in set(PIL.Image.Resampling):
        name = PIL.Image.Resampling(name).name.lower()
    _check.one_of("resample", name, FILTERS)
    return name


def _rgb(name: str, image: Any, convert: bool, layout: str | None) -> Tensor:
    """An image as transformers makes it RGB, ``[3, H, W]``, of its own dtype and any strides."""
    if isinstance(image, PIL.Image.Image):
        if convert and (image.mode != "RGB" or "transparency" in image.info):
            image = convert_to_rgb(image)
        image, layout = np.asarray(image), "channels_last"
        image = image if image.ndim == 3 else image[..., None]
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "uifb":
            raise TypeError(f"{name} must be of numbers, got {image.dtype}")
        image = _images.to_tensor(image)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} must be a Pillow image, array or tensor, got {type(image).__name__}"
        )
    image = image.detach()
    if (layout or infer_channel_dimension_format(image, (1, 3, 4))) == "channels_last":
        image = image.movedim(-1, 0)
    if convert and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    if convert and image.shape[0] == 4:
        image = _on_white(name, image)
    if image.shape[0] != 3:
        raise ValueError(f"{name} must have 3 channels, got {list(image.shape)}")
    return image


def _on_white(name: str, image: Tensor) -> Tensor:
    """RGBA on a white ground, in double precision for integers, which are rounded."""
    if image.is_floating_point():
        _in_range(name, image, 1)
        return image[3] * image[:3] + (1 - image[3])
    alpha = image[3].double() / 255
    return (alpha * image[:3] + (1 - alpha) * 255).round().to(image.dtype)


def _in_range(name: str, image: Tensor, most: int) -> None:
    low, high = (x.item() for x in image.aminmax())
    if not 0 <= low <= high <= most:
        raise ValueError(f"{name} must be in 0..{most}, got {low:.6g}..{high:.6g}")


def _in_bytes(name: str, image: Tensor, resized: bool) -> tuple[Tensor, float]:
    """An image as it is resized, and its unit: see ``_Ready``.

    Pillow resizes bytes. Whole numbers are those, and fractions are of 255, not rounded but cut.
    """
    if image.dtype == torch.uint8:
        return image, 255
    if not resized:
        return image.float(), 1
    wide = image.double()
    if torch.allclose(wide, wide.trunc()):
        _in_range(name, wide, 255)
        return wide.to(torch.uint8), 255
    _in_range(name, wide, 1)
    return (wide * 255).float().to(torch.uint8), 1


def _plan(name: str, options: _Options, height: int, width: int) -> qwen2_vl.Plan:
    sizes = (options.patch_size, options.temporal_patch_size, options.merge_size)
    patch_size, _, merge_size = sizes
    if options.do_resize:
        return qwen2_vl.plan(
            height,
            width,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            patch_size=patch_size,
            temporal_patch_size=options.temporal_patch_size,
            merge_size=merge_size,
        )
    factor = patch_size * merge_size
    if height % factor or width % factor:
        raise ValueError(
            f"{name} must have sides that divide by patch_size * merge_size = {factor} where"
            f" do_resize is off, got {height} x {width}"
        )
    grid_thw = (1, height // patch_size, width // patch_size)
    return qwen2_vl.Plan(height, width, (height, width), grid_thw, *sizes)


def _patches(images: Sequence[_Ready], options: _Options) -> Tensor:
    """The patches of images of one dtype and unit."""
    scale = images[0].unit * (options.rescale_factor if options.do_rescale else 1)
    mean, std = (options.image_mean, options.image_std) if options.do_normalize else (0.0, 1.0)
    mean, std = (
        [value / scale for value in ([x] * 3 if isinstance(x, (int, float)) else x)]
        for x in (mean, std)
    )
    pixels = [image.pixels for image in images]
    sizes = [image.plan.grid_thw for image in images]
    grid = PackedGrid(sizes, options.merge_size, device=pixels[0].device)
    recipe = {
        "patch_size": options.patch_size,
        "temporal_patch_size": options.temporal_patch_size,
        "mean": mean,
        "std": std,
        "dtype": options.dtype,
    }
    if not options.do_resize:
        return _images.patches(pixels, grid, **recipe)
    clips = [image.movedim(0, -1)[None] for image in pixels]
    return _images.resized_patches(clips, grid, mode=options.resample, **recipe)
