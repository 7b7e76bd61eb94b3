"""What every op owes, over the whole catalogue: see ``patchpack.testing.contract``."""

import importlib
import itertools
import math

import pytest
import torch

from patchpack import _check
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import CHECKS, Subject, leaves, subjects, tensors


def _subjects(device="cpu"):
    params = []
    for op, check in itertools.product(SPECS, CHECKS):
        for subject in subjects(op, check, device=device):
            dtype = str(subject.dtype).removeprefix("torch.")
            name = f"{op}-{subject.case}-{check}-{dtype}"
            params.append(pytest.param(check, subject, id=name.replace(" ", "_")))
    return params


@pytest.mark.parametrize(("check", "subject"), _subjects())
def test_triton_in_the_interpreter(check, subject):
    CHECKS[check](subject)


@pytest.mark.parametrize("op", SPECS)
def test_half_precision_keeps_the_bits_of_its_batch(op):
    for dtype in (torch.bfloat16, torch.float16):
        subject = Subject(op, next(iter(SPECS[op].cases)), dtype)
        for check in ("packed as alone", "strided inputs", "deterministic"):
            CHECKS[check](subject)


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
    [("mrope", "rotate"), ("rope_2d", "rotate"), ("varlen_attention", "attend_bwd")],
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
    ("check", "subject"), _subjects("cuda") if torch.cuda.is_available() else []
)
def test_triton_on_the_gpu(check, subject):
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
