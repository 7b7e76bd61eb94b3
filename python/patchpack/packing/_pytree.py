"""How ``torch.export`` and ``torch.func`` take apart what describes a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def register(
    cls: type,
    *,
    tensors: Sequence[str],
    numbers: Sequence[str],
    options: Sequence[str] = (),
    rest: Callable[[Any], dict[str, Any]],
) -> None:
    """Make ``cls`` a node of pytrees, and safe to load from files of weights.

    Args:
        cls: Whose instances hold what the other arguments name.
        tensors: Attributes that are leaves.
        numbers: Those that differ between batches. As leaves they are the lengths of empty tensors,
            so that exported programs take any. What was put together keeps them as ``_lengths``,
            which is ``None`` otherwise: taken apart again, they are what export knows.
        options: Those that are the same for all batches.
        rest: What else an instance holds that has those.
    """

    def flatten(x: Any) -> tuple[list[Any], list[Any]]:
        lengths = x._lengths
        if lengths is None:
            lengths = tuple(torch.empty(getattr(x, name), 0, device="cpu") for name in numbers)
        leaves = [*(getattr(x, name) for name in tensors), *lengths]
        return leaves, [getattr(x, name) for name in options]

    def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
        leaves, context = flatten(x)
        keys = map(pytree.GetAttrKey, (*tensors, *numbers))
        return list(zip(keys, leaves, strict=True)), context

    def unflatten(leaves: Iterable[Any], context: Sequence[Any]) -> Any:
        leaves = list(leaves)
        lengths = tuple(leaves[len(tensors) :])
        # leaves are anything, where something was made of each
        found = [n.shape[0] if isinstance(n, Tensor) else n for n in lengths]
        values = [*leaves[: len(tensors)], *found, *context]
        x = object.__new__(cls)
        for name, value in zip((*tensors, *numbers, *options), values, strict=True):
            object.__setattr__(x, name, value)
        for name, value in {"_lengths": lengths, **rest(x)}.items():
            object.__setattr__(x, name, value)
        return x

    name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=name,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls])
