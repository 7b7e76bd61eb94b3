"""The encoder as a whole: what it computes, and that it never asks where an image begins."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from patchpack import PackedGrid
from patchpack.models import NativeViT, NativeViTConfig
from patchpack.testing.compare import measure_model

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
CONFIG = NativeViTConfig(
    patch_size=4, hidden_size=64, depth=2, num_heads=2, mlp_ratio=2, out_size=24
)
SIZES = [(1, 4, 6), (2, 2, 2), (1, 2, 8)]


def _model(impl="reference", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = NativeViT(NativeViTConfig(**{**vars(CONFIG), **changes}), impl=impl)
    for parameter in model.parameters():  # biases and norms too, or their gradients hide faults
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def _images(sizes=SIZES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(t * h * w, CONFIG.patch_dim, generator=generator).to(dtype) for t, h, w in sizes
    ]


def _results(model, pixels, grid):
    pixels = pixels.clone().requires_grad_()
    tokens = model(pixels, grid)
    tokens.backward(torch.linspace(-1, 1, tokens.numel()).view(tokens.shape).to(tokens.dtype))
    results = {"tokens": tokens.detach(), "pixels": pixels.grad}
    for name, parameter in model.named_parameters():
        results[name.removeprefix("_orig_mod.")], parameter.grad = parameter.grad, None
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"rope_axes": "paired", "rope_interleaved": True}], ids=["split", "paired"]
)
def test_fused_is_as_accurate_as_the_reference(dtype, changes):
    pixels, grid = torch.cat(_images(dtype=dtype)), PackedGrid(SIZES, 2)
    fused, eager, oracle = (
        _model(impl, dtype, **changes) for impl in ("triton", "reference", "reference")
    )
    got, baseline = _results(fused, pixels, grid), _results(eager, pixels, grid)
    want = _results(oracle.double(), pixels.double(), grid)
    assert len(got) == 2 + len(list(fused.parameters()))
    wrong = [
        str(accuracy) for accuracy in measure_model(got, baseline, want) if not accuracy.passed
    ]
    assert not wrong


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_it_computes_what_transformers_does(impl):
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = modeling.Qwen2VLConfig().vision_config
    for name, value in {"depth": 3, "embed_dim": 160, "num_heads": 2, "hidden_size": 48}.items():
        setattr(config, name, value)
    original = modeling.Qwen2VisionTransformerPretrainedModel(config).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = NativeViT(
        NativeViTConfig(hidden_size=160, depth=3, num_heads=2, out_size=48), impl=impl
    )
    weights = original.state_dict()
    kernel = weights["patch_embed.proj.weight"]
    model.load_state_dict({**weights, "patch_embed.proj.weight": kernel.flatten(1)})

    forward = original.forward  # gave a bare tensor before transformers 5
    original.forward = lambda pixels, grid: getattr(
        tokens := forward(pixels, grid.grid_thw), "pooler_output", tokens
    )
    grid = PackedGrid([(1, 4, 6), (2, 2, 8), (1, 6, 2)], 2)
    pixels = torch.randn(grid.num_tokens, 1176)
    got, want = _results(model, pixels, grid), _results(original, pixels, grid)
    assert got.keys() == want.keys()
    for name, x in want.items():
        x = x.view_as(got[name])  # the kernel is flat
        error = (got[name] - x).abs().max() / x.abs().max()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_base": 100.0},
        {"rope_axes": "even_odd"},
        {"rope_axes": "paired"},
        {"rope_interleaved": True},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_every_option_of_the_rotary_embedding_matters(change):
    pixels, grid = torch.cat(_images()), PackedGrid(SIZES, 2)
    tokens = _model()(pixels, grid)
    assert (_model(**change)(pixels, grid) - tokens).abs().max() > 1e-6


def test_impl_may_change_at_any_time():
    model = _model("triton", torch.float32)
    pixels, grid = torch.cat(_images(dtype=torch.float32)), PackedGrid(SIZES, 2)
    fused = model(pixels, grid)
    model.impl = "reference"
    torch.testing.assert_close(fused, model(pixels, grid))


def test_golden_patch_embedding_is_a_convolution():
    (case,) = (case for case in GOLDEN if case["function"] == "qwen2vl.conv3d_equals_linear")
    config = NativeViTConfig(hidden_size=case["inputs"]["embed"], num_heads=1, depth=0)
    assert config.patch_dim == case["inputs"]["in_dim"]
    embed = NativeViT(config).patch_embed
    pixels = torch.randn(15, config.patch_dim)
    window = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    want = torch.nn.functional.conv3d(
        pixels.unflatten(1, window), embed.proj.weight.unflatten(1, window)
    )
    torch.testing.assert_close(embed(pixels), want.flatten(1), rtol=0, atol=case["tol"])


def test_packed_images_have_the_tokens_they_have_alone():
    model, images = _model(), _images()
    alone = [model(x, PackedGrid([size], 2)) for x, size in zip(images, SIZES, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        grid = PackedGrid([SIZES[i] for i in order], 2)
        packed = model(torch.cat([images[i] for i in order]), grid)
        torch.testing.assert_close(packed, torch.cat([alone[i] for i in order]))


def test_a_frame_attends_to_itself_alone():
    model, pixels = _model(), torch.cat(_images()).requires_grad_()
    grid = PackedGrid(SIZES, 2)
    bounds = grid.cu_seqlens.tolist()
    tokens = model(pixels, grid)
    for begin, end in itertools.pairwise(bounds):
        own = tokens[begin // 4 : end // 4].square().sum()
        (grad,) = torch.autograd.grad(own, pixels, retain_graph=True)
        touched = grad.abs().sum(dim=1) > 0
        assert touched[begin:end].all()
        assert touched.sum() == end - begin


def test_a_token_is_a_block_of_neighbours():
    model = _model(depth=0)
    grid = PackedGrid([(1, 4, 6)], 2)
    (pixels,) = _images([(1, 4, 6)])
    before = model(pixels, grid)
    block = (grid.position_ids // 2 == torch.tensor([1, 2])).all(dim=1)  # row 1, column 2
    changed = (model(pixels + block[:, None], grid) - before).abs().sum(dim=1) > 0
    assert block.sum() == 4
    assert changed.nonzero().tolist() == [[1 * 3 + 2]]  # raster order


def test_position_within_an_image_matters():
    model, (pixels,) = _model(), _images([(1, 2, 6)])
    wide, tall = (model(pixels, PackedGrid([size], 2)) for size in ((1, 2, 6), (1, 6, 2)))
    assert (wide - tall).abs().max() > 1e-6


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = (_model(impl, torch.float32, depth=1) for impl in ("triton", "reference"))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for sizes in ([(1, 2, 2)] * 2, SIZES, [(1, 4, 4)], [(3, 2, 4), (1, 6, 2)]):
        pixels, grid = torch.cat(_images(sizes, torch.float32)), PackedGrid(sizes, 2)
        want = _results(eager, pixels, grid)
        got = _results(compiled, pixels, grid)
        for name, x in want.items():
            torch.testing.assert_close(got[name], x)
    assert counter.frame_count <= 2


def test_reads_no_value_of_a_device():
    model = _model("triton", torch.float32).to("meta")  # where there is none to read
    grid = PackedGrid(SIZES, 2).to("meta")
    tokens = model(torch.empty(grid.num_tokens, CONFIG.patch_dim, device="meta"), grid)
    assert tokens.shape == (grid.num_tokens // 4, CONFIG.out_size)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_images_no_tokens(impl):
    model = _model(impl, torch.float32)
    assert model(torch.empty(0, CONFIG.patch_dim), PackedGrid([], 2)).shape == (0, CONFIG.out_size)


def test_parameters_keep_their_names():
    shapes = {name: list(x.shape) for name, x in _model(depth=1).state_dict().items()}
    assert shapes == {
        "patch_embed.proj.weight": [64, 3 * 2 * 4 * 4],
        "blocks.0.norm1.weight": [64],
        "blocks.0.norm1.bias": [64],
        "blocks.0.norm2.weight": [64],
        "blocks.0.norm2.bias": [64],
        "blocks.0.attn.qkv.weight": [192, 64],
        "blocks.0.attn.qkv.bias": [192],
        "blocks.0.attn.proj.weight": [64, 64],
        "blocks.0.attn.proj.bias": [64],
        "blocks.0.mlp.fc1.weight": [128, 64],
        "blocks.0.mlp.fc1.bias": [128],
        "blocks.0.mlp.fc2.weight": [64, 128],
        "blocks.0.mlp.fc2.bias": [64],
        "merger.ln_q.weight": [64],
        "merger.ln_q.bias": [64],
        "merger.mlp.0.weight": [256, 256],
        "merger.mlp.0.bias": [256],
        "merger.mlp.2.weight": [24, 256],
        "merger.mlp.2.bias": [24],
    }


def test_defaults_are_the_encoder_of_qwen2_vl():
    with torch.device("meta"):
        model = NativeViT(NativeViTConfig())
    assert model.config.patch_dim == 1176
    assert sum(x.numel() for x in model.parameters()) == 675_759_104  # of Qwen2-VL-7B's


@pytest.mark.parametrize(
    ("columns", "grid", "message"),
    [
        (95, PackedGrid(SIZES, 2), r"pixels must have shape \[\*, 96\], got \[48, 95\]"),
        (96, PackedGrid(SIZES[:1], 2), r"pixels must have the 24 tokens of grid, got \[48, 96\]"),
        (96, PackedGrid([(4, 4)] * 3, 4), r"grid must have spatial_merge_size=2, got 4"),
    ],
)
def test_rejects_what_does_not_fit(columns, grid, message):
    with pytest.raises(ValueError, match=message):
        _model()(torch.zeros(48, columns), grid)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_rejects_pixels_that_are_not_floating(dtype):
    pixels = torch.zeros(48, 96, dtype=dtype)
    with pytest.raises(TypeError, match=f"pixels must be floating, got {dtype}"):
        _model()(pixels, PackedGrid(SIZES, 2))


SIZE_NAMES = (
    *("patch_size", "temporal_patch_size", "in_channels", "hidden_size", "num_heads"),
    *("spatial_merge_size", "out_size"),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *(({name: 0}, ValueError, f"{name} must be at least 1, got 0") for name in SIZE_NAMES),
        ({"num_heads": -16}, ValueError, "num_heads must be at least 1, got -16"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"depth": 2.0}, TypeError, "depth must be an integer, got 2.0"),
        ({"spatial_merge_size": "2"}, TypeError, "spatial_merge_size must be an integer, got '2'"),
        ({"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
        (
            {"hidden_size": 64, "num_heads": 3},
            ValueError,
            "hidden_size must divide by 4 * num_heads = 12, got 64",
        ),
        (
            {"hidden_size": 512, "num_heads": 2},
            ValueError,
            "hidden_size must be at most 128 * num_heads = 256, got 512",
        ),
        ({"mlp_ratio": 1e-4}, ValueError, "mlp_ratio must give at least 1 channel, got 0.0001"),
        (
            {"full_attention_blocks": (1,)},
            ValueError,
            "full_attention_blocks must be empty without window_size, got (1,)",
        ),
        *(
            (
                {name: blocks, "window_size": 112},
                ValueError,
                f"{name} must be in ascending order, from 0 and below depth = 32, got {blocks}",
            )
            for name, blocks in (
                ("full_attention_blocks", (7, 32)),
                ("deepstack_blocks", (-1,)),
                ("deepstack_blocks", (1, 1)),
                ("deepstack_blocks", (2, 1)),
            )
        ),
        (
            {"window_size": 27},
            ValueError,
            "window_size must be at least patch_size * spatial_merge_size = 28, got 27",
        ),
        ({"rope_interleaved": "yes"}, TypeError, "rope_interleaved must be a bool, got 'yes'"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be above 0, got 0"),
        ({"mlp_ratio": None}, TypeError, "mlp_ratio must be a number, got None"),
        ({"rope_base": -1.0}, ValueError, "rope_base must be above 0, got -1.0"),
        ({"rope_base": "1e4"}, TypeError, "rope_base must be a number, got '1e4'"),
        (
            {"rope_axes": "rows"},
            ValueError,
            "rope_axes must be one of 'split', 'even_odd', 'paired', got 'rows'",
        ),
    ],
)
def test_a_config_names_what_it_refuses(change, error, message):
    with pytest.raises(error) as raised:
        NativeViTConfig(**change)
    assert str(raised.value) == message


def test_the_ratio_of_two_sizes_gives_the_size():
    for size in (1, 1951, 1952, 5419):
        assert NativeViTConfig(hidden_size=448, mlp_ratio=size / 448).mlp_size == size


def test_impl_that_is_not_available_is_refused():
    pixels, grid = torch.cat(_images(dtype=torch.float32)), PackedGrid(SIZES, 2)
    with pytest.raises(ValueError, match=r"impl must be None or one of .*, got 'fastest'"):
        _model("fastest", torch.float32)(pixels, grid)
