"""Checks of arguments: they read shapes, dtypes and devices, never values on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from patchpack.packing import PackedGrid, is_integer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shape(name: str, x: Tensor, *want: int | None) -> None:
    """``x`` is a tensor whose sizes are ``want``; ``None`` stands for any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be a strided tensor, got a {kind} one")
    fits = x.ndim == len(want)
    for n, w in zip(x.shape, want, strict=False):
        fits = fits and (w is None or n == w)
    if not fits:
        sizes = ", ".join("*" if w is None else str(w) for w in want)
        raise ValueError(f"{name} must have shape [{sizes}], got {list(x.shape)}")


def dtype(name: str, x: Tensor, *want: torch.dtype) -> None:
    """``x`` has one of the dtypes ``want``."""
    if x.dtype not in want:
        names = " or ".join(str(w).removeprefix("torch.") for w in want)
        raise TypeError(f"{name} must be {names}, got {str(x.dtype).removeprefix('torch.')}")


def floating(impl: str, **tensors: Tensor) -> None:
    """All of ``tensors`` share one floating dtype; float64 and tangents are for the reference."""
    (first, x), *rest = tensors.items()
    if impl != "reference" and forward_ad._current_level >= 0:
        for name, y in tensors.items():
            if forward_ad.unpack_dual(y).tangent is not None:
                raise ValueError(
                    f"{name} must have no tangent: forward mode is for impl='reference',"
                    f" got {impl!r}"
                )
    dtype(first, x, *FLOATS, *((torch.float64,) if impl == "reference" else ()))
    for name, y in rest:
        if y.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {x.dtype}, got {y.dtype}")


def same_device(**tensors: Tensor) -> None:
    """All of ``tensors`` are on the device of the first."""
    (first, x), *rest = tensors.items()
    for name, y in rest:
        if y.device != x.device:
            raise ValueError(f"{name} must be on the device of {first}, {x.device}, got {y.device}")


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def integers(name: str, values: Sequence[int]) -> list[int]:
    """``values`` is a sequence of integers."""
    if not isinstance(values, (list, tuple)) or not all(map(is_integer, values)):
        raise TypeError(f"{name} must be a list or tuple of integers, got {values!r}")
    return [int(v) for v in values]


def whole(least: int = 1, /, **values: int) -> list[int]:
    """``values`` as Python integers, which do not overflow as NumPy's do, of ``least`` or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        _limit(name, int(value))
    return [int(value) for value in values.values()]


def numbers(**values: float) -> list[float]:
    """``values`` as Python integers and floats, above zero."""
    found = []
    for name, value in values.items():
        positive(name, value)
        found.append(int(value) if isinstance(value, Integral) else float(value))
        _limit(name, found[-1])
    return found


def _limit(name: str, value: float) -> None:
    if value >= 2**63:  # far from where a product of some overflows a float
        raise ValueError(f"{name} must be below 2**63, got {value}")


def finite(name: str, values: Sequence[float]) -> list[float]:
    """``values`` as floats: a list, tuple or NumPy array of numbers that fit into float32."""
    if not isinstance(values, Iterable) or not all(map(_is_number, values)):
        raise TypeError(f"{name} must be numbers, got {values!r}")
    found = [float(value) for value in values]
    if not all(abs(value) < 2**127 for value in found):  # NaN fails
        raise ValueError(f"{name} must be finite, below 2**127, got {values!r}")
    return found


def images(name: str, values: Sequence[Tensor]) -> list[Tensor]:
    """``values`` is a list or tuple of tensors ``[C, H, W]`` or ``[F, C, H, W]`` on one device."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(values).__name__}")
    for i, x in enumerate(values):
        ndim = x.ndim if isinstance(x, Tensor) and x.ndim == 4 else 3
        shape(f"{name}[{i}]", x, *[None] * ndim)
    if values:
        same_device(**{f"{name}[{i}]": x for i, x in enumerate(values)})
    return list(values)


def flags(**values: bool) -> None:
    """All of ``values`` are true or false, and nothing that merely counts as it."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")


def window(name: str, sides: tuple[int, int]) -> list[int]:
    """``sides`` is two integers of -1 (no limit) or more; what no segment reaches is no limit."""
    pair = integers(name, sides)
    if len(pair) != 2 or min(pair) < -1:
        raise ValueError(f"{name} must be two integers of -1 or more, got {sides}")
    return [-1 if side >= 2**30 else side for side in pair]  # sums of int32 hold


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def positive(name: str, value: float) -> None:
    """``value`` is a number above zero that fits into float32."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    if value >= 2**127:  # the end of float32
        raise ValueError(f"{name} must be below 2**127, got {value}")


def heads(impl: str, q: Tensor, k: Tensor) -> None:
    """``q`` and ``k`` are heads ``[T, H, D]`` of the same tokens, head size, dtype and device."""
    shape("q", q, None, None, None)
    shape("k", k, q.shape[0], None, q.shape[2])
    floating(impl, q=q, k=k)
    same_device(q=q, k=k)


def grid_of(name: str, x: Tensor, grid: PackedGrid, called: str = "grid") -> None:
    """``grid``, an argument of the name ``called``, describes ``x``, on its device."""
    if not isinstance(grid, PackedGrid):
        raise TypeError(f"{called} must be a PackedGrid, got {type(grid).__name__}")
    if torch.compiler.is_compiling():  # of a grid that is made in the graph
        torch._check(x.shape[0] == grid.num_tokens)
    elif x.shape[0] != grid.num_tokens:
        raise ValueError(
            f"{name} must have the {grid.num_tokens} tokens of {called}, got {list(x.shape)}"
        )
    if grid.geometry.device != x.device:
        raise ValueError(
            f"{called} must be on the device of {name}, {x.device}, got {grid.geometry.device};"
            f" use {called}.to(...)"
        )
