"""The encoder and the ops under checkpoints, autocast, accumulation and ``torch.func``."""

import functools

import pytest
import small_encoders as encoders
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from tracing import Recorder

from patchpack import PackedGrid
from patchpack.models.native_vit import CONFIGS
from patchpack.testing import contract
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import Subject, leaves, tensors

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


@pytest.mark.cpp
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_change_no_bit(kind, name):
    config = encoders.small(name)
    plain, model = encoders.make(config), _checkpointed(encoders.make(config), CHECKPOINTS[kind])
    grid = PackedGrid(encoders.BATCHES[2], config.spatial_merge_size)
    pixels = encoders.pixels_of(config, grid.num_tokens)
    want = encoders.results_of(plain, dict(plain.named_parameters()), pixels, grid)
    with Recorder() as recorder:
        encoders.assert_equal(
            encoders.results_of(model, dict(model.named_parameters()), pixels, grid), want
        )
    attended = sum("patchpack.varlen_attention.native" in call for call, _ in recorder.calls)
    assert attended == config.depth * (1 if kind == "selective" else 2)


@pytest.mark.cpp
def test_checkpoints_are_compiled_too():
    torch._dynamo.reset()
    config = encoders.small("qwen2_vl")
    plain, model = encoders.make(config), _checkpointed(encoders.make(config), {})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grid = PackedGrid(encoders.BATCHES[2], 2)
    pixels = encoders.pixels_of(config, grid.num_tokens)
    want = encoders.results_of(plain, dict(plain.named_parameters()), pixels, grid)
    encoders.assert_equal(
        encoders.results_of(compiled, dict(model.named_parameters()), pixels, grid), want
    )


# torch says that it has no fused norm for two dtypes, which is what autocast gives it
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_runs_under_autocast(name, impl):
    config = encoders.small(name)
    model = encoders.make(config, impl)
    grid = PackedGrid(encoders.BATCHES[2], config.spatial_merge_size)
    pixels = encoders.pixels_of(config, grid.num_tokens)
    want = encoders.tokens_of(model(pixels, grid)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = encoders.tokens_of(model(pixels, grid))
    error = (got.float() - want).square().mean() / want.square().mean()
    assert 1e-8 < error < 1e-3  # of bfloat16, not of float32
    got.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in model.parameters())


@pytest.mark.cpp
@pytest.mark.parametrize("op", SPECS)
def test_ops_run_in_the_dtype_of_their_inputs_under_autocast(op):
    subject = Subject(op, next(iter(SPECS[op].cases)), impl="native")
    inputs = subject.inputs()
    want = contract.differentiate(subject, inputs, subject.spec.grads)
    with torch.autocast("cpu", torch.bfloat16):
        got = contract.differentiate(subject, inputs, subject.spec.grads)
    assert [x.dtype for x in got.values()] == [x.dtype for x in want.values()]
    encoders.assert_equal(got, want)


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-12), ("native", torch.float32, 1e-5)],
    ids=str,
)
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_gradients_of_micro_batches_add_up(name, impl, dtype, tolerance):
    config = encoders.small(name)
    model = encoders.make(config, impl, dtype)

    def accumulate(batches):
        for sizes in batches:
            grid = PackedGrid(sizes, config.spatial_merge_size)
            pixels = torch.cat([encoders.pixels_of(config, t * h * w, dtype) for t, h, w in sizes])
            encoders.tokens_of(model(pixels, grid)).square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return grads

    sizes = encoders.BATCHES[1]
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


@pytest.mark.cpp
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


@pytest.mark.cpp
def test_an_encoder_takes_its_parameters_as_an_argument():
    config = encoders.small("qwen2_5_vl")
    model = encoders.make(config)
    grid = PackedGrid(encoders.BATCHES[0], 2)
    pixels = encoders.pixels_of(config, grid.num_tokens)
    doubled = {name: 2 * x for name, x in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (pixels, grid))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    assert torch.equal(got, model(pixels, grid))
