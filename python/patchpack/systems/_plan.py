"""What the plans of all systems answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar


class Plan:
    """What becomes of one image or video; every system has its own, with these answers.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        frame_indices: Which frames of a video are used; ``None`` for an image.
    """

    height: int
    width: int
    frame_indices: tuple[int, ...] | None

    @property
    def num_frames(self) -> int:
        """Frames that are read: one for an image."""
        return 1 if self.frame_indices is None else len(self.frame_indices)

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """What the vision transformer sees, in order: frames, rows and columns, in patches."""
        raise NotImplementedError

    @property
    def vit_tokens(self) -> int:
        """Patches, the tokens of the vision transformer."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def llm_tokens(self) -> int:
        """Tokens of the language model that the image or video becomes, newlines included."""
        raise NotImplementedError

    @property
    def markup_tokens(self) -> int:
        """Tokens of text around them."""
        raise NotImplementedError

    @property
    def total_tokens(self) -> int:
        """What the image or video takes of the language model's context."""
        return self.llm_tokens + self.markup_tokens


P = TypeVar("P", bound=Plan)


def listed(plans: Iterable[P], kind: type[P]) -> list[P]:
    """``plans`` as a list, all of them of ``kind``."""
    if not isinstance(plans, Iterable):
        raise TypeError(f"plans must be a sequence of plans, got {type(plans).__name__}")
    plans = list(plans)
    for i, p in enumerate(plans):
        if not isinstance(p, kind):
            raise TypeError(f"plans[{i}] must be a {kind.__name__}, got {type(p).__name__}")
    return plans


def shared(plans: Iterable[Plan], name: str, default: Any) -> Any:
    """The attribute ``name`` that all plans of a batch share; without plans, ``default``."""
    values = {getattr(p, name) for p in plans} or {default}
    if len(values) > 1:
        raise ValueError(f"plans must share {name}, got {sorted(values)}")
    return values.pop()
