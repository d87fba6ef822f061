"""Draw the demo pictures in examples/pictures; none of them is ever drawn during training."""

from __future__ import annotations

import random
from pathlib import Path

from pictures import COLOURS, RGB, draw_shape, font_files, load_font
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent.parent / "pictures"
SCALE = 3  # drawn larger and shrunk, for smooth edges
Placed = tuple[str, str, float, float, float]  # shape, colour, centre and half size in pixels

SHAPES: dict[str, tuple[tuple[int, int], RGB, list[Placed]]] = {
    "shapes": (
        (420, 300),
        (250, 247, 240),
        [("circle", "red", 90, 160, 58), ("square", "blue", 215, 95, 66), ("star", "green", 325, 190, 72)],
    ),
    "circle": ((280, 280), (236, 242, 250), [("circle", "red", 140, 140, 84)]),
    "stars": (
        (420, 280),
        (24, 30, 58),
        [
            ("star", "yellow", 70, 80, 44),
            ("star", "yellow", 190, 190, 52),
            ("star", "yellow", 230, 66, 36),
            ("star", "yellow", 345, 110, 50),
            ("star", "yellow", 330, 225, 34),
        ],
    ),
    "hearts": (
        (360, 260),
        (255, 250, 252),
        [("heart", "red", 90, 90, 56), ("heart", "pink", 262, 92, 50), ("diamond", "purple", 178, 186, 58)],
    ),
    "corners": (
        (320, 320),
        (232, 246, 236),
        [("triangle", "orange", 62, 66, 46), ("cross", "black", 258, 62, 40), ("square", "blue", 64, 258, 50)],
    ),
}
TEXTS: dict[str, tuple[str, tuple[int, int], RGB, RGB, int]] = {
    "digits": ("4821", (320, 200), (253, 246, 227), (40, 50, 80), 92),
    "sum": ("27 + 45", (400, 200), (255, 255, 255), (20, 20, 20), 76),
    "word": ("HELLO", (360, 200), (30, 40, 60), (250, 240, 200), 84),
}


def draw_shapes(name: str) -> Image.Image:
    """Draw one of the compositions of shapes."""
    (width, height), background, placed = SHAPES[name]
    rng = random.Random(f"demo {name}")
    image = Image.new("RGB", (width * SCALE, height * SCALE), background)
    draw = ImageDraw.Draw(image)
    for shape, colour, x, y, radius in placed:
        draw_shape(rng, draw, shape, COLOURS[colour][1], (x * SCALE, y * SCALE), radius * SCALE, False, None)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def draw_text(name: str) -> Image.Image:
    """Draw one line of text in the middle."""
    text, (width, height), background, ink, size = TEXTS[name]
    image = Image.new("RGB", (width, height), background)
    bold = next((f for f in font_files() if f.endswith("DejaVuSans-Bold.ttf")), "")
    ImageDraw.Draw(image).text((width / 2, height / 2), text, fill=ink, font=load_font(bold, size), anchor="mm")
    return image


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for key in SHAPES:
        draw_shapes(key).save(FOLDER / f"{key}.png", optimize=True)
    for key in TEXTS:
        draw_text(key).save(FOLDER / f"{key}.png", optimize=True)
