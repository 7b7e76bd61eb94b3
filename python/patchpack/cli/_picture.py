"""Draws the demo: photos and their patches, both packed sequences, positions and losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from patchpack.cli._demo_model import Batch
from patchpack.cli._images import Photo

INK, FAINT, PAPER = "#22262f", "#8b93a3", "#f3f4f7"
TIME, HEIGHT, WIDTH = "#22262f", "#00897b", "#e4572e"
COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951"),
    *("#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"),
)
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}
# inches
PAGE, MARGIN, GAP = 15.0, 0.6, 0.25
PHOTO_ROW, CAPTION = 2.4, 0.5
STRIP, PANEL, POSITIONS = 0.22, 3.9, 2.3


class Page:
    """A figure that is filled from the top, in inches."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(PAGE, height), facecolor="white")
        self.height = height

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / PAGE, bottom / self.height, width / PAGE, height / self.height)
        )


def draw(
    path: Path, photos: Sequence[Photo], batch: Batch, loss: dict[str, Sequence[float]]
) -> None:
    """Write the picture to ``path``."""
    rows = _justified(photos)
    heights = [_row_height([photos[i] for i in row]) for row in rows]
    below = MARGIN + 0.5 + sum(heights) + len(rows) * (CAPTION + GAP)
    with matplotlib.rc_context(STYLE):
        page = Page(below + PANEL + POSITIONS + 2.9)
        page.figure.text(
            MARGIN / PAGE,
            1 - 0.5 / page.height,
            "Photos at their own resolution, packed into one sequence",
            size=17,
            weight="bold",
        )
        top = MARGIN + 0.5
        for row, height in zip(rows, heights, strict=True):
            left = MARGIN
            for i in row:
                width = height * _aspect(photos[i])
                _photo(page.axes(left, top + CAPTION, width, height), photos[i], COLOURS[i % 10])
                left += width + GAP
            top += CAPTION + height + GAP

        top = below + 0.6
        step = PANEL + 0.95
        _vision_mask(page, MARGIN, top, batch)
        _language_mask(page, MARGIN + step, top, batch)
        left = MARGIN + 2 * step
        _losses(page.axes(left, top, PAGE - MARGIN - left, PANEL + STRIP + 0.05), loss)
        _positions(page, MARGIN, top + PANEL + 1.2, batch)
        page.figure.savefig(path, dpi=130)


def _aspect(photo: Photo) -> float:
    height, width = photo.plan.resized
    return width / height


def _justified(photos: Sequence[Photo]) -> list[list[int]]:
    """Photos, by number, in rows of about equal length."""
    aspects = np.array([_aspect(photo) for photo in photos])
    num_rows = max(1, round(aspects.sum() * PHOTO_ROW / (PAGE - 2 * MARGIN)))
    middle = aspects.cumsum() - aspects / 2
    row = np.minimum(middle * num_rows // aspects.sum(), num_rows - 1)
    return [np.flatnonzero(row == r).tolist() for r in np.unique(row)]


def _row_height(row: Sequence[Photo]) -> float:
    """The height at which a row of photos is as wide as the page; not too high where it is short."""
    width = PAGE - 2 * MARGIN - (len(row) - 1) * GAP
    return min(width / sum(_aspect(photo) for photo in row), 1.5 * PHOTO_ROW)


def _photo(axes: Axes, photo: Photo, colour: str) -> None:
    """The resized photo with a line around every patch, and a strong one around every token."""
    plan = photo.plan
    height, width = plan.resized
    axes.imshow(photo.image.convert("RGB").resize((width, height)), aspect="auto")
    for side, alpha, line in (
        (plan.patch_size, 0.35, 0.4),
        (plan.patch_size * plan.merge_size, 0.9, 0.8),
    ):
        axes.vlines(np.arange(0, width + 1, side) - 0.5, -0.5, height - 0.5, colour, lw=line, alpha=alpha)
        axes.hlines(np.arange(0, height + 1, side) - 0.5, -0.5, width - 0.5, colour, lw=line, alpha=alpha)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_axis_off()
    axes.annotate(photo.name, (0, 1), (0, 15), "axes fraction", "offset points", color=colour, weight="bold")
    _, rows, cols = plan.grid_thw
    sizes = f"{plan.height}×{plan.width} to {rows}×{cols} patches, {plan.llm_tokens} tokens"
    axes.annotate(sizes, (0, 1), (0, 4), "axes fraction", "offset points", size=8)


def _strip(axes: Axes, bounds: Sequence[int], views: Sequence[tuple[int, int, float]] = ()) -> None:
    """The packed sequence: one colour a photo. ``views`` are stretches and how strong they are."""
    for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        axes.add_patch(Rectangle((begin, 0), end - begin, 1, color=COLOURS[i % 10], lw=0))
    for begin, end, shade in views:
        axes.add_patch(Rectangle((begin, 0), end - begin, 1, color="white", alpha=1 - shade, lw=0))
    axes.set(xlim=(0, bounds[-1]), ylim=(0, 1))
    axes.set_axis_off()
