"""What torch makes of a function: exported programs, and the operators that ran."""

import io
import logging

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def exported(function, inputs, others):
    """What was exported with ``inputs`` and saved, loaded again."""

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    module = function if isinstance(function, torch.nn.Module) else Module()
    more = torch.export.AdditionalInputs()
    more.add(others)
    log = logging.getLogger("torch.export.dynamic_shapes")
    log.disabled = True  # torch warns of what it does itself: None for sizes that are the same
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=more)
    finally:
        log.disabled = False
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


class Recorder(TorchDispatchMode):
    """Which operators run, on which shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = torch.utils._pytree.tree_leaves((args, kwargs, out))
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in found]
        self.calls.append((str(func), shapes))
        return out
