"""``python -m patchpack``: see ``patchpack.cli``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from patchpack.cli import CommandError, printable

COMMANDS = {
    "demo": "four systems on the same photos and clip, fused and by the reference; training",
    "info": "versions, and which implementation of which op is available here",
    "plan": "what a system makes of images and clips: grids and tokens",
    "verify": "check on this machine that every op does what it promises",
}
DEMO_EXTRA = ("av", "PIL", "matplotlib", "rich", "skimage")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m patchpack",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<8}{summary}" for name, summary in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="COMMAND --help lists them")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # names may have what the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # only now, so that `info` runs where the others lack what they need
        module = importlib.import_module(f"patchpack.cli.{args.command}")
        command = argparse.ArgumentParser(
            prog=f"{parser.prog} {args.command}", description=module.__doc__
        )
        module.add_arguments(command)
        return module.run(command.parse_args(args.arguments))
    except CommandError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name not in DEMO_EXTRA:
            raise
        message = f"{args.command} needs {error.name}: pip install 'patchpack[demo]'"
    print(f"patchpack: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
