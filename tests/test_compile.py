"""The encoder and the ops compiled and exported: one graph for all batches."""

import io
from dataclasses import fields

import pytest
import small_encoders as encoders
import torch
from marks import slow
from torch._dynamo.testing import CompileCounterWithBackend
from tracing import exported

from patchpack import PackedGrid, TokenLayout
from patchpack.models.native_vit import CONFIGS
from patchpack.testing import contract
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_the_small_configurations_have_all_that_the_systems_have(name):
    for field in fields(CONFIGS[name]):
        ours, theirs = getattr(encoders.small(name), field.name), getattr(CONFIGS[name], field.name)
        assert bool(ours) == bool(theirs), field.name
        if isinstance(theirs, (bool, str)):
            assert ours == theirs, field.name


QUICK = ("internvl", "qwen2_5_vl", "qwen3_vl", "siglip2")

# torch.compile -----------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("name", [*QUICK, *slow(name for name in CONFIGS if name not in QUICK)])
def test_an_encoder_is_one_graph_for_all_batches(name):
    torch._dynamo.reset()
    config = encoders.small(name)
    model = encoders.make(config)
    parameters = dict(model.named_parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i, sizes in enumerate(encoders.BATCHES):
        grid = PackedGrid(sizes, config.spatial_merge_size)
        if i == 1:
            grid.position_ids  # noqa: B018 (they are kept, which compiles nothing anew)
        pixels = encoders.pixels_of(config, grid.num_tokens)
        want = encoders.results_of(model, parameters, pixels, grid)
        encoders.assert_equal(encoders.results_of(compiled, parameters, pixels, grid), want)
    assert counter.frame_count <= 2


def test_a_grid_that_comes_again_compiles_nothing():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(grid):
        return grid.position_ids.sum()

    grid = PackedGrid(encoders.BATCHES[0], 2)
    for _ in range(2):
        assert function(grid) == grid.position_ids.sum()
    assert counter.frame_count == 1


@pytest.mark.cpp
def test_inductor_computes_what_eager_does():
    torch._dynamo.reset()
    config = encoders.small("qwen2_vl")
    model = encoders.make(config)
    parameters = dict(model.named_parameters())
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    grid = PackedGrid(encoders.BATCHES[1], config.spatial_merge_size)
    pixels = encoders.pixels_of(config, grid.num_tokens)
    want = encoders.results_of(model, parameters, pixels, grid)
    for key, x in encoders.results_of(compiled, parameters, pixels, grid).items():
        torch.testing.assert_close(x, want[key], rtol=1e-4, atol=1e-5, msg=key)


# torch.export ------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_an_exported_encoder_takes_other_images(name):
    config = encoders.small(name)
    model = encoders.make(config)
    batches = []
    for sizes in encoders.BATCHES:
        grid = PackedGrid(sizes, config.spatial_merge_size)
        batches.append((encoders.pixels_of(config, grid.num_tokens), grid))
    program = exported(model, *batches[:2])
    for batch in batches:
        assert torch.equal(encoders.tokens_of(program(*batch)), encoders.tokens_of(model(*batch)))


@pytest.mark.cpp
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
    program = exported(run, given[0], given[0 if same else 1])
    for batch, inputs in zip(batches[: 1 if same else None], given, strict=not same):
        for got, want in zip(tensors(program(*inputs)), tensors(subject(batch)), strict=True):
            assert torch.equal(got, want)


def test_a_grid_is_a_pytree():
    plain = PackedGrid(encoders.BATCHES[2], 2)
    for grid in (plain, plain.padded(**encoders.ROOM)):
        copied = torch.utils._pytree.tree_map(lambda x: x if x is None else x.clone(), grid)
        copied.validate()
        assert repr(copied) == repr(grid)
        file = io.BytesIO()
        torch.save(grid, file)
        file.seek(0)
        assert repr(torch.load(file, weights_only=True)) == repr(grid)
