"""Drawn cases of ops: layouts, instructions, and what holds of every case."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from hypothesis import strategies as st

import patchpack
from fuzzing.options import OPTIONS
from patchpack.testing.catalogue import SPECS
from patchpack.testing.compare import MAX_RELATIVE_RMS, Accuracy
from patchpack.testing.contract import CHECKS, DTYPES, Subject, accuracies, differentiate, tensors

# Layouts: the same values elsewhere in memory ----------------------------------------------------


def _around(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A part of a larger buffer."""
    shape = list(x.shape)
    shape[dim] += 3
    return x.new_full(shape, 99).narrow(dim, 1, x.shape[dim]).copy_(x)


def _every_second(x: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] *= 2
    index = (*[slice(None)] * (dim % x.ndim), slice(1, None, 2))
    return x.new_full(shape, 99)[index].copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "a part of rows": lambda x: _around(x, 0),
    "a part of columns": lambda x: _around(x, -1),
    "a part of what is between": lambda x: _around(x, x.ndim // 2),
    "every second row": lambda x: _every_second(x, 0),
    "every second column": lambda x: _every_second(x, -1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "not aligned": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "first row expanded": lambda x: x[:1].expand(x.shape) if x.is_floating_point() else x.clone(),
    "first column expanded": lambda x: (
        x[..., :1].expand(x.shape) if x.is_floating_point() else x.clone()
    ),
}


@dataclass(frozen=True)
class Drawn(Subject):
    """A drawn case of an op: what is checked of it, in which layouts, by which instructions."""

    options: dict = field(default_factory=dict)
    check: str = "accuracy"
    layouts: tuple[str, ...] = ("contiguous",)
    level: str = "plain"

    @property
    def spec(self):
        spec = SPECS[self.op]
        reference = partial(spec.op, impl="reference")  # with what patchify resamples
        return replace(spec, cases={self.case: self.options}, reference=reference)


def check_accuracy(drawn: Drawn) -> None:
    """As the contract's; what fails is measured on more numbers: in few, eager's error is luck."""
    numbers = max((x.numel() for x in tensors([*drawn.inputs().values()])), default=0)
    few = numbers < 2**12 and len(drawn.options["sizes"]) < 8 and drawn.impl != "triton"
    for seeds in (4, 64, 400) if few else (1, 4, 12):
        found = accuracies(drawn, range(seeds))
        scale = max((a.value for a in found), default=0)
        failed = [str(a) for a in found if not a.passed and not cancels(a, scale, drawn.dtype)]
        if not failed:
            return
    raise AssertionError("; ".join(failed))


def cancels(accuracy: Accuracy, scale: float, dtype: torch.dtype) -> bool:
    """What is nothing but rounding has no size: it is small beside the other results, or eager's.

    Such are gradients of the scores of a single key, and of a norm over one channel.
    """
    small = max(MAX_RELATIVE_RMS[dtype] * scale, 2 * accuracy.eager_error)
    return accuracy.value <= 1e-9 * scale and accuracy.error <= small


def check_layouts(drawn: Drawn) -> None:
    """Any strides give the bits of contiguous inputs, and nothing is written into them."""
    layouts = itertools.cycle(LAYOUTS[name] for name in drawn.layouts)

    def lay(x):
        if isinstance(x, list):
            return [lay(y) for y in x]
        return next(layouts)(x) if isinstance(x, torch.Tensor) and x.ndim else x

    laid = {name: lay(x) for name, x in drawn.inputs().items()}
    plain = {name: _map(lambda y: y.clone(memory_format=torch.contiguous_format), x)
             for name, x in laid.items()}  # fmt: skip
    before = [x.clone() for x in tensors(list(laid.values()))]
    want = differentiate(drawn, plain, drawn.spec.grads)
    got = differentiate(drawn, laid, drawn.spec.grads)
    same(got, want)
    for x, y in zip(tensors(list(laid.values())), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was written"


def _map(function, x):
    if isinstance(x, list):
        return [_map(function, y) for y in x]
    return function(x) if isinstance(x, torch.Tensor) else x


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        torch.testing.assert_close(got[name], x, rtol=0, atol=0, equal_nan=True, msg=name)


def check_threads(drawn: Drawn) -> None:
    inputs, before = drawn.inputs(), torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(differentiate(drawn, inputs, drawn.spec.grads))
        finally:
            torch.set_num_threads(before)
    same(*results)


FUZZED_CHECKS: dict[str, Callable[[Drawn], None]] = {
    "accuracy": check_accuracy,
    "layouts": check_layouts,
    "threads": check_threads,
    **{
        name: CHECKS[name]
        for name in (
            "packed as alone",
            "inputs unmodified",
            "fully written",
            "deterministic",
            "strided inputs",
        )
    },
}


def _levels() -> list[str]:
    """The instructions that this CPU has."""
    if patchpack.available("rope", "native"):
        return ["plain"]
    before, found = torch.ops.patchpack.cpu_capability(""), []
    for level in ("plain", "avx2", "avx512", "avx512_bf16"):
        try:
            found.append(torch.ops.patchpack.cpu_capability(level))
        except RuntimeError:
            continue
    torch.ops.patchpack.cpu_capability(before)
    return found


LEVELS = _levels()


@st.composite
def drawn_case(draw, op: str, impl: str) -> Drawn:
    checks = [name for name in FUZZED_CHECKS if impl != "triton" or name != "threads"]
    return Drawn(
        op=op,
        case="drawn",
        dtype=draw(st.sampled_from(DTYPES)),
        impl=impl,
        options=draw(OPTIONS[op](impl == "triton")),
        check=draw(st.just("accuracy") | st.sampled_from(checks)),
        layouts=tuple(draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=4))),
        level=draw(st.sampled_from(LEVELS)),
    )


def check_drawn(drawn: Drawn) -> None:
    if drawn.impl != "native":
        FUZZED_CHECKS[drawn.check](drawn)
        return
    before = torch.ops.patchpack.cpu_capability("")
    torch.ops.patchpack.cpu_capability(drawn.level)
    try:
        FUZZED_CHECKS[drawn.check](drawn)
    finally:
        torch.ops.patchpack.cpu_capability(before)


# In place ----------------------------------------------------------------------------------------


@st.composite
def drawn_buffer(draw, op: str, impl: str) -> tuple[Drawn, str, int]:
    """A case of the op that allocates, the layout of a buffer, and what its gradient is of."""
    drawn = draw(drawn_case(op, impl))
    kept = ("contiguous", "a part of rows", "a part of what is between", "every second row")
    return drawn, draw(st.sampled_from([*kept, "not aligned"])), draw(st.integers(1, 3))


def check_in_place(drawn_buffer: tuple[Drawn, str, int]) -> None:
    """The bits of the op that allocates, forward and backward; values of attention stay."""
    drawn, layout, num_values = drawn_buffer
    inputs = drawn.inputs()
    q, k = inputs.pop("q"), inputs.pop("k")
    num_heads = q.shape[1], k.shape[1]
    where = inputs.pop("grid" if drawn.op == "rope_2d" else "position_ids")
    v = torch.randn(k.shape).to(k.dtype)
    x = LAYOUTS[layout](torch.cat([q, k, v], dim=1))
    results = []
    for function in (getattr(patchpack, f"{drawn.op}_"), None):
        leaf = x.detach().clone().requires_grad_()
        if function:
            buffer = LAYOUTS[layout](leaf)
            out = function(buffer, where, num_heads=num_heads, impl=drawn.impl, **inputs)
            assert out is buffer
        else:
            heads = leaf.split([*num_heads, k.shape[1]], dim=1)
            turned = SPECS[drawn.op].op(*heads[:2], where, impl=drawn.impl, **inputs)
            out = torch.cat([*turned, heads[2]], dim=1)
        out.backward(torch.sin(num_values * out.detach()))
        results.append({"output": out.detach(), "gradient": leaf.grad})
    same(*results)
