"""``python -m patchpack``: see ``patchpack.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import patchpack
from patchpack.cli import CommandError, demo, info, plan, verify

DEMO_EXTRA = {"PIL", "matplotlib", "rich", "skimage"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is its exit status."""
    parser = argparse.ArgumentParser(prog="python -m patchpack", description=patchpack.__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, info, plan, verify):
        name, summary = module.__name__.rpartition(".")[2], (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name not in DEMO_EXTRA:
            raise
        message = f"{args.command} needs {error.name}: pip install 'patchpack[demo]'"
    print(f"patchpack: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
