"""Show what a system makes of images: their size, grid and tokens."""

from __future__ import annotations

import argparse

from rich.console import Console

from patchpack.cli import _images, to_json

SYSTEMS = ("qwen2_vl",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image")
    parser.add_argument("--system", choices=SYSTEMS, default=SYSTEMS[0])
    parser.add_argument("--min-pixels", type=int, help="smallest area after resizing")
    parser.add_argument("--max-pixels", type=int, help="largest area after resizing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    photos = _images.read(args.paths, args.min_pixels, args.max_pixels)
    if args.json:
        plans = [p.as_dict() | {"markup_tokens": p.plan.markup_tokens} for p in photos]
        print(to_json(plans))
    else:
        Console().print(_images.table(photos))
    return 0
