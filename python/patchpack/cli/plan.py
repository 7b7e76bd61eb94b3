"""Show what a system makes of images and clips: grids and tokens."""

from __future__ import annotations

import argparse

from rich.console import Console

from patchpack.cli import _media, to_json


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
    names = list(_media.SYSTEMS) if args.system == "all" else [args.system]
    if args.system == "all" and any(medium.clip is not None for medium in media):
        names = [name for name in names if hasattr(_media.system(name), "plan_video")]
    plans = {name: _media.plan(media, name, **limits) for name in names}
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
