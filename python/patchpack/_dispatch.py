"""Which implementation runs, and how an op is registered.

An op is one ``torch.library`` operator a direction: what ``torch.compile``, ``FakeTensor`` and
autograd see. Behind it stands a Triton launcher, run on the GPU for CUDA tensors and by Triton's
interpreter for CPU tensors. The reference is plain eager code and needs no registration.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

IMPLS = ("triton", "native", "reference")
RUNS_ON = {"triton": ("cuda", "cpu", "meta"), "native": ("cpu",)}

_LIBRARY = torch.library.Library("patchpack", "FRAGMENT")
_OPS: set[str] = set()
_UNAVAILABLE = {
    "triton": None
    if importlib.util.find_spec("triton")
    else "Triton is not installed: pip install triton",
    "native": None
    if importlib.util.find_spec("patchpack._C")
    else "the C++ extension patchpack._C is not part of this installation",
    "reference": None,
}


def available(op: str, impl: str) -> str | None:
    """Tell whether ``impl`` of ``op`` can run here.

    Args:
        op: Name of a public op, such as ``"rope_2d"``.
        impl: ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        ``None`` if it can, otherwise the reason as a sentence. On CPU tensors ``"triton"`` runs in
        Triton's interpreter: correct, and slow.

    Raises:
        ValueError: There is no such op or implementation.
    """
    if op not in list(_OPS):
        raise ValueError(f"op must be one of {', '.join(sorted(_OPS))}, got {op!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    return _UNAVAILABLE[impl]


def resolve(op: str, impl: str | None, **first: Tensor) -> str:
    """The implementation that runs for the ``first`` argument: the asked one, or its device's."""
    ((name, x),) = first.items()
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    device = x.device.type
    if impl is None:
        cpu = "reference" if _UNAVAILABLE["native"] else "native"
        impl = {"cuda": "triton", "meta": "triton", "cpu": cpu}.get(device, "reference")
    if impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {', '.join(IMPLS)}, got {impl!r}")
    reason = _UNAVAILABLE[impl]
    if impl != "reference" and device not in RUNS_ON[impl]:
        reason = f"it runs on {' and '.join(RUNS_ON[impl])} tensors, got one on {x.device}"
    if reason:
        raise ValueError(f"impl={impl!r} of {op} is not available: {reason}")
    return impl


def define(
    schema: str,
    launcher: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Register an operator of the ``patchpack`` namespace.

    Args:
        schema: The operator in PyTorch's schema language.
        launcher: ``module:function`` under ``patchpack.kernels``, imported at the first call, with
            the schema's arguments; the first one is a tensor, or a list of some.
        fake: Shapes and dtypes of the outputs.
        setup_context: Saves what ``backward`` needs, ``(ctx, inputs, output)``.
        backward: Gradients of the inputs. Without it, asking for them raises.
    """
    name = schema.partition("(")[0]
    module, _, function = launcher.partition(":")
    _LIBRARY.define(schema)

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

    _LIBRARY.impl(name, launch_cuda, "CUDA")
    _LIBRARY.impl(name, launch_cpu, "CPU")
    torch.library.register_fake(f"patchpack::{name}", fake, lib=_LIBRARY)
    if not name.endswith("_backward"):
        _OPS.add(name)

    def refuse(ctx, *grads):
        raise RuntimeError(f"patchpack::{name} has no gradient: its op is differentiable once")

    torch.library.register_autograd(
        f"patchpack::{name}", backward or refuse, setup_context=setup_context, lib=_LIBRARY
    )
