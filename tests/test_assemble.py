"""``assemble``: the sequences of real models, the adjoint, what is read, messages."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from patchpack import TokenLayout, assemble, available
from patchpack.layout import FeatureMap, Vector

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
KERNELS = ("triton", "native")
IMPLS = ("reference", *KERNELS)


def golden(function):
    return [case for case in GOLDEN if case["function"] == function]


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", golden("llava_ov.video_newline"), ids=lambda c: c["inputs"]["mode"]
)
def test_golden_newlines_of_llava_onevision(case, impl):
    frames = torch.arange(18.0).view(2, 9, 1)
    if case["inputs"]["mode"] == "grid":
        parts = [FeatureMap(i * 9, (3, 3), newline=0) for i in range(2)]
    else:
        parts = [x for i in range(2) for x in (FeatureMap(i * 9, (3, 3)), Vector(0))]
    got = assemble(frames, rows(-1), TokenLayout(parts), impl=impl)
    assert got.flatten().tolist() == case["outputs"]["seq"]


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_resizing_of_llava_onevision(impl):
    (case,) = golden("llava_ov.interp_values")
    whole = torch.arange(54 * 81.0).view(2, 27, 3, 27)
    tiles = whole.transpose(1, 2).reshape(6, 729, 1)
    layout = TokenLayout([FeatureMap(0, (27, 27), (2, 3), target_hw=(33, 50))])
    got = assemble(tiles, None, layout, impl=impl).view(33, 50)
    tolerance = {"rtol": 0, "atol": case["tol"]}
    corners = [got[0, 0], got[0, -1], got[-1, 0], got[-1, -1]]
    want = case["outputs"]
    torch.testing.assert_close(torch.stack(corners), torch.tensor(want["corners"]), **tolerance)
    torch.testing.assert_close(got[0, :5], torch.tensor(want["row0_first5"]), **tolerance)
    torch.testing.assert_close(got[16, 25], torch.tensor(want["mid"]), **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", golden("oryx.projector_layout"), ids=lambda c: c["inputs"]["modality"]
)
def test_golden_sequences_of_oryx(case, impl):
    vectors = rows(-1, -2, -3, -4)  # newline, begin, end, separator
    if case["inputs"]["modality"] == "image":
        tokens = rows(0, 1, 2, 3, 10, 11, 12, 13, 14, 15)
        maps = FeatureMap(0, (2, 2), newline=0), FeatureMap(4, (2, 3), newline=0)
        parts = [Vector(1), maps[0], Vector(3), maps[1], Vector(2)]
    else:
        tokens = rows(*range(10, 18))
        frames = [FeatureMap(i * 4, (2, 2), newline=0) for i in range(2)]
        parts = [Vector(1), *(x for frame in frames for x in (frame, Vector(3))), Vector(2)]
    got = assemble(tokens, vectors, TokenLayout(parts), impl=impl)
    assert got.flatten().tolist() == case["outputs"]["seq"]


@pytest.mark.parametrize("impl", KERNELS)
def test_video_of_llava_onevision_has_the_values_of_torch(impl):
    frames = torch.randn(2, 729, 4)
    parts = [FeatureMap(i * 729, (27, 27), target_hw=(14, 14), newline=0) for i in range(2)]
    got = assemble(frames, torch.zeros(1, 4), TokenLayout(parts), impl=impl)
    maps = frames.transpose(1, 2).view(2, 4, 27, 27)
    want = functional.interpolate(maps, (14, 14), mode="bilinear").permute(0, 2, 3, 1)
    want = functional.pad(want, (0, 0, 0, 1)).reshape(-1, 4)
    torch.testing.assert_close(got, want)


@st.composite
def layouts(draw):
    """Maps of all kinds with gaps between them, in any order, among vectors."""
    side, first, parts = st.integers(1, 4), 0, []
    for _ in range(draw(st.integers(1, 4))):
        tile, tiles = (draw(side), draw(side)), (draw(side), draw(side))
        height, width = (n * m for n, m in zip(tile, tiles, strict=True))
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        size = draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
        target = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
        first += draw(st.integers(0, 3))
        newline = draw(st.none() | st.integers(0, 2))
        parts.append(FeatureMap(first, tile, tiles, (top, left, *size), target, newline))
        first += height * width
    parts += [Vector(i) for i in draw(st.lists(st.integers(0, 2), max_size=3))]
    return TokenLayout(draw(st.permutations(parts)))


@settings(max_examples=15)
@given(layouts())
def test_any_layout_is_assembled_as_the_reference_says(layout):
    results = []
    for impl in (impl for impl in IMPLS if available("assemble", impl) is None):
        torch.manual_seed(0)
        tokens = torch.randn(layout.num_source_tokens + 1, 3, requires_grad=True)
        vectors = torch.randn(3, 3, requires_grad=True)
        out = assemble(tokens, vectors, layout, impl=impl)
        grads = torch.autograd.grad(out, (tokens, vectors), torch.randn(out.shape))
        results.append((out, *grads))
    for want, *others in zip(*results, strict=True):
        for got in others:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", KERNELS)
def test_what_is_not_resized_is_copied(dtype, impl):
    layout = TokenLayout([FeatureMap(0, (3, 2), (2, 2), crop=(1, 0, 4, 3), newline=1), Vector(0)])
    tokens, vectors = torch.randn(24, 5).to(dtype), torch.randn(2, 5).to(dtype)
    tokens[0] = float("nan")  # cropped
    tokens[2], vectors[0] = -0.0, -0.0
    got = assemble(tokens, vectors, layout, impl=impl)
    want = assemble(tokens, vectors, layout, impl="reference")
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [512, 524])  # whole cache lines in all dtypes, and not
def test_more_than_caches_hold_has_the_bits_of_each_map(channels, dtype, cpu_capability, impl):
    maps, side = (3 if dtype == torch.float32 else 6), 60
    tokens = torch.randn(maps, side**2, channels).to(dtype).requires_grad_()
    vectors = torch.randn(1, channels).to(dtype)

    def parts(first):  # a map as it is, and a smaller one of it
        whole = FeatureMap(first, (side, side), newline=0)
        return [whole, FeatureMap(first + side**2, (side, side), target_hw=(40, 50))]

    number = 2 * (maps // 2)
    layout = TokenLayout([p for i in range(0, number, 2) for p in parts(i * side**2)])
    y = assemble(tokens, vectors, layout, impl=impl)
    grad = torch.randn_like(y)
    (grad_tokens,) = torch.autograd.grad(y, tokens, grad)
    for i in range(0, number, 2):
        alone = tokens.detach()[i : i + 2].requires_grad_()
        got = assemble(alone, vectors, TokenLayout(parts(0)), impl=impl)
        rows = slice(i // 2 * len(got), (i // 2 + 1) * len(got))
        assert torch.equal(got, y[rows])
        (got,) = torch.autograd.grad(got, alone, grad[rows])
        assert torch.equal(got, grad_tokens[i : i + 2])
    assert not grad_tokens[number:].any()


@pytest.mark.parametrize("impl", KERNELS)
def test_a_weight_of_zero_keeps_nan_out(impl):
    tokens = torch.randn(25, 3)
    tokens[12] = float("nan")
    layout = TokenLayout([FeatureMap(0, (5, 5), target_hw=(15, 15))])  # every third stands on one
    got = assemble(tokens, None, layout, impl=impl).view(15, 15, 3)
    assert got[1::3, 1::3].isnan().all(dim=-1).nonzero().tolist() == [[2, 2]]


@pytest.mark.parametrize("impl", KERNELS)
def test_an_encoders_tiles_need_no_copy(impl):
    """Tokens after a class token are no view of two dimensions."""
    tokens = torch.randn(4, 10, 6)[:, 1:].requires_grad_()
    layout = TokenLayout([FeatureMap(9, (3, 3), (1, 3), newline=0), FeatureMap(0, (3, 3))])
    vectors = torch.randn(1, 6)
    got = assemble(tokens, vectors, layout, impl=impl)
    flat = tokens.detach().reshape(-1, 6).requires_grad_()
    want = assemble(flat, vectors, layout, impl=impl)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.square().sum(), tokens)
    (flat_grad,) = torch.autograd.grad(want.square().sum(), flat)
    assert torch.equal(grad, flat_grad.view(4, 9, 6))


@pytest.mark.parametrize("impl", KERNELS)
def test_tokens_that_nobody_reads_get_no_gradient(impl):
    tokens = torch.randn(40, 3, requires_grad=True)
    parts = [FeatureMap(2, (2, 2)), FeatureMap(10, (4, 4), crop=(0, 0, 4, 1))]
    out = assemble(tokens, None, TokenLayout(parts), impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), tokens)
    assert grad[:, 0].nonzero().flatten().tolist() == [2, 3, 4, 5, 10, 14, 18, 22]


@pytest.mark.parametrize("impl", KERNELS)
def test_a_vectors_gradient_is_the_sum_over_a_long_sequence(impl):
    layout = TokenLayout([FeatureMap(0, (2200, 1), newline=1), Vector(0)])
    vectors = torch.randn(3, 2, requires_grad=True)
    out = assemble(torch.randn(2200, 2), vectors, layout, impl=impl)
    cotangent = torch.randint(-9, 9, out.shape).float()
    (grad,) = torch.autograd.grad(out, vectors, cotangent)
    assert torch.equal(grad[0], cotangent[-1])
    assert torch.equal(grad[1], cotangent[1:-1:2].sum(dim=0))
    assert (grad[2] == 0).all()


@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_refused(impl):
    tokens = torch.randn(6, 2, requires_grad=True)
    out = assemble(tokens, None, TokenLayout([FeatureMap(0, (2, 3))]), impl=impl)
    (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"assemble_backward.* has no gradient"):
        grad.sum().backward()


TOKENS = torch.zeros(12, 4)
VECTORS = torch.zeros(2, 4)
LAYOUT = TokenLayout([FeatureMap(0, (3, 4), newline=1)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [[1.0]]}, TypeError, r"tokens must be a tensor, got list"),
        ({"tokens": TOKENS[0]}, ValueError, r"tokens must have shape \[\*, \*\], got \[4\]"),
        ({"tokens": TOKENS[:, :0]}, ValueError, r"tokens must have at least one channel"),
        ({"tokens": TOKENS.int()}, TypeError, r"tokens must be float32 or .*got int32"),
        ({"tokens": TOKENS[:11]}, ValueError, r"tokens must have the 12 tokens of layout, got \[1"),
        ({"vectors": VECTORS[:, :3]}, ValueError, r"vectors must have shape \[\*, 4\], got \[2, 3"),
        ({"vectors": VECTORS.half()}, TypeError, r"vectors must have the dtype of tokens"),
        (
            {"vectors": VECTORS[:1]},
            ValueError,
            r"vectors must have the 2 vectors of layout, got \[",
        ),
        ({"vectors": None}, ValueError, r"vectors must have the 2 vectors of layout, got None"),
        ({"layout": [1]}, TypeError, r"layout must be a TokenLayout, got list"),
        ({"layout": LAYOUT.to("meta")}, ValueError, r"layout must be on the device of tokens, cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    with pytest.raises(error, match=message):
        assemble(**{"tokens": TOKENS, "vectors": VECTORS, "layout": LAYOUT, **change}, impl=impl)
