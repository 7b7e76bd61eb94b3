"""Small random models of transformers, and batches of text, images and videos for them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch.overrides import TorchFunctionMode

IMAGE, VIDEO, START, END = 151, 152, 153, 154
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _text(**changes):
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def _rope(section, **changes):
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, **changes}


_ENCODER = {
    "hidden_size": 64,
    "out_hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 4,
}
_TILES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def _qwen2_vl(vision=None, text=None, rope=None):
    return {
        "vision_config": {
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": (text or {}).get("hidden_size", 64),
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            **(vision or {}),
        },
        "text_config": _text(**{"rope_parameters": rope or _rope([2, 3, 3]), **(text or {})}),
        **TOKENS,
    }


def _qwen2_5_vl(vision=None, text=None):
    return {
        "vision_config": {
            "depth": 3,
            **_ENCODER,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            **(vision or {}),
        },
        "text_config": _text(rope_parameters=_rope([2, 3, 3]), **(text or {})),
        **TOKENS,
    }


def _qwen3_vl(vision=None, text=None):
    return {
        "vision_config": {
            "depth": 3,
            **_ENCODER,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
            **(vision or {}),
        },
        "text_config": _text(
            head_dim=16,
            rope_parameters=_rope([3, 3, 2], mrope_interleaved=True),
            **(text or {}),
        ),
        **TOKENS,
    }


def _internvl(vision=None, text=None):
    return {
        "vision_config": {
            **_TILES,
            "image_size": [24, 24],
            "patch_size": [4, 4],
            **(vision or {}),
        },
        "text_config": _text(**{"model_type": "qwen2", **(text or {})}),
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    }


def _llava_onevision(vision=None, text=None, **changes):
    return {
        "vision_config": {
            "model_type": "siglip_vision_model",
            **_TILES,
            "image_size": 20,
            "patch_size": 4,
            "vision_use_head": False,
            **(vision or {}),
        },
        "text_config": _text(**{"model_type": "qwen2", **(text or {})}),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_grid_pinpoints": [
            [20 * rows, 20 * cols] for rows in range(1, 5) for cols in range(1, 5)
        ],
        "vision_feature_layer": -1,
        **changes,
    }


CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "internvl": "InternVL",
    "llava_onevision": "LlavaOnevision",
}
CONFIGS = {
    "qwen2_vl": {
        "grouped": _qwen2_vl(),
        "heads of 20, three to one": _qwen2_vl(
            {"embed_dim": 40, "num_heads": 2},
            {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1},
            _rope([4, 5, 3], rope_theta=5e5),
        ),
        "merging 3 x 3, tied": _qwen2_vl(
            {"spatial_merge_size": 3, "num_heads": 1},
            {
                "tie_word_embeddings": True,
                "num_key_value_heads": 4,
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 1,
            },
        ),
    },
    "qwen2_5_vl": {
        "windows": _qwen2_5_vl(),
        "windows of an odd side, no whole frames": _qwen2_5_vl(
            {"window_size": 24, "fullatt_block_indexes": [], "num_heads": 2}
        ),
        "whole frames at both ends": _qwen2_5_vl({"fullatt_block_indexes": [0, 2]}),
    },
    "qwen3_vl": {
        "deepstack": _qwen3_vl(),
        "one deepstack, one head of keys": _qwen3_vl(
            {"deepstack_visual_indexes": [2], "num_position_embeddings": 25},
            {"num_key_value_heads": 1},
        ),
    },
    "internvl": {
        "qwen2": _internvl(),
        "qwen3, normalised": _internvl(
            {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True},
            {"model_type": "qwen3", "head_dim": 24},
        ),
        "llama": _internvl({"num_attention_heads": 2}, {"model_type": "llama"}),
    },
    "llava_onevision": {
        "qwen2": _llava_onevision(),
        "two layers, clip": _llava_onevision(
            {"model_type": "clip_vision_model", "image_size": 24},
            {"num_key_value_heads": 1},
            vision_feature_layer=[-2, -1],
            vision_feature_select_strategy="default",
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24]],
        ),
    },
}


def make(family: str, config: str | dict, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model whose parameters are all of a size that matters."""
    values = CONFIGS[family][config] if isinstance(config, str) else config
    package = importlib.import_module(f"transformers.models.{family}")
    name = CLASSES[family]
    torch.manual_seed(seed)
    model = getattr(package, f"{name}ForConditionalGeneration")(
        getattr(package, f"{name}Config")(**values)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            scale = 0.15 if x.ndim > 1 else 0.1
            offset = x.mean().round() if x.ndim == 1 else 0  # norms stay around 1
            x.copy_(offset + scale * torch.randn(x.shape, generator=generator))
            x.data = x.data.to(dtype)  # as if loaded so: rotary frequencies stay in float32
    return model.train()


# Batches -----------------------------------------------------------------------------------------

Part = int | tuple  # so many tokens of text, ("image", rows, cols) or ("video", frames, rows, cols)


def sample(family: str, config, parts: Sequence[Part], seed: int) -> dict:
    """What a processor makes of one sample: ids, types, labels, and pixels of its images."""
    generator = torch.Generator().manual_seed(seed)
    ids, types, images, videos = [], [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 150, (part,), generator=generator).tolist()
            types += [0] * part
            continue
        kind, *size = part
        runs, pixels = _VISION[family](config, kind, size, generator)
        (images if kind == "image" else videos).append(pixels)
        token, number = (IMAGE, 1) if kind == "image" else (VIDEO, 2)
        for count in runs:
            ids += [START] + [token] * count + [END]
            types += [0] + [number] * count + [0]
    ids = torch.tensor(ids)
    found = {"input_ids": ids, "mm_token_type_ids": torch.tensor(types, dtype=torch.int32)}
    found["labels"] = torch.where((ids == IMAGE) | (ids == VIDEO), -100, ids)
    for kind, all_pixels in (("image", images), ("video", videos)):
        for name in all_pixels[0] if all_pixels else ():
            values = [pixels[name] for pixels in all_pixels]
            found[name.format(kind)] = torch.cat(values)
    if videos and "pixel_values_videos_of_images" in found:
        found.pop("pixel_values_videos_of_images")
    return found


def _patches(config, kind, size, generator):
    """Of the Qwen family: packed patches and their grid."""
    vision = config.vision_config
    grid = [1, *size] if kind == "image" else size
    channels = 3 * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
    pixels = torch.randn(torch.Size(grid).numel(), channels, generator=generator)
    count = grid[1] * grid[2] // vision.spatial_merge_size**2
    names = ("pixel_values", "image_grid_thw") if kind == "image" else (
        "pixel_values_videos", "video_grid_thw")  # fmt: skip
    runs = [count] * grid[0] if config.model_type == "qwen3_vl" else [grid[0] * count]
    found = dict(zip(names, (pixels, torch.tensor([grid])), strict=True))
    if config.model_type == "qwen2_5_vl" and kind == "video":
        found["second_per_grid_ts"] = torch.rand(1, generator=generator) * 2 + 0.3
    return runs, found


def _tiles(config, kind, size, generator):
    """Of InternVL: ``size`` is the number of tiles, and optionally their height and width."""
    side = config.vision_config.image_size
    count, height, width = (*size, *side)[:3] if len(size) == 1 else size
    pixels = torch.randn(count, 3, height, width, generator=generator)
    patch = config.vision_config.patch_size
    return [count * (height // patch[0]) * (width // patch[1]) // 4], {"pixel_values": pixels}


def _crops(config, kind, size, generator):
    """Of LLaVA-OneVision: the image's size in pixels, or frames of a video."""
    from transformers.models.llava_onevision import modeling_llava_onevision as modeling

    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    if kind == "video":
        pixels = torch.randn(1, size[0], 3, side, side, generator=generator)
        half = -(-(side // patch) // 2)
        return [size[0] * half**2 + 1], {"pixel_values_videos": pixels}
    count = modeling.image_size_to_num_patches(size, config.image_grid_pinpoints, side)
    pixels = torch.randn(1, 10, 3, side, side, generator=generator)
    features = torch.zeros(count, (side // patch) ** 2, 1)
    pack = modeling.LlavaOnevisionModel.pack_image_features
    holder = type("Holder", (), {"config": config})()
    _, lengths = pack(holder, [features], [size], torch.zeros(1), config.vision_aspect_ratio)
    return [int(lengths)], {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


_VISION = {
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "internvl": _tiles,
    "llava_onevision": _crops,
}


def padded(samples: Sequence[dict], side: str = "right") -> dict:
    """A batch with padding, as a tokenizer leaves it."""
    length = max(len(x["input_ids"]) for x in samples)
    batch = {}
    for name, fill in (("input_ids", 0), ("mm_token_type_ids", 0), ("labels", -100)):
        rows = []
        for x in samples:
            empty = x[name].new_full((length - len(x[name]),), fill)
            rows.append(torch.cat([x[name], empty] if side == "right" else [empty, x[name]]))
        batch[name] = torch.stack(rows)
    masks = [torch.ones_like(x["input_ids"]) for x in samples]
    masks = [
        torch.nn.functional.pad(
            mask, (0, length - len(mask)) if side == "right" else (length - len(mask), 0)
        )
        for mask in masks
    ]
    return batch | {"attention_mask": torch.stack(masks)} | pixels_of(samples)


def pixels_of(samples: Sequence[dict]) -> dict:
    """The tensors of images and videos of all samples, one after the other."""
    text = {"input_ids", "mm_token_type_ids", "labels"}
    names = {name: None for x in samples for name in x if name not in text}
    return {name: torch.cat([x[name] for x in samples if name in x]) for name in names}


# Float64 -----------------------------------------------------------------------------------------


class Float64(TorchFunctionMode):
    """Code that asks for float32 gets float64: a model then computes as exactly as can be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            return args[0].double()
        kwargs = {name: widen(x) for name, x in (kwargs or {}).items()}
        return func(*map(widen, args), **kwargs)


def exact(model):
    """A copy in float64, its rotary frequencies computed anew."""
    import copy

    model = copy.deepcopy(model).double()
    with Float64():
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                n = len(module.inv_freq)
                settings = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
                theta = settings.get("rope_theta", getattr(module, "theta", 1e4))
                inv_freq = theta ** -(torch.arange(n, dtype=torch.float64) / n)
                assert torch.allclose(inv_freq, module.inv_freq.double(), rtol=1e-5)
                module.inv_freq = inv_freq
    return model


def run(model, batch: dict) -> dict:
    """Loss, logits and the gradient of every parameter."""
    dtype = next(model.parameters()).dtype
    batch = {
        name: x.to(dtype) if name.startswith("pixel") and isinstance(x, torch.Tensor) else x
        for name, x in batch.items()
    }
    model.zero_grad(set_to_none=True)
    out = model(**batch, use_cache=False)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    if "attention_mask" in batch:  # what padding gives is nobody's business
        found["logits"] = found["logits"][batch["attention_mask"].bool()]
    for name, x in model.named_parameters():
        found[f"grad {name}"] = torch.zeros_like(x) if x.grad is None else x.grad.detach().clone()
    return found
