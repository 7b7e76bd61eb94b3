"""``rope_2d_`` and ``mrope_``: the bits of the ops that allocate, and autograd."""

import pytest
import torch
from marks import slow
from torch._dynamo.testing import CompileCounterWithBackend

from patchpack import PackedGrid, _interpreter, mrope, mrope_, rope_2d, rope_2d_
from patchpack.testing import compiled, traffic

IMPLS = ("reference", "triton", "native")
FUSED = ("triton", "native")
DTYPES = (torch.float32, torch.bfloat16)
NUM_HEADS = {"one number of heads": None, "GQA": (6, 3)}

GRID = PackedGrid([(4, 6), (2, 4)], 2)
IDS = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T
T = GRID.num_tokens
# in place, elsewhere, by what it turns, the rest, and the head size
OPS = {
    "Qwen2-VL": (rope_2d_, rope_2d, GRID, {}, 80),
    "MoonViT": (rope_2d_, rope_2d, GRID, {"axes": "paired", "interleaved": True}, 72),
    "small heads": (rope_2d_, rope_2d, GRID, {"axes": "even_odd"}, 12),
    "M-RoPE": (mrope_, mrope, IDS, {"mrope_section": (16, 24, 24)}, 128),
    "partial M-RoPE": (
        mrope_,
        mrope,
        IDS,
        {"mrope_section": (11, 11, 10), "mrope_interleaved": True},
        80,
    ),
}
every_op = pytest.mark.parametrize("op", OPS)
a_few_ops = pytest.mark.parametrize("op", ["Qwen2-VL", *slow(["M-RoPE"])])
every_layout = pytest.mark.parametrize("num_heads", NUM_HEADS.values(), ids=list(NUM_HEADS))


def buffer(op, num_heads, dtype=torch.float32):
    heads = (3, 4) if num_heads is None else (num_heads[0] + 2 * num_heads[1],)
    return torch.randn(T, *heads, OPS[op][-1]).to(dtype)


def in_place(op, qkv, num_heads, impl):
    function, _, where, options, _ = OPS[op]
    return function(qkv, where, num_heads=num_heads, impl=impl, **options)


def elsewhere(op, qkv, num_heads, impl):
    _, function, where, options, _ = OPS[op]
    if num_heads is None:
        q, k, v = qkv.unbind(1)
    else:
        q, k, v = qkv.split([num_heads[0], num_heads[1], num_heads[1]], dim=1)
    turned = function(q, k, where, impl=impl, **options)
    return torch.stack([*turned, v], 1) if num_heads is None else torch.cat([*turned, v], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@every_layout
@every_op
def test_values_and_gradients_have_the_bits_of_the_op_that_allocates(op, num_heads, impl, dtype):
    x, gradient = buffer(op, num_heads, dtype), buffer(op, num_heads, dtype)
    kept = gradient.clone()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    qkv = leaves[0] * 1
    got, want = in_place(op, qkv, num_heads, impl), elsewhere(op, leaves[1], num_heads, impl)
    assert got is qkv
    assert torch.equal(got, want)
    got.backward(gradient)
    want.backward(gradient)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("impl", ["native"])
@every_layout
@every_op
def test_any_instructions_have_the_bits_of_the_op_that_allocates(
    op, num_heads, impl, cpu_capability
):
    for dtype in DTYPES:
        x = buffer(op, num_heads, dtype)
        want = elsewhere(op, x, num_heads, impl)
        assert torch.equal(in_place(op, x, num_heads, impl), want)


@pytest.mark.parametrize("impl", FUSED)
@every_layout
@every_op
def test_a_view_is_written_where_it_lies_and_nothing_else(op, num_heads, impl):
    x = buffer(op, num_heads)
    around = x.new_full((T, x.shape[1] + 2, *x.shape[2:]), float("nan"))
    view = around[:, 1:-1].copy_(x)
    addresses = set()

    def run(kernel, grid, args, kwargs):
        addresses.update(y.data_ptr() for y in args if isinstance(y, torch.Tensor) and y.ndim == 3)
        _interpreter.execute(kernel, grid, args, kwargs)

    with _interpreter.interpreted(run=run):
        in_place(op, view, num_heads, impl)
    assert torch.equal(view, elsewhere(op, x, num_heads, impl))
    assert around[:, 0].isnan().all()
    assert around[:, -1].isnan().all()
    first_k = view[:, 1 if num_heads is None else num_heads[0]]
    assert addresses <= {view.data_ptr(), first_k.data_ptr()}
    assert bool(addresses) == (impl == "triton")


@every_layout
@every_op
def test_programs_touch_what_turns_alone_and_once(op, num_heads):
    qkv = buffer(op, num_heads, torch.bfloat16)
    with traffic.session() as launches:
        in_place(op, qkv, num_heads, "triton")
    (launch,) = launches
    _, _, _, options, head_dim = OPS[op]
    turning = 2 * sum(options.get("mrope_section", [head_dim // 2]))
    written = T * (8 if num_heads is None else sum(num_heads)) * turning * qkv.element_size()
    assert launch.written == written
    assert launch.races == launch.out_of_bounds == 0


@pytest.mark.parametrize("impl", IMPLS)
@every_op
def test_tokens_may_lie_2_to_the_31_elements_apart(op, impl):
    x = buffer(op, None, torch.bfloat16)
    stride = 2**31 // (T - 1) + 16 & ~15
    far = torch.empty(stride * T, dtype=x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]))
    in_place(op, far.copy_(x), None, impl)
    assert torch.equal(far, elsewhere(op, x, None, impl))


@pytest.mark.parametrize("impl", IMPLS)
@every_op
def test_autograd_refuses_before_anything_is_written(op, impl):
    leaf = buffer(op, None).requires_grad_()
    before = leaf.detach().clone()
    parts = (leaf * 1).unsqueeze(0).unbind(0)
    for qkv in (leaf, leaf.view(leaf.shape), parts[0]):
        with pytest.raises(RuntimeError, match=r"in-place|inplace"):
            in_place(op, qkv, None, impl)
        assert torch.equal(qkv, before)


@pytest.mark.parametrize("impl", IMPLS)
@every_op
def test_what_kept_the_buffer_refuses_to_go_back(op, impl):
    qkv = buffer(op, None).requires_grad_() * 1
    square = qkv * qkv
    in_place(op, qkv, None, impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@every_op
def test_without_a_gradient_too_autograd_knows_that_it_was_written(op, impl):
    qkv = buffer(op, None)
    product = qkv * torch.ones_like(qkv).requires_grad_()  # keeps qkv
    with torch.no_grad():
        in_place(op, qkv, None, impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_moved_positions_refuse_to_go_back(impl):
    ids = IDS.clone()
    out = mrope_(buffer("M-RoPE", None).requires_grad_() * 1, ids, mrope_section=(16, 24, 24),
                 impl=impl)  # fmt: skip
    if impl == "reference":  # which keeps cosines and sines
        return
    ids += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("impl", ["native", *slow(["triton"])])
@every_layout
@every_op
def test_gradients_of_views_of_a_buffer_and_of_gradients(op, num_heads, impl):
    """Of a part of a larger tensor, under an expanded cotangent, and once more."""
    x = torch.cat([buffer(op, num_heads), buffer(op, num_heads)], dim=1)
    width = x.shape[1] // 2
    results = []
    for function in (in_place, elsewhere):
        leaf = x.clone().requires_grad_()
        whole = leaf * 1
        turned = function(op, whole[:, :width], num_heads, impl)
        if function is elsewhere:
            whole = torch.cat([turned, whole[:, width:]], dim=1)
        (first,) = torch.autograd.grad(whole.sum(), leaf, retain_graph=True)
        (grad,) = torch.autograd.grad(whole.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), leaf)
        results.append([whole, first, grad, second])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@every_layout
@every_op
def test_float64_has_the_gradients_of_its_values(op, num_heads):
    qkv = buffer(op, num_heads, torch.float64)[:3].requires_grad_()
    function, _, where, options, _ = OPS[op]
    where = PackedGrid([(1, 3)]) if isinstance(where, PackedGrid) else where[:, :3]

    def turned(x):
        return function(x * x, where, num_heads=num_heads, **options)

    torch.autograd.gradcheck(turned, qkv, fast_mode=True)
    torch.autograd.gradgradcheck(turned, qkv, fast_mode=True)


@pytest.mark.parametrize(
    ("impl", "grad"), [("native", True), *slow([("native", False), ("triton", True)])]
)
@every_layout
@a_few_ops
def test_compiled_has_the_same_bits(op, num_heads, impl, grad):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, where):
        function, _, _, options, _ = OPS[op]
        qkv = x * 1
        function(qkv, where, num_heads=num_heads, impl=impl, **options)
        return qkv.sin()

    traced = torch.compile(step, fullgraph=True, backend=counter)
    for batch in (1, 2, 3):
        where = IDS.repeat(1, batch)
        if OPS[op][0] is rope_2d_:
            where = PackedGrid([(4, 6), (2, 4)] * batch, 2)
        x = torch.cat([buffer(op, num_heads)] * batch)
        leaves = [x.clone().requires_grad_(grad) for _ in range(2)]
        outputs = [step(leaves[0], where), traced(leaves[1], where)]
        assert torch.equal(*outputs)
        if grad:
            for out in outputs:
                out.sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", FUSED)
@a_few_ops
def test_a_compiled_function_writes_into_its_argument(op, impl):
    torch._dynamo.reset()
    traced = torch.compile(
        lambda x: in_place(op, x, None, impl), fullgraph=True, backend="aot_eager"
    )
    x = buffer(op, None)
    want = elsewhere(op, x, None, impl)
    traced(x)
    assert torch.equal(x, want)


@pytest.mark.parametrize("overload", ["default", "native"])
@every_op
def test_operators_say_what_they_write(op, overload):
    _, _, where, options, head_dim = OPS[op]
    q, k = torch.randn(T, 4, head_dim), torch.randn(T, 2, head_dim)
    if OPS[op][0] is rope_2d_:
        function = torch.ops.patchpack.rope_2d_
        options = {"axes": "split", "interleaved": False, **options}
        args = (where.geometry, 2, 1e4, options["interleaved"], options["axes"], False)
    else:
        function = torch.ops.patchpack.mrope_
        args = (where, options["mrope_section"], "mrope_interleaved" in options, 1e6, False)
    if overload == "native" and not function.native.has_kernel_for_dispatch_key("CPU"):
        pytest.skip("there is no C++ extension")
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(getattr(function, overload), (q, k, *args), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
@every_layout
def test_no_tokens(num_heads, impl):
    for op, where in (("Qwen2-VL", PackedGrid([])), ("M-RoPE", IDS[:, :0])):
        function, _, _, options, _ = OPS[op]
        leaf = buffer(op, num_heads)[:0].requires_grad_()
        out = function(leaf * 1, where, num_heads=num_heads, impl=impl, **options)
        out.sum().backward()
        assert out.shape == leaf.grad.shape == leaf.shape


QKV = torch.zeros(T, 3, 2, 32)
GQA = torch.zeros(T, 8, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": QKV.tolist()}, TypeError, r"qkv must be a tensor, got list"),
        ({"qkv": QKV[:, :2]}, ValueError, r"qkv must have shape \[\*, 3, \*, \*\], got \[32, 2, 2"),
        ({"qkv": GQA}, ValueError, r"qkv must have shape \[\*, 3, \*, \*\], got \[32, 8, 32\]"),
        ({"num_heads": (4, 2)}, ValueError, r"qkv must have shape \[\*, 8, \*\], got \[32, 3, 2"),
        (
            {"qkv": GQA, "num_heads": (5, 2)},
            ValueError,
            r"qkv must have shape \[\*, 9, \*\], got \[32, 8, 32\]",
        ),
        (
            {"qkv": GQA, "num_heads": (8, 0)},
            ValueError,
            r"num_heads must be two counts of 1 or more, got \(8, 0\)",
        ),
        (
            {"qkv": GQA, "num_heads": (8,)},
            ValueError,
            r"num_heads must be two counts of 1 or more, got \(8,\)",
        ),
        ({"qkv": GQA, "num_heads": 4}, TypeError, r"num_heads must be a list or tuple of integers"),
        ({"qkv": QKV.int()}, TypeError, r"qkv must be float32 or bfloat16 or float16.* got int32"),
        (
            {"qkv": QKV.transpose(2, 3).contiguous().transpose(2, 3)},
            ValueError,
            r"qkv must have a contiguous last dimension, got strides \[192, 64, 1, 2\]",
        ),
        (
            {"qkv": QKV[:1].expand(T, 3, 2, 32)},
            ValueError,
            r"qkv must have elements that share no memory, got strides \[0, 64, 32, 1\] of sizes",
        ),
        (
            {"qkv": torch.zeros(T * 192).as_strided((T, 3, 2, 32), (160, 64, 32, 1))},
            ValueError,
            r"qkv must have elements that share no memory, got strides \[160, 64, 32, 1\] of",
        ),
    ],
)
@a_few_ops
def test_bad_arguments_are_named(op, change, error, message, impl):
    function, _, where, _, _ = OPS[op]
    options = {"mrope_section": (4, 6, 6)} if op == "M-RoPE" else {}
    arguments = {"qkv": QKV, **options, **change}
    with pytest.raises(error, match=message):
        function(arguments.pop("qkv"), where, impl=impl, **arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_rotations_are_named(impl):
    with pytest.raises(ValueError, match=r"qkv must have the 24 tokens of grid, got \[32, 3"):
        rope_2d_(QKV, PackedGrid([(4, 6)]), impl=impl)
    with pytest.raises(ValueError, match=r"qkv must have a head size that divides by 4, got 30"):
        rope_2d_(QKV[..., :30], GRID, impl=impl)
    with pytest.raises(ValueError, match=r"grid must be on the device of qkv, cpu, got meta"):
        rope_2d_(QKV, GRID.to("meta"), impl=impl)
    with pytest.raises(ValueError, match=r"position_ids must have shape \[\*, 32\], got \[3, 4\]"):
        mrope_(QKV, IDS[:, :4], mrope_section=(4, 6, 6), impl=impl)
    with pytest.raises(ValueError, match=r"position_ids must be on the device of qkv, cpu"):
        mrope_(QKV, IDS.to("meta"), mrope_section=(4, 6, 6), impl=impl)
    with pytest.raises(ValueError, match=r"at most half the head size, 16, got \[8, 12, 12\]"):
        mrope_(QKV, IDS, mrope_section=(8, 12, 12), impl=impl)
    assert not QKV.any()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@every_layout
@a_few_ops
def test_one_launch_without_spills_and_with_wide_stores(op, num_heads, target):
    qkv = buffer(op, num_heads, torch.bfloat16)
    with compiled.session(target) as launches:
        in_place(op, qkv, num_heads, "triton")
    (launch,) = launches
    assert launch.stack == launch.spills == 0
    assert launch.registers <= 96
    assert launch.wide_stores == launch.stores
