"""Who takes part, and rows that change hands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def check_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group that is meant, by default that of all processes."""
    if not dist.is_initialized():
        raise ValueError("group must exist: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
    return group


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.way_back = receive, send, group
        received = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), receive, send, group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.way_back), None, None, None


def exchange(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send ``send[r]`` rows of ``x`` to rank ``r``, in order, and receive ``receive[r]`` of its.

    Gradients go the way back.
    """
    return _Exchange.apply(x, list(send), list(receive), group)
