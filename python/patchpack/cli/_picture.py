"""Draws the training: photos and their patches, both packed sequences, positions and losses."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator

from patchpack.cli._demo_model import Batch, Photo

INK, FAINT, PAPER = "#22262f", "#8b93a3", "#f3f4f7"
FUSED, REFERENCE = "#22262f", "#efb118"
AXES = {"time": "#22262f", "height": "#00897b", "width": "#e4572e"}
COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951"),
    *("#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"),
)
STYLE: dict[Any, Any] = {
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
PAGE, MARGIN, HEADER, GAP = 15.0, 0.75, 1.3, 0.25
PHOTO_ROW, CAPTION = 2.4, 0.45
STRIP, PANEL, POSITIONS = 0.2, 4.0, 2.4
PANEL_TITLE, PANEL_FOOT = 0.9, 0.5


def draw(
    path: Path, photos: Sequence[Photo], batch: Batch, loss: Mapping[str, Sequence[float]]
) -> None:
    """Write the picture to ``path``."""
    rows = _justified(photos)
    heights = [_row_height([photos[i] for i in row]) for row in rows]
    colours = _cycle(len(photos))
    panels = HEADER + sum(heights) + len(rows) * (CAPTION + GAP) + PANEL_TITLE
    positions = panels + PANEL + PANEL_FOOT + PANEL_TITLE
    with matplotlib.rc_context(STYLE):
        page = Page(PAGE, positions + POSITIONS + MARGIN)
        page.text(
            MARGIN,
            0.75,
            "Photos at their own resolution, packed into one sequence",
            size=17,
            weight="bold",
        )
        page.text(
            MARGIN,
            1.05,
            "height x width in pixels → rows x columns of patches → tokens of the language model",
            color=FAINT,
        )
        top = HEADER
        for row, height in zip(rows, heights, strict=True):
            left = MARGIN
            for i in row:
                width = height * _aspect(photos[i])
                _photo(page.axes(left, top + CAPTION, width, height), photos[i], colours[i])
                left += width + GAP
            top += CAPTION + height + GAP

        step = PANEL + 0.85
        _vision_mask(*page.panel(MARGIN, panels, PANEL, PANEL), batch)
        _language_mask(*page.panel(MARGIN + step, panels, PANEL, PANEL), batch)
        _losses(page.axes(MARGIN + 2 * step, panels, PAGE - 2 * (MARGIN + step), PANEL), loss)
        _positions(*page.panel(MARGIN, positions, PAGE - 2 * MARGIN, POSITIONS), batch)
        with warnings.catch_warnings():  # names may be in any script, and fonts are not
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            page.figure.savefig(path, dpi=110)


class Page:
    """A figure laid out in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def text(self, left: float, top: float, text: str, **style) -> None:
        place = left / self.width, 1 - top / self.height
        self.figure.text(*place, text, va="baseline", **style)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def panel(self, left: float, top: float, width: float, height: float) -> tuple[Axes, Axes]:
        """A panel and the strip above it."""
        strip = self.axes(left, top - STRIP - 0.05, width, STRIP)
        return self.axes(left, top, width, height), strip


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


# Photos ------------------------------------------------------------------------------------------


def _aspect(photo: Photo) -> float:
    """Width over height of the room for a photo; a thin one leaves room for its caption."""
    height, width = photo.plan.resized
    return max(width / height, 0.65)


def _justified(photos: Sequence[Photo]) -> list[list[int]]:
    """Photos, by number, in rows of about equal length."""
    aspects = np.array([_aspect(photo) for photo in photos])
    num_rows = max(1, round(aspects.sum() * PHOTO_ROW / (PAGE - 2 * MARGIN)))
    middle = aspects.cumsum() - aspects / 2
    row = middle * num_rows // aspects.sum()
    return [np.flatnonzero(row == r).tolist() for r in np.unique(row)]


def _row_height(row: Sequence[Photo]) -> float:
    """Where a row is as wide as the page, but no height to stare at where it is short."""
    width = PAGE - 2 * MARGIN - (len(row) - 1) * GAP
    return min(width / sum(map(_aspect, row)), 1.5 * PHOTO_ROW)


def _photo(axes: Axes, photo: Photo, colour: str) -> None:
    """The resized photo with a thin line around every patch and a strong one around every token."""
    plan = photo.plan
    height, width = plan.resized
    axes.imshow(photo.image.resize((width, height)), extent=(0, width, height, 0))
    patch, token = plan.patch_size, plan.patch_size * plan.merge_size
    for side, line, alpha in ((patch, 0.4, 0.4), (token, 0.8, 0.9)):
        x, y = np.arange(0, width + 1, side), np.arange(0, height + 1, side)
        axes.vlines(x, 0, height, colour, lw=line, alpha=alpha)
        axes.hlines(y, 0, width, colour, lw=line, alpha=alpha)
    axes.set(xlim=(0, width), ylim=(height, 0), anchor="W")
    axes.set_axis_off()
    _, rows, cols = plan.grid_thw
    sizes = f"{plan.height}x{plan.width} → {rows}x{cols} → {plan.llm_tokens}"
    letters = int(axes.get_position(original=True).width * PAGE * 10)
    above = functools.partial(
        axes.annotate, xy=(0, 1), xycoords="axes fraction", textcoords="offset points"
    )
    name = photo.name[:letters]
    above(name, xytext=(0, 16), color=colour, weight="bold", parse_math=False)
    above(sizes, xytext=(0, 5), size=8)


# Sequences ---------------------------------------------------------------------------------------


def _strip(axes: Axes, bounds: Sequence[int], strength: np.ndarray | float = 1.0) -> None:
    """A packed sequence, one colour a photo; ``strength`` fades it token by token."""
    rgb = np.array([to_rgb(colour) for colour in _cycle(len(bounds) - 1)])
    rgb = np.repeat(rgb, np.diff(bounds), axis=0)
    rgb = 1 - (1 - rgb) * np.broadcast_to(strength, len(rgb))[:, None]
    axes.imshow(rgb[None], aspect="auto", interpolation="nearest")
    axes.set_axis_off()


def _square(axes: Axes, num_tokens: int, share: float) -> None:
    axes.set(xlim=(0, num_tokens), ylim=(num_tokens, 0), facecolor=PAPER)
    axes.set(xlabel=f"keys: {share:.0%} of all pairs are computed", ylabel="queries")


def _vision_mask(axes: Axes, strip: Axes, batch: Batch) -> None:
    """Every image attends to itself."""
    bounds = batch.grid.cu_seqlens.tolist()
    lengths = np.diff(bounds)
    _strip(strip, bounds)
    for begin, length, colour in zip(bounds, lengths, _cycle(len(lengths)), strict=False):
        axes.add_patch(Rectangle((begin, begin), length, length, color=colour, lw=0))
    _square(axes, bounds[-1], (lengths**2).sum() / bounds[-1] ** 2)
    strip.set_title(f"Encoder: {bounds[-1]} patches, block-diagonal attention")


def _language_mask(axes: Axes, strip: Axes, batch: Batch) -> None:
    """Every token attends to what is before it in its sample."""
    bounds = batch.cu_seqlens.tolist()
    lengths = np.diff(bounds)
    _strip(strip, bounds, _strength(batch))
    for begin, end, colour in zip(bounds, bounds[1:], _cycle(len(lengths)), strict=False):
        axes.add_patch(Polygon([(begin, begin), (begin, end), (end, end)], color=colour, lw=0))
    _square(axes, bounds[-1], (lengths * (lengths + 1) / 2).sum() / bounds[-1] ** 2)
    strip.set_title(f"Language model: {bounds[-1]} tokens, causal in each sample")


def _strength(batch: Batch) -> np.ndarray:
    """How strong text, the half-resolution view and the photo are drawn."""
    strength = np.full(batch.input_ids.shape[0], 0.2)
    strength[batch.half_index.tolist()] = 0.55
    strength[batch.index.tolist()] = 1.0
    return strength


def _positions(axes: Axes, strip: Axes, batch: Batch) -> None:
    bounds = batch.cu_seqlens.tolist()
    _strip(strip, bounds, _strength(batch))
    for begin, end, colour in zip(bounds, bounds[1:], _cycle(len(bounds) - 1), strict=False):
        axes.axvspan(begin, end, color=colour, alpha=0.1, lw=0)
    for (name, colour), ids in zip(AXES.items(), batch.position_ids.tolist(), strict=True):
        axes.plot(ids, ".", color=colour, ms=np.clip(1500 / len(ids), 2.6, 7), mew=0, label=name)
    axes.set(xlim=(0, bounds[-1]), ylim=(0, None), xlabel="token", ylabel="position")
    legend = axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1.12), borderpad=0)
    for line in legend.get_lines():
        line.set_markersize(12)
    strip.set_title(
        "M-RoPE positions of text (pale), the half-resolution view (medium) and the photo (full)"
    )


def _losses(axes: Axes, loss: Mapping[str, Sequence[float]]) -> None:
    apart = max(abs(a - b) for a, b in zip(loss["fused"], loss["reference"], strict=True))
    steps = range(1, len(loss["fused"]) + 1)
    axes.plot(steps, loss["reference"], "o-", color=REFERENCE, lw=7, ms=9, alpha=0.6, mew=0)
    axes.plot(steps, loss["fused"], "o-", color=FUSED, lw=1.4, ms=4)
    axes.set(xlabel=f"AdamW step; the curves are at most {apart:.1e} apart")
    axes.set(xlim=(0.7, len(steps) + 0.3))
    low, high = min(loss["reference"]), max(loss["reference"])
    room = max(0.08 * (high - low), 0.01 * high)  # the labels of a narrower range would be long
    if math.isfinite(low) and math.isfinite(high):
        axes.set(ylim=(low - room, high + room))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=PAPER)
    axes.legend(["reference", "fused"])
    axes.set_title("Loss of restoring hidden patches", pad=6 + 72 * (STRIP + 0.05))
