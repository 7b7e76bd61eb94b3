"""What ``apply_to`` does to a model: edits of attributes of instances, which can be undone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

from torch import nn


class Edit(NamedTuple):
    """One attribute of one instance.

    Attributes:
        op: Which of ``OPS`` it is for.
        path: Where in the model, as ``named_modules`` has it.
        owner: The module, or its configuration.
        name: The attribute.
        value: What it becomes.
        what: In words.
    """

    op: str
    path: str
    owner: Any
    name: str
    value: Any
    what: str


class Left(NamedTuple):
    """What was not replaced.

    Attributes:
        op: Which of ``OPS`` it would have been.
        path: Where in the model.
        why: In words.
        strange: Whether its code is like none that is known, so that a known model is refused.
    """

    op: str
    path: str
    why: str
    strange: bool = False


class Context(NamedTuple):
    """What the caller of ``apply_to`` wants."""

    ops: frozenset[str]
    impl: str | None


def method(function: Callable, owner: Any, name: str = "forward") -> MethodType:
    """``function`` as a method of one instance, with the signature of what it stands in for.

    ``copy.deepcopy`` binds it to the copy.
    """

    @functools.wraps(getattr(type(owner), name))
    def stand_in(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return MethodType(stand_in, owner)


def is_applied(module: Any) -> bool:
    """Whether an attribute of ``module`` is a ``method`` from here."""
    functions = (getattr(x, "__func__", None) for x in vars(module).values())
    return any(getattr(x, "__code__", None) is _STAND_IN for x in functions)


_STAND_IN = next(x for x in method.__code__.co_consts if hasattr(x, "co_code"))
_NOTHING = object()


@dataclass(eq=False)
class Report:
    """What ``apply_to`` replaced and left, and the way back.

    Attributes:
        model: The model.
        replaced: Every attribute that was set, in order.
        left: What stays as it was, and why.
    """

    model: nn.Module
    replaced: tuple[Edit, ...]
    left: tuple[Left, ...]
    _before: list[Any] = field(default_factory=list, repr=False)

    @property
    def ops(self) -> frozenset[str]:
        """Which of ``OPS`` are in use somewhere in the model."""
        return frozenset(edit.op for edit in self.replaced if edit.op)

    def undo(self) -> None:
        """Make the model what it was, its configuration included. Does nothing a second time."""
        done = list(zip(self.replaced, self._before, strict=False))  # all, or those before an error
        for edit, before in reversed(done):
            if before is _NOTHING:
                vars(edit.owner).pop(edit.name, None)
            else:
                setattr(edit.owner, edit.name, before)
        self._before.clear()

    def _do(self) -> Report:
        try:
            for edit in self.replaced:
                before = vars(edit.owner).get(edit.name, _NOTHING)
                setattr(edit.owner, edit.name, edit.value)
                self._before.append(before)
        except BaseException:
            self.undo()
            raise
        return self

    def __str__(self) -> str:
        counts: dict[tuple[str, str, str], list[str]] = {}
        for edit in self.replaced:
            if edit.what:
                generic = ".".join("*" if part.isdigit() else part for part in edit.path.split("."))
                counts.setdefault((edit.op, generic, edit.what), []).append(edit.path)
        lines = [f"{type(self.model).__name__}: {len(counts)} kinds of places replaced"]
        for (op, path, what), paths in counts.items():
            times = f" ({len(paths)} of them)" if len(paths) > 1 else ""
            lines.append(f"  {op}: {path or 'the model'}{times}: {what}")
        if self.left:
            lines.append("left as they were:")
        lines += [f"  {left.op}: {left.path or 'the model'}: {left.why}" for left in self.left]
        return "\n".join(lines)
