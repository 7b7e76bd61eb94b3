"""``scatter_tokens``: what transformers does, indices that are wrong, messages."""

import pytest
import torch

from patchpack import scatter_tokens
from patchpack.layout import validate_index

KERNELS = ("triton", "native")
IMPLS = ("reference", *KERNELS)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_masked_scatter_where_tokens_stand_in_order(impl):
    input_ids = torch.tensor([[1, 7, 7, 2, 7], [7, 3, 7, 7, 0]])
    mask = input_ids == 7
    embeds = torch.randn(2, 5, 6, requires_grad=True)
    tokens = torch.randn(6, 6, requires_grad=True)
    index = mask.flatten().nonzero().flatten()
    validate_index(index, input_ids.numel())
    got = scatter_tokens(embeds, tokens, index, impl=impl)
    want = embeds.masked_scatter(mask[..., None], tokens)
    assert torch.equal(got, want)
    cotangent = torch.randn_like(want)
    for x, y in zip(
        torch.autograd.grad(got, (embeds, tokens), cotangent),
        torch.autograd.grad(want, (embeds, tokens), cotangent),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_by_hand(impl):
    embeds = torch.arange(5.0)[:, None].requires_grad_()
    tokens = torch.tensor([[10.0], [20.0]], requires_grad=True)
    vectors = torch.tensor([[-1.0], [-2.0], [-3.0]], requires_grad=True)
    index = torch.tensor([3, 0], dtype=torch.int32)
    which = torch.tensor([1, 2, -1, -1, 2])  # the token of row 0 comes before its vector
    arguments = {"vectors": vectors, "vector_index": which}
    out = scatter_tokens(embeds, tokens, index, **arguments, impl=impl)
    assert out.flatten().tolist() == [20, -3, 2, 10, -3]
    out.backward(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert embeds.grad.flatten().tolist() == [0, 0, 3, 0, 0]
    assert tokens.grad.flatten().tolist() == [4, 1]
    assert vectors.grad.flatten().tolist() == [0, 0, 7]


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_replace_is_a_copy(impl):
    embeds = torch.randn(4, 3)
    out = scatter_tokens(embeds, embeds[:0], torch.zeros(0, dtype=torch.int64), impl=impl)
    assert torch.equal(out, embeds)
    assert out.data_ptr() != embeds.data_ptr()


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [512, 524])  # whole cache lines in all dtypes, and not
def test_more_than_caches_hold_are_the_same_rows(channels, dtype, cpu_capability, impl):
    rows = 10000 if dtype == torch.float32 else 20000
    embeds, index = torch.randn(rows, channels).to(dtype), torch.arange(0, rows, 2)
    tokens, results = torch.randn(len(index), channels).to(dtype), []
    for each in ("reference", impl):
        inputs = [x.detach().requires_grad_() for x in (embeds, tokens)]
        out = scatter_tokens(*inputs, index, impl=each)
        results.append((out, *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("impl", KERNELS)
def test_indices_that_are_wrong_touch_nothing_else(impl):
    buffer = torch.full((12, 3), 7.0)
    embeds = buffer[4:8].requires_grad_()
    tokens = torch.randn(5, 3, requires_grad=True)
    vectors = torch.randn(2, 3)
    index = torch.tensor([-1, 1, 4, 2**40, 1])
    which = torch.tensor([-5, -1, 9, -1])  # 9 is none of two: some vector
    out = scatter_tokens(embeds, tokens, index, vectors=vectors, vector_index=which, impl=impl)
    assert torch.equal(out[[0, 3]], embeds[[0, 3]])
    winner = next(i for i in (1, 4) if torch.equal(out[1], tokens[i]))
    grad_embeds, grad_tokens = torch.autograd.grad(out.sum(), (embeds, tokens))
    assert grad_embeds[:, 0].tolist() == [1, 0, 0, 1]
    assert grad_tokens[:, 0].nonzero().flatten().tolist() == [winner]
    assert (buffer == 7).all()


@pytest.mark.parametrize("impl", KERNELS)
def test_a_batch_of_views_needs_no_copy(impl):
    buffer = torch.randn(2, 6, 4)
    embeds, tokens = buffer[:, 1:5], torch.randn(3, 4)
    index = torch.tensor([7, 0, 4])
    got = scatter_tokens(embeds, tokens, index, impl=impl)
    assert torch.equal(got, scatter_tokens(embeds.contiguous(), tokens, index, impl="reference"))


@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_refused(impl):
    embeds, tokens = torch.randn(6, 2, requires_grad=True), torch.randn(1, 2)
    out = scatter_tokens(embeds, tokens, torch.tensor([2]), impl=impl)
    (grad,) = torch.autograd.grad(out.square().sum(), embeds, create_graph=True)
    with pytest.raises(RuntimeError, match=r"scatter_tokens_backward.* has no gradient"):
        grad.sum().backward()


EMBEDS = torch.zeros(2, 6, 4)
TOKENS = torch.zeros(3, 4)
VECTORS = torch.zeros(2, 4)
INDEX = torch.tensor([1, 2, 11])
WHICH = torch.full((2, 6), -1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeds": [1.0]}, TypeError, r"embeds must be a tensor, got list"),
        ({"embeds": EMBEDS[0, 0]}, ValueError, r"embeds must have shape \[\*, \*\], got \[4\]"),
        ({"embeds": EMBEDS.int()}, TypeError, r"embeds must be float32 or .*got int32"),
        ({"tokens": TOKENS[:, :3]}, ValueError, r"tokens must have shape \[\*, 4\], got \[3, 3\]"),
        ({"tokens": TOKENS.half()}, TypeError, r"tokens must have the dtype of embeds"),
        ({"index": INDEX[:2]}, ValueError, r"index must have shape \[3\], got \[2\]"),
        ({"index": INDEX.short()}, TypeError, r"index must be int64 or int32, got int16"),
        ({"vectors": None}, ValueError, r"vectors and vector_index must be given together"),
        ({"vector_index": None}, ValueError, r"vectors and vector_index must be given together"),
        ({"vectors": VECTORS[0]}, ValueError, r"vectors must have shape \[\*, 4\], got \[4\]"),
        ({"vector_index": WHICH[0]}, ValueError, r"vector_index must have shape \[2, 6\], got \[6"),
        ({"vector_index": WHICH > 0}, TypeError, r"vector_index must be int64 or int32, got bool"),
        ({"index": INDEX.to("meta")}, ValueError, r"index must be on the device of embeds, cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    arguments = {"embeds": EMBEDS, "tokens": TOKENS, "index": INDEX}
    arguments |= {"vectors": VECTORS, "vector_index": WHICH, **change}
    with pytest.raises(error, match=message):
        scatter_tokens(**arguments, impl=impl)
