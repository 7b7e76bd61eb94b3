"""Reads and plans the images that a user names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from PIL.Image import DecompressionBombError, DecompressionBombWarning
from rich.table import Table
from rich.text import Text

from patchpack.cli import CommandError, printable
from patchpack.systems import qwen2_vl
from patchpack.systems._images import to_rgb


@dataclass(frozen=True)
class Photo:
    """An image, 8-bit RGB as the system sees it before it resizes, and what becomes of it."""

    name: str
    image: Image.Image
    plan: qwen2_vl.Plan

    def as_dict(self) -> dict:
        return {
            "name": self.name,
            "height": self.plan.height,
            "width": self.plan.width,
            "resized": list(self.plan.resized),
            "grid_thw": list(self.plan.grid_thw),
            "vit_tokens": self.plan.vit_tokens,
            "llm_tokens": self.plan.llm_tokens,
        }


def read(paths: Sequence[str | Path], min_pixels: int | None, max_pixels: int | None):
    """Read and plan images, upright as their EXIF data says; of several frames the first."""
    photos = []
    for path in map(Path, paths):
        try:
            with warnings.catch_warnings(), Image.open(path) as file:
                warnings.simplefilter("ignore", DecompressionBombWarning)  # an error if far larger
                image = to_rgb("image", ImageOps.exif_transpose(file))
            plan = qwen2_vl.plan(
                image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels
            )
        except (OSError, SyntaxError, ValueError, RuntimeError, DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CommandError(f"cannot use {path}: {reason}") from error
        photos.append(Photo(printable(path.stem), image, plan))
    return photos


def table(photos: Sequence[Photo]) -> Table:
    """One row an image, and their sums."""
    table = Table(show_footer=True)
    table.add_column("image", overflow="fold")
    columns = ("size", "resized", "grid", "ViT\ntokens", "LLM\ntokens", "markup")
    plans = [photo.plan for photo in photos]
    sums = [
        str(sum(getattr(plan, name) for plan in plans))
        for name in ("vit_tokens", "llm_tokens", "markup_tokens")
    ]
    for name, footer in zip(columns, ["", "", "", *sums], strict=True):
        table.add_column(name, footer=footer, justify="right")
    for photo in photos:
        plan = photo.plan
        sizes = ((plan.height, plan.width), plan.resized, plan.grid_thw)
        counts = (plan.vit_tokens, plan.llm_tokens, plan.markup_tokens)
        cells = (*("x".join(map(str, size)) for size in sizes), *map(str, counts))
        table.add_row(Text(photo.name), *cells)  # a name is no markup
    return table
