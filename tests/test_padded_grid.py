"""Grids of a fixed number of tokens, whose padding changes nothing, and what CUDA graphs need."""

import inspect
import itertools
import math
from copy import copy
from dataclasses import replace

import pytest
import small_encoders as encoders
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from tracing import Recorder

import patchpack
from patchpack import PackedGrid, metadata
from patchpack.models.native_vit import CONFIGS, NativeViT
from patchpack.testing import contract
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, leaves, tensors

# padded grids ------------------------------------------------------------------------------------


def _padded(pixels, config):
    rows = encoders.pixels_of(config, encoders.ROOM["num_tokens"] - len(pixels), pixels.dtype)
    return torch.cat([pixels, rows])


def _of_the_batch(model, config, grid, dtype):
    """Tokens and gradients of a batch in a padded grid, whose padding gets and gives nothing."""
    pixels = encoders.pixels_of(config, grid.num_tokens, dtype)
    rows = grid.num_tokens // (config.spatial_merge_size**2 if config.out_size else 1)
    padded = grid.padded(**encoders.ROOM)
    padded.validate()
    parameters = dict(model.named_parameters())
    results = encoders.results_of(model, parameters, _padded(pixels, config), padded, rows)
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


@pytest.mark.cpp
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_no_bit_of_an_encoder(name, monkeypatch, one_thread):
    monkeypatch.setattr(torch.nn.functional, "linear", _linear)
    config = encoders.small(name)
    model = encoders.make(config)
    grid = PackedGrid(encoders.BATCHES[2], config.spatial_merge_size)
    pixels = encoders.pixels_of(config, grid.num_tokens)
    want = encoders.results_of(model, dict(model.named_parameters()), pixels, grid)
    got = _of_the_batch(model, config, grid, torch.float32)
    assert torch.equal(got["tokens"], want["tokens"])
    assert torch.equal(got["pixels"], want["pixels"])
    scale = max(x.abs().max() for x in want.values())
    for key, x in want.items():  # of parameters, sums in another order
        assert (got[key] - x).abs().max() <= 1e-5 * scale, key


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_padding_changes_no_value_of_an_encoder(name):
    config = encoders.small(name)
    model = encoders.make(config, "reference", torch.float64)
    grid = PackedGrid(encoders.BATCHES[3], config.spatial_merge_size)
    pixels = encoders.pixels_of(config, grid.num_tokens, torch.float64)
    want = encoders.results_of(model, dict(model.named_parameters()), pixels, grid)
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
    static = PackedGrid(encoders.BATCHES[0], 2).padded(**encoders.ROOM)
    places = [getattr(static, name).data_ptr() for name in ("geometry", "cu_seqlens")]
    places.append(static.position_ids.data_ptr())
    for sizes in encoders.BATCHES[1:]:
        grid = PackedGrid(sizes, 2)
        assert static.copy_(grid) is static
        static.validate()
        assert repr(static) == repr(grid.padded(**encoders.ROOM))
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
    static = PackedGrid(encoders.BATCHES[0], 2).padded(**encoders.ROOM)
    x = torch.randn(encoders.ROOM["num_tokens"], 2, 8, requires_grad=True)
    out, _ = patchpack.rope_2d(x, x, static, impl="triton")
    static.copy_(PackedGrid(encoders.BATCHES[1], 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_there_is_room_for_all_windows():
    """However thin images are: the number of windows is bounded by what a budget says."""
    for sizes in ([(1, 2, 98)], [(1, 2, 2)] * 9, [(3, 6, 14), (1, 98, 2)], encoders.BATCHES[-1]):
        grid = PackedGrid(sizes, 2)
        padded = grid.padded(grid.num_tokens + 40, 9, 9)
        for pixels in (8, 16, 24, 56):
            model = NativeViT(replace(encoders.small("qwen2_5_vl"), window_size=pixels))
            order, bounds = model._windows(padded, pixels)
            want = metadata.get_vision_window_index(grid.grid_thw, 2, pixels, patch_size=4)
            assert torch.equal(order[: grid.num_tokens // 4], want[0])
            assert torch.equal(bounds.unique(), want[1].long())
            assert torch.equal(order.sort().values, torch.arange(padded.num_tokens // 4))


# CUDA graphs -------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl", "moonvit"])
def test_what_runs_does_not_depend_on_the_batch(name):
    """What a CUDA graph records: the same operators on the same shapes, and no value is read."""
    config = encoders.small(name)
    model = encoders.make(config)
    parameters = dict(model.named_parameters())
    static = PackedGrid(encoders.BATCHES[0], config.spatial_merge_size).padded(**encoders.ROOM)
    guarded = copy(static)
    for key in ("geometry", "cu_seqlens"):
        object.__setattr__(guarded, key, getattr(static, key).as_subclass(contract._OnDevice))
    pixels, recorded = encoders.pixels_of(config, encoders.ROOM["num_tokens"]), []
    for sizes in encoders.BATCHES[:4]:
        static.copy_(PackedGrid(sizes, config.spatial_merge_size))
        object.__setattr__(guarded, "_position_ids", None)  # as in a graph
        with Recorder() as recorder:
            encoders.results_of(model, parameters, pixels, guarded)
        recorded.append(recorder.calls)
    assert any("varlen_attention_backward" in name for name, _ in recorded[0])
    reads = ("_local_scalar_dense", "nonzero", "unique", "masked_select")
    assert not [call for call, _ in recorded[0] if any(read in call for read in reads)]
    for calls in recorded[1:]:
        assert calls == recorded[0]


@pytest.mark.cpp
def test_one_budget_is_compiled_once():
    torch._dynamo.reset()
    config = encoders.small("qwen2_5_vl")
    model = encoders.make(config)
    parameters = dict(model.named_parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for sizes in encoders.BATCHES[:4]:
        grid = PackedGrid(sizes, config.spatial_merge_size).padded(**encoders.ROOM)
        pixels = encoders.pixels_of(config, encoders.ROOM["num_tokens"])
        want = encoders.results_of(model, parameters, pixels, grid)
        encoders.assert_equal(encoders.results_of(compiled, parameters, pixels, grid), want)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_graph_computes_other_batches(name):
    config = encoders.small(name)
    model = encoders.make(config, None).to("cuda", torch.bfloat16)
    parameters = list(model.parameters())
    grids = [PackedGrid(sizes, config.spatial_merge_size) for sizes in encoders.BATCHES[:5]]
    static = grids[0].to("cuda").padded(**encoders.ROOM)
    pixels = torch.zeros(encoders.ROOM["num_tokens"], config.patch_dim, device="cuda")
    cotangent = torch.zeros_like(encoders.tokens_of(model(pixels, static)))

    def step():
        tokens = encoders.tokens_of(model(pixels, static))
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
        pixels[: grid.num_tokens].copy_(encoders.pixels_of(config, grid.num_tokens))
        merged = config.spatial_merge_size**2 if config.out_size else 1
        rows = grid.num_tokens // merged
        cotangent.zero_()[:rows].copy_(torch.randn(rows, cotangent.shape[1]))
        graph.replay()
        want, want_grads = step()
        assert torch.equal(tokens, want)
        assert all(map(torch.equal, grads, want_grads))
        alone = encoders.tokens_of(model(pixels[: grid.num_tokens], grid.to("cuda")))
        torch.testing.assert_close(tokens[:rows], alone, rtol=2e-2, atol=2e-2)
