"""The command line, ``python -m patchpack``; one module a subcommand.

A subcommand has ``add_arguments(parser)`` and ``run(args)``, which returns the exit status: 0, or 1
where a check failed. What the user did wrong is a ``CommandError``: one line, and exit status 2.
"""


class CommandError(Exception):
    """What stops a command, as one line for its user."""
