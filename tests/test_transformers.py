"""Models of transformers, applied to: what they compute is theirs, up to rounding."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.9")

import transformers_models as models  # noqa: E402
from marks import slow  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from tracing import exported  # noqa: E402
from transformers import vision_utils  # noqa: E402

import patchpack  # noqa: E402
from patchpack.integrations.transformers import (  # noqa: E402
    _rewire,
    _text,
    _tiles,
    _vision,
    apply_to,
    collate,
)
from patchpack.testing import compare  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")

FAMILIES = list(models.CONFIGS)
QWEN = [family for family in FAMILIES if family.startswith("qwen")]
CASES = [(family, config) for family in FAMILIES for config in models.CONFIGS[family]]
# text, several images and a video; images and text; text alone
_QWEN = [
    [3, ("image", 4, 6), 2, ("video", 2, 8, 4), 5],
    [4, ("image", 20, 12), ("image", 2, 2), 3],
    [7],
]
SAMPLES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": [[3, ("image", 2), 4], [2, ("image", 1), 1, ("image", 3), 2], [6]],
    "llava_onevision": [
        [3, ("image", 25, 70), 4, ("video", 3), 2],
        [2, ("image", 60, 33), 1, ("image", 20, 20), 2],
        [6],
    ],
}
THREES = [  # divisible by 3
    [3, ("image", 6, 9), 2, ("video", 2, 3, 6), 5],
    [4, ("image", 12, 9), ("image", 3, 3), 3],
    [7],
]


def _quick(*families):
    return [*families, *slow(family for family in FAMILIES if family not in families)]


def _samples(family, model):
    parts = SAMPLES[family]
    if getattr(model.config.vision_config, "spatial_merge_size", 2) == 3:
        parts = THREES
    return [models.sample(family, model.config, x, seed=i) for i, x in enumerate(parts)]


def _batch(family, model, kind):
    samples = _samples(family, model)
    if kind == "packed":
        return collate(samples, config=model.config)
    batch = models.padded(samples, side=kind)
    if not hasattr(type(model.model), "get_rope_index"):
        del batch["mm_token_type_ids"]
    return batch


def _vanishes(name, want):
    """A bias of keys that nothing turns: every score of a query moves alike, and no weight does."""
    return want[name].abs().max() < 1e-6 * max(x.abs().max() for x in want.values())


def _measure(eager, got, want):
    """Accuracies of all but what is zero, and whether that is as small as eager has it."""
    zero = {name for name in want if _vanishes(name, want)}
    accuracies = compare.measure_model(
        *(
            {name: x for name, x in found.items() if name not in zero}
            for found in (got, eager, want)
        )
    )
    largest = max((eager[name].abs().max().item() for name in zero), default=0)
    small = all(got[name].abs().max() <= 4 * largest for name in zero)
    return accuracies, small


@functools.lru_cache(maxsize=2)
def _eager(family, config, kind, dtype):
    model = models.make(family, config, dtype=dtype)
    batch = _batch(family, model, kind)
    with models.Float64():
        want = models.run(models.exact(model), batch)
    return batch, want, models.run(model, batch)


def _check(family, config, kind, dtype, **options):
    batch, want, eager = _eager(family, config, kind, dtype)
    model = models.make(family, config, dtype=dtype)
    apply_to(model, **options)
    accuracies, small = _measure(eager, models.run(model, batch), want)
    failed = [str(x) for x in accuracies if not x.passed]
    assert not failed, "\n".join(failed)
    assert small
    return accuracies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize(("family", "config"), CASES)
def test_loss_logits_and_gradients_are_the_model_s(family, config, kind, dtype):
    _check(family, config, kind, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *slow([torch.bfloat16])], ids=str)
@pytest.mark.parametrize("family", _quick("internvl"))
def test_so_they_are_on_triton_s_kernels(family, dtype):
    config = next(iter(models.CONFIGS[family]))
    _check(family, config, "packed", dtype, impl="triton")


BROKEN = {
    "varlen_attention": ("_attention", lambda op, q, *args, **kw: op(1.02 * q, *args, **kw)),
    "mrope": ("_text", lambda op, q, k, ids, **kw: op(q, k, ids + (ids > 9), **kw)),
    "rope": ("_vision", lambda op, q, k, cos, sin, **kw: op(q, k, sin, cos, **kw)),
    "add_pos_embed": ("_vision", lambda op, x, t, grid, **kw: op(x, t.flip(0), grid, **kw)),
    "merge_tokens": ("_tiles", lambda op, x, grid, **kw: op(x, grid, order="column", **kw)),
    "assemble": ("_tiles", lambda op, x, v, layout, **kw: op(x, -v, layout, **kw)),
    "interpolate_tokens": (
        "_tiles",
        lambda op, x, grid, hw, **kw: op(x, grid, hw, mode="nearest", **kw),
    ),
}
SEEN_BY = {
    "varlen_attention": ("internvl", "qwen2"),
    "mrope": ("qwen2_vl", "grouped"),
    "rope": ("qwen2_5_vl", "windows"),
    "add_pos_embed": ("qwen3_vl", "deepstack"),
    "merge_tokens": ("internvl", "qwen2"),
    "assemble": ("llava_onevision", "qwen2"),
    "interpolate_tokens": ("llava_onevision", "qwen2"),
}


@pytest.mark.parametrize("op", BROKEN)
def test_an_op_that_is_slightly_wrong_is_noticed(op, monkeypatch):
    module, broken = BROKEN[op]
    place = f"patchpack.integrations.transformers.{module}.{op}"
    stock = getattr(patchpack, op)
    calls = []

    def count(*args, **kwargs):  # right while apply_to tries, wrong afterwards
        calls.append(op)
        return broken(stock, *args, **kwargs) if applied else stock(*args, **kwargs)

    applied = False
    monkeypatch.setattr(place, count)
    family, config = SEEN_BY[op]
    batch, want, eager = _eager(family, config, "right", torch.float32)
    model = models.make(family, config)
    apply_to(model)
    applied = True
    del calls[:]
    accuracies, small = _measure(eager, models.run(model, batch), want)
    assert calls
    assert not (all(x.passed for x in accuracies) and small)


# What is touched ---------------------------------------------------------------------------------


def _state(model):
    return {
        (path, name): x
        for path, module in model.named_modules()
        for name, x in vars(module).items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_leaves_the_model_as_it_was(family):
    config = next(iter(models.CONFIGS[family]))
    batch, _, eager = _eager(family, config, "right", torch.float32)
    model = models.make(family, config)
    before = _state(model)
    report = apply_to(model)
    assert _state(model).keys() != before.keys()
    report.undo()
    after = _state(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)
    again = models.run(model, batch)
    assert all(torch.equal(again[name], eager[name]) for name in eager)
    report.undo()  # does nothing
    apply_to(model).undo()
    assert _state(model).keys() == before.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_same_configuration_is_not_touched(family):
    config = next(iter(models.CONFIGS[family]))
    batch, _, eager = _eager(family, config, "right", torch.float32)
    model = models.make(family, config)
    other = type(model)(model.config)  # shares its configuration
    other.load_state_dict(model.state_dict())
    before = _state(other)
    apply_to(model)
    assert _state(other).keys() == before.keys()
    assert other.config.text_config._attn_implementation == "sdpa"
    found = models.run(other.train(), batch)
    assert all(torch.equal(found[name], eager[name]) for name in eager)


def test_a_copy_is_applied_and_stands_alone():
    batch, _, _ = _eager("qwen2_5_vl", "windows", "packed", torch.float32)
    model = models.make("qwen2_5_vl", "windows")
    report = apply_to(model)
    want = models.run(model, batch)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
    report.undo()
    found = models.run(clone, batch)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert clone.config.vision_config._attn_implementation == "patchpack_flash"


# What is said ------------------------------------------------------------------------------------


def test_the_report_says_what_was_replaced_and_what_was_left():
    report = apply_to(models.make("qwen2_5_vl", "windows"))
    text = str(report)
    assert "model.visual.blocks.*.attn (2 of them): rotated by rows and columns" in text
    assert "patchpack.rope, from the encoder's own tables" in text
    assert "left as they were:\n  metadata: model.visual: tokens are put in the order" in text
    want = {"varlen_attention", "rope_2d", "mrope", "metadata", "get_mrope_position_ids"}
    assert want <= report.ops
    assert {x.op for x in report.left} == {"metadata"}


def test_attention_with_dropout_is_left():
    config = models.CONFIGS["internvl"]["qwen2"]
    config = {**config, "text_config": {**config["text_config"], "attention_dropout": 0.1}}
    model = models.make("internvl", config)
    report = apply_to(model)
    assert [(x.op, x.path) for x in report.left] == [("varlen_attention", "model.language_model")]
    assert "drops out 0.1" in report.left[0].why
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "patchpack_flash"


def test_frequencies_that_were_rounded_are_kept():
    """``model.to(bfloat16)`` rounds them, and the model that it gives is the one to be matched."""
    model = models.make("qwen3_vl", "deepstack").to(torch.bfloat16)
    text = str(apply_to(model))
    assert "patchpack.rope, from the model's own tables" in text
    assert "patchpack.rope, from the encoder's own tables" in text


def test_ops_are_chosen_by_name():
    model = models.make("qwen3_vl", "deepstack")
    report = apply_to(model, ops=["mrope"])
    assert report.ops == {"mrope"}
    assert model.config.vision_config._attn_implementation == "sdpa"
    report.undo()
    report = apply_to(model, ops=["rope_2d", "add_pos_embed"])
    assert report.ops == {"rope_2d", "add_pos_embed"}


@pytest.mark.parametrize(
    "ops", [[op] for op in ("varlen_attention", "rope_2d", "mrope", "add_pos_embed", "metadata")]
)
def test_each_op_alone_computes_the_same(ops):
    _check("qwen3_vl", "deepstack", "packed", torch.float32, ops=ops)


def test_a_part_of_a_model_can_be_applied_to():
    model = models.make("qwen2_vl", "grouped")
    report = apply_to(model.model.visual)
    assert report.ops == {"varlen_attention", "rope_2d", "metadata"}
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ops": ["flash"]}, ValueError, "ops must be of varlen_attention, .*, got 'flash'"),
        ({"ops": "mrope"}, TypeError, "ops must be names of ops in a list, got 'mrope'"),
        ({"ops": 3}, TypeError, "ops must be names of ops in a list, got 3"),
        ({"impl": "cuda"}, ValueError, "impl must be of .*, got 'cuda'"),
        (
            {"ops": ["mrope", "assemble"]},
            ValueError,
            "ops must fit Qwen2VL.*, got 'assemble': nothing in it does that",
        ),
    ],
)
def test_errors_come_before_anything_is_touched(options, error, message):
    model = models.make("qwen2_vl", "grouped")
    before = _state(model)
    with pytest.raises(error, match=message):
        apply_to(model, **options)
    assert _state(model).keys() == before.keys()


def test_an_error_half_way_leaves_nothing_behind(monkeypatch):
    model = models.make("qwen2_vl", "grouped")
    before = _state(model)
    attention = model.model.language_model.layers[0].self_attn

    def refuse(self, name, value):
        if name == "forward":
            raise RuntimeError("not this one")
        torch.nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(type(attention), "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="not this one"):
        apply_to(model)
    after = _state(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model must be a module of transformers, got int"):
        apply_to(3)
    with pytest.raises(ValueError, match="model must have a part that is known, got Linear"):
        apply_to(torch.nn.Linear(2, 2))
    model = models.make("internvl", "qwen2")
    apply_to(model)
    with pytest.raises(ValueError, match=r"model must not be applied to already.* undo"):
        apply_to(model)


@pytest.mark.parametrize(
    ("family", "name", "op"),
    [
        ("qwen2_vl", "apply_rotary_pos_emb_vision", "rope_2d"),
        ("qwen3_vl", "apply_rotary_pos_emb", "mrope"),
        ("qwen3_vl", "is_flash_attention_requested", "varlen_attention"),
        ("qwen2_5_vl", "get_vision_position_ids", "rope_2d"),
        ("internvl", "ALL_ATTENTION_FUNCTIONS", "varlen_attention"),
    ],
)
def test_another_version_of_the_code_is_refused_whole(family, name, op, monkeypatch):
    """As if transformers had renamed what a model calls."""
    model = models.make(family, next(iter(models.CONFIGS[family])))
    before = _state(model)

    def hidden(names):
        return {x for x in names if x not in (name, "get_vision_cu_seqlens")}

    def can_rewire(function, called):
        return called != name and _rewire.can_rewire(function, called)

    for module in (_text, _vision, _tiles):
        monkeypatch.setattr(module, "names_of", lambda f: hidden(_rewire.names_of(f)))
        monkeypatch.setattr(module, "can_rewire", can_rewire, raising=False)
    with pytest.raises(RuntimeError, match=f"no place for .*{op}"):
        apply_to(model)
    assert _state(model).keys() == before.keys()


def test_positions_by_another_rule_are_refused(monkeypatch):
    model = models.make("qwen2_5_vl", "windows")
    stock = type(model.model).get_rope_index

    def shifted(self, input_ids, mm_token_type_ids, *args, **kwargs):
        ids, deltas = stock(self, input_ids, mm_token_type_ids, *args, **kwargs)
        return ids + 1, deltas

    monkeypatch.setattr(type(model.model), "get_rope_index", shifted)
    with pytest.raises(RuntimeError, match=r"no place for get_mrope_position_ids.* another rule"):
        apply_to(model)


def test_heads_turned_another_way_are_refused(monkeypatch):
    model = models.make("qwen2_vl", "grouped")
    place = "transformers.models.qwen2_vl.modeling_qwen2_vl.rotate_half"
    monkeypatch.setattr(place, lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2))
    with pytest.raises(RuntimeError, match=r"no place for mrope, rope_2d.*turns heads as"):
        apply_to(model)


# In use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl"])
def test_generation_goes_on_as_before(family):
    model = models.make(family, next(iter(models.CONFIGS[family]))).eval()
    batch = _batch(family, model, "left")
    batch.pop("labels")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**batch, **options)
    apply_to(model)
    assert torch.equal(model.generate(**batch, **options), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_activations_give_the_same_gradients(family):
    config = next(iter(models.CONFIGS[family]))
    batch, _, _ = _eager(family, config, "packed", torch.float32)
    model = models.make(family, config)
    apply_to(model)
    want = models.run(model, batch)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    found = models.run(model, batch)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_samples_end_where_positions_restart():
    model = models.make("qwen2_vl", "grouped")
    batch = collate(_samples("qwen2_vl", model), config=model.config)
    apply_to(model)
    want = models.run(model, batch)
    plain = {name: x for name, x in batch.items() if not name.startswith(("cu_seq", "max_length"))}
    found = models.run(model, plain)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_windows_are_grids_of_their_own():
    grid = patchpack.PackedGrid([(2, 12, 20), (1, 4, 6)], spatial_merge_size=2)
    windows = _vision.windows_of(grid, window_size=32, patch_size=4)
    _, bounds = patchpack.metadata.get_vision_window_index(grid.grid_thw, 2, 32, 4)
    assert torch.equal(windows.cu_seqlens, bounds)


def test_crops_are_put_together_as_by_the_model():
    model = models.make("llava_onevision", "qwen2").model
    sizes = [(25, 70), (60, 33), (20, 20), (79, 81), (13, 90)]
    pinpoints = model.config.image_grid_pinpoints
    counts = [
        transformers.models.llava_onevision.modeling_llava_onevision.image_size_to_num_patches(
            size, pinpoints, 20
        )
        for size in sizes
    ]
    crops = [torch.randn(n, 25, 64) for n in [*counts, 1]]
    sizes = torch.tensor([*sizes, (50, 50)])
    for newline in (model.image_newline, None):
        for budget in ("anyres_max_9", "anyres_max_2"):
            want, lengths = model.pack_image_features(crops, sizes, newline, budget)
            got, found = _tiles._pack_image_features(None, model, crops, sizes, newline, budget)
            assert torch.equal(found, lengths)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_is_read_back_from_the_device(family, packed):
    """Tensors of the model are on a device that holds no values; sizes stay on the host."""
    model = models.make(family, next(iter(models.CONFIGS[family])))
    report = apply_to(model)
    samples = _samples(family, model)
    if any("images and videos" in x.why for x in report.left):  # it cannot be helped, and is said
        samples = samples[1:]
    batch = collate(samples, config=model.config, packed=packed).to("meta")
    loss = model.to("meta")(**batch, use_cache=False).loss
    loss.backward()
    assert loss.device.type == "meta"


# batches that differ in images, tokens and windows; none is alike to the one before by chance
SIZES = [
    [(4, 8), (8, 12)],
    [(4, 4), (12, 4), (8, 8), (4, 16)],
    [(8, 20), (4, 28), (12, 4)],
    [(16, 12), (4, 8), (4, 4), (8, 4), (20, 4)],
    [(24, 24), (4, 4)],
    [(4, 20)] * 5,
    [(8, 16), (12, 12), (4, 4)],
    [(28, 8)] * 6,
]


class _Encoder(torch.nn.Module):
    """The vision encoder of a model: of pixels, and what is known of them, all its tokens."""

    def __init__(self, family):
        super().__init__()
        config = copy.deepcopy(next(iter(models.CONFIGS[family].values())))
        if "depth" in config["vision_config"]:
            config["vision_config"]["depth"] = 2  # of all kinds of blocks one: compiling is slow
        model = models.make(family, config)
        apply_to(model)
        self.tower = getattr(model.model, "visual", None) or model.model.vision_tower
        self.vision = model.config.vision_config

    def inputs(self, sizes, known="sizes"):
        """Pixels; of images of any size also these, a grid, or what transformers precomputes."""
        if hasattr(self.vision, "image_size"):  # as many tiles
            side = self.vision.image_size
            height, width = (side, side) if isinstance(side, int) else side
            return (torch.randn(sum(map(math.prod, sizes)) // 8, 3, height, width),)
        grid = patchpack.PackedGrid(sizes, self.vision.spatial_merge_size)
        pixels = torch.randn(grid.num_tokens, 6 * self.vision.patch_size**2)
        return pixels, grid.grid_thw, *self._known(known, grid)

    def _known(self, known, grid):
        vision, side = self.vision, getattr(self.vision, "window_size", None)
        if known == "sizes":
            return ()
        if known == "grid":
            more = {"packed_grid": grid}
        else:
            cu_seqlens = vision_utils.get_vision_cu_seqlens(grid.grid_thw)
            position_ids = vision_utils.get_vision_position_ids(grid.grid_thw, 2)
            more = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
            more["max_seqlen"] = int(cu_seqlens.diff().max())
        if side is not None:
            index, bounds = vision_utils.get_vision_window_index(
                grid.grid_thw, 2, side, vision.patch_size
            )
            more["window_index"] = index
            if known == "grid":
                more["packed_windows"] = _vision.windows_of(grid, side, vision.patch_size)
            else:
                more["cu_window_seqlens"] = bounds
        return (more,)

    def forward(self, pixels, grid_thw=None, known=None):
        if grid_thw is None:
            return [self.tower(pixels).last_hidden_state]
        out = self.tower(pixels, grid_thw, **(known or {}))
        return [out.pooler_output, *getattr(out, "deepstack_features", [])]


def _compiled(encoder, batches, **options):
    """How often the encoder is compiled; outputs and gradients have the bits of eager."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=counter, **options)
    for inputs in batches:
        found = []
        for run in (encoder, compiled):
            encoder.zero_grad()
            outputs = run(*inputs)
            sum(x.square().sum() for x in outputs).backward()
            grads = (x.grad for x in encoder.parameters() if x.grad is not None)
            found.append([*outputs, *grads])
        assert all(map(torch.equal, *found))
    return counter.frame_count


@pytest.mark.parametrize("family", _quick("qwen2_5_vl", "internvl"))
def test_an_encoder_is_compiled_twice_at_most(family):
    encoder = _Encoder(family)
    assert _compiled(encoder, map(encoder.inputs, SIZES)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("known", ["grid", "precomputed"])
@pytest.mark.parametrize("family", QWEN)
def test_so_it_is_where_the_loader_has_prepared_more(family, known):
    encoder = _Encoder(family)
    assert _compiled(encoder, (encoder.inputs(sizes, known) for sizes in SIZES)) <= 2


@pytest.mark.parametrize("family", _quick("qwen3_vl", "internvl"))
def test_an_exported_encoder_takes_other_batches(family):
    encoder = _Encoder(family).eval()
    batches = [encoder.inputs(sizes) for sizes in SIZES]
    program = exported(encoder, *batches[:2])
    for inputs in batches:
        assert all(map(torch.equal, program(*inputs), encoder(*inputs)))


@pytest.mark.parametrize("family", QWEN)
def test_padding_changes_no_value_of_an_encoder(family):
    encoder = _Encoder(family)
    static = patchpack.PackedGrid(SIZES[0], 2).padded(1600, 8)
    for sizes in SIZES[:5]:
        pixels, grid_thw = encoder.inputs(sizes)
        padded = torch.cat([pixels, torch.randn(1600 - len(pixels), pixels.shape[1])])
        static.copy_(patchpack.PackedGrid(sizes, 2))
        got = encoder(padded, static.grid_thw, {"packed_grid": static})
        for x, y in zip(got, encoder(pixels, grid_thw), strict=True):
            torch.testing.assert_close(x[: len(y)], y)


@pytest.mark.parametrize("family", ["qwen2_vl", *slow(["qwen3_vl"])])
def test_a_budget_is_compiled_once(family):
    """Not of Qwen2.5-VL, whose windows differ in number."""
    encoder, batches = _Encoder(family), []
    for sizes in SIZES[:4]:
        static = patchpack.PackedGrid(sizes, 2).padded(1600, 8)
        pixels = torch.randn(1600, 6 * encoder.vision.patch_size**2)
        batches.append((pixels, static.grid_thw, {"packed_grid": static}))
    assert _compiled(encoder, batches, dynamic=False) == 1


def test_sizes_of_other_patches_are_refused():
    encoder = _Encoder("qwen2_vl")
    pixels, grid_thw = encoder.inputs(SIZES[0])
    with pytest.raises(ValueError, match="hidden_states must have the 128 patches of grid_thw"):
        encoder(pixels[:-4], grid_thw)


# Batches -----------------------------------------------------------------------------------------


def test_collate_gives_what_the_model_would_compute():
    model = models.make("qwen2_5_vl", "windows")
    batch = collate(_samples("qwen2_5_vl", model), config=model.config)
    vision = model.config.vision_config
    for kind in ("image", "video"):
        grid_thw = batch[f"{kind}_grid_thw"]
        assert torch.equal(
            batch[f"{kind}_cu_seqlens"], vision_utils.get_vision_cu_seqlens(grid_thw)
        )
        ids = vision_utils.get_vision_position_ids(grid_thw, 2)
        assert torch.equal(batch[f"{kind}_position_ids"], ids)
        index, bounds = vision_utils.get_vision_window_index(
            grid_thw, 2, vision.window_size, vision.patch_size
        )
        assert torch.equal(batch[f"{kind}_window_index"], index)
        assert torch.equal(batch[f"{kind}_cu_window_seqlens"], bounds)
        assert batch[f"{kind}_max_window_seqlen"] == bounds.diff().max()
        assert batch[f"{kind}_max_seqlen"] == batch[f"{kind}_cu_seqlens"].diff().max()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_finds_the_positions_of_the_model(family, side):
    model = models.make(family, next(iter(models.CONFIGS[family])))
    samples = _samples(family, model)
    plain = models.padded(samples, side=side)
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: plain[name] for name in (*names, "attention_mask") if name in plain}
    want, deltas = model.model.get_rope_index(plain["input_ids"], **given)
    batch = collate(samples, config=model.config, packed=False, padding_side=side)
    for name in ("input_ids", "labels", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], plain[name])
    assert torch.equal(batch["position_ids"], want)
    apply_to(model, ops=["get_mrope_position_ids"])
    found = model.model.get_rope_index(plain["input_ids"], **given)
    assert all(map(torch.equal, found, (want, deltas)))
    packed = collate(samples, config=model.config)
    rows = [
        x[:, mask.bool()] for x, mask in zip(want.unbind(1), plain["attention_mask"], strict=True)
    ]
    assert torch.equal(packed["position_ids"][1:, 0], torch.cat(rows, dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_is_its_samples(family):
    model = models.make(family, next(iter(models.CONFIGS[family])), dtype=torch.float64)
    samples = _samples(family, model)
    apply_to(model, impl="reference")
    losses, counts = [], []
    for x in samples:
        alone = collate([x], config=model.config)
        losses.append(models.run(model, alone)["loss"])
        counts.append((alone["labels"][:, 1:] != -100).sum())
    want = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    got = models.run(model, collate(samples, config=model.config))["loss"]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_workers_collate():
    model = models.make("qwen2_vl", "grouped")
    samples = _samples("qwen2_vl", model)
    loader = torch.utils.data.DataLoader(
        samples * 2,
        batch_size=3,
        num_workers=1,
        collate_fn=functools.partial(collate, config=model.config),
        multiprocessing_context="spawn",
    )
    want = collate(samples, config=model.config)
    for batch in loader:
        assert batch.keys() == want.keys()
        for name, x in want.items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(batch[name], x)
        assert torch.equal(batch["image_packed_grid"].grid_thw, want["image_grid_thw"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, o: s.clear(), ValueError, r"samples must be at least one mapping.*, got \[\]"),
        (lambda s, o: s.append(3), TypeError, r"samples\[3\] must be a mapping, got int"),
        (lambda s, o: s[1].pop("input_ids"), ValueError, r"samples\[1\] must have input_ids"),
        (lambda s, o: s[2].pop("labels"), ValueError, r"samples\[2\] must have labels as samples"),
        (
            lambda s, o: s[2].update(input_ids=torch.rand(7)),
            TypeError,
            r"samples\[2\]\['input_ids'\] must be integers, got torch.float32",
        ),
        (
            lambda s, o: s[0].update(labels=torch.zeros(3)),
            ValueError,
            r"samples\[0\]\['labels'\] must be of 36 tokens, as input_ids are, got \[3\]",
        ),
        (
            lambda s, o: s[0].update(attention_mask=torch.tensor([0] + [1] * 35)),
            ValueError,
            r"samples\[0\]\['attention_mask'\] must be all ones",
        ),
        (
            lambda s, o: s[1].update(image_grid_thw=torch.tensor([[1, 4, 4]])),
            ValueError,
            r"samples\[1\]\['input_ids'\] must have the 4 image tokens that its pixel_values"
            " become, got 61",
        ),
        (
            lambda s, o: o.update(padding_side="both"),
            ValueError,
            "padding_side must be 'right' or 'left', got 'both'",
        ),
    ],
)
def test_collate_says_which_sample_is_wrong(change, error, message):
    model = models.make("qwen2_vl", "grouped")
    samples = [dict(x) for x in _samples("qwen2_vl", model)]
    options = {"config": model.config}
    change(samples, options)
    with pytest.raises(error, match=message):
        collate(samples, **options)


def test_collate_changes_no_sample():
    model = models.make("llava_onevision", "qwen2")
    samples = _samples("llava_onevision", model)
    before = copy.deepcopy(samples)
    collate(samples, config=model.config)
    for x, y in zip(samples, before, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_the_example_trains_as_without_patchpack():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    done = subprocess.run(
        [*command, *rendezvous, Path(__file__).parents[1] / "docs/finetune.py", "--steps", "4"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"step \d: \d+ tokens, loss ([\d.]+), unpatched ([\d.]+)", done.stdout)
    losses = [(float(ours), float(plain)) for ours, plain in found]
    assert len(losses) == 4
    assert losses[-1][0] < losses[0][0] - 1
    assert all(abs(ours - plain) < 1e-4 * plain for ours, plain in losses)


# Others that share transformers' vision_utils ----------------------------------------------------

OTHERS = {
    "cohere_compass": "CohereCompassVisionModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
    "glm_ocr": "GlmOcrVisionModel",  # hands nothing on to its blocks
    "minimax_m3_vl": "MiniMaxM3VLVisionModel",  # turns by frame, row and column
    "muse_spark": "MuseSparkVisionModel",  # counts from 1, the column first
    "qwen2_5_omni": "Qwen2_5OmniVisionEncoder",
    "qwen3_5": "Qwen3_5VisionModel",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionEncoder",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
}
SMALL = {
    "hidden_size": 64,
    "depth": 2,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "patch_size": 4,
    "out_hidden_size": 64,
}


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_of_other_models_compute_the_same(name):
    modeling = pytest.importorskip(
        f"transformers.models.{name}.modeling_{name}", reason="this transformers has none"
    )
    cls = getattr(modeling, OTHERS[name])
    values = {key: x for key, x in SMALL.items() if hasattr(cls.config_class(), key)}
    torch.manual_seed(0)
    encoder = cls(cls.config_class(**values))
    grid_thw = torch.tensor([[1, 4, 8], [2, 8, 4]])
    embed = next(x for x in encoder.parameters() if x.ndim > 1 and not x.numel() % 48)
    channels = embed[0].numel() if embed.ndim > 2 else embed.shape[1]
    pixels = torch.randn(96, channels)
    weights = torch.randn(96, 256)

    def run():
        encoder.zero_grad()
        out = encoder(pixels, grid_thw).last_hidden_state
        (out * weights[: out.shape[0], : out.shape[-1]]).sum().backward()
        return [out, *(x.grad for x in encoder.parameters() if x.grad is not None)]

    want = run()
    report = apply_to(encoder)
    assert "varlen_attention" in report.ops
    assert "rope_2d" in report.ops | {x.op for x in report.left}
    for x, y in zip(run(), want, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()
