"""Kernels run on CPU tensors as they would on a GPU, and Triton is left as it was."""

import importlib.util
import os
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterError
from triton.runtime.jit import JITFunction

from patchpack import _interpreter_arithmetic as arithmetic
from patchpack._interpreter import interpreted

SCALE: tl.constexpr = tl.constexpr(3)
BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-126, 1e-40, -9.2e-41, 3.3e38, float("inf"), float("nan")]


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    if OP == "add":
        out = a + b
    elif OP == "sub":
        out = a - b
    elif OP == "mul":
        out = a * b
    elif OP == "div":
        out = a / b
    elif OP == "less":
        out = a < b
    elif OP == "greater_equal":
        out = a >= b
    elif OP == "equal":
        out = a == b
    elif OP == "select":
        out = tl.where((a > b) & (b == b), a, b)
    elif OP == "scalar":
        out = a * 1.7 + b
    elif OP == "abs":
        out = tl.abs(a)
    else:
        out = tl.maximum(a, b)
    tl.store(out_ptr + offs, out)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, ROUNDING: tl.constexpr, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _store_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, N)
    tile = row[:, None] * N + row[None, :]
    acc = tl.zeros((N, N), tl.float32) + 1
    a = tl.load(a_ptr + tile)
    b = tl.load(b_ptr + tile)
    acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(out_ptr + tile, acc)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.fma(x, tl.load(y_ptr + offs), tl.load(z_ptr + offs)))


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, cumsum_ptr, N: tl.constexpr):
    row = tl.arange(0, N)
    tile = row[:, None] * N + row[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(sum_ptr + row, tl.sum(x, axis=1))
    tl.store(max_ptr + row, tl.max(x, axis=1))
    tl.store(cumsum_ptr + tile, tl.cumsum(x, axis=1))


@triton.jit
def _full_kernel(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.full((N,), 1.7, out_ptr.dtype.element_ty))


def run_binary(op, a, b):
    out = torch.empty(a.numel(), dtype=torch.bool if op in COMPARISONS else a.dtype)
    _binary_kernel[(4,)](a, b, out, op, a.numel() // 4)
    return out


def run_cast(x, dtype, rounding=None):
    out = torch.empty(x.numel(), dtype=dtype)
    _cast_kernel[(1,)](x, out, rounding, x.numel())
    return out


def run_store(x, dtype):
    out = torch.empty(x.numel(), dtype=dtype)
    _store_kernel[(1,)](x, out, x.numel())
    return out


def run_dot(a, b, precision="ieee"):
    out = torch.empty(a.shape[0], a.shape[0])
    _dot_kernel[(1,)](a, b, out, precision, a.shape[0])
    return out


def run_fma(x, y, z):
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, z, out, x.numel())
    return out


def run_sum(x):
    total, largest, running = (*torch.empty(2, 16).to(x.dtype).unbind(), torch.empty_like(x))
    _reduce_kernel[(1,)](x, total, largest, running, 16)
    return total, largest, running


def run_full(dtype):
    out = torch.empty(64, dtype=dtype)
    _full_kernel[(1,)](out, 64)
    return out


COMPARISONS = {"less": torch.lt, "greater_equal": torch.ge, "equal": torch.eq}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "select": lambda a, b: torch.where((a > b) & (b == b), a, b),
    "scalar": lambda a, b: a * torch.tensor(1.7, dtype=a.dtype) + b,
    "abs": lambda a, b: a.abs(),
    **COMPARISONS,
}


def same(actual, expected):
    """Equal bit by bit, except that any NaN is as good as another."""
    nan = expected.isnan()
    signed = (actual == expected) & (actual.signbit() == expected.signbit())
    return torch.equal(actual.isnan(), nan) and bool((signed | nan).all())


def operands(dtype):
    """Every pair of special values, and pairs of any bits: 2^14 in all."""
    special = torch.tensor(SPECIAL).to(dtype)
    a, b = torch.cartesian_prod(special, special).unbind(1)
    generator = torch.Generator().manual_seed(0)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    size = (2, 2**14 - a.numel())
    limits = torch.iinfo(bits)
    noise = torch.randint(limits.min, limits.max, size, generator=generator).to(bits).view(dtype)
    return torch.cat([a, noise[0]]), torch.cat([b, noise[1]])


def near_ties():
    """Every bfloat16, and float32 at, just below and just above the midpoint to the next."""
    exact = BFLOAT16.float().view(torch.int32)
    return torch.cat([exact + step for step in (0, 2**15 - 1, 2**15, 2**15 + 1)]).view(
        torch.float32
    )


def small():
    """Numbers whose sums and products are exact in float32, and not in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-50, 50, (2, 16, 16), generator=generator).to(torch.bfloat16)


STOCK_FAULTS = {
    "dot": lambda: torch.equal(run_dot(*small()), 1 + small()[0].float() @ small()[1].float().mT),
    "arithmetic": lambda: same(run_binary("mul", *operands(torch.bfloat16)), product()),
    "comparison": lambda: torch.equal(run_binary("less", *operands(torch.bfloat16)), less()),
    "cast": lambda: same(run_cast(near_ties(), torch.bfloat16), near_ties().bfloat16()),
    "store": lambda: same(run_store(near_ties(), torch.bfloat16), near_ties().bfloat16()),
    "fma": lambda: torch.equal(run_fma(*small()[0, :3]), torch.addcmul(*small()[0, [2, 0, 1]])),
    "sum": lambda: torch.equal(run_sum(small()[0])[0], small()[0].float().sum(1).bfloat16()),
    "full": lambda: torch.equal(run_full(torch.bfloat16), torch.full((64,), 1.7).bfloat16()),
}


def product():
    a, b = operands(torch.bfloat16)
    return a * b


def less():
    a, b = operands(torch.bfloat16)
    return a < b


@pytest.mark.parametrize("fault", STOCK_FAULTS)
def test_the_repair_is_needed_and_repairs(fault, monkeypatch):
    with interpreted():
        assert STOCK_FAULTS[fault]()
    if arithmetic._stock_is_right():
        pytest.skip("this Triton is right about bfloat16")
    monkeypatch.setattr(arithmetic, "_stock_is_right", lambda: True)
    with interpreted():
        try:
            right = STOCK_FAULTS[fault]()
        except InterpreterError:
            right = False
    assert not right


def test_the_repair_steps_aside_when_triton_is_right():
    with interpreted():  # a repaired Triton is one that is right
        assert arithmetic._stock_is_right.__wrapped__()
        assert isinstance(interpreter.interpreter_builder, arithmetic.Builder) is not (
            arithmetic._stock_is_right()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_and_comparisons_are_torchs(op, dtype):
    a, b = operands(dtype)
    with interpreted():
        assert same(run_binary(op, a, b), BINARY[op](a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_maximum_is_a_number_if_one_operand_is(dtype):
    a, b = operands(dtype)
    with interpreted():
        largest = run_binary("max", a, b)
    expected = torch.where(a.isnan() | (b > a), b, a)
    assert same(largest + 0, expected + 0)  # either zero will do


@pytest.mark.parametrize("run", [run_cast, run_store])
def test_float32_rounds_to_nearest_even_bfloat16(run):
    x = near_ties()
    with interpreted():
        assert same(run(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("run", [run_cast, run_store])
def test_float32_rounds_to_nearest_even_float16(run):
    exact = BFLOAT16.view(torch.float16).float().view(torch.int32)
    x = torch.cat([exact + step for step in (0, 2**12 - 1, 2**12, 2**12 + 1)]).view(torch.float32)
    x = torch.cat([x, x * 2.0**-14])  # subnormal numbers, too
    with interpreted():
        assert same(run(x, torch.float16), x.half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_toward_zero_when_asked(dtype):
    x = torch.cat([near_ties(), near_ties() * 2.0**-100])
    with interpreted():
        y = run_cast(x, dtype, "rtz")
        above = torch.nextafter(y, torch.copysign(torch.tensor(torch.inf, dtype=dtype), y))
    finite = x.isfinite()
    assert same(y[~finite], x[~finite].to(dtype))
    x, y, above = x[finite], y[finite], above[finite]
    assert torch.equal(x.signbit(), y.signbit())
    assert (y.float().abs() <= x.abs()).all()
    assert (x.abs() < above.float().abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_bfloat16_casts_to_other_types(dtype):
    x = BFLOAT16 if dtype.is_floating_point else torch.arange(-256, 256).bfloat16()
    with interpreted():
        assert same(run_cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_cast_to_bfloat16(dtype):
    x = torch.arange(-(2**12), 2**12).to(dtype)
    with interpreted():
        assert torch.equal(run_cast(x, torch.bfloat16), x.bfloat16())


def test_float64_casts_to_bfloat16_with_one_rounding():
    just_above_tie = 1 + 2.0**-8 + 2.0**-40
    x = torch.tensor([just_above_tie, -just_above_tie] * 32, dtype=torch.float64)
    with interpreted():
        assert torch.equal(run_cast(x, torch.bfloat16), (x.sign() * (1 + 2.0**-7)).bfloat16())


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_float32(dtype, precision):
    a, b = small().to(dtype)
    with interpreted():
        assert torch.equal(run_dot(a, b, precision), 1 + a.float() @ b.float().mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fma_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 256, generator=generator).to(dtype)
    z = torch.where(torch.arange(256) % 2 == 0, -(x * y), z)  # half of the sums cancel
    with interpreted():
        out = run_fma(x, y, z)

    def distance(candidate):
        columns = zip(candidate.tolist(), x.tolist(), y.tolist(), z.tolist(), strict=True)
        return [
            abs(Fraction(r) - Fraction(a) * Fraction(b) - Fraction(c)) for r, a, b, c in columns
        ]

    infinity = torch.tensor(torch.inf, dtype=dtype)
    for neighbour in (torch.nextafter(out, infinity), torch.nextafter(out, -infinity)):
        assert all(d <= other for d, other in zip(distance(out), distance(neighbour), strict=True))


@pytest.mark.parametrize(
    ("dtype", "x", "y", "z", "expected"),
    [
        (torch.float32, 97, 172_961, 2.0**-40, 2**24 + 2),  # x * y is a tie: z decides
        (torch.float32, 97, 172_961, -(2.0**-40), 2**24),
        (torch.bfloat16, 7, 37, 2.0**-100, 260),
        (torch.bfloat16, 7, 37, -(2.0**-100), 258),
        (torch.float32, 2.0**127, 2, -(2.0**127), 2.0**127),
        (torch.float32, 2.0**127, 2, 0, torch.inf),
        (torch.bfloat16, torch.inf, 1, -torch.inf, torch.nan),
    ],
)
def test_fma_of_special_values(dtype, x, y, z, expected):
    with interpreted():
        out = run_fma(*torch.tensor([[x], [y], [z]], dtype=dtype))
    assert same(out, torch.tensor([expected], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reductions_and_scans(dtype):
    x = small()[0].to(dtype)
    with interpreted():
        total, largest, running = run_sum(x)
    assert torch.equal(total, x.float().sum(1).to(dtype))
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(running, x.float().cumsum(1).to(dtype))


def test_a_maximum_ignores_nan_and_nothing_warns():
    x = torch.ones(16, 16)
    x[3] = torch.nan
    x[4, 5:] = torch.nan
    x[5] = -torch.inf
    with interpreted():
        _, largest, _ = run_sum(x)
    assert largest[3].isnan()
    assert largest[4] == 1
    assert largest[5] == -torch.inf


@triton.jit
def _square_kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x * x)


def test_masked_lanes_may_overflow_without_a_warning():
    x = torch.full((16,), 1e30)
    with interpreted():
        _square_kernel[(1,)](x, 16)
    assert x.isinf().all()


@triton.jit
def _one_mask_kernel(out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    mine = tl.program_id(0).to(tl.int64) == 1  # Triton 3.9 casts it back to int64
    tl.store(out_ptr + offs, 1.0, mask=mine)
    tl.store(out_ptr + N + offs, 1.0, mask=(offs < 2) & mine)


def test_one_comparison_masks_a_tile():
    out = torch.zeros(8)
    with interpreted():
        _one_mask_kernel[(1,)](out, 4)
    assert not out.any()
    with interpreted():
        _one_mask_kernel[(2,)](out, 4)
    assert out.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _affine(x, shift):
    doubled = _twice(x)
    return doubled * SCALE + shift, tl.cdiv(tl.sum(x.to(tl.int32)), 2)


@triton.jit(do_not_specialize=["num_rows"])
def _everything_kernel(
    x_ptr,
    bounds_ptr,
    out_ptr,
    num_rows,
    shift,
    negate,
    skip_ptr,
    FLAG: tl.constexpr,
    N: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid >= num_rows:
        return
    lo = tl.load(bounds_ptr + pid)
    hi = tl.load(bounds_ptr + pid + 1)
    acc = tl.zeros((N,), tl.float32)
    for i in range(lo, hi):
        acc += tl.load(x_ptr + i * N + tl.arange(0, N))
    for i in tl.static_range(SCALE):
        acc += i
    while lo < hi:
        acc += 1
        lo += 1
    out, half = _affine(acc, shift.to(tl.float32))
    if negate:
        out = -out
    if FLAG and skip_ptr is None and 0 < num_rows < 9:
        out += half
    tl.store(out_ptr + pid.to(tl.int64) * N + tl.arange(0, N), out)


def test_launch_code_and_control_flow_are_those_of_a_gpu():
    x = torch.arange(9 * 4).view(9, 4).float()
    bounds, out = torch.tensor([0, 3, 3, 9], dtype=torch.int32), torch.zeros(4, 4)
    with interpreted():
        _everything_kernel[lambda meta: (triton.cdiv(meta["N"], 1),)](
            x, bounds, out, 3, 0.1, True, None, FLAG=True, N=4, num_warps=8, num_stages=2
        )
    for row, (lo, hi) in enumerate(((0, 3), (3, 3), (3, 9))):
        acc = x[lo:hi].sum(0) + 3 + (hi - lo)
        assert torch.equal(out[row], -(acc * 6 + 0.1) + -(-int(acc.sum()) // 2))
    assert not out[3].any()  # this program returned early


@triton.jit
def _scalar_kernel(out_ptr, scale):
    tl.store(out_ptr, scale * 3)


def test_float_arguments_have_single_precision():
    out = torch.zeros(1, dtype=torch.float64)
    with interpreted():
        _scalar_kernel[(1,)](out, 0.1)
    assert out.item() == (torch.tensor(0.1) * 3).item() != 0.1 * 3


@triton.jit
def _turn_kernel(position_ptr, frequency_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    position = tl.load(position_ptr + offs)
    high = tl.load(frequency_ptr + offs).to(tl.uint32, bitcast=True)
    low = tl.load(frequency_ptr + N + offs).to(tl.uint32, bitcast=True)
    turn = position.to(tl.uint32) * high + tl.umulhi(position.to(tl.uint32), low)
    tl.store(out_ptr + offs, turn.to(tl.int32, bitcast=True))
    signed = tl.umulhi(position, low.to(tl.int32, bitcast=True))
    tl.store(out_ptr + N + offs, signed)
    even, odd = tl.split(tl.reshape(turn, (N // 2, 2)))
    tl.store(
        out_ptr + 2 * N + offs, tl.reshape(tl.join(odd, even), (N,)).to(tl.int32, bitcast=True)
    )


def test_unsigned_arithmetic_wraps_and_pairs_swap():
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(0, 2**22, (64,), generator=generator, dtype=torch.int32)
    frequency = torch.randint(-(2**31), 2**31, (2, 64), generator=generator).int()
    out = torch.empty(3, 64, dtype=torch.int32)
    with interpreted():
        _turn_kernel[(1,)](position, frequency, out, 64)
    high, low = (row.long() & 0xFFFFFFFF for row in frequency)
    carry = torch.tensor(
        [p * f >> 32 for p, f in zip(position.tolist(), low.tolist(), strict=True)]
    )
    assert torch.equal(out[0], (position.long() * high + carry).int())
    assert torch.equal(out[1], carry.int())
    assert torch.equal(out[2].view(32, 2).flip(1), out[0].view(32, 2))


@triton.jit
def _batched_kernel(x_ptr, out_ptr, N: tl.constexpr):
    batch = tl.arange(0, 2)[:, None, None]
    tile = batch * N * N + tl.arange(0, N)[None, :, None] * N + tl.arange(0, N)[None, None, :]
    x = tl.load(x_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(x, tl.permute(x, (0, 2, 1)), input_precision="ieee"))


def test_three_dimensional_tiles():
    x = small()
    out = torch.empty(2, 16, 16)
    with interpreted():
        _batched_kernel[(1,)](x, out, 16)
    assert torch.equal(out, x.float() @ x.float().mT)


HELPERS = """
import triton
import triton.language as tl

WEIGHT: tl.constexpr = tl.constexpr(7)

@triton.jit
def weighted(x):
    return _shifted(x) * WEIGHT

@triton.jit
def _shifted(x):
    shifted = x + 1
    return shifted
"""


@triton.jit
def _calling_kernel(x_ptr, HELPER: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, HELPER(tl.load(x_ptr + offs)))


def test_helpers_of_another_module_are_called_in_their_own_module(tmp_path):
    path = tmp_path / "helpers.py"
    path.write_text(HELPERS)
    spec = importlib.util.spec_from_file_location("helpers", path)
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    names = set(vars(helpers))
    x = torch.arange(16).bfloat16()
    with interpreted():
        _calling_kernel[(1,)](x, helpers.weighted, 16)
    assert torch.equal(x, (torch.arange(16) + 1).mul(7).bfloat16())
    assert set(vars(helpers)) == names


def state():
    """Everything of Triton that running a kernel in the interpreter touches."""
    owners = [JITFunction, InterpretedFunction, interpreter, tl, tl.core, tl.math, tl.standard]
    owners += [tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, interpreter.interpreter_builder]
    snapshot = {
        (id(owner), name): value
        for owner in owners
        for name, value in vars(owner).items()
        if name not in ("grid_dim", "grid_idx")  # set anew by each launch
    }
    return snapshot, type(interpreter.interpreter_builder), set(globals())


@triton.jit
def _failing_kernel(x_ptr, N: tl.constexpr):
    tl.static_assert(N == 0, "a fault in a kernel")


@pytest.mark.parametrize("kernel", ["right", "failing", "caller fails"])
def test_nothing_stays_patched(kernel):
    x = torch.ones(16)
    with interpreted():
        _square_kernel[(1,)](x, 16)
    before = state()
    if kernel == "right":
        with interpreted():
            _square_kernel[(1,)](x, 16)
    elif kernel == "failing":
        with pytest.raises(InterpreterError, match="a fault in a kernel"), interpreted():
            _failing_kernel[(1,)](x, 16)
    else:
        with pytest.raises(KeyError), interpreted():
            raise KeyError
    assert state() == before


def test_outside_kernels_are_not_run_by_the_repaired_interpreter():
    with interpreted():
        inside = JITFunction.run
    assert JITFunction.run is not inside
    assert not isinstance(interpreter.interpreter_builder, arithmetic.Builder)


def test_contexts_nest():
    x = torch.full((16,), 2.0)
    with interpreted():
        with interpreted():
            _square_kernel[(1,)](x, 16)
        _square_kernel[(1,)](x, 16)
    assert (x == 16).all()


def test_a_context_may_run_launches_its_own_way():
    seen = []
    x = torch.full((16,), 2.0)
    with interpreted(lambda *launch: seen.append(launch)), interpreted():
        _square_kernel[(3,)](x, N=16)
    [(kernel, grid, args, kwargs)] = seen
    assert kernel is _square_kernel
    assert grid == (3,)
    assert args[0] is x
    assert kwargs == {"N": 16}
    assert (x == 2).all()
    with interpreted(), pytest.raises(RuntimeError, match="outermost"), interpreted(print):
        pass


def test_launches_on_other_devices_are_not_interpreted(monkeypatch):
    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: launches.append(args))
    kernel = JITFunction(_square_kernel.fn)
    x = torch.empty(16, device="meta")
    with interpreted():
        kernel[(1,)](x, 16)
    assert launches == [(kernel, x, 16)]


def test_threads_do_not_disturb_one_another():
    before = state()[1:]
    results = {}

    def work(seed):
        x = (torch.arange(64) + seed).bfloat16()
        for _ in range(5):
            with interpreted():
                results[seed] = run_binary("mul", x, x)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(results[seed], (torch.arange(64) + seed).bfloat16().square())
    assert state()[1:] == before


def test_importing_does_not_import_triton():
    code = "import patchpack._interpreter, sys; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_all_of_this_holds_with_triton_interpret_set(tmp_path):
    options = [__file__, "--noconftest", "-q", "-k", "not interpret_set"]
    code = f"""
import pytest, sys, triton
status = pytest.main({options!r})
sys.exit(status or not triton.knobs.runtime.interpret)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
