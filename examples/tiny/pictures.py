"""Draw the synthetic pictures that the tiny model learns from: shapes, digits, words and sums."""

from __future__ import annotations

import colorsys
import io
import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAD_COLOUR = (122, 116, 104)
RGB = tuple[int, int, int]

# Each name has a few anchors (Pillow's own colour names among them); a little jitter is added when drawing.
COLOURS: dict[str, list[RGB]] = {
    "red": [(255, 0, 0), (220, 20, 40), (229, 57, 53), (210, 30, 30)],
    "orange": [(255, 165, 0), (255, 140, 0), (251, 140, 0), (245, 130, 32)],
    "yellow": [(255, 255, 0), (253, 216, 53), (255, 225, 30), (250, 220, 60)],
    "green": [(0, 128, 0), (67, 160, 71), (0, 200, 0), (34, 139, 34), (0, 255, 0), (60, 180, 75)],
    "blue": [(0, 0, 255), (30, 136, 229), (30, 80, 220), (65, 105, 225), (25, 60, 180)],
    "purple": [(128, 0, 128), (142, 36, 170), (145, 30, 180), (123, 60, 190), (106, 27, 154)],
    "pink": [(255, 192, 203), (255, 105, 180), (244, 143, 177), (255, 150, 200)],
    "brown": [(139, 69, 19), (121, 85, 72), (150, 75, 0), (165, 42, 42), (110, 65, 35)],
    "gray": [(128, 128, 128), (140, 140, 140), (117, 117, 117), (158, 158, 158)],
    "black": [(0, 0, 0), (20, 20, 20), (33, 33, 33)],
    "white": [(255, 255, 255), (245, 245, 245), (250, 250, 250)],
}
SHAPES = ("circle", "square", "rectangle", "triangle", "diamond", "star", "heart", "cross")
WORD_LIST = """
cat dog sun moon star tree fish bird book home love time day night good hello world apple water milk tea cup car bus
red blue green hat box key map pen ball door hand eye ear nose foot king queen game play run jump stop go yes no up
down left right open close hot cold big small fast slow new old one two three four five six seven eight nine ten
zero light dark sky sea sand wind rain snow fire ice rock hill lake river road city town farm house room bed desk
lamp clock phone music song dance art paint color happy sad smile laugh kind nice cool wow ok hi bye thanks please
sorry food bread rice egg cake meat soup salt sugar lemon grape pear peach melon horse cow pig duck goat lion tiger
bear wolf fox frog bee ant tiny model test code data file list menu exit start end sale free shop bank park zoo ship
boat train plane rocket robot magic dream peace hope luck gold silver
"""
WORDS = tuple(WORD_LIST.split())
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Thing:
    """One drawn shape: its name and colour, and its centre as fractions of the picture."""

    shape: str
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows, as the questions need to know it."""

    kind: str  # shapes, digits, word, sum or blank
    things: tuple[Thing, ...] = ()
    text: str = ""
    numbers: tuple[int, int] = (0, 0)
    glyphs: tuple[tuple[str, float, float], ...] = ()  # each character of the text and its centre


def pad_and_resize(image: Image.Image, size: int) -> np.ndarray:
    """Return the picture as the model sees it before scaling to floats: RGB, padded to a square, bicubic, uint8."""
    image = image.convert("RGB")
    width, height = image.size
    if width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


GLYPHS = "0123456789+=?" + LETTERS + LETTERS.upper()
MARKS = 2 * len(GLYPHS) + len(SHAPES) + len(COLOURS) + 9


def mark_patches(scene: Scene, width: int, height: int, grid: int) -> np.ndarray:
    """Say for each patch of the padded picture what has its centre in it: [grid * grid, MARKS], 0 or 1.

    A shape is marked by kind, colour and cell of the 3x3 grid. Two characters can share a patch, so those in
    its left half and those in its right half are told apart."""
    marks = np.zeros((grid * grid, MARKS), np.uint8)
    side = max(width, height)
    shapes = 2 * len(GLYPHS)
    found = [(shapes + SHAPES.index(t.shape), t.x, t.y) for t in scene.things]
    found += [(shapes + len(SHAPES) + list(COLOURS).index(t.colour), t.x, t.y) for t in scene.things]
    found += [(MARKS - 9 + min(2, int(t.y * 3)) * 3 + min(2, int(t.x * 3)), t.x, t.y) for t in scene.things]
    found += [(GLYPHS.index(char), x, y) for char, x, y in scene.glyphs if char in GLYPHS]
    for number, x, y in found:
        column = (x * width + (side - width) / 2) / side * grid
        row = int((y * height + (side - height) / 2) / side * grid)
        if number < len(GLYPHS) and column % 1 >= 0.5:
            number += len(GLYPHS)
        if 0 <= column < grid and 0 <= row < grid:
            marks[row * grid + int(column), number] = 1
    return marks


# Backgrounds


def jitter(rng: random.Random, colour: RGB, amount: int = 12) -> RGB:
    """Move each channel of a colour a little."""
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b


def distance(a: RGB, b: RGB) -> float:
    """Return the distance of two colours in RGB space."""
    return math.dist(a, b)


def _hsv(hue: float, saturation: float, value: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def random_background(rng: random.Random) -> tuple[RGB, RGB]:
    """Choose the colours at both ends of the background; they are equal when it is plain."""
    roll = rng.random()
    if roll < 0.34:
        first = (255, 255, 255)
    elif roll < 0.50:
        first = _hsv(rng.random(), rng.uniform(0, 0.06), rng.uniform(0.82, 1.0))
    elif roll < 0.68:
        first = _hsv(rng.random(), rng.uniform(0.08, 0.3), rng.uniform(0.8, 1.0))
    elif roll < 0.86:
        first = _hsv(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.0, 0.28))
    else:
        first = _hsv(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.3, 0.8))
    if rng.random() < 0.82:
        return first, first
    factor = rng.uniform(0.72, 0.95) if sum(first) > 380 else rng.uniform(1.1, 1.6)
    r, g, b = (min(255, max(0, round(c * factor) + rng.randint(-12, 12))) for c in first)
    return first, (r, g, b)


def draw_background(rng: random.Random, width: int, height: int, ends: tuple[RGB, RGB]) -> Image.Image:
    """Draw a plain canvas or a straight gradient between two colours."""
    if ends[0] == ends[1]:
        return Image.new("RGB", (width, height), ends[0])
    across = rng.random() < 0.5
    ramp = np.linspace(0, 1, width if across else height, dtype=np.float32)[:, None]
    line = (np.asarray(ends[0]) * (1 - ramp) + np.asarray(ends[1]) * ramp).astype(np.uint8)
    strip = Image.fromarray(line[None] if across else line[:, None])
    return strip.resize((width, height), Image.Resampling.NEAREST)


def finish(rng: random.Random, image: Image.Image) -> Image.Image:
    """Add camera-like flaws to some pictures: noise and JPEG compression."""
    if rng.random() < 0.15:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((image.height, image.width, 1), np.float32)
        image = Image.fromarray(np.clip(np.asarray(image) + noise * rng.uniform(3, 18), 0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(45, 95))
        image = Image.open(buffer).convert("RGB")
    return image


# Shapes


@lru_cache
def outline_points(shape: str) -> tuple[tuple[float, float], ...]:
    """Return the corners of a shape inside the unit circle; the circle itself is a fine polygon."""
    if shape in ("circle", "heart"):
        turns = [2 * math.pi * i / 48 for i in range(48)]
        if shape == "circle":
            return tuple((math.cos(t), math.sin(t)) for t in turns)
        return tuple(
            (
                math.sin(t) ** 3 * 0.95,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17.5,
            )
            for t in turns
        )
    if shape == "triangle":
        return tuple((math.cos(a), math.sin(a)) for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6))
    if shape == "diamond":
        return ((0, -1), (0.8, 0), (0, 1), (-0.8, 0))
    half = math.sqrt(0.5)
    return ((-half, -half), (half, -half), (half, half), (-half, half))


def _shape_points(rng: random.Random, shape: str) -> list[tuple[float, float]]:
    """Return one variant of a shape: proportions and rotation differ from drawing to drawing."""
    if shape == "star":
        inner = rng.uniform(0.36, 0.52)
        angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
        radii = [1.0 if i % 2 == 0 else inner for i in range(10)]
        points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    elif shape == "cross":
        t = rng.uniform(0.2, 0.38)
        points = [
            (-t, -1),
            (t, -1),
            (t, -t),
            (1, -t),
            (1, t),
            (t, t),
            (t, 1),
            (-t, 1),
            (-t, t),
            (-1, t),
            (-1, -t),
            (-t, -t),
        ]
    elif shape == "rectangle":
        ratio = rng.uniform(0.35, 0.66)
        w, h = (0.95, 0.95 * ratio) if rng.random() < 0.7 else (0.95 * ratio, 0.95)
        points = [(-w, -h), (w, -h), (w, h), (-w, h)]
    elif shape == "diamond":
        w = rng.uniform(0.6, 1.0)
        points = [(x / 0.8 * w, y) for x, y in outline_points(shape)]
    elif shape == "triangle" and rng.random() < 0.5:
        points = [(rng.uniform(-0.3, 0.3), -0.95), (0.9, 0.8), (-0.9, 0.8)]
    else:
        points = list(outline_points(shape))
    if rng.random() < 0.6:
        return points
    turn = math.radians(rng.uniform(-14, 14))
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def draw_shape(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    shape: str,
    rgb: RGB,
    centre: tuple[float, float],
    radius: float,
    outlined: bool,
    edge: RGB | None,
) -> None:
    """Draw one shape, filled or as an outline; a filled one may have an edge of another colour."""
    cx, cy = centre
    points = [(cx + x * radius, cy + y * radius) for x, y in _shape_points(rng, shape)]
    if not outlined:
        draw.polygon(points, fill=rgb)
    width = round(radius * rng.uniform(0.12, 0.28)) if outlined else max(1, round(radius * 0.05))
    if outlined or edge is not None:
        draw.line([*points, *points[:2]], fill=rgb if outlined else edge, width=max(2, width), joint="curve")


def _row_layout(rng: random.Random, count: int, width: int, height: int) -> list[tuple[float, float, float]]:
    """Place equal shapes evenly in a row, or in a column when the canvas is tall."""
    along, across = max(width, height), min(width, height)
    radius = min(along / count, across) * rng.uniform(0.25, 0.45)
    line = across * rng.uniform(0.45, 0.55) if rng.random() < 0.7 else rng.uniform(radius, across - radius)
    places = [((i + 0.5) * along / count, line, radius) for i in range(count)]
    return places if width >= height else [(y, x, r) for x, y, r in places]


def _free_layout(rng: random.Random, count: int, width: int, height: int) -> list[tuple[float, float, float]]:
    """Place shapes anywhere without overlap; sizes shrink until they all fit."""
    short = min(width, height)
    high = (0.45, 0.3, 0.25, 0.22, 0.2)[count - 1]
    equal = rng.uniform(0.08, high) if rng.random() < 0.3 else None
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(40 * count):
            r = short * (equal or rng.uniform(0.08, high))
            x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
            if all(math.hypot(x - px, y - py) > (r + pr) * 1.06 for px, py, pr in placed):
                placed.append((x, y, r))
                if len(placed) == count:
                    return placed
        high = max(0.09, high * 0.85)
        equal = equal and max(0.08, equal * 0.85)


def _cell_layout(rng: random.Random, count: int, width: int, height: int) -> list[tuple[float, float, float]]:
    """Put each shape into a cell of its own of the 3x3 grid."""
    cells = rng.sample([(i, j) for i in range(3) for j in range(3)], count)
    cw, ch = width / 3, height / 3
    places = []
    for i, j in cells:
        r = min(cw, ch) * rng.uniform(0.28, 0.48)
        dx, dy = cw / 2 - r, ch / 2 - r
        places.append((cw * (i + 0.5) + rng.uniform(-dx, dx), ch * (j + 0.5) + rng.uniform(-dy, dy), r))
    return places


def random_canvas(rng: random.Random, widest: float = 1.8) -> tuple[int, int]:
    """Choose a canvas size; large ones are rarer because they cost time and look the same after resizing."""
    roll = rng.random()
    long = rng.randint(100, 240) if roll < 0.75 else rng.randint(240, 480) if roll < 0.95 else rng.randint(480, 800)
    if rng.random() < 0.5:
        return long, long
    short = round(long / rng.uniform(1.0, widest))
    return (long, short) if rng.random() < 0.7 else (short, long)


def _choose_kinds(rng: random.Random, count: int, allowed: list[str], shapes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Choose the shape and the colour of each thing; some pictures repeat one of the two."""
    roll = rng.random()
    if roll < 0.12:
        return [(s, c) for s in [rng.choice(shapes)] for c in rng.choices(allowed, k=count)]
    if roll < 0.22:
        return [(s, c) for c in [rng.choice(allowed)] for s in rng.choices(shapes, k=count)]
    if roll < 0.40:  # few different ones, so that there is something to count
        s2, c2 = rng.sample(shapes, 2), rng.sample(allowed, min(2, len(allowed)))
        return [(rng.choice(s2), rng.choice(c2)) for _ in range(count)]
    if roll < 0.46:
        return [(rng.choice(shapes), rng.choice(allowed))] * count
    return [(rng.choice(shapes), rng.choice(allowed)) for _ in range(count)]


def shapes_picture(rng: random.Random, count: int | None = None) -> tuple[Image.Image, Scene]:
    """Draw one to five shapes."""
    count = count or rng.choices((1, 2, 3, 4, 5), (24, 22, 20, 17, 17))[0]
    row = count > 1 and rng.random() < 0.22
    width, height = random_canvas(rng, 3.0 if row else 1.8)
    ends = random_background(rng)
    rgbs = {name: jitter(rng, rng.choice(anchors)) for name, anchors in COLOURS.items()}
    allowed = [n for n, c in rgbs.items() if min(distance(c, ends[0]), distance(c, ends[1])) > 75]
    if len(allowed) < 3:
        return shapes_picture(rng, count)
    layout = _row_layout if row else _cell_layout if rng.random() < 0.3 else _free_layout
    places = layout(rng, count, width, height)
    image = draw_background(rng, width, height, ends)
    draw = ImageDraw.Draw(image)
    style = rng.random()
    outlined = [style < 0.14 or (style < 0.22 and rng.random() < 0.5) for _ in places]
    edge_style = rng.random()
    edge = (0, 0, 0) if edge_style < 0.12 else jitter(rng, (60, 60, 60)) if edge_style < 0.16 else None
    if edge_style > 0.98:
        edge = (255, 255, 255)
    things = []
    kinds = _choose_kinds(rng, count, allowed, SHAPES)
    for (shape, colour), (x, y, r), bare in zip(kinds, places, outlined, strict=True):
        rgb = rgbs[colour] if rng.random() < 0.8 else jitter(rng, rgbs[colour], 6)
        draw_shape(rng, draw, shape, rgb, (x, y), r, bare and r > 11, edge)
        things.append(Thing(shape, colour, x / width, y / height))
    return finish(rng, image), Scene("shapes", tuple(things))


# Text


@lru_cache
def font_files() -> tuple[str, ...]:
    """List the scalable fonts to draw with; "" is the one built into Pillow."""
    try:
        import matplotlib
    except ImportError:
        return ("",)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [
        f"DejaVu{family}{style}"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ]
    names += [
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
    ]
    return ("", "", "", *(str(folder / f"{name}.ttf") for name in names))


@lru_cache(maxsize=1024)
def load_font(file: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Open a font once per size."""
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def text_picture(rng: random.Random, scene: Scene) -> tuple[Image.Image, Scene]:
    """Draw the line of text of a scene, large enough to be read in the small picture that the model sees."""
    text = scene.text
    width, height = random_canvas(rng, 3.5 if len(text) > 2 else 1.8)
    if len(text) > 2 and height > 1.2 * width:
        width, height = height, width
    side = max(width, height)
    ends = random_background(rng)
    light = sum(ends[0]) > 380
    if rng.random() < 0.5:
        ink = jitter(rng, (12, 12, 12) if light else (243, 243, 243))
    else:
        ink = jitter(rng, rng.choice(rng.choice(list(COLOURS.values()))), 20)
    grey = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b in (ink, *ends)]
    if min(abs(grey[0] - grey[1]), abs(grey[0] - grey[2])) < 75:
        ink = (0, 0, 0) if min(grey[1:]) > 128 else (255, 255, 255)
    file = rng.choice(font_files())
    probe = load_font(file, 64)
    left, top, right, bottom = probe.getbbox(text)
    # The smallest text has letters about a twelfth of the side high; the largest nearly touches the border.
    fit = min(width * 0.94 / (right - left), height * 0.9 / (bottom - top)) * 64
    low = min(fit, 0.095 * side)
    size = max(
        8,
        round(
            fit if rng.random() < 0.1 else rng.uniform(low, min(fit, 0.7 * side)) ** 0.6 * rng.uniform(low, fit) ** 0.4
        ),
    )
    font = load_font(file, size)
    left, top, right, bottom = font.getbbox(text)
    w, h = right - left, bottom - top
    image = draw_background(rng, width, height, ends)
    room_x, room_y = max(0, width - w), max(0, height - h)
    if rng.random() < 0.45:
        x, y = room_x / 2, room_y / 2
    else:
        x, y = rng.uniform(0.02, 0.98) * room_x, rng.uniform(0.02, 0.98) * room_y
    ImageDraw.Draw(image).text((x - left, y - top), text, fill=ink, font=font)
    angle = 0.0
    if rng.random() < 0.25 and w < 0.9 * width and h < 0.8 * height:
        angle = rng.uniform(-8, 8)
        image = image.rotate(angle, Image.Resampling.BILINEAR, center=(x + w / 2, y + h / 2), fillcolor=ends[0])
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    glyphs = []
    for i, char in enumerate(text):
        dx = font.getlength(text[:i]) + font.getlength(char) / 2 - left - w / 2
        glyphs.append((char, (x + w / 2 + dx * cos) / width, (y + h / 2 - dx * sin) / height))
    return finish(rng, image), replace(scene, glyphs=tuple(glyphs))


def random_word(rng: random.Random) -> str:
    """Choose a common word or a random string of letters, in lower, upper or title case."""
    if rng.random() < 0.6:
        word = rng.choice(WORDS)
    else:
        word = "".join(rng.choice(LETTERS) for _ in range(rng.choices((1, 2, 3, 4, 5, 6), (1, 2, 4, 4, 3, 2))[0]))
    return rng.choice((word, word.upper(), word, word.upper(), word.title()))


def sum_scene(rng: random.Random) -> Scene:
    """Choose two numbers below 100 and a way of writing their sum."""
    a, b = (rng.randint(0, 99) if rng.random() < 0.85 else rng.randint(0, 9) for _ in range(2))
    form = rng.choices(("{} + {}", "{}+{}", "{} + {} =", "{}+{}=", "{}+{}=?", "{} + {} = ?"), (8, 4, 2, 2, 2, 2))[0]
    return Scene("sum", text=form.format(a, b), numbers=(a, b))


def digits_scene(rng: random.Random, easy: bool = False) -> Scene:
    """Choose a number of one to five digits; it may begin with zeros. An easy one has at most two."""
    length = rng.randint(1, 2) if easy else rng.choices((1, 2, 3, 4, 5), (3, 3, 4, 5, 5))[0]
    return Scene("digits", text="".join(rng.choice("0123456789") for _ in range(length)))


def make_picture(rng: random.Random, kind: str, easy: bool = False) -> tuple[Image.Image, Scene]:
    """Draw a random picture of a kind (shapes, digits, word, sum or blank) and say what it shows."""
    if kind == "shapes":
        return shapes_picture(rng, 1 if easy else None)
    if kind == "blank":
        width, height = random_canvas(rng)
        return finish(rng, draw_background(rng, width, height, random_background(rng))), Scene("blank")
    if kind == "digits":
        scene = digits_scene(rng, easy)
    elif kind == "word":
        scene = Scene("word", text=random_word(rng))
    elif kind == "sum":
        scene = sum_scene(rng)
    else:
        raise ValueError(f"unknown kind of picture: {kind}")
    return text_picture(rng, scene)
