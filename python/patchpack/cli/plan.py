"""Show what a system makes of images and clips: grids and tokens.

With ``--system all`` those that have no rules for one of them, or not the options, are left out.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from patchpack.cli import CommandError, _media, printable, to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image or a clip")
    parser.add_argument("--system", choices=(*_media.SYSTEMS, "all"), default="qwen2_vl")
    parser.add_argument("--min-pixels", type=int, help="smallest area after resizing")
    parser.add_argument("--max-pixels", type=int, help="largest area after resizing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    limits = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    limits = {name: value for name, value in limits.items() if value is not None}
    media = _media.read(args.paths)
    plans = {}
    for name in _media.SYSTEMS if args.system == "all" else [args.system]:
        try:
            plans[name] = _media.plan(media, name, **limits)
        except CommandError as error:
            if args.system != "all":
                raise
            print(f"patchpack: {printable(str(error))}", file=sys.stderr)
    if not plans:
        raise CommandError("no system can use all of them")
    if args.json:
        documents = {
            name: [_media.as_dict(*pair) for pair in zip(media, of, strict=True)]
            for name, of in plans.items()
        }
        print(to_json(documents if args.system == "all" else documents[args.system]))
        return 0
    for name, of in plans.items():
        Console().print(_media.table(media, of, _media.SYSTEMS[name]))
    return 0
