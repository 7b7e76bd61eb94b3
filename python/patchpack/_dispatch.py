"""Which implementation runs, and how an op is registered.

An op is one ``torch.library`` operator a direction: what ``torch.compile``, ``FakeTensor`` and
autograd see. It has an overload for each implementation. ``patchpack::<op>`` itself is a Triton
launcher, run on the GPU for CUDA tensors and by Triton's interpreter for CPU tensors;
``patchpack::<op>.native`` is C++ of the extension ``_C``, ``patchpack::<op>.cuda`` CUDA C++ of
``_C_cuda``. The reference is plain eager code and needs no registration.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMPLS = ("triton", "cuda", "native", "reference")
RUNS_ON = {
    "triton": ("cuda", "cpu", "meta"),
    "cuda": ("cuda", "meta"),
    "native": ("cpu", "meta"),
}

# implementations by default: the first that is available
_DEFAULTS = {
    "cuda": ("triton", "cuda"),
    "meta": ("triton", "cuda", "native", "reference"),
    "cpu": ("native", "reference"),
}
# implementations that extensions register, and for which dispatch key
_COMPILED = {"cuda": "CUDA", "native": "CPU"}
# the overload of an operator that is an implementation
_OVERLOADS = {"triton": "default", "cuda": "cuda", "native": "native"}


def _reason_not_loaded(extension: str) -> str | None:
    """Import an extension, which gives the overloads of an implementation their kernels."""
    # an editable installation elsewhere would lend its own to a package that has none
    here = [str(Path(__file__).parent)]
    name = f"patchpack.{extension}"
    if importlib.machinery.PathFinder.find_spec(name, here) is None:
        return f"the C++ extension {name} is not part of this installation"
    try:
        importlib.import_module(name)
    except ImportError as error:
        reason = f"the extension {name} does not load with torch {torch.__version__}: {error}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return reason
    return None


_LIBRARY = torch.library.Library("patchpack", "FRAGMENT")
_NOT_INSTALLED = {
    "triton": None
    if importlib.util.find_spec("triton")
    else "Triton is not installed: pip install triton",
    "cuda": _reason_not_loaded("_C_cuda") if torch.version.cuda else "this torch is without CUDA",
    "native": _reason_not_loaded("_C"),
    "reference": None,
}
if _NOT_INSTALLED["native"] is None:
    torch.ops.patchpack.cpu_capability("")  # refuses a wrong PATCHPACK_CPU_CAPABILITY at once
# why an implementation of an op cannot run, by op and implementation
_UNAVAILABLE: dict[str, dict[str, str | None]] = {}


def available(op: str, impl: str) -> str | None:
    """Tell whether ``impl`` of ``op`` can run here.

    Args:
        op: Name of a public op, such as ``"rope_2d"``.
        impl: ``"triton"``, ``"cuda"``, ``"native"`` or ``"reference"``.

    Returns:
        ``None`` if it can, otherwise the reason as a sentence. On CPU tensors ``"triton"`` runs in
        Triton's interpreter: correct, and slow. ``"cuda"``, which few ops have, is CUDA C++
        compiled ahead of time, for machines where Triton cannot compile.

    By default CUDA tensors take ``"triton"`` where Triton is installed, else ``"cuda"``, and CPU
    tensors ``"native"`` where it is built, else ``"reference"``, which is slow and what float64
    takes.

    Raises:
        ValueError: There is no such op or implementation.
    """
    if op not in list(_UNAVAILABLE):
        raise ValueError(f"op must be one of {', '.join(sorted(_UNAVAILABLE))}, got {op!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    return _UNAVAILABLE[op][impl]


def resolve(op: str, impl: str | None, *, wide: bool = False, **first: Tensor) -> str:
    """The implementation that runs for the ``first`` argument: the asked one, or its device's.

    ``wide`` says that float64 is computed where ``first`` does not tell.
    """
    ((name, x),) = first.items()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    device = x.device.type
    if impl is None:
        choices = _DEFAULTS.get(device, ("reference",))
        wide = wide or x.dtype == torch.float64  # which is for checks of gradients
        if device == "cpu" and wide:
            choices = ("reference",)
        usable = [choice for choice in choices if not _UNAVAILABLE[op][choice]]
        impl = (usable or choices)[0]
    if impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")
    reason = _UNAVAILABLE[op][impl]
    if impl != "reference" and device not in RUNS_ON[impl]:
        reason = f"it runs on {' and '.join(RUNS_ON[impl])} tensors, got one on {x.device}"
    if reason:
        raise ValueError(f"impl={impl!r} of {op} is not available: {reason}")
    if impl != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"impl={impl!r} of {op} has no transforms of torch.func: instead of vmap make the batch"
            " one packed sequence, instead of grad, vjp or jacrev use torch.autograd.grad, or take"
            " impl='reference'"
        )
    return impl


def native(name: str, *args: object) -> Any:
    """What the C++ operator ``name`` makes of plain CPU tensors, without registered autograd.

    Returns:
        ``None`` where that is not to be had: without the extension, while ``torch.compile`` looks
        at the code, for subclasses and other devices, and if C++ refuses the arguments. Code that
        serves them all then has to do it, or to say what is wrong.
    """
    if _NOT_INSTALLED["native"] or torch.compiler.is_compiling():
        return None
    for x in args:
        if isinstance(x, Tensor) and not (type(x) is Tensor and x.is_cpu):
            return None
    try:
        return getattr(torch.ops.patchpack, name).default(*args)
    except RuntimeError:
        return None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Where references run on the device of ``x``: in the dtypes they name, as kernels do."""
    if x.is_meta:  # it has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def operator(name: str, impl: str) -> Callable:
    """The registered operator of an implementation."""
    op = getattr(getattr(torch.ops.patchpack, name), _OVERLOADS[impl])
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return op
    return functools.partial(_below_autograd, op)


def _below_autograd(op: Callable, *args: object) -> Any:
    """What registered autograd calls where there is no gradient, without the way through Python."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def define(
    schema: str,
    launcher: str | None,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Register an operator of the ``patchpack`` namespace, with its overloads.

    Args:
        schema: The operator in PyTorch's schema language. One that returns nothing writes in
            place: its caller tells autograd. One that begins with ``_`` is a part of an op, which
            ``available`` does not know.
        launcher: ``module:function`` under ``patchpack.kernels``, imported at the first call, with
            the schema's arguments; the first one is a tensor, or a list of some. ``None`` for a
            fusion of other ops that only an extension has: no op by itself, ``available`` does not
            know it.
        fake: Shapes and dtypes of the outputs.
        setup_context: Saves what ``backward`` needs, ``(ctx, inputs, output)``. It finds the
            implementation that runs in ``ctx.impl``.
        backward: Gradients of the inputs. Without it, asking for them raises.
    """
    name = schema.partition("(")[0]
    for impl in _COMPILED:
        _register(schema.replace(name, f"{name}.{impl}", 1), impl, fake, setup_context, backward)
    if launcher is None:
        return
    module, _, function = launcher.partition(":")

    def launch(*args):
        return getattr(importlib.import_module(f"patchpack.kernels.{module}"), function)(*args)

    def launch_cuda(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device(first.device):
            return launch(*args)

    def launch_cpu(*args):
        from patchpack._interpreter import interpreted

        with interpreted():
            return launch(*args)

    _register(schema, "triton", fake, setup_context, backward)
    _LIBRARY.impl(name, launch_cuda, "CUDA")
    _LIBRARY.impl(name, launch_cpu, "CPU")
    if not name.startswith("_") and not name.endswith("_backward"):
        _UNAVAILABLE[name] = {impl: _reason(name, impl) for impl in IMPLS}


def _reason(op: str, impl: str) -> str | None:
    """Why ``impl`` of ``op`` cannot run in this installation."""
    if _NOT_INSTALLED[impl] or impl not in _COMPILED:
        return _NOT_INSTALLED[impl]
    name, key = f"patchpack::{op}.{impl}", _COMPILED[impl]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    return None if has_kernel else f"the op has no {impl} kernel"


def _register(
    schema: str,
    impl: str,
    fake: Callable,
    setup_context: Callable | None,
    backward: Callable | None,
) -> None:
    """Define one overload, what it gives and its gradient."""
    name = f"patchpack::{schema.partition('(')[0]}"
    _LIBRARY.define(schema)
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if schema.endswith("-> ()"):
        return

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name} has no gradient: its op is differentiable once")

    def setup(ctx, inputs, output):
        ctx.impl = impl
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    torch.library.register_autograd(name, backward or refuse, setup_context=setup, lib=_LIBRARY)
