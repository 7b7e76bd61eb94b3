"""Vision tokens on their way into the language model, without waiting for the device."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from patchpack import PackedGrid
from patchpack.integrations.transformers._report import Context, Edit, Left, method
from patchpack.integrations.transformers._rewire import names_of


def features(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """What hands grids to the vision encoder, and splits by them what comes out."""
    for kind in ("image", "video"):
        name = f"get_{kind}_features"
        if "visual" not in model._modules or not hasattr(type(model), name):
            continue
        value = method(functools.partial(_features, kind), model, name)
        # early versions need it for attention alone: see _OF_TEXT
        op = "metadata" if "metadata" in context.ops else "varlen_attention"
        yield Edit(op, path, model, name, value, "grids are read on the host")


# bounds of samples, which early versions hand to the vision encoder too
_OF_TEXT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _features(kind: str, self, *args, **kwargs):
    """What follows reads sizes from the grids, so these are where that waits for no device."""
    name, packed = f"{kind}_grid_thw", f"{kind}_packed_grid"
    kwargs = {key: x for key, x in kwargs.items() if key not in _OF_TEXT}
    if len(args) > 1:
        args, kwargs[name] = args[:1], args[1]
    grid = kwargs.get(packed)
    if grid is None and kwargs.get(name) is not None:
        grid = PackedGrid(kwargs[name], self.visual.spatial_merge_size)
    if grid is not None:
        kwargs |= {packed: grid, name: grid.grid_thw}
    return getattr(type(self), f"get_{kind}_features")(self, *args, **kwargs)


def both_kinds(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """A forward pass that selects rows by masks where a batch has images and videos (Qwen3-VL)."""
    stock = type(model).forward
    if "visual" not in model._modules or "deepstack_features" not in names_of(stock):
        return
    if "mm_encoder_outputs" not in inspect.signature(stock).parameters:
        why = "batches of images and videos select rows by masks, which waits for the device"
        yield Left("scatter_tokens", path, why)
        return
    value = method(_as_images, model)
    what = "videos of a batch with images as images, in the order of their tokens"
    yield Edit("scatter_tokens", path, model, "forward", value, what)


def _as_images(self, *args, **kwargs):
    stock, pixels = type(self).forward, ("pixel_values", "pixel_values_videos")
    ids = kwargs.get("input_ids")
    if args or ids is None or any(kwargs.get(name) is None for name in pixels):
        return stock(self, *args, **kwargs)
    named = inspect.signature(stock).parameters
    rest = {name: x for name, x in kwargs.items() if name not in named} | {"return_dict": True}
    images, videos = (kwargs.pop(name) for name in pixels)
    images = self.get_image_features(images, kwargs.get("image_grid_thw"), **rest)
    videos = self.get_video_features(videos, kwargs.get("video_grid_thw"), **rest)

    masks = ids == self.config.image_token_id, ids == self.config.video_token_id
    place = (masks[0] | masks[1]).flatten().cumsum(0) - 1
    rows = [
        torch.nonzero_static(mask.flatten(), size=sum(map(len, found.pooler_output)))[:, 0]
        for mask, found in zip(masks, (images, videos), strict=True)
    ]
    place = place[torch.cat(rows)]  # of each image's and then each video's token among all

    def ordered(of_images: Sequence[Tensor], of_videos: Sequence[Tensor]) -> list[Tensor]:
        tokens = torch.cat([*of_images, *of_videos])
        return [torch.empty_like(tokens).index_copy(0, place, tokens)]

    both = copy.copy(images)
    both.pooler_output = ordered(images.pooler_output, videos.pooler_output)
    levels = zip(images.deepstack_features, videos.deepstack_features, strict=True)
    both.deepstack_features = [ordered(*level) for level in levels]
    kwargs["input_ids"] = ids.masked_fill(masks[1], self.config.image_token_id)
    kwargs["mm_encoder_outputs"] = {"image": both}
    out = stock(self, **kwargs)
    out.image_outputs, out.video_outputs = images, videos
    return out


def placeholders(path: str, module: Any, context: Context) -> Iterator[Edit | Left]:
    """What counts placeholders, or selects rows by a mask."""
    name = "get_placeholder_mask"
    stock = getattr(type(module), name, None)
    if stock is not None and hasattr(getattr(module, "config", None), "image_token_id"):
        pair = "video_features" in inspect.signature(stock).parameters
        value = method(functools.partial(_placeholder_mask, pair), module, name)
        what = "placeholders on a device are not counted"
        yield Edit("scatter_tokens", path, module, name, value, what)
    if hasattr(type(module), "_deepstack_process"):
        what = "added in place of selected rows"
        value = method(_deepstack_process, module, "_deepstack_process")
        yield Edit("scatter_tokens", path, module, "_deepstack_process", value, what)


def _placeholder_mask(pair: bool, self, input_ids: Tensor | None = None, *args, **kwargs):
    """Where images are, ``[B, L, 1]``, and where videos are if the model asks for a ``pair``."""
    if input_ids is None or input_ids.device.type == "cpu":
        return type(self).get_placeholder_mask(self, input_ids, *args, **kwargs)
    images = (input_ids == self.config.image_token_id)[..., None]
    return (images, (input_ids == self.config.video_token_id)[..., None]) if pair else images


def _deepstack_process(
    self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor
) -> Tensor:
    """Add ``visual_embeds`` ``[N, C]`` to the rows of ``[B, L, C]`` that the mask marks."""
    mask = visual_pos_masks.to(hidden_states.device)[..., None]
    embeds = visual_embeds.to(hidden_states)
    return hidden_states + torch.zeros_like(hidden_states).masked_scatter(mask, embeds)
