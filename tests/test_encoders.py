"""The encoders of the systems: what transformers computes from the same weights and images."""

import re
from dataclasses import replace

import pytest
import torch

from patchpack import PackedGrid, patchify
from patchpack.models.native_vit import CONFIGS, NativeViT

pytest.importorskip("transformers", minversion="5")

SMALL = {"hidden_size": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
HF_SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
LAYERS = {**HF_SMALL, "num_hidden_layers": 2}
DEPTH = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 24}


def _modeling(name):
    package = f"transformers.models.{name}"
    return (
        pytest.importorskip(f"{package}.modeling_{name}"),
        pytest.importorskip(f"{package}.configuration_{name}"),
    )


def _images(config, sizes):
    """One random image or clip a grid, ``[frames, 3, height, width]``."""
    p, tp = config.patch_size, config.temporal_patch_size
    return [torch.randn(t * tp, 3, h * p, w * p) for t, h, w in sizes]


def _pixels(config, images, grid, layout="ctpp"):
    return patchify(
        images,
        grid,
        patch_size=config.patch_size,
        mean=[0] * 3,
        std=[1] * 3,
        temporal_patch_size=config.temporal_patch_size,
        layout=layout,
    )


def _renamed(weights, names):
    """Weights under our names: ``names`` are patterns of theirs and what becomes of them."""
    renamed = {}
    for name, x in weights.items():
        for pattern, ours in names.items():
            name = re.sub(pattern, ours, name)
        renamed[name] = x
    for name in [n for n in renamed if ".q_proj." in n]:
        parts = [renamed.pop(name.replace(".q_", f".{p}_")) for p in "qkv"]
        renamed[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return renamed


def _internvl():
    modeling, configuration = _modeling("internvl")
    config = replace(CONFIGS["internvl"], **SMALL, pos_table=(4, 4))
    original = modeling.InternVLVisionModel(
        configuration.InternVLVisionConfig(
            **LAYERS, use_qk_norm=True, norm_type="rms_norm", image_size=[56, 56]
        )
    )

    def ours(weights):
        weights = _renamed(
            weights,
            {
                "embeddings.patch_embeddings.projection": "patch_embed.proj",
                r"encoder.layer.(\d+)": r"blocks.\1",
                "layernorm_before": "norm1",
                "layernorm_after": "norm2",
                r"lambda_(\d)": r"ls\1",
                "attention.projection_layer": "attn.proj",
                "attention": "attn",
            },
        )
        positions = weights.pop("embeddings.position_embeddings")[0]
        weights["class_token"] = weights.pop("embeddings.cls_token").flatten() + positions[0]
        weights["pos_embed"] = positions[1:].view(4, 4, -1)
        return weights

    def run(images, grid):
        tiles = torch.cat(images)
        return original(tiles, interpolate_pos_encoding=True).last_hidden_state[:, 1:].flatten(0, 1)

    return config, original, ours, run, [(1, 4, 4)] * 3, 1


def _llava_onevision():
    modeling, configuration = _modeling("siglip")
    config = replace(CONFIGS["llava_onevision"], **SMALL, pos_table=(5, 5))
    original = modeling.SiglipVisionModel(
        configuration.SiglipVisionConfig(
            **LAYERS, image_size=75, patch_size=14, vision_use_head=False
        )
    )

    def ours(weights):
        weights = _renamed(
            {name: x for name, x in weights.items() if "post_layernorm" not in name},
            {**SIGLIP, "embeddings.position_embedding.weight": "pos_embed"},
        )
        return {**weights, "pos_embed": weights["pos_embed"].view(5, 5, -1)}

    def run(images, grid):
        model = getattr(original, "vision_model", original)
        embedded = model.embeddings(torch.cat(images))
        return model.encoder(inputs_embeds=embedded).last_hidden_state.flatten(0, 1)

    return config, original, ours, run, [(1, 5, 5)] * 2, 1


SIGLIP = {
    r"^vision_model\.": "",
    "embeddings.patch_embedding": "patch_embed.proj",
    r"encoder.layers.(\d+)": r"blocks.\1",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "self_attn": "attn",
    "post_layernorm": "post_norm",
}


def _siglip2():
    modeling, configuration = _modeling("siglip2")
    config = replace(CONFIGS["siglip2"], **SMALL, patch_size=4, pos_table=(4, 4))
    original = modeling.Siglip2VisionModel(
        configuration.Siglip2VisionConfig(
            **LAYERS, patch_size=4, num_patches=16, vision_use_head=False
        )
    )

    def ours(weights):
        names = {**SIGLIP, "embeddings.position_embedding.weight": "pos_embed"}
        weights = _renamed(weights, names)
        return {**weights, "pos_embed": weights["pos_embed"].view(4, 4, -1)}

    def run(images, grid):
        lengths = grid.grid_thw.prod(dim=1).tolist()
        rows = _pixels(config, images, grid, layout="ppc").split(lengths)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        tokens = original(padded, mask.long(), grid.grid_thw[:, 1:]).last_hidden_state
        return tokens[mask]

    return config, original, ours, run, [(1, 5, 3), (1, 2, 9), (1, 4, 4)], 1


def _qwen2_5_vl():
    modeling, configuration = _modeling("qwen2_5_vl")
    config = replace(CONFIGS["qwen2_5_vl"], **SMALL, full_attention_blocks=(1,), out_size=24)
    original = modeling.Qwen2_5_VisionTransformerPretrainedModel(
        configuration.Qwen2_5_VLVisionConfig(**DEPTH, depth=2, fullatt_block_indexes=[1])
    )

    def run(images, grid):
        return original(_pixels(config, images, grid), grid.grid_thw).pooler_output

    return config, original, lambda x: _renamed(x, {}), run, [(1, 10, 12), (2, 6, 4)], 2


def _qwen3_vl():
    modeling, configuration = _modeling("qwen3_vl")
    config = replace(CONFIGS["qwen3_vl"], **SMALL, deepstack_blocks=(0,), out_size=24)
    original = modeling.Qwen3VLVisionModel(
        configuration.Qwen3VLVisionConfig(**DEPTH, depth=2, deepstack_visual_indexes=[0])
    )

    def ours(weights):
        weights = _renamed(
            weights,
            {
                "deepstack_merger_list": "deepstack",
                r"(merger|deepstack\.\d)\.norm": r"\1.ln_q",
                r"(merger|deepstack\.\d)\.linear_fc1": r"\1.mlp.0",
                r"(merger|deepstack\.\d)\.linear_fc2": r"\1.mlp.2",
                "linear_fc": "fc",
                "pos_embed.weight": "pos_embed",
            },
        )
        return {**weights, "pos_embed": weights["pos_embed"].view(48, 48, -1)}

    def run(images, grid):
        outputs = original(_pixels(config, images, grid), grid.grid_thw)
        return torch.cat([outputs.pooler_output, *outputs.deepstack_features])

    return config, original, ours, run, [(1, 4, 6), (2, 2, 8)], 2


def _moonvit():
    modeling, configuration = _modeling("kimi_k25")
    config = replace(  # transformers permutes the weights, to turn halves together
        CONFIGS["moonvit"], **SMALL, patch_size=4, rope_interleaved=False, out_size=None
    )
    original = modeling.Kimi_K25VisionModel(
        configuration.Kimi_K25VisionConfig(**LAYERS, patch_size=4)
    )

    def ours(weights):
        return _renamed(
            weights,
            {
                "patch_embed.pos_emb.position_embeddings": "pos_embed",
                r"^layers": "blocks",
                "final_layernorm": "post_norm",
            },
        )

    def run(images, grid):
        rows = _pixels(config, images, grid).unflatten(1, (3, 4, 4))
        return original(rows, grid.grid_thw).last_hidden_state

    return config, original, ours, run, [(1, 4, 6), (1, 2, 8)], 1


def _pixtral():
    modeling, configuration = _modeling("pixtral")
    config = replace(CONFIGS["pixtral"], **SMALL, patch_size=4, out_size=None)
    original = modeling.PixtralVisionModel(
        configuration.PixtralVisionConfig(
            **LAYERS,
            patch_size=4,
            image_size=64,
            hidden_act="silu",  # as released
        )
    )

    def ours(weights):
        return _renamed(
            weights,
            {
                "patch_conv": "patch_embed.proj",
                "ln_pre": "pre_norm",
                "transformer.layers": "blocks",
                "attention_norm": "norm1",
                "ffn_norm": "norm2",
                "feed_forward": "mlp",
                "attention.o_proj": "attn.proj",
                "attention": "attn",
            },
        )

    def run(images, grid):
        sizes = [tuple(x.shape[-2:]) for x in images]
        side = torch.tensor(sizes).amax(0).tolist()
        padded = [
            torch.nn.functional.pad(x, (0, side[1] - w, 0, side[0] - h))
            for x, (h, w) in zip(images, sizes, strict=True)
        ]
        return original(torch.cat(padded), image_sizes=sizes).last_hidden_state[0]

    return config, original, ours, run, [(1, 5, 3), (1, 2, 7)], 1


ENCODERS = {
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "siglip2": _siglip2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "moonvit": _moonvit,
    "pixtral": _pixtral,
}


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("system", ENCODERS)
def test_it_computes_what_transformers_does(system, impl):
    config, original, ours, run, sizes, merge = ENCODERS[system]()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    original.eval()
    model = NativeViT(config, impl=impl)
    flat = {
        name: x.flatten(1) if name == "patch_embed.proj.weight" else x
        for name, x in ours(original.state_dict()).items()
    }
    model.load_state_dict(flat)

    images, grid = _images(config, sizes), PackedGrid(sizes, merge)
    layout = "ppc" if system == "siglip2" else "ctpp"
    got = model(_pixels(config, images, grid, layout), grid)
    got = torch.cat([got[0], *got[1]]) if isinstance(got, tuple) else got
    want = run(images, grid)
    cotangent = torch.linspace(-1, 1, want.numel()).view(want.shape)
    got.backward(cotangent)
    want.backward(cotangent)

    theirs = ours({n: p.grad for n, p in original.named_parameters() if p.grad is not None})
    pairs = {"tokens": (got, want)}
    for name, parameter in model.named_parameters():
        if name != "class_token":  # two parameters there
            pairs[name] = (parameter.grad, theirs[name].view_as(parameter))
    for name, (x, y) in pairs.items():
        error = (x - y).abs().max() / y.abs().max()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("system", "parameters"),
    [
        # counted from the published configurations, language-model projector included
        ("qwen2_vl", 675_759_104),
        ("qwen2_5_vl", 676_550_144),
    ],
)
def test_configurations_have_the_size_of_the_released_checkpoints(system, parameters):
    with torch.device("meta"):
        model = NativeViT(CONFIGS[system])
    assert sum(x.numel() for x in model.parameters()) == parameters


@pytest.mark.parametrize("system", CONFIGS)
def test_every_configuration_can_be_built(system):
    with torch.device("meta"):
        model = NativeViT(CONFIGS[system])
    assert len(model.blocks) == model.config.depth


@pytest.mark.parametrize("system", CONFIGS)
def test_a_gradient_reaches_every_parameter(system):
    config = CONFIGS[system]
    blocks = {
        name: (1,) for name in ("full_attention_blocks", "deepstack_blocks") if vars(config)[name]
    }
    config = replace(config, **SMALL, **blocks, patch_size=4, window_size=config.window_size and 8)
    model = NativeViT(config, impl="reference")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    grid = PackedGrid([(1, 4, 6), (2, 2, 4)], config.spatial_merge_size)
    outputs = model(torch.randn(grid.num_tokens, config.patch_dim), grid)
    tokens, features = outputs if isinstance(outputs, tuple) else (outputs, [])
    sum(x.square().sum() for x in [tokens, *features]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    outputs = model(torch.empty(0, config.patch_dim), PackedGrid([], config.spatial_merge_size))
    nothing, features = outputs if isinstance(outputs, tuple) else (outputs, [])
    assert all(x.shape == (0, tokens.shape[1]) for x in [nothing, *features])
