"""Draws what each system makes of the same images and clip, side by side."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from patchpack.cli import _demo_systems
from patchpack.cli._demo_systems import Result
from patchpack.cli._media import SYSTEMS, Medium
from patchpack.cli._picture import COLOURS, FAINT, INK, STYLE, Page

IDEAS = {
    "internvl": "one of 35 tile shapes, whatever that does\nto size and aspect, and a thumbnail",
    "llava_onevision": "a view of it all, then crops of it padded;\n"
    "the tokens of the padding are cut off again",
    "oryx": "its own size, in steps of 32 pixels,\nafter a small view; video compressed 4 : 1",
    "qwen2_vl": "its own size, in steps of 28 pixels;\n2 x 2 patches, and 2 frames, are one token",
}
# inches
LEFT, COLUMN, GAP, MARGIN = 2.2, 3.45, 0.3, 0.6
HEADER, TITLES, CAPTION, ROW, SUMMARY = 1.35, 0.95, 0.62, 2.5, 1.9
FRAMES = 4  # of a clip that are drawn


@dataclass(frozen=True)
class View:
    """A picture as an encoder gets it: ``tiles`` rows and columns, each of ``tokens``."""

    image: Image.Image
    size: tuple[int, int]
    tiles: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] = (1, 1)
    box: tuple[int, int, int, int] | None = None  # top, left, height, width of the image in it


def draw(
    path: Path,
    media: Sequence[Medium],
    plans: Mapping[str, Sequence[Any]],
    results: Mapping[str, Result],
) -> None:
    """Write the gallery to ``path``: ``plans`` and ``results`` by system."""
    pictures = [_picture(medium) for medium in media]
    rows = [
        {name: VIEWS[name](*_drawn(medium, of[i])) for name, of in plans.items()}
        for i, medium in enumerate(media)
    ]
    scales = [min(map(_scale, row.values())) for row in rows]
    heights = [
        max(_thumbnail(medium)[1], *(scale * v.size[0] for views in row.values() for v in views))
        for medium, row, scale in zip(media, rows, scales, strict=True)
    ]
    width = 2 * MARGIN + LEFT + len(plans) * (COLUMN + GAP)
    height = HEADER + TITLES + sum(heights) + len(rows) * (CAPTION + GAP) + SUMMARY + MARGIN
    with matplotlib.rc_context(STYLE):
        page = Page(width, height)
        page.text(MARGIN, 0.75, "One image, four readers", size=19, weight="bold")
        page.text(
            MARGIN,
            1.08,
            "What the encoder of each system gets to see, drawn to scale in each row, and the"
            " tokens that are left for the language model.",
            color=FAINT,
            size=11,
        )
        for c, name in enumerate(plans):
            left = _column(c)
            page.text(left, HEADER + 0.3, SYSTEMS[name], size=13, weight="bold", color=COLOURS[c])
            page.text(left, HEADER + 0.72, IDEAS[name], color=INK, size=8.5, linespacing=1.3)
        top = HEADER + TITLES
        for i, medium in enumerate(media):
            _original(page, top, medium, pictures[i])
            for c, (name, of) in enumerate(plans.items()):
                page.text(_column(c), top + 0.2, _words(name, of[i]), size=9, weight="bold")
                counts = f"{of[i].vit_tokens:,} patches → {of[i].llm_tokens:,} tokens"
                page.text(_column(c), top + 0.38, counts, size=8.5, color=FAINT)
                _views(page, _column(c), top + CAPTION, rows[i][name], scales[i], COLOURS[c])
            top += CAPTION + heights[i] + GAP
        _summary(page, top + 0.3, plans, results)
        with warnings.catch_warnings():  # names may be in any script, and fonts are not
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            page.figure.savefig(path, dpi=110)


def _column(c: int) -> float:
    return MARGIN + LEFT + c * (COLUMN + GAP)


# What is seen -------------------------------------------------------------------------------------


def _picture(medium: Medium) -> Image.Image:
    if medium.image is not None:
        return medium.image
    (frame,) = medium.read([medium.clip.num_frames // 2 if medium.clip else 0])
    return frame


def _drawn(medium: Medium, plan: Any) -> tuple[list[Image.Image], Any]:
    """The image, or a few of the frames that are used, and the plan."""
    if medium.image is not None:
        return [medium.image], plan
    used = plan.frame_indices
    shown = sorted({used[i] for i in np.linspace(0, len(used) - 1, FRAMES).astype(int)})
    return medium.read(shown), plan


def _internvl(images: list[Image.Image], plan: Any) -> list[View]:
    side = plan.image_size
    tokens = (side // plan.patch_size // plan.merge_size,) * 2
    views = [View(image, plan.resized, plan.tiles, tokens) for image in images]
    return views + [View(image, (side, side), tokens=tokens) for image in images * plan.thumbnail]


def _llava_onevision(images: list[Image.Image], plan: Any) -> list[View]:
    side = plan.image_size
    whole = (side, side)
    if plan.tiles is None:
        return [View(image, whole, tokens=plan.target_hw) for image in images]
    tokens = (plan.side, plan.side)
    views = [View(image, whole, tokens=tokens) for image in images]
    return views + [
        View(image, plan.canvas, plan.tiles, tokens, box=plan.letterbox) for image in images
    ]


def _oryx(images: list[Image.Image], plan: Any) -> list[View]:
    sizes = [size for size in (plan.low, plan.high) if size is not None]
    return [
        View(image, size, tokens=tokens[1:])
        for image in images
        for size, tokens in zip(sizes, plan.maps, strict=True)
    ]


def _qwen2_vl(images: list[Image.Image], plan: Any) -> list[View]:
    _, rows, cols = plan.grid_thw
    tokens = (rows // plan.merge_size, cols // plan.merge_size)
    return [View(image, plan.resized, tokens=tokens) for image in images]


VIEWS = {
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "oryx": _oryx,
    "qwen2_vl": _qwen2_vl,
}


def _words(name: str, plan: Any) -> str:
    frames = f"{plan.num_frames} frame{'s' * (plan.num_frames > 1)} of "
    frames = "" if plan.frame_indices is None else frames
    if name == "internvl":
        rows, cols = plan.tiles
        tiles = f"{rows * cols} tile" + "s" * (rows * cols > 1)
        return frames + tiles + " + thumbnail" * plan.thumbnail
    if name == "llava_onevision":
        rows, cols = plan.target_hw
        if plan.tiles is None:
            return f"{frames}{plan.side} x {plan.side}, halved to {rows} x {cols}"
        kept = "x".join(map(str, plan.crop[2:]))
        shrunk = f" → {rows}x{cols}" if plan.crop[2:] != (rows, cols) else ""
        crops = plan.tiles[0] * plan.tiles[1]
        return f"whole + {crops} crop{'s' * (crops > 1)}, map of {kept}{shrunk}"
    if name == "oryx":
        sizes = [size for size in (plan.low, plan.high) if size is not None]
        return frames + " + ".join(f"{h} x {w}" for h, w in sizes) + " pixels"
    return f"{frames}{plan.resized[0]} x {plan.resized[1]} pixels"


# Drawing ------------------------------------------------------------------------------------------

BETWEEN, BETWEEN_TILES = 0.06, 0.025


def _scale(views: Sequence[View]) -> float:
    """Inches a pixel at which views next to each other fit their room."""
    room = COLUMN - BETWEEN * (len(views) - 1)
    return min(room / sum(view.size[1] for view in views), ROW / max(v.size[0] for v in views))


def _views(
    page: Page, left: float, top: float, views: Sequence[View], scale: float, colour: str
) -> None:
    for view in views:
        height, width = (scale * side for side in view.size)
        _view(page.axes(left, top, width, height), view, scale, colour)
        left += width + BETWEEN


def _view(axes: Axes, view: View, scale: float, colour: str) -> None:
    """The picture, cut where tiles are, with a faint line around every token."""
    height, width = view.size
    top, left, rows, cols = view.box or (0, 0, height, width)
    pixels = (max(1, round(scale * cols * 220)), max(1, round(scale * rows * 220)))
    image = view.image.resize(pixels)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    if view.box is not None:
        axes.add_patch(
            Rectangle((0, 0), width, height, fc="#e9ebf0", ec=FAINT, hatch="////", lw=0, zorder=-1)
        )
    axes.imshow(image, extent=(left, left + cols, top + rows, top), aspect="auto")
    axes.set(xlim=(0, width), ylim=(height, 0))
    down, right = (n * t for n, t in zip(view.tiles, view.tokens, strict=True))
    axes.hlines(np.linspace(0, height, down + 1), 0, width, "white", lw=0.3, alpha=0.35)
    axes.vlines(np.linspace(0, width, right + 1), 0, height, "white", lw=0.3, alpha=0.35)
    gap = 72 * BETWEEN_TILES
    axes.hlines(np.linspace(0, height, view.tiles[0] + 1)[1:-1], 0, width, "white", lw=gap)
    axes.vlines(np.linspace(0, width, view.tiles[1] + 1)[1:-1], 0, height, "white", lw=gap)
    for y in range(view.tiles[0]):
        for x in range(view.tiles[1]):
            h, w = height / view.tiles[0], width / view.tiles[1]
            axes.add_patch(Rectangle((x * w, y * h), w, h, fill=False, ec=colour, lw=1.1))


def _thumbnail(medium: Medium) -> tuple[float, float]:
    """Width and height of the original as it is drawn."""
    width = min(LEFT - 0.4, 1.6 * medium.width / medium.height)
    return width, width * medium.height / medium.width


def _original(page: Page, top: float, medium: Medium, image: Image.Image) -> None:
    page.text(MARGIN, top + 0.2, medium.name[:24], size=10, weight="bold", parse_math=False)
    size = f"{medium.height} x {medium.width} pixels"
    if medium.clip is not None:
        size += f", {medium.clip.num_frames} frames"
    page.text(MARGIN, top + 0.38, size, size=8.5, color=FAINT)
    width, height = _thumbnail(medium)
    axes = page.axes(MARGIN, top + CAPTION, width, height)
    axes.imshow(image.resize((max(1, round(width * 220)), max(1, round(height * 220)))))
    axes.set_axis_off()


def _summary(
    page: Page, top: float, plans: Mapping[str, Sequence[Any]], results: Mapping[str, Result]
) -> None:
    """Tokens of all media together, and what the fused path was measured against."""
    totals = {n: [sum(getattr(p, f"{k}_tokens") for p in of) for k in ("vit", "llm")]
              for n, of in plans.items()}  # fmt: skip
    most = max(max(pair) for pair in totals.values())
    page.text(MARGIN, top + 0.22, "All of them together", size=10, weight="bold")
    page.text(MARGIN, top + 0.85, "fused against reference,\non smaller budgets", size=8.5,
              color=FAINT, linespacing=1.3)  # fmt: skip
    for c, name in enumerate(plans):
        axes = page.axes(_column(c), top, COLUMN, 0.5)
        axes.barh([0, 1], totals[name], color=COLOURS[c], height=0.8)
        axes.patches[0].set_alpha(0.35)
        axes.set(xlim=(0, most), ylim=(1.5, -0.5))
        axes.set_axis_off()
        for y, (count, what) in enumerate(zip(totals[name], ("patches", "tokens"), strict=True)):
            inside = count > 0.6 * most
            axes.annotate(
                f"{count:,} {what}",
                (count, y),
                xytext=(-4 if inside else 4, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                size=8.5,
                color="white" if inside and y else INK,
            )
        result = results[name]
        worst = _demo_systems.worst(result.checks)
        failed = sum(not x.passed for x in result.checks)
        verdict = f"{failed} checks FAILED" if failed else f"{len(result.checks)} checks pass"
        words = f"{verdict}; largest error {worst:.0%} of what is allowed\n" + ", ".join(
            f"{label} {s:.2g} s" for label, s in result.seconds.items()
        )
        page.text(_column(c), top + 0.85, words, size=8.5, linespacing=1.3)
