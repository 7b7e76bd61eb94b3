"""``collate``: samples to one batch, with everything that would make a model wait for its device.

A model of transformers computes segments, positions and windows from ``grid_thw`` in its forward
pass, reading them back from the device. Here the workers of a ``DataLoader`` do that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from patchpack import PackedGrid, metadata
from patchpack.integrations.transformers import _text, _tiles, _vision

_TEXT = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Batch(dict):
    """Keyword arguments of a model: tensors, ``PackedGrid``s and integers by name."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Everything on ``device``, but for sizes that the host reads: ``*_grid_thw``."""
        moved = Batch()
        for name, x in self.items():
            if isinstance(x, PackedGrid):
                x = x.to(device)
            elif isinstance(x, Tensor) and not name.endswith(("_grid_thw", "image_sizes")):
                x = x.to(device, non_blocking=non_blocking)
            moved[name] = x
        return moved


def collate(
    samples: Sequence[Mapping[str, Any]],
    *,
    config: Any,
    packed: bool = True,
    padding_side: str = "right",
    pad_token_id: int = 0,
    ignore_index: int = -100,
) -> Batch:
    """Make one batch of what a processor of transformers gave for each sample.

    With ``packed`` all samples are one sequence without padding, in which positions restart and
    attention ends where a sample does: ``position_ids`` (text positions first where there is
    M-RoPE), ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``; no sample
    is asked for its first token by the one before it. Otherwise rows are padded and masked. Of
    images and videos there are, as ``image_*`` and ``video_*``, their ``packed_grid``,
    ``cu_seqlens``, ``max_seqlen`` and ``position_ids``, and of windows ``packed_windows``,
    ``window_index``, ``cu_window_seqlens`` and ``max_window_seqlen``. Models without ``apply_to``
    take the same batch: of packed samples with ``use_cache=False``.

    Args:
        samples: Of each sample ``input_ids``, integer ``[L]`` or ``[1, L]``, tensors or lists; as
            far as the model has them ``labels``, ``mm_token_type_ids``, ``pixel_values``,
            ``image_grid_thw``, ``pixel_values_videos``, ``video_grid_thw``,
            ``second_per_grid_ts``, ``image_sizes``, ``batch_num_images``. An ``attention_mask``
            must be all ones.
        config: The model's configuration.
        packed: One sequence ``[1, T]`` in place of rows ``[B, L]``.
        padding_side: ``"right"`` or ``"left"``.
        pad_token_id: What padding is.
        ignore_index: The label that asks for nothing.

    Returns:
        Keyword arguments of the model, on the CPU: ``model(**batch.to(device))``.

    Raises:
        ValueError: There is no sample, one lacks tokens, has padding, or has placeholders of
            another number than its images and videos give tokens; or an argument is unknown.
        TypeError: A sample is no mapping, or ``input_ids`` are no integers.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    if isinstance(samples, Mapping) or not len(samples):
        raise ValueError(f"samples must be at least one mapping in a list, got {samples!r}")
    samples = [_checked(i, x, config) for i, x in enumerate(samples)]
    for i, x in enumerate(samples):
        if ("labels" in x) != ("labels" in samples[0]):
            raise ValueError(f"samples[{i}] must have labels as samples[0] has, or neither")
    batch = Batch(_vision_of(samples, config))
    index = _text.index_of(AutoModel._model_mapping[type(config)], config)
    types = [x["mm_token_type_ids"] for x in samples]
    rows = {name: [x[name] for x in samples] for name in ("input_ids", "labels")
            if name in samples[0]}  # fmt: skip
    fill = {"input_ids": pad_token_id, "labels": ignore_index}
    images, videos = batch.get("image_grid_thw"), batch.get("video_grid_thw")
    seconds = batch.get("second_per_grid_ts")
    if packed:
        for labels in rows.get("labels", ()):
            labels[:1] = ignore_index
        batch |= {name: torch.cat(xs)[None] for name, xs in rows.items()}
        lengths = torch.tensor([len(x) for x in rows["input_ids"]])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        text = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
        if index is None:
            batch["position_ids"] = text
        else:
            ids = index(torch.cat(types), images, videos, seconds, cu_seqlens=bounds)
            batch["position_ids"] = torch.cat([text, ids])[:, None]  # [4, 1, T]
        longest = int(lengths.max())
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch
    batch |= {name: _padded(xs, fill[name], padding_side) for name, xs in rows.items()}
    mask = _padded([torch.ones_like(x) for x in rows["input_ids"]], 0, padding_side)
    batch["attention_mask"] = mask
    if index is not None:
        types = _padded(types, 0, padding_side)
        batch["position_ids"] = index(types, images, videos, seconds, mask)
    return batch


def _padded(rows: list[Tensor], fill: int, side: str) -> Tensor:
    """Rows of one length, ``[B, L]``."""
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=fill, padding_side=side
    )


def _checked(i: int, sample: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    """A sample of tensors, its text as ``[L]``, with token types and labels of its own."""
    if not isinstance(sample, Mapping):
        raise TypeError(f"samples[{i}] must be a mapping, got {type(sample).__name__}")
    found = {name: torch.as_tensor(x) for name, x in sample.items() if x is not None}
    ids = found.get("input_ids")
    if ids is None or ids.numel() == 0:
        raise ValueError(f"samples[{i}] must have input_ids, got {sorted(found)}")
    if ids.is_floating_point():
        raise TypeError(f"samples[{i}]['input_ids'] must be integers, got {ids.dtype}")
    for name in _TEXT:
        if name in found:
            if found[name].numel() != ids.numel():
                raise ValueError(
                    f"samples[{i}][{name!r}] must be of {ids.numel()} tokens, as input_ids are,"
                    f" got {list(found[name].shape)}"
                )
            found[name] = found[name].flatten().clone()
    if not found.pop("attention_mask", ids).to(torch.bool).all() and "attention_mask" in sample:
        raise ValueError(f"samples[{i}]['attention_mask'] must be all ones: collate pads itself")
    ids = found["input_ids"]
    is_kind = {kind: ids == getattr(config, f"{kind}_token_id", -1) for kind in _PIXELS}
    types = is_kind["image"] + 2 * is_kind["video"]
    found["mm_token_type_ids"] = found.get("mm_token_type_ids", types.int())
    for kind, want in _tokens_of(found, config).items():
        got = int(is_kind[kind].sum())
        if got != want:
            raise ValueError(
                f"samples[{i}]['input_ids'] must have the {want} {kind} tokens that its"
                f" {_PIXELS[kind]} become, got {got}"
            )
    return found


def _tokens_of(sample: Mapping[str, Tensor], config: Any) -> dict[str, int]:
    """How many tokens of the language model the images and videos of a sample become."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        grids = {kind: sample.get(f"{kind}_grid_thw") for kind in _PIXELS}
        m = vision.spatial_merge_size
        return {
            kind: 0 if grid is None else int(grid.view(-1, 3).prod(1).sum()) // m**2
            for kind, grid in grids.items()
        }
    return _tiles.tokens_of(sample, config)


def _vision_of(samples: list[dict[str, Tensor]], config: Any) -> dict[str, Any]:
    """Tensors of images and videos of all samples, and what follows from their sizes."""
    names = {name: None for x in samples for name in x if name not in _TEXT}
    found: dict[str, Any] = {}
    for name in names:
        found[name] = _tiles.joined([x[name] for x in samples if name in x])
    vision = config.vision_config
    for kind in _PIXELS:
        grid_thw = found.get(f"{kind}_grid_thw")
        if grid_thw is None or not hasattr(vision, "spatial_merge_size"):
            continue
        grid = PackedGrid(grid_thw.view(-1, 3), vision.spatial_merge_size)
        known = {
            "packed_grid": grid,
            "cu_seqlens": grid.cu_seqlens,
            "max_seqlen": grid.max_seqlen,
            "position_ids": grid.position_ids,
        }
        if hasattr(vision, "window_size"):
            sizes = vision.window_size, vision.patch_size
            windows = _vision.windows_of(grid, *sizes)
            index, bounds = metadata.get_vision_window_index(
                grid.grid_thw, grid.spatial_merge_size, *sizes
            )
            known |= {
                "packed_windows": windows,
                "window_index": index,
                "cu_window_seqlens": bounds,
                "max_window_seqlen": windows.max_seqlen,
            }
        found |= {f"{kind}_{name}": x for name, x in known.items()}
    return found
