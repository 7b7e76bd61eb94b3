"""Vision tokens on their way into the language model, without waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from patchpack import PackedGrid
from patchpack.integrations.transformers._report import Context, Edit, Left, method
from patchpack.integrations.transformers._rewire import global_of, names_of, rewired


def features(path: str, model: Any, context: Context) -> Iterator[Edit | Left]:
    """What hands grids to the vision encoder, and splits by them what comes out."""
    for kind in ("image", "video"):
        name = f"get_{kind}_features"
        if "visual" not in model._modules or not hasattr(type(model), name):
            continue
        value = method(functools.partial(_features, kind), model, name)
        yield Edit("metadata", path, model, name, value, "grids are read on the host")


def _features(kind: str, self, *args, **kwargs):
    """What follows reads sizes from the grids, so these are where that waits for no device."""
    name, packed = f"{kind}_grid_thw", f"{kind}_packed_grid"
    if len(args) > 1:
        args, kwargs[name] = args[:1], args[1]
    grid = kwargs.get(packed)
    if grid is None and kwargs.get(name) is not None:
        grid = PackedGrid(kwargs[name], self.visual.spatial_merge_size)
    if grid is not None:
        kwargs |= {packed: grid, name: grid.grid_thw}
    return getattr(type(self), f"get_{kind}_features")(self, *args, **kwargs)


def placeholders(path: str, module: Any, context: Context) -> Iterator[Edit | Left]:
    """What counts placeholders, or selects rows by a mask."""
    stock = getattr(type(module), "get_placeholder_mask", None)
    name = "torch_compilable_check"
    if stock is not None and name in names_of(stock):
        check = global_of(stock, name)
        mask = rewired(stock, **{name: functools.partial(_check_on_host, check)})
        what = "counts on a device are not read back"
        value = method(mask, module, "get_placeholder_mask")
        yield Edit("scatter_tokens", path, module, "get_placeholder_mask", value, what)
    if hasattr(type(module), "_deepstack_process"):
        what = "added in place of selected rows"
        value = method(_deepstack_process, module, "_deepstack_process")
        yield Edit("scatter_tokens", path, module, "_deepstack_process", value, what)


def _check_on_host(check: Callable, condition: Tensor | bool, *args) -> None:
    if not isinstance(condition, Tensor) or condition.device.type == "cpu":
        check(condition, *args)


def _deepstack_process(
    self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor
) -> Tensor:
    """Add ``visual_embeds`` ``[N, C]`` to the rows of ``[B, L, C]`` that the mask marks."""
    mask = visual_pos_masks.to(hidden_states.device)[..., None]
    embeds = visual_embeds.to(hidden_states)
    return hidden_states + torch.zeros_like(hidden_states).masked_scatter(mask, embeds)
