"""A GPU that is not there: a process with this folder on its path believes that it has one.

Its tensors lie on the CPU, where kernels are interpreted, and its events tell the host's clock.
The libraries that run on GPUs alone are ``peers``.
"""

import sys
import time
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import SimpleNamespace

import peers
import torch
from torch.overrides import TorchFunctionMode
from triton.backends.nvidia.driver import CudaDriver


class OnTheCpu(TorchFunctionMode):
    """What is asked to be on a CUDA device is on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [self.device(x) for x in args]
        return func(*args, **{name: self.device(x) for name, x in (kwargs or {}).items()})

    @staticmethod
    def device(x):
        return "cpu" if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)


PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=132, uuid="0-1")

torch.version.cuda = "13.0"
for name, value in {
    "is_available": True,
    "device_count": 1,
    "get_device_name": "Pretended GPU",
    "get_device_properties": PROPERTIES,
    "mem_get_info": (70 * 2**30, 80 * 2**30),
    "device": nullcontext(),
    "synchronize": None,
    "empty_cache": None,
    "get_sync_debug_mode": 0,
    "set_sync_debug_mode": None,
}.items():
    setattr(torch.cuda, name, lambda *_, value=value: value)
torch.cuda.Event = Event
CudaDriver.is_active = staticmethod(lambda: False)  # Triton does not look for it
OnTheCpu().__enter__()

for name, functions in peers.MODULES.items():
    sys.modules[name] = module_from_spec(ModuleSpec(name, None))
    vars(sys.modules[name]).update(functions)
