"""Curves as PNG, drawn with PIL: so plots need no further package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

SIZE = (900, 540)
LEFT, RIGHT, TOP, BOTTOM = 90, 25, 45, 50
INK, GRID, PALE, STRONG = (60, 60, 60), (225, 225, 225), (165, 195, 230), (30, 90, 170)


def plot_curve(path: Path, title: str, steps: Sequence[float], values: Sequence[float], smooth: bool = False) -> None:
    """Draw ``values`` over ``steps``; ``smooth`` lays a running mean over a pale curve of the values themselves.

    Values that are not finite are left out.
    """
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    if not points:
        return
    image = PIL.Image.new("RGB", SIZE, "white")
    draw = PIL.ImageDraw.Draw(image)
    font = PIL.ImageFont.load_default(15)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_range, y_range = (min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs))), (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + across * (SIZE[0] - LEFT - RIGHT), SIZE[1] - BOTTOM - up * (SIZE[1] - TOP - BOTTOM)

    for x in x_ticks:
        at = place(x, y_range[0])[0]
        draw.line((at, TOP, at, SIZE[1] - BOTTOM), fill=GRID)
        draw.text((at, SIZE[1] - BOTTOM + 8), f"{x:g}", fill=INK, font=font, anchor="mt")
    for y in y_ticks:
        at = place(x_range[0], y)[1]
        draw.line((LEFT, at, SIZE[0] - RIGHT, at), fill=GRID)
        draw.text((LEFT - 8, at), f"{y:.4g}", fill=INK, font=font, anchor="rm")
    draw.rectangle((LEFT, TOP, SIZE[0] - RIGHT, SIZE[1] - BOTTOM), outline=INK)
    draw.text((SIZE[0] / 2, 12), title, fill=INK, font=PIL.ImageFont.load_default(19), anchor="mt")
    draw.text((SIZE[0] / 2, SIZE[1] - 8), "step", fill=INK, font=font, anchor="mb")
    _draw_line(draw, [place(x, y) for x, y in points], PALE if smooth else STRONG)
    if smooth:
        _draw_line(draw, [place(x, y) for x, y in zip(xs, running_mean(ys), strict=True)], STRONG)
    image.save(path)


def _draw_line(draw: PIL.ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=2)
    for x, y in points if len(points) < 40 else []:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential mean, corrected for its start."""
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        means.append(total / norm)
    return means


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers that reach from below ``low`` to above ``high``."""
    if high - low <= abs(high) * 1e-9:
        pad = abs(high) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * times for times in (1, 2, 5, 10) if size * times >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
