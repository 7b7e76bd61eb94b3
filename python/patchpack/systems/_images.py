"""What the systems take for images and videos, made the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from patchpack import _check, available, patchify, resize_images
from patchpack.packing import PackedGrid
from patchpack.systems._plan import Plan

if TYPE_CHECKING:
    import PIL.Image

    Image: TypeAlias = PIL.Image.Image | np.ndarray | Tensor

P = TypeVar("P", bound=Plan)

# without the C++ extension Pillow resizes: the bytes are the same
NATIVE = available("resize_images", "native") is None


def to_rgb(name: str, image: Any) -> PIL.Image.Image:
    """``image``, a Pillow image, array or tensor of one image, as 8-bit RGB on a white ground.

    Arrays have their channels last, tensors first; floats are in 0..1. ``name`` is what an error
    calls the image.
    """
    try:
        import PIL.Image  # here, because planning works without Pillow
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "images need Pillow: pip install 'patchpack[demo]'", name="PIL"
        ) from None

    came = list(image.shape) if isinstance(image, (Tensor, np.ndarray)) else None
    if isinstance(image, Tensor):
        if image.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {image.device}")
        if image.is_floating_point():  # NumPy has no bfloat16
            image = image.to(torch.promote_types(image.dtype, torch.float32))
        image = image.detach().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        channels = image.shape[2:]
        if image.ndim < 2 or channels not in ((), (1,), (3,), (4,)) or image.size == 0:
            raise ValueError(f"{name} must be one image of 1, 3 or 4 channels, got {came}")
        if np.issubdtype(image.dtype, np.floating):
            if not (image.min() >= 0 and image.max() <= 1):
                raise ValueError(
                    f"{name} must be in 0..1, got {image.min():.6g}..{image.max():.6g}"
                )
            # a float16 product is rounded once more
            wide = np.promote_types(image.dtype, np.float32)
            image = np.rint(np.multiply(image, 255, dtype=wide)).astype(np.uint8)
        if image.dtype != np.uint8:
            raise TypeError(f"{name} must be uint8 or floating, got {image.dtype}")
        image = PIL.Image.fromarray(image[..., 0] if channels == (1,) else image)
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(
            f"{name} must be a Pillow image, array or tensor, got {type(image).__name__}"
        )
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to white without a word
        raise ValueError(f"{name} must have 8 bits a channel, got Pillow mode {image.mode!r}")
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def is_video(image: Any) -> bool:
    """Whether ``image`` is a sequence of frames, or an array or tensor with frames in front."""
    return isinstance(image, (list, tuple)) or getattr(image, "ndim", 3) == 4


def _bytes_of(image: Any) -> Tensor | None:
    """A view ``[..., H, W, 3]`` of an array or tensor, if its pixels are 8-bit RGB already."""
    if isinstance(image, Tensor) and image.device.type == "cpu" and image.ndim >= 3:
        image = image.movedim(-3, -1).numpy() if image.dtype == torch.uint8 else None
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.size == 0:
        return None
    if image.ndim < 3 or image.shape[-1] != 3:
        return None
    return to_tensor(image)


def to_tensor(array: np.ndarray) -> Tensor:
    """A view of an array that is not written to; a copy where a stride is negative."""
    if min(array.strides, default=0) < 0:  # torch has none
        array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


class _Writable:
    """What NumPy takes for a writable array: of another torch warns, though nothing writes here."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # alive as long as its view
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def to_clip(name: str, image: Any) -> Tensor:
    """The frames of a video, or the one of an image, as ``to_rgb`` makes them: ``[F, H, W, 3]``.

    A view of an array or tensor of bytes.
    """
    if not is_video(image):
        return _to_pixels(name, image)[None]
    clip = _bytes_of(image)
    if clip is not None:
        return clip
    frames = [_to_pixels(f"{name}[{i}]", frame) for i, frame in enumerate(image)]
    sizes = sorted({tuple(frame.shape[:2]) for frame in frames})
    if len(sizes) != 1:
        raise ValueError(f"{name} must have frames of one size, got {sizes}")
    return torch.stack(frames)


def _to_pixels(name: str, image: Any) -> Tensor:
    pixels = _bytes_of(image) if getattr(image, "ndim", 0) == 3 else None
    if pixels is None:
        pixels = _bytes_of(np.asarray(to_rgb(name, image)))
    assert pixels is not None
    return pixels


def clips_of(
    images: Iterable[Image | Sequence[Image]],
    plans: Iterable[P] | None,
    kind: type[P],
    default: Callable[[int | None, int, int], P],
) -> tuple[list[Tensor], list[P]]:
    """What ``to_clip`` makes of images and videos, and a plan of ``kind`` for each, which they fit.

    Without ``plans``, ``default`` makes them of the number of frames, ``None`` for an image, the
    height and the width.
    """
    images = _listed("images", images)
    clips = [to_clip(f"images[{i}]", image) for i, image in enumerate(images)]
    if plans is None:
        plans = [
            default(len(clip) if is_video(image) else None, *clip.shape[1:3])
            for image, clip in zip(images, clips, strict=True)
        ]
    plans = _listed("plans", plans)
    if len(plans) != len(clips):
        raise ValueError(f"plans must be one for each of {len(clips)} images, got {len(plans)}")
    for i, (p, clip) in enumerate(zip(plans, clips, strict=True)):
        if not isinstance(p, kind):
            raise TypeError(f"plans[{i}] must be a {kind.__name__}, got {type(p).__name__}")
        want = (p.num_frames, p.height, p.width)
        got = tuple(clip.shape[:3])
        if want != got:
            raise ValueError(
                f"images[{i}] must have the frames, height and width of plans[{i}], {want},"
                f" got {got}"
            )
    return clips, plans


def resized(clip: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """The frames of ``clip`` resized as Pillow does, ``[F, 3, height, width]``, of any strides."""
    if NATIVE:
        return resize_images([clip.permute(0, 3, 1, 2)], [(height, width)], mode=mode)[0]
    import PIL.Image

    resample = PIL.Image.Resampling[mode.upper()]
    images = map(PIL.Image.fromarray, clip.numpy())
    frames = [np.asarray(image.resize((width, height), resample)) for image in images]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _listed(name: str, values: Any) -> list[Any]:
    # the rows of one image are no images; four axes are a batch
    if not isinstance(values, Iterable) or getattr(values, "ndim", 4) < 4:
        raise TypeError(
            f"{name} must be a sequence of {name}, got one {name[:-1]}, {type(values).__name__}"
        )
    return list(values)


def patches(
    images: Sequence[Tensor],
    grid: PackedGrid,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """The patches that ``patchify`` makes of ``images``, RGB, in any floating ``dtype``."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype!r}")
    center, scale = three_numbers("mean", mean), three_numbers("std", std)
    if not (scale > 0).all():
        raise ValueError(f"std must be above 0, got {std}")
    pixels = patchify(
        images,
        grid,
        mean=center.tolist(),
        std=scale.tolist(),
        dtype=dtype if dtype in _check.FLOATS else torch.float32,
        **options,
    )
    return pixels.to(dtype)


def resized_patches(
    clips: Sequence[Tensor], grid: PackedGrid, *, patch_size: int, mode: str = "bicubic", **options
) -> Tensor:
    """The patches of ``clips`` that are resized to the whole patches of their grid."""
    if NATIVE:
        views = [clip.permute(0, 3, 1, 2) for clip in clips]
        return patches(views, grid, patch_size=patch_size, resample=mode, **options)
    sizes = (grid.grid_thw[:, 1:] * patch_size).tolist()
    images = [resized(clip, h, w, mode) for clip, (h, w) in zip(clips, sizes, strict=True)]
    return patches(images, grid, patch_size=patch_size, **options)


def three_numbers(name: str, values: Sequence[float]) -> np.ndarray:
    """One finite number for each channel, float32."""
    try:
        numbers = np.array(values, np.float32)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (3,) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must have 3 numbers, got {values!r}")
    return numbers
