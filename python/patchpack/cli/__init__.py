"""The command line, ``python -m patchpack``; one module a subcommand.

A subcommand has ``add_arguments(parser)`` and ``run(args)``, which returns the exit status: 0, or 1
where a check failed. What the user or the machine did wrong is a ``CommandError``: one line, and
exit status 2.
"""

import json
import math
from typing import Any


class CommandError(Exception):
    """What stops a command, as one line for its user."""


def printable(text: str) -> str:
    """``text`` on one line, without what a terminal would take for commands."""
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def to_json(value: Any) -> str:
    """``value`` as strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
