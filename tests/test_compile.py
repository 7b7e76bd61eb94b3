"""The encoder and the ops under torch's transforms: compile, export, CUDA graphs, checkpoints."""

import functools
import inspect
import io
import itertools
import logging
import math
from copy import copy
from dataclasses import fields, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import patchpack
from patchpack import PackedGrid, TokenLayout, metadata
from patchpack.models.native_vit import CONFIGS, NativeViT
from patchpack.testing import contract
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, leaves, tensors

needs_native = pytest.mark.skipif(
    patchpack.available("rope", "native") is not None, reason="there is no C++ extension"
)

SMALL = {"hidden_size": 48, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1.5}


def _small(name):
    """The configuration of a system with all it has, and few numbers."""
    config = CONFIGS[name]
    changes = SMALL | {"depth": 2 if config.window_size else 1}
    for option, value in {
        "pos_table": (5, 7),
        "window_size": 16,  # 2 x 2 merged tokens
        "full_attention_blocks": (1,),
        "deepstack_blocks": (0,),
        "merger_size": 28,
        "out_size": 20,
    }.items():
        if getattr(config, option):
            changes[option] = value
    return replace(config, **changes)


def _model(config, impl="native", dtype=torch.float32):
    torch.manual_seed(0)
    model = NativeViT(config, impl=impl)
    for parameter in model.parameters():  # biases and norms too, or their gradients hide faults
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def _pixels(config, num_tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, config.patch_dim, generator=generator).to(dtype)


def _tokens(result):
    """All tokens of a result as one tensor: those of deepstack have as many rows."""
    return result if isinstance(result, torch.Tensor) else torch.cat([result[0], *result[1]], dim=1)


def _results(model, parameters, pixels, grid, num_rows=None):
    """Tokens and gradients under a cotangent of the first ``num_rows``, 0 for the others."""
    pixels = pixels.clone().requires_grad_()
    tokens = _tokens(model(pixels, grid))
    rows = tokens[:num_rows]
    (rows * torch.linspace(-1, 1, rows.numel()).view(rows.shape).to(rows.dtype)).sum().backward()
    results = {"tokens": tokens.detach(), "pixels": pixels.grad}
    for name, parameter in parameters.items():
        results[name], parameter.grad = parameter.grad, None
    return results


def _equal(got, want):
    assert got.keys() == want.keys()
    different = [name for name, x in want.items() if not torch.equal(got[name], x)]
    assert not different, different


# images, tokens, segments, windows and longest segments differ, and none by chance is another
BATCHES = (
    [(1, 4, 6), (1, 8, 4)],
    [(2, 6, 4), (1, 10, 4), (1, 4, 14)],
    [(1, 4, 12), (3, 6, 6), (1, 8, 10), (1, 12, 2)],
    [(1, 14, 10), (1, 2, 2)],
    [(1, 6, 10)] * 5,
    [(2, 2, 2)] * 9,
    [(7, 8, 2), (1, 6, 18)],
    [(1, 2 + 2 * i, 16 - 2 * i) for i in range(4)],
)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_small_configurations_have_all_that_the_systems_have(name):
    for field in fields(CONFIGS[name]):
        ours, theirs = getattr(_small(name), field.name), getattr(CONFIGS[name], field.name)
        assert bool(ours) == bool(theirs), field.name
        if isinstance(theirs, (bool, str)):
            assert ours == theirs, field.name


# torch.compile -----------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_is_one_graph_for_all_batches(name):
    torch._dynamo.reset()
    config = _small(name)
    model = _model(config)
    parameters = dict(model.named_parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i, sizes in enumerate(BATCHES):
        grid = PackedGrid(sizes, config.spatial_merge_size)
        if i == 1:
            grid.position_ids  # noqa: B018 (they are kept, which compiles nothing anew)
        pixels = _pixels(config, grid.num_tokens)
        want = _results(model, parameters, pixels, grid)
        _equal(_results(compiled, parameters, pixels, grid), want)
    assert counter.frame_count <= 2


def test_a_grid_that_comes_again_compiles_nothing():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(grid):
        return grid.position_ids.sum()

    grid = PackedGrid(BATCHES[0], 2)
    for _ in range(2):
        assert function(grid) == grid.position_ids.sum()
    assert counter.frame_count == 1


@needs_native
def test_inductor_computes_what_eager_does():
    torch._dynamo.reset()
    config = _small("qwen2_vl")
    model = _model(config)
    parameters = dict(model.named_parameters())
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    grid = PackedGrid(BATCHES[1], config.spatial_merge_size)
    pixels = _pixels(config, grid.num_tokens)
    want = _results(model, parameters, pixels, grid)
    for key, x in _results(compiled, parameters, pixels, grid).items():
        torch.testing.assert_close(x, want[key], rtol=1e-4, atol=1e-5, msg=key)


# torch.export ------------------------------------------------------------------------------------


def _exported(function, inputs, others):
    """What was exported with ``inputs`` and saved, loaded again."""

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    module = function if isinstance(function, torch.nn.Module) else Module()
    more = torch.export.AdditionalInputs()
    more.add(others)
    log = logging.getLogger("torch.export.dynamic_shapes")
    log.disabled = True  # torch warns of what it does itself: None for sizes that are the same
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=more)
    finally:
        log.disabled = False
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@needs_native
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_an_exported_encoder_takes_other_images(name):
    config = _small(name)
    model = _model(config)
    batches = []
    for sizes in BATCHES:
        grid = PackedGrid(sizes, config.spatial_merge_size)
        batches.append((_pixels(config, grid.num_tokens), grid))
    program = _exported(model, *batches[:2])
    for batch in batches:
        assert torch.equal(_tokens(program(*batch)), _tokens(model(*batch)))


@needs_native
@pytest.mark.parametrize("op", SPECS)
def test_an_exported_op_takes_other_batches(op):
    spec = SPECS[op]
    subject = Subject(op, next(iter(spec.cases)), impl="native")
    sets = contract.LIST_SETS[1:] if spec.lists else contract.LENGTH_SETS[1:]
    batches = [subject.inputs(sizes=sizes) for sizes in sets]
    kinds = (torch.Tensor, PackedGrid, TokenLayout)
    names = [
        name
        for name, x in batches[0].items()
        if isinstance(x, kinds) or (isinstance(x, list) and isinstance(x[0], torch.Tensor))
    ]
    same = op == "resize_images"  # whose sizes are numbers, and part of the program

    def run(inputs):
        return tensors(subject({**batches[0], **inputs}))

    given = [({name: batch[name] for name in names},) for batch in batches]
    program = _exported(run, given[0], given[0 if same else 1])
    for batch, inputs in zip(batches[: 1 if same else None], given, strict=not same):
        for got, want in zip(tensors(program(*inputs)), tensors(subject(batch)), strict=True):
            assert torch.equal(got, want)


def test_a_grid_is_a_pytree():
    plain = PackedGrid(BATCHES[2], 2)
    for grid in (plain, plain.padded(**ROOM)):
        copied = torch.utils._pytree.tree_map(lambda x: x if x is None else x.clone(), grid)
        copied.validate()
        assert repr(copied) == repr(grid)
        file = io.BytesIO()
        torch.save(grid, file)
        file.seek(0)
        assert repr(torch.load(file, weights_only=True)) == repr(grid)


# padded grids ------------------------------------------------------------------------------------

ROOM = {"num_tokens": 360, "num_grids": 9, "num_segments": 18}


def _padded(pixels, config):
    rows = _pixels(config, ROOM["num_tokens"] - len(pixels), pixels.dtype)
    return torch.cat([pixels, rows])


def _of_the_batch(model, config, grid, dtype):
    """Tokens and gradients of a batch in a padded grid, whose padding gets and gives nothing."""
    pixels = _pixels(config, grid.num_tokens, dtype)
    rows = grid.num_tokens // (config.spatial_merge_size**2 if config.out_size else 1)
    padded = grid.padded(**ROOM)
    padded.validate()
    parameters = dict(model.named_parameters())
    results = _results(model, parameters, _padded(pixels, config), padded, rows)
    assert results["tokens"].isfinite().all()
    assert not results["pixels"][len(pixels) :].any()
    results["tokens"] = results["tokens"][:rows]
    results["pixels"] = results["pixels"][: len(pixels)]
    return results


@pytest.fixture
def one_thread():
    """Torch cuts long tensors by their length for its threads, and ends of vectors differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _linear(x, weight, bias=None):
    """A matrix product that gives a row the same bits whatever other rows there are."""
    out = (x[:, None] * weight).sum(dim=2)  # [T, out]
    return out if bias is None else out + bias


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_no_bit_of_an_encoder(name, monkeypatch, one_thread):
    monkeypatch.setattr(torch.nn.functional, "linear", _linear)
    config = _small(name)
    model = _model(config)
    grid = PackedGrid(BATCHES[2], config.spatial_merge_size)
    pixels = _pixels(config, grid.num_tokens)
    want = _results(model, dict(model.named_parameters()), pixels, grid)
    got = _of_the_batch(model, config, grid, torch.float32)
    assert torch.equal(got["tokens"], want["tokens"])
    assert torch.equal(got["pixels"], want["pixels"])
    scale = max(x.abs().max() for x in want.values())
    for key, x in want.items():  # of parameters, sums in another order
        assert (got[key] - x).abs().max() <= 1e-5 * scale, key


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_padding_changes_no_value_of_an_encoder(name):
    config = _small(name)
    model = _model(config, "reference", torch.float64)
    grid = PackedGrid(BATCHES[3], config.spatial_merge_size)
    pixels = _pixels(config, grid.num_tokens, torch.float64)
    want = _results(model, dict(model.named_parameters()), pixels, grid)
    got = _of_the_batch(model, config, grid, torch.float64)
    for key, x in want.items():
        torch.testing.assert_close(got[key], x, rtol=1e-10, atol=1e-12, msg=key)


def _grid_ops():
    params = []
    for op, spec in SPECS.items():
        names = inspect.signature(spec.op).parameters
        cases = [
            case
            for case, options in spec.cases.items()
            if not spec.lists and ("grid" in names or ("rope" in names and "merge" in options))
        ]
        for case, impl in itertools.product(cases, ("native", "reference", "triton")):
            if impl != "triton" or case == cases[0]:  # the interpreter is slow
                params.append(pytest.param(op, case, impl, id=f"{op}-{case}-{impl}"))
    return params


@pytest.mark.parametrize(("op", "case", "impl"), _grid_ops())
def test_padding_changes_no_bit_of_an_op(op, case, impl):
    spec = SPECS[op]
    subject = Subject(op, case, impl=impl)
    inputs = subject.inputs(**subject.without_padding)
    name = "rope" if "rope" in inputs else "grid"
    grid = inputs[name]
    shared = spec.shared
    side = inputs.get("region") or inputs.get("merge_size")  # of what becomes one token
    if side is None and op == "merge_tokens" and grid.spatial_merge_size == 1:
        side = 2
    block = math.lcm(grid.spatial_merge_size, side or 1)
    room = grid.num_tokens + 7 * block**2, grid.num_grids + 2, grid.num_segments + 4
    changes = {name: grid.padded(*room, block_size=block)}
    if "cu_seqlens_q" in inputs:
        changes["cu_seqlens_q"] = changes[name].cu_seqlens
    if "target_hw" in inputs:
        merge = inputs.get("spatial_merge_size")
        target = grid.resized(inputs["target_hw"], merge)
        more = target.num_tokens + 11 * target.spatial_merge_size**2
        changes |= {"target_hw": target.padded(more, *room[1:]), "spatial_merge_size": None}
    rows = {}
    for key in spec.grads:
        x = inputs[key]
        if key not in shared and isinstance(x, torch.Tensor):
            cell = side**2 if key == "query" else 1
            rows[key] = len(x)
            extra = torch.randn(room[0] // cell - len(x), *x.shape[1:])
            changes[key] = torch.cat([x, extra])

    def run(inputs, lengths):
        arguments = leaves(inputs, spec.grads)
        outputs = tensors(subject({**inputs, **arguments}))
        lengths = lengths or [x.shape for x in outputs]
        kept = [x[tuple(map(slice, shape))] for x, shape in zip(outputs, lengths, strict=True)]
        contract.backward(kept, [contract._cotangent(x, torch.float32) for x in kept])
        assert all(x.isfinite().all() for x in outputs if not inputs.get("return_lse"))
        return kept, lengths, {n: x.grad for n, x in arguments.items() if x is not None}

    want, lengths, want_grads = run(inputs, None)
    got, _, grads = run({**inputs, **changes}, lengths)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    for key, grad in want_grads.items():
        if key in rows:
            assert torch.equal(grads[key][: rows[key]], grad), key
            assert not grads[key][rows[key] :].any(), key
        else:
            torch.testing.assert_close(grads[key], grad)


def test_a_padded_grid_becomes_another_batch():
    static = PackedGrid(BATCHES[0], 2).padded(**ROOM)
    places = [getattr(static, name).data_ptr() for name in ("geometry", "cu_seqlens")]
    places.append(static.position_ids.data_ptr())
    for sizes in BATCHES[1:]:
        grid = PackedGrid(sizes, 2)
        assert static.copy_(grid) is static
        static.validate()
        assert repr(static) == repr(grid.padded(**ROOM))
        assert torch.equal(static.cu_seqlens[: grid.num_segments + 1], grid.cu_seqlens)
        assert (static.cu_seqlens[grid.num_segments :] == grid.num_tokens).all()
        assert torch.equal(static.position_ids[: grid.num_tokens], grid.position_ids)
        merged = static.merged()
        merged.validate()
        assert torch.equal(merged.position_ids[: grid.num_tokens // 4], grid.merged().position_ids)
        assert merged.num_blocks(1) == merged.num_tokens == 90
    now = [static.geometry.data_ptr(), static.cu_seqlens.data_ptr(), static.position_ids.data_ptr()]
    assert now == places


@pytest.mark.parametrize("merge_temporal", [False, True])
def test_padding_is_in_no_segment(merge_temporal):
    grid = PackedGrid([(3, 4, 6), (1, 2, 2)], 2, merge_temporal)
    padded = grid.padded(100, 4, 9)
    want = [0, 72, 76] if merge_temporal else [0, 24, 48, 72, 76]
    assert padded.cu_seqlens.tolist() == want + [76] * (10 - len(want))
    assert padded.grid_thw.tolist() == [[3, 4, 6], [1, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2, 8]]
    assert padded.max_seqlen == padded.num_tokens == 100
    assert (padded.num_grids, padded.num_segments) == (5, 9)
    assert padded.to("meta").cu_seqlens.shape == (10,)
    moved = padded.to("meta").to("cpu")
    moved.validate()
    assert moved.cu_seqlens.tolist() == padded.cu_seqlens.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((80, 3, 4), "num_tokens must be at least 84 for this batch, got 80"),
        ((100, 1), "num_grids must be at least 2 for this batch, got 1"),
        ((100, 4, 3), "num_segments must be at least 4 for this batch, got 3"),
        ((102, 4, 4), r"num_tokens must divide by block_size\*\*2 = 4, got 102"),
        ((100.0, 4, 4), "num_tokens must be an int, got 100.0"),
        ((100, 4, True), "num_segments must be an int, got True"),
        ((400, 4, 4, 3), "block_size must divide by spatial_merge_size=2, got 3"),
        ((400, 4, 4, 0), "block_size must be at least 1 and below"),
        (
            (400, 4, 4, 4),
            r"grid must have rows and columns that divide by block_size=4, got \[3, 4, 6\] in"
            r" grid_thw\[0\]",
        ),
    ],
)
def test_what_does_not_fit_is_not_padded(arguments, message):
    grid = PackedGrid([(3, 4, 6), (1, 2, 2)], 2)
    *room, block = (*arguments, None)[:4] if len(arguments) == 4 else (*arguments, None)
    with pytest.raises((TypeError, ValueError), match=message):
        grid.padded(*room, block_size=block)


def test_what_a_padded_grid_refuses():
    grid = PackedGrid([(1, 4, 6), (1, 2, 2)], 2)
    static = grid.padded(64, 3)
    before = static.geometry.clone(), static.cu_seqlens.clone(), static.grid_thw.clone()
    for other, message in (
        (PackedGrid([(1, 8, 8)], 2), "num_tokens must be at least 76 for this batch, got 64"),
        (PackedGrid([(1, 2, 2)] * 4, 2), "num_grids must be at least 4 for this batch, got 3"),
        (PackedGrid([(4, 2, 2)], 2), "num_segments must be at least 4 for this batch, got 3"),
        (PackedGrid([(1, 4, 6)]), "grid must have spatial_merge_size=2, got 1"),
        (PackedGrid([(1, 4, 6)], 2, True), "grid must have merge_temporal=False, got True"),
        (static, "a padded grid cannot be padded again"),
    ):
        with pytest.raises(ValueError, match=message):
            static.copy_(other)
    with pytest.raises(TypeError, match="grid must be a PackedGrid, got list"):
        static.copy_([(1, 4, 6)])
    with pytest.raises(ValueError, match="a grid must be padded to be copied to"):
        grid.copy_(grid)
    now = static.geometry, static.cu_seqlens, static.grid_thw
    assert all(map(torch.equal, now, before))
    with pytest.raises(ValueError, match="grid must be resized before it is padded"):
        static.resized([(2, 2)] * 4)
    with pytest.raises(ValueError, match="target_hw must be padded if grid is, and only then"):
        static.resized(grid)
    with pytest.raises(ValueError, match="grid must be padded with a block_size that divides by 4"):
        static.num_blocks(4)
    images = [torch.zeros(3, 16, 24), torch.zeros(3, 8, 8)]
    with pytest.raises(ValueError, match="grid must have no padding"):
        patchpack.patchify(images, static, patch_size=4, mean=[0] * 3, std=[1] * 3)


def test_a_grid_is_not_changed_between_forward_and_backward():
    static = PackedGrid(BATCHES[0], 2).padded(**ROOM)
    x = torch.randn(ROOM["num_tokens"], 2, 8, requires_grad=True)
    out, _ = patchpack.rope_2d(x, x, static, impl="triton")
    static.copy_(PackedGrid(BATCHES[1], 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_there_is_room_for_all_windows():
    """However thin images are: the number of windows is bounded by what a budget says."""
    for sizes in ([(1, 2, 98)], [(1, 2, 2)] * 9, [(3, 6, 14), (1, 98, 2)], BATCHES[-1]):
        grid = PackedGrid(sizes, 2)
        padded = grid.padded(grid.num_tokens + 40, 9, 9)
        for pixels in (8, 16, 24, 56):
            model = NativeViT(replace(_small("qwen2_5_vl"), window_size=pixels))
            order, bounds = model._windows(padded, pixels)
            want = metadata.get_vision_window_index(grid.grid_thw, 2, pixels, patch_size=4)
            assert torch.equal(order[: grid.num_tokens // 4], want[0])
            assert torch.equal(bounds.unique(), want[1].long())
            assert torch.equal(order.sort().values, torch.arange(padded.num_tokens // 4))


# CUDA graphs -------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Which operators run, on which shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = torch.utils._pytree.tree_leaves((args, kwargs, out))
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in found]
        self.calls.append((str(func), shapes))
        return out


@needs_native
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl", "moonvit"])
def test_what_runs_does_not_depend_on_the_batch(name):
    """What a CUDA graph records: the same operators on the same shapes, and no value is read."""
    config = _small(name)
    model = _model(config)
    parameters = dict(model.named_parameters())
    static = PackedGrid(BATCHES[0], config.spatial_merge_size).padded(**ROOM)
    guarded = copy(static)
    for key in ("geometry", "cu_seqlens"):
        object.__setattr__(guarded, key, getattr(static, key).as_subclass(contract._OnDevice))
    pixels, recorded = _pixels(config, ROOM["num_tokens"]), []
    for sizes in BATCHES[:4]:
        static.copy_(PackedGrid(sizes, config.spatial_merge_size))
        object.__setattr__(guarded, "_position_ids", None)  # as in a graph
        with _Recorder() as recorder:
            _results(model, parameters, pixels, guarded)
        recorded.append(recorder.calls)
    assert any("varlen_attention_backward" in name for name, _ in recorded[0])
    reads = ("_local_scalar_dense", "nonzero", "unique", "masked_select")
    assert not [call for call, _ in recorded[0] if any(read in call for read in reads)]
    for calls in recorded[1:]:
        assert calls == recorded[0]


@needs_native
def test_one_budget_is_compiled_once():
    torch._dynamo.reset()
    config = _small("qwen2_5_vl")
    model = _model(config)
    parameters = dict(model.named_parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for sizes in BATCHES[:4]:
        grid = PackedGrid(sizes, config.spatial_merge_size).padded(**ROOM)
        pixels = _pixels(config, ROOM["num_tokens"])
        want = _results(model, parameters, pixels, grid)
        _equal(_results(compiled, parameters, pixels, grid), want)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_graph_computes_other_batches(name):
    config = _small(name)
    model = _model(config, None).to("cuda", torch.bfloat16)
    parameters = list(model.parameters())
    grids = [PackedGrid(sizes, config.spatial_merge_size) for sizes in BATCHES[:5]]
    static = grids[0].to("cuda").padded(**ROOM)
    pixels = torch.zeros(ROOM["num_tokens"], config.patch_dim, device="cuda")
    cotangent = torch.zeros_like(_tokens(model(pixels, static)))

    def step():
        tokens = _tokens(model(pixels, static))
        return tokens, torch.autograd.grad(tokens, parameters, cotangent)

    stream = torch.cuda.Stream()  # warm up, as torch asks for
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, grads = step()
    for grid in grids[1:]:
        static.copy_(grid)
        pixels[: grid.num_tokens].copy_(_pixels(config, grid.num_tokens))
        merged = config.spatial_merge_size**2 if config.out_size else 1
        rows = grid.num_tokens // merged
        cotangent.zero_()[:rows].copy_(torch.randn(rows, cotangent.shape[1]))
        graph.replay()
        want, want_grads = step()
        assert torch.equal(tokens, want)
        assert all(map(torch.equal, grads, want_grads))
        alone = _tokens(model(pixels[: grid.num_tokens], grid.to("cuda")))
        torch.testing.assert_close(tokens[:rows], alone, rtol=2e-2, atol=2e-2)


# activation checkpoints, autocast, accumulation --------------------------------------------------


def _policy(ctx, op, *args, **kwargs):
    kept = op._overloadpacket is torch.ops.patchpack.varlen_attention
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "with the state of random numbers": {"preserve_rng_state": True},
    "without": {"preserve_rng_state": False},
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)},
}


def _checkpointed(model, options):
    """Each block computed again in the backward pass."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)
    return model


@needs_native
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_change_no_bit(kind, name):
    config = _small(name)
    plain, model = _model(config), _checkpointed(_model(config), CHECKPOINTS[kind])
    grid = PackedGrid(BATCHES[2], config.spatial_merge_size)
    pixels = _pixels(config, grid.num_tokens)
    want = _results(plain, dict(plain.named_parameters()), pixels, grid)
    with _Recorder() as recorder:
        _equal(_results(model, dict(model.named_parameters()), pixels, grid), want)
    attended = sum("patchpack.varlen_attention.native" in call for call, _ in recorder.calls)
    assert attended == config.depth * (1 if kind == "selective" else 2)


@needs_native
def test_checkpoints_are_compiled_too():
    torch._dynamo.reset()
    config = _small("qwen2_vl")
    plain, model = _model(config), _checkpointed(_model(config), {})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grid = PackedGrid(BATCHES[2], 2)
    pixels = _pixels(config, grid.num_tokens)
    want = _results(plain, dict(plain.named_parameters()), pixels, grid)
    _equal(_results(compiled, dict(model.named_parameters()), pixels, grid), want)


# torch says that it has no fused norm for two dtypes, which is what autocast gives it
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_runs_under_autocast(name, impl):
    config = _small(name)
    model = _model(config, impl)
    grid = PackedGrid(BATCHES[2], config.spatial_merge_size)
    pixels = _pixels(config, grid.num_tokens)
    want = _tokens(model(pixels, grid)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = _tokens(model(pixels, grid))
    error = (got.float() - want).square().mean() / want.square().mean()
    assert 1e-8 < error < 1e-3  # of bfloat16, not of float32
    got.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in model.parameters())


@needs_native
@pytest.mark.parametrize("op", SPECS)
def test_ops_run_in_the_dtype_of_their_inputs_under_autocast(op):
    subject = Subject(op, next(iter(SPECS[op].cases)), impl="native")
    inputs = subject.inputs()
    want = contract.differentiate(subject, inputs, subject.spec.grads)
    with torch.autocast("cpu", torch.bfloat16):
        got = contract.differentiate(subject, inputs, subject.spec.grads)
    assert [x.dtype for x in got.values()] == [x.dtype for x in want.values()]
    _equal(got, want)


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-12), ("native", torch.float32, 1e-5)],
    ids=str,
)
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_gradients_of_micro_batches_add_up(name, impl, dtype, tolerance):
    config = _small(name)
    model = _model(config, impl, dtype)

    def accumulate(batches):
        for sizes in batches:
            grid = PackedGrid(sizes, config.spatial_merge_size)
            pixels = torch.cat([_pixels(config, t * h * w, dtype) for t, h, w in sizes])
            _tokens(model(pixels, grid)).square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return grads

    sizes = BATCHES[1]
    want, got = accumulate([sizes]), accumulate([sizes[:1], sizes[1:]])
    scale = max(x.abs().max() for x in want.values())
    for key, x in want.items():
        assert (got[key] - x).abs().max() <= tolerance * scale, key


# torch.func --------------------------------------------------------------------------------------

TRANSFORMS = ("grad", "vjp", "jvp", "jacrev", "vmap", "vmap of grad")


def _transformed(transform, function, xs):
    """What a transform makes of ``function``, and what it is without transforms."""
    argnums = tuple(range(len(xs)))

    def number(*xs):
        return sum((y * y.sin()).sum() for y in function(*xs))

    def gradients(xs):
        xs = [x.clone().requires_grad_() for x in xs]
        return torch.autograd.grad(number(*xs), xs)

    batch = [torch.stack([x, 2 * x, x + 1]) for x in xs]
    each = list(zip(*batch, strict=True))
    ones = tuple(map(torch.ones_like, xs))
    if transform == "grad":
        return torch.func.grad(number, argnums)(*xs), gradients(xs)
    if transform == "vjp":
        _, pull = torch.func.vjp(number, *xs)
        return pull(torch.tensor(2.0, dtype=xs[0].dtype)), [2 * x for x in gradients(xs)]
    if transform == "jvp":
        _, tangent = torch.func.jvp(number, tuple(xs), ones)
        return [tangent], [sum(x.sum() for x in gradients(xs))]
    if transform == "jacrev":

        def few(*xs):
            return torch.cat([y.flatten()[:2] for y in function(*xs)])

        rows = [x.clone().requires_grad_() for x in xs]
        got = torch.func.jacrev(few, argnums)(*xs)
        want = [torch.autograd.grad(y, rows, retain_graph=True) for y in few(*rows)]
        return got, [torch.stack(x) for x in zip(*want, strict=True)]
    if transform == "vmap":
        got, one = torch.func.vmap(function)(*batch), lambda x: function(*x)
    else:
        got, one = torch.func.vmap(torch.func.grad(number, argnums))(*batch), gradients
    return got, [torch.stack(y) for y in zip(*map(one, each), strict=True)]


# torch.func.jvp compiles scripts of torch's own, which torch has deprecated
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize("op", SPECS)
def test_a_transform_is_right_or_refused(op, impl, transform):
    spec = SPECS[op]
    dtype = torch.float64 if impl == "reference" else torch.float32
    inputs = spec.make_inputs(next(iter(spec.cases)), torch.float32)
    inputs = {k: contract._map(lambda x: contract._convert(x, dtype), x) for k, x in inputs.items()}
    if "dtype" in inputs:
        inputs["dtype"] = dtype
    flat = [(name, i) for name in spec.grads for i, _ in enumerate(tensors(inputs[name]))]
    if op in ("patchify", "resize_images"):
        flat = [("images", i) for i, _ in enumerate(inputs["images"])]
    xs = [tensors(inputs[name])[i].to(dtype) for name, i in flat]
    if op == "resize_images":  # of bytes: nothing but vmap has a meaning
        transform, xs = "vmap", [x.to(torch.uint8) for x in xs]

    def function(*xs):
        given = {name: [] for name, _ in flat}
        for (name, _), x in zip(flat, xs, strict=True):
            given[name].append(x)
        given = {n: x if isinstance(inputs[n], list) else x[0] for n, x in given.items()}
        return [
            y
            for y in tensors(spec.op(**{**inputs, **given}, impl=impl))
            if y.is_floating_point() or op == "resize_images"
        ]

    if impl != "reference":
        message = (
            rf"impl='{impl}' of \w+ has no transforms of torch.func: instead of vmap make the"
            r" batch one packed sequence, .*, or take impl='reference'"
        )
        with pytest.raises(RuntimeError, match=message):
            _transformed(transform, function, xs)
        return
    got, want = _transformed(transform, function, xs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@needs_native
def test_gradients_of_many_cotangents_are_those_of_each():
    subject = Subject("merge_tokens", next(iter(SPECS["merge_tokens"].cases)), impl="native")
    inputs = subject.inputs()
    arguments = leaves(inputs, subject.spec.grads)
    out = subject({**inputs, **arguments})
    cotangents = torch.randn(3, *out.shape)
    given = list(arguments.values())
    together = torch.autograd.grad(out, given, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(out, given, cotangent, retain_graph=True)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[i], y)


@needs_native
def test_an_encoder_takes_its_parameters_as_an_argument():
    config = _small("qwen2_5_vl")
    model = _model(config)
    grid = PackedGrid(BATCHES[0], 2)
    pixels = _pixels(config, grid.num_tokens)
    doubled = {name: 2 * x for name, x in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (pixels, grid))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    assert torch.equal(got, model(pixels, grid))
