"""What every op owes, over the whole catalogue: see ``patchpack.testing.contract``."""

import importlib
import itertools
import math

import pytest
import torch
from marks import slow

import patchpack
from patchpack import _check
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import (
    CHECKS,
    TRACING,
    Subject,
    differentiate,
    leaves,
    subjects,
    tensors,
    views,
)


def _subjects(impl="triton", device="cpu", checks=tuple(CHECKS)):
    params = []
    for op, check in itertools.product(SPECS, checks):
        for subject in subjects(op, check, impl, device):
            dtype = str(subject.dtype).removeprefix("torch.")
            name = f"{op}-{subject.case}-{check}-{dtype}"
            params.append(pytest.param(check, subject, id=name.replace(" ", "_")))
    return params


def _a_third(params):
    """Of most checks the first case and a third of the rest, as the interpreter is slow.

    Each check takes another third, and on a GPU all of them are run. What traces sees the operators
    that the native implementation is traced with too. By default it is accuracy in float32
    alone that is checked of more than the first case.
    """
    kept, place = [], {}
    for param in params:
        check, subject = param.values
        kind = check, subject.op, subject.dtype
        number = place[kind] = place.get(kind, -1) + 1
        # whose faults single cases see
        every = check in ("accuracy", "int64 offsets") and subject.dtype != torch.float16
        third = (number + list(CHECKS).index(check)) % 3 == 0 and check not in TRACING
        if every or number == 0 or third:
            exact = check == "accuracy" and subject.dtype == torch.float32
            quick = exact or (number == 0 and check not in TRACING)
            marks = () if quick else pytest.mark.slow
            kept.append(pytest.param(*param.values, id=param.id, marks=marks))
    return kept


@pytest.mark.parametrize(("check", "subject"), _a_third(_subjects()))
def test_triton_in_the_interpreter(check, subject):
    CHECKS[check](subject)


@pytest.mark.cpp
@pytest.mark.parametrize(("check", "subject"), _subjects("native"))
def test_native(check, subject):
    CHECKS[check](subject)


# torch sees the same operators at any level
NUMERIC = [check for check in CHECKS if check not in TRACING]


@pytest.mark.cpp
@pytest.mark.parametrize("cpu_capability", ["plain", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize(("check", "op"), list(itertools.product(NUMERIC, SPECS)))
def test_native_on_a_lesser_cpu(check, op, cpu_capability):
    for subject in subjects(op, check, "native"):
        CHECKS[check](subject)


@pytest.mark.cpp
@pytest.mark.parametrize("op", SPECS)
def test_native_copies_no_view(op):
    for case in SPECS[op].cases:
        subject = Subject(op, case, impl="native")
        inputs = views(subject.inputs())
        with torch.autograd.profiler.profile(use_kineto=False, record_shapes=True) as profile:
            subject(inputs)
        # a grid that the op makes copies its sizes
        clones = [e.input_shapes[0] for e in profile.function_events if e.name == "aten::clone"]
        assert not any(list(x.shape) in clones for x in tensors(list(inputs.values()))), case


@pytest.mark.cpp
@pytest.mark.parametrize("op", SPECS)
def test_native_has_the_same_bits_for_any_number_of_threads(op):
    before = torch.get_num_threads()
    for case, dtype in itertools.product(SPECS[op].cases, (torch.float32, torch.bfloat16)):
        subject = Subject(op, case, dtype, "native")
        # enough tokens that there is work for every thread, which takes few where each meets each
        side = 24 if op == "varlen_attention" else 48
        sizes = [(1, side, side * 3 // 2), (1, side * 3 // 2, side)]
        inputs = subject.inputs(sizes=sizes, **subject.without_padding)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                results.append(differentiate(subject, inputs, subject.spec.grads))
            finally:
                torch.set_num_threads(before)
        for name, x in results[0].items():
            assert all(torch.equal(x, result[name]) for result in results[1:]), (case, name)


@pytest.mark.parametrize("op", SPECS)
def test_half_precision_keeps_the_bits_of_its_batch(op):
    dtypes = torch.bfloat16, torch.float16, torch.bfloat16
    checks = "packed as alone", "strided inputs", "deterministic"
    for check, dtype in zip(checks, dtypes, strict=True):
        CHECKS[check](Subject(op, next(iter(SPECS[op].cases)), dtype))


@pytest.mark.parametrize("op", SPECS)
def test_autocast_does_not_reach_the_reference(op):
    subject = Subject(op, next(iter(SPECS[op].cases)), torch.float16, "reference")
    inputs = subject.inputs()
    want = tensors(subject(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        got = tensors(subject(inputs))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


# faults that no kernel has are seen

READS = {
    "item": lambda x: x.flatten()[0].item(),
    "tolist": lambda x: x.tolist(),
    "int": lambda x: int(x.shape[0] and x.flatten()[0]),
    "bool": lambda x: bool((x == x).all()),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to(torch.device("cpu")),
    "nonzero": lambda x: x.nonzero(),
    "numpy": lambda x: x.detach().numpy(),
}


@pytest.mark.parametrize("read", READS)
def test_a_check_that_waits_is_seen(read, monkeypatch):
    original = _check.heads

    def waiting(impl, q, k):
        READS[read](q)
        return original(impl, q, k)

    monkeypatch.setattr(_check, "heads", waiting)
    with pytest.raises(AssertionError, match="the host waits for the device"):
        CHECKS["no host sync"](Subject("mrope", "Qwen2-VL"))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("op", "launcher"),
    [("mrope", "rotate"), *slow([("rope_2d", "rotate"), ("varlen_attention", "attend_bwd")])],
)
def test_a_launcher_that_waits_is_seen(op, launcher, read, monkeypatch):
    module = importlib.import_module(f"patchpack.kernels.{op}")
    original = getattr(module, launcher)

    def waiting(*args):
        READS[read](args[0])
        return original(*args)

    monkeypatch.setattr(module, launcher, waiting)
    with pytest.raises(AssertionError, match="the host waits for the device"):
        CHECKS["no host sync"](Subject(op, next(iter(SPECS[op].cases))))


def test_a_copy_of_a_view_is_seen(monkeypatch):
    module = importlib.import_module("patchpack.kernels.varlen_attention")
    monkeypatch.setattr(module, "_addressable", torch.Tensor.contiguous)
    with pytest.raises(AssertionError, match="q was copied"):
        CHECKS["strided inputs"](Subject("varlen_attention", "lse"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("check", "subject"), _subjects(device="cuda") if torch.cuda.is_available() else []
)
def test_triton_on_the_gpu(check, subject):
    CHECKS[check](subject)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("check", "subject"), _subjects("cuda", "cuda") if torch.cuda.is_available() else []
)
def test_cuda_on_the_gpu(check, subject):
    if reason := patchpack.available(subject.op, "cuda"):
        pytest.skip(reason)
    CHECKS[check](subject)


@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op, spec in SPECS.items() for case in spec.cases]
)
def test_reference_has_the_gradient_of_its_values(op, case):
    spec = SPECS[op]
    sizes = [size for size in spec.cases[case]["sizes"] if 4 <= math.prod(size) <= 40]
    small = {**spec.cases[case], "sizes": [*sizes, (1, 4, 4)][:1]}
    inputs = spec.pack(spec.make_images(dtype=torch.float64, device="cpu", seed=0, **small))
    arguments = leaves(inputs, spec.grads)
    flat = [x for x in tensors(list(arguments.values())) if x.requires_grad]

    def function(*_):  # gradcheck changes the leaves in place
        result = spec.reference(**{**inputs, **arguments})
        # lse is -inf where a query sees no key: finite differences say nothing there
        return tuple(x[x.isfinite()] for x in tensors(result))

    if flat:
        torch.autograd.gradcheck(function, flat, fast_mode=True)
