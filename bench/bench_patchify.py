"""``patchify``, as Qwen2-VL cuts photos into patches. Memory-bound."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from _harness import PHOTOS, Bench, Provider
from patchpack import PackedGrid
from patchpack.testing.catalogue import Inputs

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def _make_inputs(dtype, device, sizes, patch_size, temporal_patch_size, merge) -> Inputs:
    """Photos as Pillow and NumPy hold them, channels last."""
    shapes = [(h * patch_size, w * patch_size, 3) for h, w in sizes]
    photos = [torch.randint(256, shape, dtype=torch.uint8, device=device) for shape in shapes]
    return {
        "images": [photo.permute(2, 0, 1) for photo in photos],
        "grid": PackedGrid(sizes, merge, device=device),
        "patch_size": patch_size,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "temporal_patch_size": temporal_patch_size,
        "dtype": dtype,
    }


def _num_results(inputs: Inputs) -> int:
    columns = 3 * inputs["temporal_patch_size"] * inputs["patch_size"] ** 2
    return inputs["grid"].num_tokens * columns


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read the bytes, write the patches; bytes have no gradient."""
    return (
        sum(x.numel() for x in inputs["images"]) + _num_results(inputs) * inputs["dtype"].itemsize
    )


def _flops(inputs: Inputs, backward: bool) -> int:
    """Scale, take off the mean, divide."""
    return 3 * _num_results(inputs)


def _torch_chain(inputs: Inputs) -> Provider:
    """What the torchvision processors of transformers do with each image."""
    p, tp, m = (
        inputs["patch_size"],
        inputs["temporal_patch_size"],
        inputs["grid"].spatial_merge_size,
    )
    device = inputs["images"][0].device
    mean, std = (
        torch.tensor(x, device=device).mul(255).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD)
    )

    def patchify(images: list[Tensor], dtype: torch.dtype, **_) -> Tensor:
        packed = []
        for image in images:
            values = (image.float() - mean) / std
            frames = values.repeat(tp, 1, 1, 1)
            h, w = values.shape[1] // p, values.shape[2] // p
            cut = frames.view(tp, 3, h // m, m, p, w // m, m, p).permute(2, 5, 3, 6, 1, 0, 4, 7)
            packed.append(cut.reshape(h * w, -1))
        return torch.cat(packed).to(dtype)

    return patchify


def _numpy_chain(inputs: Inputs) -> Provider:
    """What the NumPy processors of transformers do with each image."""
    if inputs["images"][0].device.type != "cpu":
        raise ValueError("NumPy runs on the CPU")
    p, tp, m = (
        inputs["patch_size"],
        inputs["temporal_patch_size"],
        inputs["grid"].spatial_merge_size,
    )
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))

    def patchify(images: list[Tensor], dtype: torch.dtype, **_) -> Tensor:
        packed = []
        for image in images:
            values = (image.numpy() * np.float32(1 / 255) - mean) / std
            frames = np.tile(values, (tp, 1, 1, 1))
            h, w = values.shape[1] // p, values.shape[2] // p
            cut = frames.reshape(tp, 3, h // m, m, p, w // m, m, p)
            packed.append(cut.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(h * w, -1))
        return torch.from_numpy(np.concatenate(packed)).to(dtype)

    return patchify


QWEN2_VL = {"patch_size": 14, "temporal_patch_size": 2, "merge": 2}

BENCH = Bench(
    op="patchify",
    shapes={"16 photos, Qwen2-VL": {"sizes": PHOTOS, **QWEN2_VL}},
    tiny={"sizes": [(4, 2), (2, 6)], **QWEN2_VL},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="copy",
    peers={"torch, image by image": _torch_chain, "NumPy, image by image": _numpy_chain},
    backward=False,
)
