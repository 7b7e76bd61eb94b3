"""What the systems take for images and videos, made the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from patchpack import _check, patchify
from patchpack.packing import PackedGrid
from patchpack.systems._plan import Plan

if TYPE_CHECKING:
    import PIL.Image

    Image: TypeAlias = PIL.Image.Image | np.ndarray | Tensor

P = TypeVar("P", bound=Plan)


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


def to_frames(name: str, image: Any) -> list[PIL.Image.Image]:
    """The frames of a video, or the one of an image, as ``to_rgb`` makes them."""
    if not is_video(image):
        return [to_rgb(name, image)]
    clip = [to_rgb(f"{name}[{i}]", frame) for i, frame in enumerate(image)]
    if len({frame.size for frame in clip}) != 1:
        sizes = sorted({(frame.height, frame.width) for frame in clip})
        raise ValueError(f"{name} must have frames of one size, got {sizes}")
    return clip


def clips_of(
    images: Iterable[Image | Sequence[Image]],
    plans: Iterable[P] | None,
    kind: type[P],
    default: Callable[[int | None, int, int], P],
) -> tuple[list[list[PIL.Image.Image]], list[P]]:
    """The frames of images and videos, and a plan of ``kind`` for each, which they fit.

    Without ``plans``, ``default`` makes them of the number of frames, ``None`` for an image, the
    height and the width.
    """
    images = _listed("images", images)
    clips = [to_frames(f"images[{i}]", image) for i, image in enumerate(images)]
    if plans is None:
        plans = [
            default(len(clip) if is_video(image) else None, clip[0].height, clip[0].width)
            for image, clip in zip(images, clips, strict=True)
        ]
    plans = _listed("plans", plans)
    if len(plans) != len(clips):
        raise ValueError(f"plans must be one for each of {len(clips)} images, got {len(plans)}")
    for i, (p, clip) in enumerate(zip(plans, clips, strict=True)):
        if not isinstance(p, kind):
            raise TypeError(f"plans[{i}] must be a {kind.__name__}, got {type(p).__name__}")
        want = (p.num_frames, p.height, p.width)
        got = (len(clip), clip[0].height, clip[0].width)
        if want != got:
            raise ValueError(
                f"images[{i}] must have the frames, height and width of plans[{i}], {want},"
                f" got {got}"
            )
    return clips, plans


def resized(
    clip: Sequence[PIL.Image.Image], height: int, width: int, mode: str = "bicubic"
) -> Tensor:
    """The frames of ``clip`` resized by Pillow, uint8 ``[F, 3, height, width]``, of any strides."""
    import PIL.Image

    resample = PIL.Image.Resampling[mode.upper()]
    frames = [np.asarray(frame.resize((width, height), resample)) for frame in clip]
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


def three_numbers(name: str, values: Sequence[float]) -> np.ndarray:
    """One finite number for each channel, float32."""
    try:
        numbers = np.array(values, np.float32)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (3,) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must have 3 numbers, got {values!r}")
    return numbers
