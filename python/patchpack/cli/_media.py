"""Reads the images and clips that a user names, and plans them as a system does."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageOps
from PIL.Image import DecompressionBombError, DecompressionBombWarning
from rich.table import Table
from rich.text import Text

from patchpack import video
from patchpack.cli import CommandError, printable
from patchpack.systems._images import to_rgb
from patchpack.systems._plan import Plan

# the four of the literature, and their successors
SYSTEMS = {
    "internvl": "InternVL 1.5",
    "llava_onevision": "LLaVA-OneVision",
    "oryx": "Oryx",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "siglip2": "SigLIP2",
    "moonvit": "MoonViT",
    "pixtral": "Pixtral",
}
CLIPS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


@dataclass(frozen=True)
class Medium:
    """An image, upright and 8-bit RGB as a system sees it before it resizes, or a clip."""

    path: Path
    height: int
    width: int
    image: Image.Image | None
    clip: video.VideoInfo | None

    @property
    def name(self) -> str:
        return printable(self.path.stem)

    def frames(self, plan: Plan) -> Image.Image | list[Image.Image]:
        """What ``preprocess`` wants for ``plan``."""
        if self.image is not None:
            return self.image
        return self.read(plan.frame_indices or ())

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Frames of the clip."""
        try:
            return list(video.read_frames(self.path, indices))
        except (OSError, ValueError) as error:
            raise _unusable(self.path, error) from error


def system(name: str) -> ModuleType:
    """The module of a system."""
    return importlib.import_module(f"patchpack.systems.{name}")


def read(paths: Sequence[str | Path]) -> list[Medium]:
    """Read images, upright as their EXIF data says, of several frames the first; probe clips."""
    media = []
    for path in map(Path, paths):
        try:
            if path.suffix.lower() in CLIPS:
                clip = video.probe(path)
                media.append(Medium(path, clip.height, clip.width, None, clip))
                continue
            with warnings.catch_warnings(), Image.open(path) as file:
                warnings.simplefilter("ignore", DecompressionBombWarning)  # an error if far larger
                image = to_rgb("image", ImageOps.exif_transpose(file))
            media.append(Medium(path, image.height, image.width, image, None))
        except (OSError, SyntaxError, ValueError, RuntimeError, DecompressionBombError) as error:
            raise _unusable(path, error) from error
    return media


def plan(media: Sequence[Medium], name: str, **options: Any) -> list[Any]:
    """What the system makes of each; what it has no rules for is a ``CommandError``."""
    module = system(name)
    plans = []
    for medium in media:
        function = module.plan if medium.clip is None else getattr(module, "plan_video", None)
        if function is None:
            raise CommandError(
                f"{SYSTEMS[name]} cannot use {medium.path}: it has no rules for video"
            )
        unknown = set(options) - set(inspect.signature(function).parameters)
        if unknown:
            names = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(unknown))
            raise CommandError(f"{SYSTEMS[name]} has no {names}")
        clip = medium.clip
        size = (medium.height, medium.width)
        try:
            of = size if clip is None else (clip.num_frames, clip.fps, *size)
            plans.append(function(*of, **options))
        except ValueError as error:
            raise CommandError(f"{SYSTEMS[name]} cannot use {medium.path}: {error}") from error
    return plans


def _unusable(path: Path, error: Exception) -> CommandError:
    reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{path} ")
    return CommandError(f"cannot use {path}: {reason}")


def as_dict(medium: Medium, plan: Plan) -> dict[str, Any]:
    return {
        "name": medium.name,
        "height": medium.height,
        "width": medium.width,
        "frames": None if medium.clip is None else plan.num_frames,
        "grids": [list(grid) for grid in plan.grids],
        "vit_tokens": plan.vit_tokens,
        "llm_tokens": plan.llm_tokens,
        "markup_tokens": plan.markup_tokens,
    }


def grids_of(plan: Plan) -> str:
    """The grids of a plan in words, equal ones counted."""
    counted = Counter("x".join(map(str, grid)) for grid in plan.grids)
    return ", ".join(f"{n} of {grid}" if n > 1 else grid for grid, n in counted.items())


def table(media: Sequence[Medium], plans: Sequence[Plan], title: str | None = None) -> Table:
    """One row an image or clip, and their sums."""
    table = Table(title=title, show_footer=True, title_justify="left")
    table.add_column("image", overflow="fold")
    columns = ("size", "frames", "grids", "ViT\ntokens", "LLM\ntokens", "markup")
    sums = [
        str(sum(getattr(plan, name) for plan in plans))
        for name in ("vit_tokens", "llm_tokens", "markup_tokens")
    ]
    for name, footer in zip(columns, ["", "", "", *sums], strict=True):
        table.add_column(name, footer=footer, justify="right")
    for medium, plan in zip(media, plans, strict=True):
        counts = (plan.vit_tokens, plan.llm_tokens, plan.markup_tokens)
        frames = "" if medium.clip is None else f"{plan.num_frames} of {medium.clip.num_frames}"
        cells = (f"{medium.height}x{medium.width}", frames, grids_of(plan), *map(str, counts))
        table.add_row(Text(medium.name), *cells)  # a name is no markup
    return table
