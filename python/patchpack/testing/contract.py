"""What every op owes, as functions of a ``Spec``, a case and where it runs.

Each check raises ``AssertionError`` with what it found. The tests run all of them over the whole
catalogue, and ``python -m patchpack verify`` runs them on the machine of a user.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from patchpack import _interpreter
from patchpack.layout import TokenLayout
from patchpack.packing import PackedGrid
from patchpack.testing.catalogue import SPECS, Inputs, Spec
from patchpack.testing.compare import Accuracy, measure

# what describes a batch, and its tensors on the device
METADATA = {PackedGrid: ("geometry", "cu_seqlens"), TokenLayout: ("table", "maps")}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Subject:
    """One named case of one op, and where and in which dtype to run it."""

    op: str
    case: str
    dtype: torch.dtype = torch.float32
    impl: str = "triton"
    device: str = "cpu"

    @property
    def spec(self) -> Spec:
        return SPECS[self.op]

    def images(self, seed: int = 0, **changes) -> list[Inputs]:
        options = {**self.spec.cases[self.case], **changes}
        return self.spec.make_images(dtype=self.dtype, device=self.device, seed=seed, **options)

    @property
    def without_padding(self) -> Inputs:
        """Changes to the case that leave out rows that belong to no image."""
        return {"padding": 0} if "padding" in self.spec.cases[self.case] else {}

    def inputs(self, **changes) -> Inputs:
        return self.spec.pack(self.images(**changes))

    def __call__(self, inputs: Inputs) -> Any:
        return self.spec.op(**inputs, impl=self.impl)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for y in result for x in tensors(y)] if isinstance(result, (tuple, list)) else []


def leaves(inputs: Inputs, grads: Iterable[str], dtype: torch.dtype | None = None) -> Inputs:
    """The arguments ``grads`` as leaves of autograd, in ``dtype``; integers have no gradient."""

    def leaf(x: Tensor) -> Tensor:
        x = _convert(x, dtype).detach()
        return x.requires_grad_() if x.is_floating_point() else x

    return {name: _map(leaf, inputs[name]) for name in grads}


def _map(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``function`` of a tensor or of each of a list; anything else as it is."""
    if isinstance(x, list):
        return [_map(function, y) for y in x]
    return function(x) if isinstance(x, Tensor) else x


def _map_metadata(
    function: Callable[[Tensor], Tensor], inputs: Inputs, *, everywhere: bool = False
) -> Inputs:
    """Copies of what describes the batch, with ``function`` of its tensors on the device, or all.

    Ops trust them, so that nothing has to be built anew.
    """
    copies = {name: copy(x) for name, x in inputs.items() if type(x) in METADATA}
    for x in copies.values():
        held = [name for name, y in vars(x).items() if isinstance(y, Tensor)]
        for name in held if everywhere else METADATA[type(x)]:
            object.__setattr__(x, name, function(getattr(x, name)))
    return copies


def backward(outputs: list[Tensor], cotangents: list[Tensor]) -> None:
    """The backward pass from the outputs that have one."""
    pairs = [(x, y) for x, y in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [y for _, y in pairs])


def _gradients(arguments: Inputs) -> dict[str, Tensor]:
    gradients = {}
    for name, x in arguments.items():
        for i, leaf in enumerate(tensors(x)):
            if leaf.requires_grad:
                assert leaf.grad is not None, f"no gradient for {name}"
                gradients[f"grad_{name}" + (f"[{i}]" if isinstance(x, list) else "")] = leaf.grad
    return gradients


def differentiate(
    function: Callable[[Inputs], Any],
    inputs: Inputs,
    grads: tuple[str, ...],
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Outputs and gradients of ``function``, under cotangents that depend on outputs and ``seed``.

    With ``dtype``, inputs and cotangents are first converted: the same values, already rounded.
    """
    arguments = leaves(inputs, grads, dtype)
    first = next((x.dtype for name in grads for x in tensors(inputs[name])), None)
    options = {} if dtype is None or "dtype" not in inputs else {"dtype": dtype}
    outputs = tensors(function({**inputs, **options, **arguments}))
    backward(outputs, [_convert(_cotangent(x, first, seed), dtype) for x in outputs])
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return results | _gradients(arguments)


def _convert(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None or not x.is_floating_point() else x.to(dtype)


def _cotangent(output: Tensor, dtype: torch.dtype | None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel() + 10**6 * seed)
    cotangent = torch.randn(output.shape, generator=generator)
    if dtype is not None and dtype.is_floating_point:
        cotangent = cotangent.to(dtype)  # rounded as the inputs
    return cotangent.to(output.device, output.dtype)


def _equal(name: str, got: Tensor, want: Tensor) -> None:
    same = (got == want) | (got.isnan() & want.isnan())
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, want {list(want.shape)}"
    assert same.all(), f"{name}: {(~same).sum()} of {same.numel()} values differ"


def _close(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, equal_nan=True, msg=lambda message: f"{name}: {message}")


def _all_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        _equal(name, got[name], want[name])


def accuracies(subject: Subject, seeds: Sequence[int] = (0,)) -> list[Accuracy]:
    """Error of every output and gradient, and eager's own, against a float64 oracle.

    Several ``seeds`` give more numbers of a small case: in few, eager's error is luck.
    """
    spec, runs = subject.spec, []
    for seed in seeds:
        inputs = subject.inputs(seed=seed)
        run = functools.partial(differentiate, inputs=inputs, grads=spec.grads, seed=seed)
        oracle = run(lambda x: spec.reference(**x), dtype=torch.float64)
        runs.append((run(subject), run(lambda x: spec.reference(**x)), oracle))

    def joined(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    actual, eager, oracle = map(joined, zip(*runs, strict=True))
    return [measure(name, actual[name], eager[name], oracle[name]) for name in actual]


def check_accuracy(subject: Subject) -> None:
    """Every output and gradient errs at most twice as much as eager, in maximum and in RMS."""
    failed = [str(accuracy) for accuracy in accuracies(subject) if not accuracy.passed]
    assert not failed, "; ".join(failed)


def check_strided(subject: Subject) -> None:
    """Views of larger buffers, NaN elsewhere, give a contiguous input's bits without a copy.

    On a GPU that holds for views as aligned as the input. Others are read in narrower pieces, which
    changes the order of sums: they give its values.
    """
    inputs = subject.inputs()
    want = differentiate(subject, inputs, subject.spec.grads)
    if subject.device == "cuda":
        _all_equal(_of_views(subject, inputs, skipped=128), want)
        torch.testing.assert_close(_of_views(subject, inputs), want, equal_nan=True)
    else:
        _all_equal(_of_views(subject, inputs), want)


def _of_views(subject: Subject, inputs: Inputs, skipped: int = 1) -> dict[str, Tensor]:
    """Outputs and gradients from views of inputs and cotangents; on a CPU none may be copied."""
    strided = views(inputs, skipped)
    arguments = leaves(strided, subject.spec.grads)
    read = set()

    def run(kernel, grid, args, kwargs):
        read.update(x.data_ptr() for x in args if isinstance(x, Tensor))
        _interpreter.execute(kernel, grid, args, kwargs)

    with _interpreter.interpreted(run=run):
        outputs = tensors(subject({**strided, **arguments}))
    for name, x in arguments.items() if read else ():
        if isinstance(x, Tensor):  # of a list, kernels get addresses alone
            assert not x.numel() or x.data_ptr() in read, f"{name} was copied"
    backward(outputs, [_as_view(_cotangent(x, subject.dtype), skipped) for x in outputs])
    return {f"output {i}": x.detach() for i, x in enumerate(outputs)} | _gradients(arguments)


def views(inputs: Inputs, skipped: int = 1) -> Inputs:
    """The same values as views of larger buffers, NaN elsewhere, which begin with ``skipped``."""
    return {name: _map(lambda x: _as_view(x, skipped), x) for name, x in inputs.items()}


def _as_view(x: Tensor, skipped: int) -> Tensor:
    if not (x.is_floating_point() or x.dtype == torch.uint8) or x.ndim < 2:
        return x
    fill = float("nan") if x.is_floating_point() else 255
    buffer = x.new_full((x.shape[0], x.shape[1] + 3 * skipped, *x.shape[2:]), fill)
    view = buffer[:, skipped : skipped + x.shape[1]]
    return view.copy_(x)


def check_inputs_unmodified(subject: Subject) -> None:
    """Forward and backward leave every input and cotangent as it was."""
    inputs = subject.inputs()
    watched = {f"{name}[{i}]": x for name in inputs for i, x in enumerate(tensors(inputs[name]))}
    for name in [name for name, x in inputs.items() if type(x) in METADATA]:
        held = vars(inputs[name]).items()
        watched |= {f"{name}.{n}": x for n, x in held if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in watched.items()}
    outputs = tensors(subject({**inputs, **leaves(inputs, subject.spec.grads)}))
    cotangents = [_cotangent(x, subject.dtype) for x in outputs]
    kept = [x.clone() for x in cotangents]
    backward(outputs, cotangents)
    _all_equal(watched, before)
    for i, (x, want) in enumerate(zip(cotangents, kept, strict=True)):
        _equal(f"cotangent {i}", x, want)


def check_fully_written(subject: Subject) -> None:
    """Nothing of a result is memory that was never written: allocations hold NaN beforehand."""
    inputs = subject.inputs()
    want = differentiate(subject, inputs, subject.spec.grads)
    with _poisoned_allocations():
        assert torch.empty(1).isnan().all()
        got = differentiate(subject, inputs, subject.spec.grads)
    _all_equal(got, want)


@contextlib.contextmanager
def _poisoned_allocations() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def check_empty(subject: Subject) -> None:
    """No tokens in, no tokens out, and gradients of the right shape."""
    inputs = subject.inputs(sizes=[(0, 0, 0)], **subject.without_padding)
    got = differentiate(subject, inputs, subject.spec.grads)
    want = differentiate(lambda x: subject.spec.reference(**x), inputs, subject.spec.grads)
    _all_equal(got, want)
    assert all(x.numel() == 0 for name, x in got.items() if name.startswith("output"))


def check_packed(subject: Subject) -> None:
    """A packed batch has the bits of its images one by one, and permuting images permutes it."""
    images = subject.images(**subject.without_padding)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1)).tolist()
    for batch in (images, [images[i] for i in order]):
        packed = subject(subject.spec.pack(batch))
        alone = [subject(subject.spec.pack([image])) for image in batch]
        if isinstance(packed, list):  # one result an image
            for x, y in zip(tensors(packed), tensors(alone), strict=True):
                _equal("an image", x, y)
            continue
        for i, x in enumerate(tensors(packed)):
            parts = [tensors(y)[i] for y in alone]
            dim = 0 if sum(len(y) for y in parts) == len(x) else 1
            _equal(f"output {i}", x, torch.cat(parts, dim))
    grads = [_run_backward(subject, subject.spec.pack([image])) for image in images]
    together = _run_backward(subject, subject.spec.pack(images))
    for name in subject.spec.grads:
        if name in subject.spec.shared:  # a sum over the images: accuracy is what it owes
            continue
        grad = _of_argument(name, together)
        assert not any(x.isnan().any() for x in grad), f"grad_{name} has NaN"
        parts = [x for g in grads for x in _of_argument(name, g)]
        if len(grad) == 1:
            parts = [torch.cat(parts)]
        for x, y in zip(grad, parts, strict=True):
            _equal(f"grad_{name}", x, y)


def _of_argument(name: str, gradients: dict[str, Tensor]) -> list[Tensor]:
    """The gradients of one argument: one, or one for each tensor of a list."""
    return [x for n, x in gradients.items() if n.partition("[")[0] == f"grad_{name}"]


def _run_forward(subject: Subject, inputs: Inputs) -> list[Tensor]:
    return tensors(subject(inputs))


def _run_backward(
    subject: Subject, inputs: Inputs, view: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Tensor]:
    """Gradients under a ``view`` of a cotangent that is a function of the output's values.

    It is NaN where the output is infinite: at a query without keys, which passes nothing on.
    """
    arguments = leaves(inputs, subject.spec.grads)
    outputs = tensors(subject({**inputs, **arguments}))
    cotangents = [view(torch.sin(3 * x.detach())) if x.is_floating_point() else x for x in outputs]
    backward(outputs, cotangents)
    return _gradients(arguments)


def check_deterministic(subject: Subject) -> None:
    """Every run gives the same bits; on a CPU programs run in one order, whatever they write."""
    runs = 2 if subject.device == "cpu" else 5
    inputs = subject.inputs()
    first = differentiate(subject, inputs, subject.spec.grads)
    for _ in range(runs - 1):
        _all_equal(differentiate(subject, inputs, subject.spec.grads), first)


def check_opcheck(subject: Subject) -> None:
    """``torch.library.opcheck`` on every registered op that forward and backward call."""
    inputs = subject.inputs()
    arguments = leaves(inputs, subject.spec.grads)
    with _Recorder() as recorder:
        outputs = tensors(subject({**inputs, **arguments}))
        backward(outputs, [_cotangent(x, subject.dtype) for x in outputs])
    # not what builds a grid on the host: that is never traced
    calls = [(op, args) for op, args in recorder.calls if subject.op in op._schema.name]
    assert calls, "no operator of the op was called"
    for op, args in calls:
        tests = ["test_schema", "test_faketensor"]
        if op._schema.name == f"patchpack::{subject.op}" and subject.spec.grads:
            tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
            named = {str(i): x for i, x in enumerate(args)}
            args = list(leaves(named, named).values())
        torch.library.opcheck(op, tuple(args), test_utils=tests)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "patchpack":
            self.calls.append((func, list(args)))
        return func(*args, **(kwargs or {}))


# batches that differ in the number of images and of tokens; every size divides by 4. None has one
# image: torch compiles tensors of size 1 apart from others
LENGTH_SETS = (
    [(1, 4, 4), (1, 8, 4)],
    [(1, 4, 8)] * 3,
    [(2, 4, 4), (1, 4, 12), (1, 4, 4), (1, 4, 4)],
    [(1, 12, 4), (1, 4, 4)],
    [(1, 4, 4)] * 7,
)
# lists of images, whose length is a constant to torch: from the second batch on no size is that of
# another axis by chance
LIST_SETS = (
    [(2, 4, 4), (2, 8, 4)],
    [(3, 8, 12), (5, 16, 20)],
    [(4, 12, 4), (2, 4, 12)],
)


def check_compiled(subject: Subject) -> None:
    """``torch.compile(fullgraph=True)`` gives eager's bits and compiles twice for all batches."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(subject, fullgraph=True, backend=counter)
    for sizes in LIST_SETS if subject.spec.lists else LENGTH_SETS:
        inputs = subject.inputs(sizes=sizes)
        want = differentiate(subject, inputs, subject.spec.grads)
        _all_equal(differentiate(compiled, inputs, subject.spec.grads), want)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations, want at most 2"


def check_shapes_alone(subject: Subject) -> None:
    """Meta and fake tensors get the shapes, strides and dtypes of real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    inputs = subject.inputs()
    want = [(x.shape, x.stride(), x.dtype) for x in tensors(subject(inputs))]
    got = [(x.shape, x.stride(), x.dtype) for x in tensors(subject(_to_meta(inputs)))]
    assert got == want, f"meta gives {got}, want {want}"
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = {name: _map(mode.from_tensor, x) for name, x in inputs.items()}
        fake |= _map_metadata(mode.from_tensor, inputs, everywhere=True)
        outputs = tensors(subject(fake))
    assert [x.dtype for x in outputs] == [dtype for _, _, dtype in want]
    assert [x.ndim for x in outputs] == [len(shape) for shape, _, _ in want]


# arguments that stay on the host
ON_HOST = ("target_hw",)


def _to_meta(inputs: Inputs) -> Inputs:
    return {
        name: x.to("meta") if type(x) in METADATA else _map(lambda y: y.to("meta"), x)
        for name, x in inputs.items()
        if name not in ON_HOST
    } | {name: inputs[name] for name in ON_HOST if name in inputs}


# what waits for the device to give the host a value
READS = (
    *("item", "tolist", "numpy", "__array__", "cpu", "nonzero", "unique", "masked_select"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__iter__"),
)


def _names_the_cpu(*args: Any) -> bool:
    return any(isinstance(x, (str, torch.device)) and str(x) == "cpu" for x in args)


class _OnDevice(Tensor):
    """A tensor that refuses to be read by the host, as one on a busy GPU should be left alone."""

    READS = frozenset(getattr(Tensor, name) for name in READS) | {
        *(torch.nonzero, torch.masked_select, torch.unique, torch.equal, torch.allclose)
    }

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        func = getattr(func, "__wrapped__", func)  # where _Unreadable guards it
        waits = func in cls.READS
        waits |= func.__name__ == "to" and _names_the_cpu(*args, *kwargs.values())
        waits |= func in (torch.repeat_interleave, Tensor.repeat_interleave) and (
            "output_size" not in kwargs
        )
        assert not waits, f"the host waits for the device: {func.__name__}"
        return super().__torch_function__(func, types, args, kwargs)


class _Unreadable:
    """Forbids the host to read any tensor: launchers and backward passes hold none of its own.

    ``__torch_function__`` does not reach there, because PyTorch calls them from within an op.
    """

    def __init__(self) -> None:
        self.active = False

    def __enter__(self) -> None:
        self.stack = contextlib.ExitStack()
        for name in (*READS, "to"):
            guarded = self._guard(name, getattr(Tensor, name))
            self.stack.enter_context(mock.patch.object(Tensor, name, guarded))

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def _guard(self, name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def read(*args, **kwargs):
            copies = name == "to" and not _names_the_cpu(*args, *kwargs.values())
            waits = self.active and not (copies or kwargs.get("non_blocking"))
            assert not waits, f"the host waits for the device: {name}"
            return original(*args, **kwargs)

        return read

    @contextlib.contextmanager
    def set(self, active: bool) -> Iterator[None]:
        with _interpreter.replaced(self, "active", active):
            yield


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Within this context, it is an error if the host waits for the CUDA device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it does not see all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_no_sync(subject: Subject) -> None:
    """Neither the checks nor the launches nor the backward pass read a value of a device tensor."""
    inputs = subject.inputs()
    _run_backward(subject, inputs)  # tables that do not depend on the batch are copied once
    if subject.device == "cuda":
        with no_sync():
            _run_backward(subject, inputs)
        return

    guard = _Unreadable()
    interpreted = _interpreter.interpreted

    def run(kernel, grid, args, kwargs):
        plain = [x.as_subclass(Tensor) if isinstance(x, Tensor) else x for x in args]
        with guard.set(False):
            _interpreter.execute(kernel, grid, tuple(plain), kwargs)

    @contextlib.contextmanager
    def launching():
        with interpreted(), guard.set(True):
            yield

    guarded = {
        name: x if name in ON_HOST else _map(lambda y: y.as_subclass(_OnDevice), x)
        for name, x in inputs.items()
    }
    guarded |= _map_metadata(lambda x: x.as_subclass(_OnDevice), inputs)
    arguments = leaves(guarded, subject.spec.grads)
    with (
        guard,
        interpreted(run=run),
        _interpreter.replaced(_interpreter, "interpreted", launching),
    ):
        outputs = tensors(subject({**guarded, **arguments}))
        cotangents = [torch.ones_like(x) for x in outputs]
        with guard.set(True):
            backward(outputs, cotangents)


def check_int64_offsets(subject: Subject) -> None:
    """Tokens more than 2**31 elements into a buffer are read, of inputs and cotangents.

    Only touched pages are committed. On a GPU strides of other divisors change the order of sums,
    as in ``check_strided``.
    """
    same = _close if subject.device == "cuda" else _equal
    inputs = subject.inputs(**subject.without_padding)
    spread = {
        name: _map(_spread, x) if name in subject.spec.grads or isinstance(x, list) else x
        for name, x in inputs.items()
    }
    want = _run_forward(subject, inputs)
    for i, (x, y) in enumerate(zip(_run_forward(subject, spread), want, strict=True)):
        same(f"output {i}", x, y)
    got, want = _run_backward(subject, spread, _spread), _run_backward(subject, inputs)
    for name, gradient in want.items():
        same(name, got[name], gradient)


def _spread(x: Tensor) -> Tensor:
    """The same values with the last row's offset past 2**31 elements; a vector has no rows."""
    if x.ndim < 2:
        return x
    stride = -(-(2**31) // max(x.shape[0] - 1, 1)) + 15 & ~15
    buffer = torch.empty(stride * x.shape[0], dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, (stride, *x.stride()[1:]))
    return view.copy_(x)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "accuracy": check_accuracy,
    "strided inputs": check_strided,
    "inputs unmodified": check_inputs_unmodified,
    "fully written": check_fully_written,
    "empty input": check_empty,
    "packed as alone": check_packed,
    "deterministic": check_deterministic,
    "opcheck": check_opcheck,
    "compiled": check_compiled,
    "meta and fake": check_shapes_alone,
    "no host sync": check_no_sync,
    "int64 offsets": check_int64_offsets,
}

# slow to trace and blind to values: the first two cases of an op are enough
TRACING = {"opcheck", "compiled", "meta and fake"}

# what the reference does not owe, and why
NOT_OWED_BY_REFERENCE = {
    "accuracy": "the reference is the yardstick",
    "packed as alone": "the order in which eager code sums depends on the sizes",
    "opcheck": "the reference is not a registered op",
    "compiled": "the reference loops over segments and images",
    "meta and fake": "the reference reads lengths on the host",
    "no host sync": "the reference reads lengths on the host",
}


def subjects(op: str, check: str, impl: str = "triton", device: str = "cpu") -> list[Subject]:
    """The cases of ``op`` that ``check`` runs, in all dtypes where accuracy is at stake."""
    cases = list(SPECS[op].cases)[: 2 if check in TRACING else None]
    dtypes = DTYPES if check == "accuracy" and SPECS[op].grads else DTYPES[:1]
    return [Subject(op, case, dtype, impl, device) for case in cases for dtype in dtypes]
