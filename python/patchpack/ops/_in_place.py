"""What ``rope_2d_`` and ``mrope_`` share: the heads of a buffer, and autograd of turning them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchpack import _check

Rotate = Callable[[Tensor, Tensor, bool], None]


def check(impl: str, qkv: Tensor, num_heads: Sequence[int] | None) -> None:
    """``qkv`` is a buffer ``[T, 3, H, D]``, or ``[T, Hq + 2 Hk, D]`` that can be written to."""
    if num_heads is None:
        _check.shape("qkv", qkv, None, 3, None, None)
    else:
        counts = _check.integers("num_heads", num_heads)
        if len(counts) != 2 or min(counts) < 1:
            raise ValueError(f"num_heads must be two counts of 1 or more, got {num_heads}")
        _check.shape("qkv", qkv, None, counts[0] + 2 * counts[1], None)
    _check.floating(impl, qkv=qkv)
    placements = getattr(qkv, "placements", ())  # of a DTensor
    if any(placement.is_shard(1) for placement in placements):
        # its heads would be copies, and what is written there lost
        raise ValueError(f"qkv must not be sharded on dimension 1, got {placements}")
    if qkv.shape[-1] > 1 and qkv.stride(-1) != 1:
        raise ValueError(
            f"qkv must have a contiguous last dimension, got strides {list(qkv.stride())}"
        )
    if not all(_strides_over_the_rest(qkv, dim) for dim in range(qkv.ndim)):
        raise ValueError(
            "qkv must have elements that share no memory,"
            f" got strides {list(qkv.stride())} of sizes {list(qkv.shape)}"
        )


def _strides_over_the_rest(x: Tensor, dim: int) -> bool:
    """Whether a step along ``dim`` leaves all that the dimensions of smaller strides reach."""
    reach = 1
    for other in range(x.ndim):
        if other != dim and x.stride(other) <= x.stride(dim):
            reach += x.stride(other) * (x.shape[other] - 1)
    return x.shape[dim] <= 1 or x.stride(dim) >= reach


def heads_of(qkv: Tensor, num_heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Views of the heads of queries and keys, ``[T, Hq, D]`` and ``[T, Hk, D]``."""
    if num_heads is None:
        return qkv.select(1, 0), qkv.select(1, 1)
    return qkv.narrow(1, 0, num_heads[0]), qkv.narrow(1, num_heads[0], num_heads[1])


def is_composed(impl: str, qkv: Tensor) -> bool:
    """Whether heads are turned elsewhere and copied back: what is not traced tells autograd."""
    traced = torch.compiler.is_compiling() and torch.is_grad_enabled() and qkv.requires_grad
    return impl == "reference" or traced


def copy_(q: Tensor, k: Tensor, turned: tuple[Tensor, Tensor]) -> None:
    """Write the rotated heads over ``q`` and ``k``."""
    q.copy_(turned[0])
    k.copy_(turned[1])


class _Turned(torch.autograd.Function):
    """Has autograd refuse or record what will be written, before anything is."""

    @staticmethod
    def forward(qkv, rotate, where, inverse):
        return qkv

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, ctx.rotate, where, ctx.inverse = inputs
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(where)

    @staticmethod
    def backward(ctx, grad):
        (where,) = ctx.saved_tensors
        # others may hold grad; a rotation is orthogonal, so its adjoint is the opposite rotation
        grad = grad.clone(memory_format=torch.contiguous_format)
        return turn_(grad, ctx.rotate, where, not ctx.inverse), None, None, None


def turn_(qkv: Tensor, rotate: Rotate, where: Tensor, inverse: bool = False) -> Tensor:
    """``rotate(qkv, where, inverse)``, which writes into ``qkv``, as one operation of autograd."""
    if not torch.compiler.is_compiling():
        qkv = _Turned.apply(qkv, rotate, where, inverse)
    with torch.no_grad():
        rotate(qkv, where, inverse)
    return qkv
