"""``varlen_attention``: invariants, hand-computed and original values, messages, compiled code."""

import functools
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from marks import slow
from torch.autograd import forward_ad

from patchpack import PackedGrid, available, reference, rope_2d, varlen_attention
from patchpack.kernels import _attention_tiles
from patchpack.kernels import varlen_attention as kernels
from patchpack.testing import compiled, traffic
from patchpack.testing.compare import assert_as_accurate
from patchpack.testing.contract import CHECKS, Subject, differentiate

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
IMPLS = ("reference", "triton", "native")
FUSED = ("triton", "native")


def golden(function):
    (case,) = (case for case in GOLDEN if case["function"] == function)
    return case


def wave(function, step, *shape, shift=0.0):
    """``function(step * i + shift)`` over the flat index ``i``, as the golden cases define it."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return function(step * index + shift).float().reshape(shape)


def bounds(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def heads(num_tokens, num_heads=2, head_dim=32, dtype=torch.float32):
    return torch.randn(num_tokens, num_heads, head_dim).to(dtype)


def gradients(impl, grad_out, grad_lse, q, k, v, *cu_seqlens, **options):
    """Output, lse and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = varlen_attention(*leaves, *cu_seqlens, return_lse=True, impl=impl, **options)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    return out.detach(), lse.detach(), *grads


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_qwen2_vl(impl):
    case, gradient = golden("varlen_attention"), golden("varlen_attention_bwd")
    q = wave(torch.sin, 0.7, 10, 2, 4).requires_grad_()
    k = wave(torch.cos, 0.3, 10, 2, 4).requires_grad_()
    v = wave(torch.sin, 0.2, 10, 2, 4, shift=1.0).requires_grad_()
    cu_seqlens = torch.tensor(case["inputs"]["cu_seqlens"], dtype=torch.int32)
    out = varlen_attention(q, k, v, cu_seqlens, impl=impl)
    out.backward(wave(torch.sin, 0.11, 10, 2, 4))
    for got, want in (
        (out, case["outputs"]["out"]),
        (q.grad, gradient["outputs"]["dq"]),
        (k.grad, gradient["outputs"]["dk"]),
        (v.grad, gradient["outputs"]["dv"]),
    ):
        torch.testing.assert_close(got.flatten(1), torch.tensor(want), rtol=0, atol=case["tol"])


# which keys a query of a segment with ``n`` queries and ``m`` keys sees, by hand
MASKS = [
    ({}, 3, 3, ["###", "###", "###"]),
    ({"causal": True}, 3, 3, ["#..", "##.", "###"]),
    ({"causal": True}, 2, 4, ["###.", "####"]),
    ({"causal": True}, 4, 2, ["..", "..", "#.", "##"]),
    ({"window_size": (1, 0)}, 4, 4, ["#...", "##..", ".##.", "..##"]),
    ({"window_size": (0, 1)}, 3, 3, ["##.", ".##", "..#"]),
    ({"window_size": (0, 0)}, 2, 4, ["..#.", "...#"]),
    ({"window_size": (-1, 1)}, 3, 4, ["###.", "####", "####"]),
    ({"window_size": (1, -1)}, 3, 3, ["###", "###", ".##"]),
    ({"window_size": (1, 5), "causal": True}, 3, 3, ["#..", "##.", ".##"]),
    ({"window_size": (0, 0)}, 3, 1, [".", ".", "#"]),
    ({}, 2, 0, ["", ""]),
    ({"causal": True}, 0, 2, []),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("options", "len_q", "len_k", "mask"), MASKS)
def test_equal_keys_give_the_mean_of_the_values_that_are_seen(options, len_q, len_k, mask, impl):
    seen = torch.tensor([[c == "#" for c in row] for row in mask]).reshape(len_q, len_k)
    # a segment on either side, of one query and one key
    cu_seqlens_q, cu_seqlens_k = bounds(1, len_q, 1), bounds(1, len_k, 1)
    q, k = heads(len_q + 2), torch.zeros(len_k + 2, 2, 32)
    v = heads(len_k + 2)
    out, lse = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, impl=impl, **options
    )
    count = seen.sum(dim=1)
    mean = torch.einsum("ij,jhd->ihd", seen / count.clamp(min=1)[:, None], v[1:-1])
    torch.testing.assert_close(out, torch.cat([v[:1], mean, v[-1:]]))
    want = torch.cat([torch.zeros(1), count.log(), torch.zeros(1)])
    torch.testing.assert_close(lse, want.expand(2, -1))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (70, 3)}], ids=str)
def test_long_masks_are_those_of_the_reference(options, impl):
    cu_seqlens_q, cu_seqlens_k = bounds(150, 40, 129), bounds(131, 200, 64)
    q, k, v = heads(319, 1, 16), torch.zeros(395, 1, 16), heads(395, 1, 16)
    got, want = (
        varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, impl=i, **options)
        for i in (impl, "reference")
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 20, 33, 64, 72, 80, 88, 96, 104, 120, 128])
def test_any_head_size_is_as_accurate_as_eager(head_dim, dtype, impl):
    inputs = {
        "q": heads(33, 2, head_dim, dtype),
        "k": heads(33, 1, head_dim, dtype),
        "v": heads(33, 1, head_dim, dtype),
        "cu_seqlens_q": bounds(3, 30),
        "return_lse": True,
    }
    names = ("q", "k", "v")
    actual = differentiate(lambda x: varlen_attention(**x, impl=impl), inputs, names)
    eager = differentiate(lambda x: reference.varlen_attention(**x), inputs, names)
    oracle = differentiate(lambda x: reference.varlen_attention(**x), inputs, names, torch.float64)
    for name in actual:
        assert_as_accurate(name, actual[name], eager[name], oracle[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vector_added_to_every_key_of_a_segment_changes_lse_alone(impl):
    cu_seqlens = bounds(9, 70)
    q, k, v = heads(79), heads(79), heads(79)
    shift = torch.cat([torch.randn(1, 2, 32).expand(9, 2, 32), torch.zeros(70, 2, 32)])
    out, lse = varlen_attention(q, k, v, cu_seqlens, return_lse=True, softmax_scale=0.1, impl=impl)
    shifted_out, shifted_lse = varlen_attention(
        q, k + shift, v, cu_seqlens, return_lse=True, softmax_scale=0.1, impl=impl
    )
    torch.testing.assert_close(shifted_out, out)
    torch.testing.assert_close(shifted_lse, lse + 0.1 * (q * shift).sum(dim=2).T)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_keys_does_not_matter(impl):
    q, k, v = heads(100), heads(100), heads(100)
    order = torch.cat([torch.randperm(30), 30 + torch.randperm(70)])
    out = varlen_attention(q, k, v, bounds(30, 70), impl=impl)
    permuted = varlen_attention(q, k[order], v[order], bounds(30, 70), impl=impl)
    torch.testing.assert_close(permuted, out)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_of_heads_shares_its_keys(impl):
    q, k, v = heads(50, 6), heads(50, 2), heads(50, 2)
    grad_out, grad_lse = torch.randn_like(q), torch.randn(6, 50)
    cu_seqlens = bounds(20, 30)
    repeated = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    got = gradients(impl, grad_out, grad_lse, q, k, v, cu_seqlens)
    want = gradients(impl, grad_out, grad_lse, q, *repeated, cu_seqlens)
    for x, y in zip(got[:3], want[:3], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(x, y.unflatten(1, (2, 3)).sum(dim=2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 9)}], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_past_the_end_do_not_exist(options, poison, impl):
    cu_seqlens_q, cu_seqlens_k = bounds(5, 64, 3), bounds(8, 60, 2)
    q, k, v = heads(72, 4), heads(70), heads(70)
    grad_out, grad_lse = torch.randn_like(q), torch.randn(4, 72)
    want = gradients(impl, grad_out, grad_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    pad = torch.nn.functional.pad
    padded = [pad(x, (0, 0, 0, 0, 0, n), value=poison) for x, n in ((q, 90), (k, 3), (v, 3))]
    got = gradients(
        impl,
        pad(grad_out, (0, 0, 0, 0, 0, 90), value=poison),
        pad(grad_lse, (0, 90), value=poison),
        *padded,
        cu_seqlens_q,
        cu_seqlens_k,
        **options,
    )
    fills = (0, -math.inf, 0, 0, 0)
    for x, y, fill in zip(got, want, fills, strict=True):
        axis = 1 if x.shape[0] == 4 else 0
        n = y.shape[axis]
        assert torch.equal(x.narrow(axis, 0, n), y)
        assert (x.narrow(axis, n, x.shape[axis] - n) == fill).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_segment_does_not_see_what_its_neighbours_hold(dtype, impl):
    cu_seqlens = bounds(61, 10, 69)
    q, k, v = (heads(140, dtype=dtype) for _ in range(3))
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 140)
    want = gradients(impl, grad_out, grad_lse, q, k, v, cu_seqlens)
    poisoned = [x.clone() for x in (grad_out, q, k, v)]
    for x in poisoned:
        x[61:71] = math.nan
    got = gradients(impl, poisoned[0], grad_lse, *poisoned[1:], cu_seqlens)
    for x, y in zip(got, want, strict=True):
        x, y = (z.T if z.ndim == 2 else z for z in (x, y))
        assert x[61:71].isnan().any()
        assert torch.equal(x[:61], y[:61])
        assert torch.equal(x[71:], y[71:])


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_without_keys_give_nothing(impl):
    cu_seqlens_q, cu_seqlens_k = bounds(70, 4, 2), bounds(3, 0, 2)
    q, k, v = heads(76), heads(5), heads(5)
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 76)
    out, lse, *grads = gradients(
        impl, grad_out, grad_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True
    )
    alone = torch.tensor([True] * 67 + [False] * 3 + [True] * 4 + [False] * 2)
    assert (out[alone] == 0).all()
    assert (lse[:, alone] == -math.inf).all()
    assert (grads[0][alone] == 0).all()
    assert out[~alone].ne(0).all()
    assert lse[:, ~alone].isfinite().all()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (1, 0)}], ids=str)
def test_queries_without_keys_pass_no_nan_on(options, impl):
    cu_seqlens_q, cu_seqlens_k = bounds(70, 4), bounds(30, 0)
    q, k, v = heads(74), heads(30), heads(30)
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 74)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    want = gradients(impl, grad_out, grad_lse, *arguments, **options)
    alone = want[1][0] == -math.inf
    assert alone.sum() == 44
    grad_out[alone], grad_lse[:, alone] = math.nan, math.inf
    for x, y in zip(gradients(impl, grad_out, grad_lse, *arguments, **options), want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(20, 20), (20, 9)], ids=str)
@pytest.mark.parametrize("unlimited", [2**30, 2**31 - 1, sys.maxsize, 2**63])
def test_a_window_larger_than_any_segment_is_none(unlimited, lengths, impl):
    q, k, v = heads(lengths[0]), heads(lengths[1]), heads(lengths[1])
    arguments = (torch.randn_like(q), torch.randn(2, lengths[0]), q, k, v)
    arguments += tuple(bounds(n) for n in lengths)
    for side in (-1, 0):
        for mirror in (tuple, lambda pair: tuple(reversed(pair))):
            want = gradients(impl, *arguments, window_size=mirror((-1, side)))
            got = gradients(impl, *arguments, window_size=mirror((unlimited, side)))
            for x, y in zip(got, want, strict=True):
                assert torch.equal(x, y)


BAD_CU_SEQLENS = [(0, 9), (0, 100_000), (0, 2**31 - 1), (-3, 5), (2, 5), (0, 4, 2, 5), (5, 0)]


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("cu_seqlens", BAD_CU_SEQLENS, ids=str)
def test_bad_values_of_cu_seqlens_stay_within_the_tensors(cu_seqlens, impl):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    arguments = [heads(5), torch.randn(2, 5), heads(5), heads(5), heads(5), cu_seqlens]
    gradients(impl, *arguments)  # or it ends with the process
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gradients("reference", *arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_float16_may_exceed_it(impl):
    q = 25 * heads(32, 2, 128, torch.float16)
    out, lse = varlen_attention(q, q, q, bounds(32), return_lse=True, impl=impl)
    assert out.isfinite().all()
    assert lse.max() * 128**0.5 > torch.finfo(torch.float16).max


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    q = heads(9).requires_grad_()
    want = varlen_attention(q, q, q, bounds(9), impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        got = varlen_attention(q, q, q, bounds(9), impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_without_queries_get_no_gradient(impl):
    q, k, v = heads(3), heads(70), heads(70)
    *_, grad_k, grad_v = gradients(
        impl, torch.randn_like(q), torch.randn(2, 3), q, k, v, bounds(0, 3, 0), bounds(64, 4, 2)
    )
    for grad in (grad_k, grad_v):
        assert (grad[:64] == 0).all()
        assert grad[64:68].ne(0).all()
        assert (grad[68:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_either_result_alone_can_be_differentiated(impl):
    q, k, v = (x.requires_grad_() for x in (heads(20), heads(20), heads(20)))
    out, lse = varlen_attention(q, k, v, bounds(9, 11), return_lse=True, impl=impl)
    of_both = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), retain_graph=True)
    of_out = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    of_lse = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    # d lse / d q is the mean key, weighted by the attention: the output with keys for values
    mean_key = varlen_attention(q, k, k, bounds(9, 11), impl=impl) * 32**-0.5
    torch.testing.assert_close(of_lse[0], mean_key)
    assert of_lse[2] is None or (of_lse[2] == 0).all()
    torch.testing.assert_close(of_both[0], of_out[0] + of_lse[0])
    torch.testing.assert_close(of_both[1], of_out[1] + of_lse[1])


@pytest.mark.parametrize("impl", FUSED)
def test_rows_of_one_segment_may_lie_far_apart(impl):
    """Their offsets need 64 bits; only the pages that are touched get memory."""
    q = heads(200, 1, 16, torch.float16)
    apart = torch.empty(200, 2**24, dtype=q.dtype)[:, None, :16].copy_(q)
    assert apart[-1:].storage_offset() > 2**31
    grad_out, grad_lse = torch.randn_like(q), torch.randn(1, 200)
    want = gradients(impl, grad_out, grad_lse, q, q, q, bounds(200))
    got = gradients(impl, grad_out, grad_lse, apart, apart, apart, bounds(200))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


# torch's own, at the first tangent
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_tangent_is_refused():
    q = heads(5)
    with forward_ad.dual_level():
        for name in "qkv":
            dual = {**dict.fromkeys("qkv", q), name: forward_ad.make_dual(q, q)}
            with pytest.raises(ValueError, match=f"{name} must have no tangent"):
                varlen_attention(**dual, cu_seqlens_q=bounds(5), impl="triton")


def test_a_second_derivative_is_refused():
    q = heads(7).requires_grad_()
    out = varlen_attention(q, q, q, bounds(3, 4), impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="varlen_attention_backward has no gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", FUSED)
def test_a_query_that_sees_one_key_does_not_move_it(impl):
    """Its softmax is 1 whatever the score, to float32's last bits."""
    q, k, v = (x.requires_grad_() for x in (heads(40, 2, 80), heads(40, 2, 80), heads(40, 2, 80)))
    out = varlen_attention(q, k, v, bounds(*[1] * 40), impl=impl)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert grad_q.abs().max() < 1e-12
    assert (grad_k == 0).all()
    assert grad_v.abs().max() > 1


@pytest.mark.parametrize("impl", IMPLS)
def test_no_segments_at_all(impl):
    q = heads(5)
    out, lse, *grads = gradients(
        impl, torch.ones_like(q), torch.ones(2, 5), q, q, q, torch.zeros(1, dtype=torch.int32)
    )
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((x == 0).all() for x in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_one_buffer_and_strided_heads(impl):
    qkv = torch.randn(40, 3, 2, 72)
    cu_seqlens = bounds(17, 23)
    want = varlen_attention(*(x.contiguous() for x in qkv.unbind(1)), cu_seqlens, impl=impl)
    assert torch.equal(varlen_attention(*qkv.unbind(1), cu_seqlens, impl=impl), want)
    strided = qkv.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert strided.stride(-1) != 1
    assert torch.equal(varlen_attention(*strided.unbind(1), cu_seqlens, impl=impl), want)
    every_other = torch.stack([cu_seqlens, cu_seqlens], dim=1)[:, 0]
    assert torch.equal(varlen_attention(*qkv.unbind(1), every_other, impl=impl), want)


@pytest.mark.parametrize("impl", FUSED)
def test_what_other_libraries_need_is_accepted(impl):
    q, cu_seqlens = heads(7), bounds(3, 4)
    want = varlen_attention(q, q, q, cu_seqlens, impl=impl)
    got = varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 4, 4, impl=impl)
    assert torch.equal(got, want)


# what the tiles of native kernels could get wrong: several blocks of either side, tails of one,
# masks that cross them
BLOCKS = [
    ((200, 0, 77), (131, 5, 200), {}),
    ((300, 70), (131, 260), {"causal": True}),
    ((150, 40, 1), (260, 40, 150), {"window_size": (30, 17)}),
]


@functools.cache
def in_blocks(head_dim, dtype, case):
    """Inputs, and what eager code and a float64 oracle make of them."""
    lengths_q, lengths_k, options = BLOCKS[case]
    torch.manual_seed(head_dim)
    inputs = {
        "q": heads(sum(lengths_q) + 3, 4, head_dim, dtype),
        "k": heads(sum(lengths_k) + 2, 2, head_dim, dtype),
        "v": heads(sum(lengths_k) + 2, 2, head_dim, dtype),
        "cu_seqlens_q": bounds(*lengths_q),
        "cu_seqlens_k": bounds(*lengths_k),
        "return_lse": True,
        **options,
    }

    def eager(precision=None):
        return differentiate(lambda x: reference.varlen_attention(**x), inputs, "qkv", precision)

    return inputs, eager(), eager(torch.float64)


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(BLOCKS)))
@pytest.mark.parametrize("head_dim", [1, 3, 20, 64, 72, 80, 96, 128])
def test_many_blocks_are_as_accurate_as_eager(head_dim, case, dtype, cpu_capability, impl):
    inputs, eager, oracle = in_blocks(head_dim, dtype, case)
    actual = differentiate(lambda x: varlen_attention(**x, impl=impl), inputs, "qkv")
    for name in actual:
        assert_as_accurate(name, actual[name], eager[name], oracle[name])


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_segments_have_the_bits_they_have_alone(dtype, cpu_capability, impl):
    lengths = (17, 300, 1, 129)
    q, k, v, grad_out = (heads(sum(lengths), n, 72, dtype) for n in (4, 2, 2, 4))
    grad_lse = torch.randn(4, sum(lengths))
    packed = gradients(impl, grad_out, grad_lse, q, k, v, bounds(*lengths), causal=True)
    for begin, end in itertools.pairwise(bounds(*lengths).tolist()):
        alone = (x[begin:end].clone() for x in (q, k, v))
        arguments = (grad_out[begin:end], grad_lse[:, begin:end], *alone, bounds(end - begin))
        for x, y in zip(packed, gradients(impl, *arguments, causal=True), strict=True):
            assert torch.equal(x[:, begin:end] if x.shape[0] == 4 else x[begin:end], y)


@pytest.mark.parametrize("impl", ["native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_key_at_minus_infinity_is_not_seen(dtype, cpu_capability, impl):
    q, k, v = (heads(150, 2, 16, dtype) for _ in range(3))
    q[..., 0] = 1
    k[::3, :, 0] = -math.inf
    seen = torch.arange(150) % 3 != 0
    got = varlen_attention(q, k, v, bounds(150), return_lse=True, impl=impl)
    want = varlen_attention(
        q, k[seen], v[seen], bounds(150), bounds(100), return_lse=True, impl="reference"
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)


# ------------------------------------------------------------------- few queries of many keys

SPLIT_Q, SPLIT_K = (3, 20, 0, 5, 70), (30, 300, 200, 129, 140)
CHUNK = 128  # so that the second and the fourth segment are split


def few_queries(head_dim, dtype):
    """Heads of segments of which some are split."""
    q, grad_out = (heads(sum(SPLIT_Q), 2, head_dim, dtype) for _ in range(2))
    k, v = (heads(sum(SPLIT_K), 1, head_dim, dtype) for _ in range(2))
    return grad_out, torch.randn(2, sum(SPLIT_Q)), q, k, v


@pytest.mark.parametrize(
    ("head_dim", "dtype", "options"),
    [
        (80, torch.bfloat16, {}),
        (16, torch.float16, {"causal": True}),
        (32, torch.bfloat16, {"window_size": (190, 40)}),
    ],
    ids=["all", "causal", "window"],
)
def test_split_keys_are_as_accurate_as_eager(head_dim, dtype, options, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", CHUNK)
    torch.manual_seed(0)
    _, _, q, k, v = few_queries(head_dim, dtype)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "return_lse": True,
        **options,
        "cu_seqlens_q": bounds(*SPLIT_Q),
        "cu_seqlens_k": bounds(*SPLIT_K),
    }

    def eager(precision=None):
        return differentiate(lambda x: reference.varlen_attention(**x), inputs, "qkv", precision)

    want, oracle = eager(), eager(torch.float64)
    actual = differentiate(lambda x: varlen_attention(**x, impl="triton"), inputs, "qkv")
    for name in actual:
        assert_as_accurate(name, actual[name], want[name], oracle[name])


def test_a_split_segment_has_the_bits_it_has_alone(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", CHUNK)
    grad_out, grad_lse, q, k, v = few_queries(32, torch.bfloat16)
    for x in (k, v):
        x[330:530] = math.nan  # nobody's
    cu_seqlens = bounds(*SPLIT_Q), bounds(*SPLIT_K)
    packed = gradients("triton", grad_out, grad_lse, q, k, v, *cu_seqlens)
    for queries, keys in ((slice(3, 23), slice(30, 330)), (slice(23, 28), slice(530, 659))):
        lengths = bounds(queries.stop - queries.start), bounds(keys.stop - keys.start)
        alone = q[queries].clone(), k[keys].clone(), v[keys].clone(), *lengths
        out, lse, *grads = gradients("triton", grad_out[queries], grad_lse[:, queries], *alone)
        assert torch.equal(out, packed[0][queries])
        assert torch.equal(lse, packed[1][:, queries])
        for x, y, rows in zip(grads, packed[2:], (queries, keys, keys), strict=True):
            assert torch.equal(x, y[rows])


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "dtype", "split"),
    [
        ((3, 9), (1020, 10), torch.bfloat16, True),
        ((3, 9), (1020, 10), torch.float32, False),
        ((3, 9), (1014, 10), torch.bfloat16, False),
        ((1020, 10), None, torch.bfloat16, False),
    ],
)
def test_keys_are_split_where_they_may_be_many(lengths_q, lengths_k, dtype, split):
    q = heads(sum(lengths_q), 1, 16, dtype).requires_grad_()
    k = q if lengths_k is None else heads(sum(lengths_k), 1, 16, dtype)
    cu_seqlens = [bounds(*lengths) for lengths in (lengths_q, lengths_k) if lengths is not None]
    with compiled.session("sm_90") as launches:
        varlen_attention(q, k, k, *cu_seqlens, impl="triton").sum().backward()
    names = [launch.kernel.strip("_").removesuffix("_kernel") for launch in launches]
    forward, backward = ["attend_fwd"], ["attend_bwd_dq"]
    if split:
        forward, backward = (2 * kernel + ["sum_chunks"] for kernel in (forward, backward))
    assert names == [*forward, *backward, "attend_bwd_dkv"]


@pytest.mark.parametrize("lengths", [*BAD_CU_SEQLENS, (0, 3, 900), (900, 0, 900)], ids=str)
def test_bad_values_of_cu_seqlens_stay_within_split_tensors(lengths, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", CHUNK)
    cu_seqlens_q = torch.tensor([min(x, 5) for x in lengths], dtype=torch.int32)
    cu_seqlens_k = torch.tensor(lengths, dtype=torch.int32) * 100
    q, k = (heads(n, 1, 16, torch.bfloat16).requires_grad_() for n in (5, 700))
    with traffic.session() as launches:
        out = varlen_attention(q, k, k, cu_seqlens_q, cu_seqlens_k, impl="triton")
        out.backward(torch.ones_like(out))
    assert len(launches) == 7
    assert [launch.out_of_bounds for launch in launches] == [0] * 7


Q, CU = torch.zeros(6, 4, 16), bounds(2, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must have shape \[\*, \*, \*\], got \[4, 16\]"),
        ({"q": Q.int()}, TypeError, r"q must be float32 .*, got int32"),
        ({"k": Q[..., :8]}, ValueError, r"k must have shape \[\*, \*, 16\], got \[6, 4, 8\]"),
        ({"k": Q.half()}, TypeError, r"k must have the dtype of q, torch.float32, got torch.float"),
        ({"k": Q[:, :3], "v": Q[:, :3]}, ValueError, r"k must have heads that divide q's 4, got 3"),
        ({"k": Q[:, :0], "v": Q[:, :0]}, ValueError, r"k must have heads that divide q's 4, got 0"),
        ({"v": Q[:, :2]}, ValueError, r"v must have shape \[6, 4, 16\], got \[6, 2, 16\]"),
        ({"v": Q.to("meta")}, ValueError, r"v must be on the device of q, cpu, got meta"),
        ({"k": Q[:5], "v": Q[:5]}, ValueError, r"cu_seqlens_k must be given .*got 5 and 6"),
        ({"cu_seqlens_q": CU.long()}, TypeError, r"cu_seqlens_q must be int32, got int64"),
        ({"cu_seqlens_q": CU.tolist()}, TypeError, r"cu_seqlens_q must be a tensor, got list"),
        ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q must have shape \[\*\], got \[1,"),
        ({"cu_seqlens_q": CU[:0]}, ValueError, r"cu_seqlens_q must hold at least the 0"),
        ({"cu_seqlens_q": CU.to("meta")}, ValueError, r"cu_seqlens_q must be on the device of q"),
        ({"cu_seqlens_k": CU[:2]}, ValueError, r"cu_seqlens_k must have shape \[3\], got \[2\]"),
        ({"cu_seqlens_k": CU.long()}, TypeError, r"cu_seqlens_k must be int32, got int64"),
        ({"max_seqlen_q": 4.0}, TypeError, r"max_seqlen_q must be an int or None, got float"),
        ({"max_seqlen_k": CU}, TypeError, r"max_seqlen_k must be an int or None, got Tensor"),
        ({"softmax_scale": 0.0}, ValueError, r"softmax_scale must be above 0, got 0.0"),
        ({"max_seqlen_k": True}, TypeError, r"max_seqlen_k must be an int or None, got bool"),
        ({"softmax_scale": 10**400}, ValueError, r"softmax_scale must be below 2\*\*127, got 1000"),
        ({"q": Q.to_sparse()}, TypeError, r"q must be a strided tensor, got a torch.sparse_coo"),
        ({"softmax_scale": "1"}, TypeError, r"softmax_scale must be a number, got '1'"),
        ({"window_size": (4, -2)}, ValueError, r"window_size must be two integers of -1 or more"),
        ({"window_size": (4,)}, ValueError, r"window_size must be two integers .*got \(4,\)"),
        ({"causal": 1}, TypeError, r"causal must be a bool, got 1"),
        ({"window_size": 4}, TypeError, r"window_size must be a list or tuple of integers, got 4"),
    ],
)
def test_bad_arguments_are_named(change, error, message, impl):
    arguments = {"q": Q, "k": Q, "v": Q, "cu_seqlens_q": CU, **change}
    with pytest.raises(error, match=message):
        varlen_attention(**arguments, impl=impl)


@pytest.mark.parametrize("head_dim", [0, 129, 256])
def test_a_head_size_out_of_range_is_named(head_dim):
    q = torch.zeros(6, 1, head_dim)
    with pytest.raises(ValueError, match=rf"q must have a head size from 1 to 128, got {head_dim}"):
        varlen_attention(q, q, q, CU)


def launches_of(target, head_dim, dtype=torch.bfloat16, lengths=(70, 0, 40), **options):
    """What the forward and the backward pass launch, on views of one qkv buffer."""
    qkv = torch.zeros(sum(lengths) + 3, 3, 4, head_dim, dtype=dtype)
    q, k, v = qkv.unbind(1)
    q = q.requires_grad_()
    with compiled.session(target) as launches:
        varlen_attention(q, k, v, bounds(*lengths), impl="triton", **options).sum().backward()
    return launches


def test_the_launches_follow_from_the_numbers_of_tokens_and_segments():
    launches = launches_of("sm_90", 64)
    assert [launch.kernel for launch in launches] == [
        "_attend_fwd_kernel",
        "_attend_bwd_dq_kernel",
        "_attend_bwd_dkv_kernel",
    ]
    # 113 rows in tiles of 64, and one for each of 3 segments and what lies past them; four heads
    assert all(launch.grid == ((113 // 64 + 3 + 1) * 4, 1, 1) for launch in launches)


def multiplications(launch):
    """On tensor cores, in the code of one block, by the shapes that opcodes name."""
    total = 0
    for opcode, count in launch.opcodes.items():
        if shape := re.match(r"HMMA\.(16)(8)(\d+)\.", opcode):  # by a warp
            total += math.prod(map(int, shape.groups())) * count * launch.num_warps
        if shape := re.match(r"HGMMA\.(64)x(\d+)x(\d+)\.", opcode):  # by four
            total += math.prod(map(int, shape.groups())) * count * launch.num_warps // 4
    return total


@pytest.mark.parametrize(
    ("target", "head_dim"),
    [("sm_80", 72), ("sm_90", 80)],
)
def test_no_matrix_product_is_spent_on_padding(target, head_dim, monkeypatch):
    monkeypatch.setattr(kernels, "attention_tiles", _attention_tiles.attention_tiles.__wrapped__)
    split = [multiplications(launch) for launch in launches_of(target, head_dim)]
    monkeypatch.setattr(_attention_tiles, "head_pieces", lambda _: (128, 0))
    padded = [multiplications(launch) for launch in launches_of(target, head_dim)]
    needed = -(-head_dim // 16) * 16
    assert all(split)
    assert [n * 128 for n in split] == [n * needed for n in padded]


ROTATED = {
    "D80": (80, (5, 5), 2, {}),
    "Pixtral, GQA": (64, (4, 2), 1, {"rope_axes": "even_odd", "rope_base": 100.0}),
    "D128": (128, (2, 2), 4, {}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("max_seqlen", [None, *slow([64])])
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "merge", "options"), ROTATED.values(), ids=ROTATED
)
def test_rotated_is_rope_2d_and_attention(head_dim, num_heads, merge, options, max_seqlen, impl):
    """To the bit, where one tile holds the keys of a segment in either."""
    grid = PackedGrid([(8, 8), (4, 4), (3, 4, 4)], merge)
    q, k, v = (torch.randn(grid.num_tokens, num_heads[i > 0], head_dim) for i in range(3))
    leaves = [[x.bfloat16().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    cotangent = torch.randn_like(q).bfloat16()
    rope = {"base": 1e4, "axes": "split"} | {n[5:]: value for n, value in options.items()}
    two = *rope_2d(*leaves[1][:2], grid, **rope, impl=impl), leaves[1][2]
    results = []
    for tensors, fused in ((leaves[0], {"rope": grid, **options}), (two, {})):
        out, lse = varlen_attention(
            *tensors, grid.cu_seqlens, max_seqlen_q=max_seqlen, return_lse=True, impl=impl, **fused
        )
        (out * cotangent).sum().backward()
        results.append([out, lse])
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    if max_seqlen is not None and impl == "triton" and head_dim == 64:  # in tiles of 32 keys
        same = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=1e-2)
    for got, want in zip(*results, strict=True):
        same(got, want)
    for got, want in zip(*leaves, strict=True):
        same(got.grad, want.grad)


def test_rotated_is_traced():
    CHECKS["meta and fake"](Subject("varlen_attention", "rotated", torch.bfloat16))
    # of an operator of its own, whatever runs it
    impl = "triton" if available("varlen_attention", "native") else "native"
    for check in ("compiled", "opcheck", "meta and fake"):
        CHECKS[check](Subject("varlen_attention", "rotated, short segments", torch.bfloat16, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_rotations_are_named(impl):
    grid = PackedGrid([(2, 3)])
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be None with rope"):
        varlen_attention(Q, Q, Q, CU, CU, rope=grid, impl=impl)
    with pytest.raises(ValueError, match=r"q must have the 8 tokens of rope, got \[6, 4, 16\]"):
        varlen_attention(Q, Q, Q, CU, rope=PackedGrid([(2, 4)]), impl=impl)
    with pytest.raises(ValueError, match=r"rope_axes must be one of 'split', .* got 'hw'"):
        varlen_attention(Q, Q, Q, CU, rope=grid, rope_axes="hw", impl=impl)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_short_segments_are_rotated_in_the_one_launch(target, head_dim):
    grid = PackedGrid([(8, 8), (8, 8), (3, 4)])
    q, k, v = torch.zeros(grid.num_tokens, 3, 6, head_dim, dtype=torch.bfloat16).unbind(1)
    with compiled.session(target) as launches:
        varlen_attention(q, k, v, grid.cu_seqlens, max_seqlen_q=64, rope=grid, impl="triton")
    (launch,) = launches
    assert launch.grid[1] == 2  # of six heads, four at a time
    assert launch.stack == launch.spills == 0
