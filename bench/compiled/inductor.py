"""The Triton code that Inductor writes for an NVIDIA GPU that need not be there.

    with compiled.session("sm_90"):
        torch.compile(function, backend=backend("sm_90"))(*cpu_tensors)

A graph is traced on CPU tensors and lowered as if they were the GPU's. What comes of it, wrapper
and kernels, runs on CPU tensors again, so that whatever takes launches sees those of a GPU.

Operators are decomposed before, as on a CPU. Of those compiled here one differs: layer_norm saves
its statistics in the dtype of its input.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor import utils
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx import GraphModule
from torch.utils import _triton
from torch.utils._pytree import tree_map
from triton.runtime.driver import driver

from patchpack.testing import compiled

# multiprocessors, and threads that one of them holds, of A100, A40, L40S, H100, B200, RTX 5090
MULTIPROCESSORS = {
    "sm_80": (108, 2048),
    "sm_86": (84, 1536),
    "sm_89": (142, 1536),
    "sm_90": (132, 2048),
    "sm_100": (148, 2048),
    "sm_120": (170, 1536),
}
CUDA = torch.device("cuda", 0)


def backend(target: str) -> Callable[[GraphModule, list[Tensor]], Callable[..., Any]]:
    """A backend of ``torch.compile``: Inductor for ``target``, whose code runs on CPU tensors.

    Args:
        target: A key of ``MULTIPROCESSORS``.
    """
    # caches are keyed by the GPU that is there, and other processes do not pretend
    uncached = functools.partial(
        torch._inductor.config.patch, compile_threads=1, force_disable_caches=True
    )

    def compile_inner(module: GraphModule, inputs: Sequence[Any], **options) -> Callable[..., Any]:
        with pretended(target), uncached():
            code = compile_fx_inner(module, _move(module, inputs), **options)

        def call(arguments: list[Any]) -> Any:
            with pretended(target):
                return code(arguments)

        call._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]  (it takes a list)
        return call

    def compile_graph(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        with uncached():
            return compile_fx(module, inputs, inner_compile=compile_inner)  # pyright: ignore[reportArgumentType, reportReturnType]

    return compile_graph


def check(target: str) -> None:
    """Raise ``ValueError`` unless code can be had for ``target``."""
    if target not in MULTIPROCESSORS:
        raise ValueError(f"target must be one of {', '.join(MULTIPROCESSORS)}, got {target!r}")


def capability(target: str) -> tuple[int, int]:
    """The CUDA capability of a target."""
    return divmod(int(target.removeprefix("sm_")), 10)


@contextlib.contextmanager
def pretended(target: str) -> Iterator[None]:
    """Within this context, PyTorch takes an NVIDIA GPU of the kind ``target`` to be there.

    CUDA memory is the CPU's, and kernels that Inductor wrote are launched without its launchers.

    Raises:
        ValueError: Nothing is known of ``target``.
    """
    check(target)
    major, minor = capability(target)
    properties = _properties(target)
    guards = torch._C._dynamo.guards  # pyright: ignore[reportAttributeAccessIssue]
    device_interface.get_interface_for_device("cuda")  # fills the table that is patched
    replacements = [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "_exchange_device", lambda index: index),
        (torch.cuda, "_maybe_exchange_device", lambda index: index),
        (torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
        # as methods these ask for CUDA, even if a tensor is fake
        (Tensor, "copy_", lambda x, source: torch.ops.aten.copy_.default(x, source)),
        (Tensor, "__invert__", lambda x: torch.ops.aten.bitwise_not.default(x)),
        (guards, "_empty_strided_cuda", _empty_strided),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (triton_heuristics.CachingAutotuner, "precompile", lambda tuner, *_, **__: None),
        (triton_heuristics.CachingAutotuner, "run", _launch),
    ]
    interfaces = {"cuda": _interface(properties)}
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_device)
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        _forget_device()
        yield


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _properties(target: str) -> SimpleNamespace:
    major, minor = capability(target)
    multiprocessors, threads = MULTIPROCESSORS[target]
    shared = compiled.MULTIPROCESSORS[target].shared_a_block
    return SimpleNamespace(
        name=target,
        gcnArchName="",
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        warp_size=32,
    )


def _interface(properties: SimpleNamespace) -> type:
    """What Inductor asks of a kind of device."""

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: properties)

    answers = {
        "Worker": Worker,
        "current_device": 0,
        "device_count": 1,
        "get_compute_capability": 10 * properties.major + properties.minor,
        "get_device_properties": properties,
        "get_raw_stream": 0,
        "is_available": True,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "synchronize": None,
    }
    functions = {
        name: x if name == "Worker" else staticmethod(lambda *_, x=x, **__: x)
        for name, x in answers.items()
    }
    return type("PretendedInterface", (device_interface.CudaInterface,), functions)


def _forget_device() -> None:
    """Clear what Inductor remembers of the GPU that was there."""
    for known in (
        DeviceProperties.create,
        _triton.has_triton,
        utils.get_gpu_type,
        utils.get_max_num_sms,
        utils.is_big_gpu,
        utils.using_b200,
    ):
        known.cache_clear()


def _move(module: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Move a graph, and those within it, to the GPU; gives its ``inputs`` there, which are fake."""
    mode = detect_fake_mode(inputs)
    assert mode is not None

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)

    with mode:
        for graph_module in module.modules():
            if isinstance(graph_module, GraphModule):
                for node in graph_module.graph.nodes:
                    if "device" in node.kwargs:
                        node.kwargs = {**node.kwargs, "device": CUDA}
                    if "val" in node.meta:
                        node.meta["val"] = tree_map(moved, node.meta["val"])
                graph_module.recompile()
        return [moved(x) for x in inputs]


def _launch(tuner: Any, *args, stream: int, **kwargs) -> None:
    """Launch a kernel of Inductor's with the best of its configurations."""

    def launch(config: Any) -> None:
        arguments, grid = tuner._interpret_args_grid(args, config)
        tuner.fn[grid](*arguments, **kwargs, **config.all_kwargs())

    if len(tuner.configs) > 1:
        measure: Callable[..., Any] = driver.active.get_benchmarker()
        best = min(tuner.configs, key=lambda config: measure(functools.partial(launch, config)))
        tuner.configs = [best]
    launch(tuner.configs[0])
