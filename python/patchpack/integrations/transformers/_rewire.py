"""Copies of functions in which a global name means something else.

A model of transformers calls its rotary embedding by a global name of its module. Writing to the
module would change every model of that class; a copy of ``forward`` whose globals differ in that
name, set on one instance, changes one layer of one model, whatever else its version does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any


def names_of(function: Callable) -> set[str]:
    """The global names that ``function``, below its decorators, refers to."""
    return {name for inner in _unwrapped(function) for name in inner.__code__.co_names}


def global_of(function: Callable, name: str) -> Any:
    """What ``name`` means to ``function``, below its decorators."""
    return next(
        inner.__globals__[name] for inner in _unwrapped(function) if name in inner.__globals__
    )


def rewired(function: Callable, **names: object) -> Callable:
    """A copy of ``function``, decorated like it, to which global ``names`` mean these values.

    Raises:
        LookupError: ``function`` refers to none of the names, or a decorator holds it in a way that
            cannot be followed.
    """
    if isinstance(function, FunctionType):
        if not names.keys().isdisjoint(function.__code__.co_names):
            # without a name of its own, torch.compile looks globals up here and not in the module
            scope = {key: x for key, x in function.__globals__.items() if key != "__name__"}
            return _copy(function, scope | names, function.__closure__)
        inner = getattr(function, "__wrapped__", None)
        cells = function.__closure__ or ()
        held = [cell for cell in cells if cell.cell_contents is inner]
        if inner is not None and len(held) == 1:
            cell = CellType(rewired(inner, **names))
            closure = tuple(cell if x is held[0] else x for x in cells)
            return _copy(function, function.__globals__, closure)
    raise LookupError(f"{function!r} does not call {', '.join(names)} in a way that is known")


def can_rewire(function: Callable, name: str) -> bool:
    """Whether ``rewired`` can give ``name`` another meaning."""
    try:
        return bool(rewired(function, **{name: None}))
    except LookupError:
        return False


def _unwrapped(function: Callable) -> list[FunctionType]:
    """``function`` and what its decorators wrap, from the outside in."""
    found, inner = [], function
    while isinstance(inner, FunctionType):
        found.append(inner)
        inner = getattr(inner, "__wrapped__", None)
    return found


def _copy(function: FunctionType, scope: dict, closure: tuple | None) -> FunctionType:
    copy = FunctionType(function.__code__, scope, function.__name__, None, closure)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy
