"""``metadata`` and ``PackedGrid`` of a batch, on one thread. The limit is to write the results."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor

from _harness import Bench, Floor, Provider
from patchpack import PackedGrid, metadata
from patchpack.testing.catalogue import Inputs
from patchpack.testing.contract import tensors

START, END, IMAGE, VIDEO = 1, 2, 3, 4  # token ids
TEXT = 50  # tokens of text before each image
WINDOWS = (2, 112, 14)  # blocks of patches, pixels of a window and of a patch

Calls = dict[str, Callable[[], list[Tensor]]]


def _make_inputs(dtype, device, sizes, functions) -> Inputs:
    runs = [[START, *[IMAGE] * (h * w // 4), END, *[9] * TEXT] for h, w in sizes]
    return {
        "grid_thw": torch.tensor([(1, h, w) for h, w in sizes]),
        "input_ids": torch.tensor([[token for run in runs for token in run]]),
        "functions": functions,
    }


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    return sum(x.nbytes for x in tensors(_ours(inputs)(**inputs)))


def _ours(inputs: Inputs) -> Provider:
    grid_thw, input_ids = inputs["grid_thw"], inputs["input_ids"]

    def mrope_position_ids() -> list[Tensor]:
        return [
            *metadata.get_mrope_position_ids(
                input_ids,
                grid_thw,
                vision_start_token_id=START,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
            )
        ]

    def grid() -> list[Tensor]:
        grid = PackedGrid(grid_thw, 2)
        return [grid.cu_seqlens, grid.position_ids]

    return _provider(
        {
            "cu_seqlens": lambda: [metadata.get_vision_cu_seqlens(grid_thw)],
            "position_ids": lambda: [metadata.get_vision_position_ids(grid_thw, 2)],
            "window_index": lambda: [*metadata.get_vision_window_index(grid_thw, *WINDOWS)],
            "mrope_position_ids": mrope_position_ids,
            "PackedGrid": grid,
        }
    )


def _transformers(inputs: Inputs) -> Provider:
    from transformers import vision_utils
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel  # pyright: ignore[reportMissingImports]

    grid_thw, input_ids = inputs["grid_thw"], inputs["input_ids"]
    # what get_rope_index reads of a model, whose weights would take gigabytes
    vision_config = types.SimpleNamespace(spatial_merge_size=2)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision_config))
    model.get_vision_position_ids = types.MethodType(Qwen2VLModel.get_vision_position_ids, model)

    def cu_seqlens() -> list[Tensor]:
        return [vision_utils.get_vision_cu_seqlens(grid_thw)]

    def position_ids() -> list[Tensor]:
        return [vision_utils.get_vision_position_ids(grid_thw, 2)]

    def rope_index() -> list[Tensor]:
        kinds = (input_ids == IMAGE).int()
        return [*Qwen2VLModel.get_rope_index(model, input_ids, kinds, image_grid_thw=grid_thw)]  # pyright: ignore[reportArgumentType]

    return _provider(
        {
            "cu_seqlens": cu_seqlens,
            "position_ids": position_ids,
            "window_index": lambda: [*vision_utils.get_vision_window_index(grid_thw, *WINDOWS)],
            "mrope_position_ids": rope_index,
            "PackedGrid": lambda: cu_seqlens() + position_ids(),
        }
    )


def _provider(calls: Calls) -> Provider:
    return lambda functions, **_: [calls[name]() for name in functions]


# 87 516 patches
SIZES = [(34 + 22 * i % 50, 26 + 26 * i % 50) for i in range(32)]
ONE_BY_ONE = ("cu_seqlens", "position_ids", "window_index", "mrope_position_ids", "PackedGrid")
BATCH = "32 images, 87.5k patches"
ALL = f"all four, {BATCH}"

BENCH = Bench(
    op="metadata",
    shapes={
        ALL: {"sizes": SIZES, "functions": ONE_BY_ONE[:4]},
        **{f"{name}, {BATCH}": {"sizes": SIZES, "functions": (name,)} for name in ONE_BY_ONE},
    },
    tiny={"sizes": [(4, 6), (2, 2)], "functions": ONE_BY_ONE},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=lambda inputs, backward: 0,
    bound="copy",
    peers={"transformers": _transformers, "patchpack": _ours},
    backward=False,
    dtypes=("int64",),
    floors=(Floor(ALL, "int64", "forward", "transformers", 20, provider="patchpack"),),
    threads=1,
)
