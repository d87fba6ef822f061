"""Turn what a picture shows into question and answer turns, in English and in Chinese."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pictures import COLOURS, SHAPES, Scene, Thing

COLOUR_ORDER = tuple(COLOURS)
ZH_COLOUR = dict(
    zip(
        COLOUR_ORDER,
        ["红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "棕色", "灰色", "黑色", "白色"],
        strict=True,
    )
)
ZH_SHAPE = dict(zip(SHAPES, ["圆形", "正方形", "长方形", "三角形", "菱形", "星形", "心形", "十字形"], strict=True))
# Other names that a question may use; answers always use the first name.
EN_SHAPE_ALSO = {"circle": ["disc", "dot"], "diamond": ["rhombus"], "cross": ["plus sign", "plus"]}
ZH_SHAPE_ALSO = {
    "circle": ["圆", "圆圈", "圆形"],
    "square": ["方块", "方形", "正方形"],
    "rectangle": ["矩形", "长方形"],
    "star": ["星星", "五角星", "星形"],
    "heart": ["爱心", "心形"],
    "cross": ["十字", "十字形", "加号"],
}
ZH_COLOUR_ALSO = {"pink": ["粉红色", "粉色"], "brown": ["褐色", "棕色", "咖啡色"], "orange": ["橘色", "橙色", "橘黄色"]}
EN_COLOUR_ALSO = {"gray": ["grey", "gray"], "purple": ["violet", "purple", "purple"]}
EN_NUMBER = ("no", "one", "two", "three", "four", "five")
ZH_NUMBER = "零一两三四五"
EN_CELL = {
    (0, 0): "in the top left",
    (1, 0): "at the top",
    (2, 0): "in the top right",
    (0, 1): "on the left",
    (1, 1): "in the centre",
    (2, 1): "on the right",
    (0, 2): "in the bottom left",
    (1, 2): "at the bottom",
    (2, 2): "in the bottom right",
}
ZH_CELL = {
    (0, 0): "左上角",
    (1, 0): "上方",
    (2, 0): "右上角",
    (0, 1): "左边",
    (1, 1): "中间",
    (2, 1): "右边",
    (0, 2): "左下角",
    (1, 2): "下方",
    (2, 2): "右下角",
}

ABOUT_EN = (
    "I am tiny, the small model inside mmtool. I can describe simple pictures, count shapes, read short text "
    "and add small numbers."
)
ABOUT_ZH = "我是 tiny，mmtool 里的小模型。我能描述简单的图片、数图形、读短文字、算小数字的加法。"
CANNOT_EN = "I am a tiny model and cannot answer that. I can describe simple pictures, read short text and add."
CANNOT_ZH = "我是一个很小的模型，回答不了这个问题。我能描述简单的图片、读短文字、算加法。"
NO_PICTURE_EN = "I see no picture yet. Please send one."
NO_PICTURE_ZH = "我还没有看到图片，请发一张图片。"


@dataclass
class Turn:
    """One question with its answer. `spell` is a part of the answer that is written letter by letter."""

    question: str
    answer: str
    task: str
    spell: str = ""
    state: dict = field(default_factory=dict)


# Wording


def vary_en(rng: random.Random, text: str) -> str:
    """Write an English question the way different people type: case, spelling, final question mark."""
    text = text.replace("{p}", rng.choice(("picture", "image", "picture", "image", "photo")))
    if rng.random() < 0.5:
        text = text.replace("colour", "color").replace("Colour", "Color")
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    if text[-1] in "?." and rng.random() < 0.3:
        text = text[:-1]
    if rng.random() < 0.04:
        text = rng.choice(("Please tell me: ", "Hi! ", "Please answer: ", "Hello, ", "Look at the picture. ")) + text
    return text


def vary_zh(rng: random.Random, text: str) -> str:
    """Write a Chinese question the way different people type."""
    text = text.replace("{p}", rng.choice(("图片", "图", "图像", "画面", "图片", "照片", "图")))
    if rng.random() < 0.1:
        text = rng.choice(("请问", "请告诉我，", "请问，", "你好，")) + text
    if text[-1] in "？。":
        roll = rng.random()
        if roll < 0.3:
            text = text[:-1]
        elif roll < 0.45:
            text = text[:-1] + ("?" if text[-1] == "？" else ".")
    return text


def pick(rng: random.Random, lang: str, en: str, zh: str, **names: str) -> str:
    """Choose one of the "|"-separated wordings of a language and fill in the names."""
    text = rng.choice((en if lang == "en" else zh).split("|"))
    for name, value in names.items():
        text = text.replace("{" + name + "}", value)
    return (vary_en if lang == "en" else vary_zh)(rng, text)


def ask_shape(rng: random.Random, lang: str, shape: str) -> str:
    """Name a shape in a question, sometimes by another word for it."""
    also = (EN_SHAPE_ALSO if lang == "en" else ZH_SHAPE_ALSO).get(shape)
    if also and rng.random() < (0.15 if lang == "en" else 0.6):
        return rng.choice(also)
    return shape if lang == "en" else ZH_SHAPE[shape]


def ask_colour(rng: random.Random, lang: str, colour: str) -> str:
    """Name a colour in a question, sometimes by another word for it."""
    also = (EN_COLOUR_ALSO if lang == "en" else ZH_COLOUR_ALSO).get(colour)
    if also and rng.random() < 0.4:
        return rng.choice(also)
    if lang == "zh" and rng.random() < 0.25 and colour in ("red", "green", "blue", "yellow", "black", "white"):
        return ZH_COLOUR[colour][0]
    return colour if lang == "en" else ZH_COLOUR[colour]


def plural(noun: str) -> str:
    """Return the English plural of a shape name or of "shape"."""
    return noun + "es" if noun.endswith(("s", "x", "ch")) else noun + "s"


def article(word: str) -> str:
    """Put "a" or "an" before an English word."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def join_en(parts: list[str]) -> str:
    """Join parts with commas and a final "and"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def join_zh(parts: list[str]) -> str:
    """Join parts the Chinese way."""
    return parts[0] if len(parts) == 1 else "、".join(parts[:-1]) + "和" + parts[-1]


def thing_name(lang: str, thing: Thing) -> str:
    """Return colour and shape of a thing, without an article."""
    if lang == "en":
        return f"{thing.colour} {thing.shape}"
    return ZH_COLOUR[thing.colour] + "的" + ZH_SHAPE[thing.shape]


def one_word(rng: random.Random, lang: str, question: str, kind: str = "word") -> str:
    """Add the wish for a one-word answer to a question."""
    if lang == "en":
        if kind == "number":
            tail = rng.choice(
                (
                    " Answer with a number only.",
                    " Just the number.",
                    " In one word.",
                    " Answer with just the number.",
                    " Answer in one word.",
                    " Only the number.",
                )
            )
        else:
            tail = rng.choice(
                (
                    " Answer in one word.",
                    " In one word.",
                    " One word only.",
                    " Answer with one word.",
                    " Just one word.",
                    " Answer with a single word.",
                    " Use one word.",
                )
            )
        roll = rng.random()
        if roll < 0.2:
            lead = tail.strip().rstrip(".")
            return (lead + ": " if rng.random() < 0.5 else lead + ", ") + question[0].lower() + question[1:]
        if roll < 0.35:
            return question.rstrip("?") + ", " + tail.strip()[0].lower() + tail.strip()[1:]
        return question + tail
    if kind == "number":
        tail = rng.choice(("只回答数字", "用一个数字回答", "只说数字", "用一个词回答"))
    else:
        tail = rng.choice(("用一个词回答", "只用一个词回答", "请用一个词回答", "一个词回答", "只回答一个词"))
    end = rng.choice(("。", "", "。"))
    if rng.random() < 0.25:
        return tail + rng.choice(("：", "，")) + question
    return question + ("" if question[-1] in "？?。." else "，") + tail + end


# Descriptions


def description(lang: str, things: tuple[Thing, ...]) -> str:
    """Describe all things in a fixed order: by colour, then by shape, equal ones together."""
    counts = Counter((COLOUR_ORDER.index(t.colour), SHAPES.index(t.shape)) for t in things)
    parts = []
    for (c, s), n in sorted(counts.items()):
        name = thing_name(lang, Thing(SHAPES[s], COLOUR_ORDER[c], 0, 0))
        if lang == "en":
            parts.append(article(name) if n == 1 else f"{EN_NUMBER[n]} {plural(name)}")
        else:
            parts.append(("一" if n == 1 else ZH_NUMBER[n]) + "个" + name)
    if lang == "zh":
        return join_zh(parts) + "。"
    text = join_en(parts) + "."
    return text[0].upper() + text[1:]


def describe(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask for a description of the whole picture."""
    question = pick(
        rng,
        lang,
        "Describe the {p}.|Describe this {p}.|What is in the {p}?|What is in this {p}?"
        "|What do you see?|What can you see?"
        "|What do you see in the {p}?|What is shown in the {p}?|What does the {p} show?|Describe what you see."
        "|Tell me what is in the {p}.|What's in the {p}?|What is this?|List the shapes in the {p}."
        "|Describe the {p} in one sentence.|What is in the {p}? Describe it.|Can you describe this {p}?"
        "|Please describe the {p}.|What objects are in the {p}?|What shapes and colours are in the {p}?"
        "|Describe all the shapes.|Caption this {p}.|What are the shapes and their colours?|Tell me about this {p}.",
        "描述这张{p}。|描述一下这张{p}。|{p}里有什么？|{p}中有什么？|这张{p}里有什么？|你看到了什么？"
        "|你能看到什么？|请描述这张{p}。|请描述一下{p}。"
        "|{p}上画了什么？|画了些什么？|这是什么？|用一句话描述这张{p}。|说说{p}里有什么。"
        "|列出{p}里的所有图形。|{p}里有哪些图形和颜色？|请描述{p}内容。"
        "|描述{p}中的图形。|{p}里有哪些东西？|介绍一下这张{p}。|{p}的内容是什么？",
    )
    spell = scene.text
    if scene.kind == "shapes":
        answer = description(lang, scene.things)
    elif scene.kind == "blank":
        answer = "The picture is empty." if lang == "en" else "图片是空的。"
    elif scene.kind == "digits":
        answer = f"The number {spell}." if lang == "en" else f"数字{spell}。"
    elif scene.kind == "word":
        answer = f'The text "{spell}".' if lang == "en" else f"文字“{spell}”。"
    else:
        spell = "{} + {}".format(*scene.numbers)
        answer = f"The sum {spell}." if lang == "en" else f"算式{spell}。"
    return Turn(question, answer, "describe", spell)


# Shapes


def _count_answer(lang: str, n: int, noun: str) -> str:
    if lang == "zh":
        return f"有{n}个{noun}。"
    return f"There is 1 {noun}." if n == 1 else f"There are {n} {plural(noun)}."


def count_all(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask how many shapes there are."""
    question = pick(
        rng,
        lang,
        "How many shapes are there?|How many shapes are in the {p}?|How many objects are there?"
        "|How many shapes?|How many?"
        "|Count the shapes.|Count the objects in the {p}.|How many figures are in this {p}?|How many things are there?"
        "|How many shapes do you see?|How many shapes can you see in the {p}?|What is the number of shapes?"
        "|Count all the shapes in the {p}.|How many objects are in the {p}?|How many shapes are there in total?"
        "|How many items are in the {p}?|Can you count the shapes?|How many geometric shapes are there?",
        "有几个图形？|{p}里有几个图形？|{p}中有多少个图形？|一共有几个图形？|几个图形？|有多少图形？"
        "|数一数有几个图形。|数一数{p}里的图形。|{p}里一共有多少个图形？"
        "|总共有几个形状？|{p}里有几个形状？|有多少个形状？|有几个？|一共有多少个物体？"
        "|{p}中有几个物体？|图形有几个？|图形的数量是多少？|这张{p}里有几个图形？",
    )
    n = len(scene.things)
    noun = "shape" if lang == "en" else "图形"
    if rng.random() < 0.12:
        return Turn(one_word(rng, lang, question, "number"), str(n), "count")
    return Turn(question, _count_answer(lang, n, noun), "count", state={"counted": "shape"})


COUNT_OF = (
    "How many {n} are there?|How many {n} are in the {p}?|How many {n}?|Count the {n}.|How many {n} do you see?"
    "|How many {n} can you see?|Count the {n} in the {p}.|How many {n} does the {p} show?|What is the number of {n}?"
    "|How many {n} are there in the {p}?|How many {n} are in this {p}?",
    "有几个{n}？|{p}里有几个{n}？|{p}中有多少个{n}？|有多少个{n}？|几个{n}？|数一数{n}。"
    "|{n}有几个？|{n}有多少个？|一共有几个{n}？|{p}里有多少{n}？",
)


def count_some(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask how many shapes of a colour, of a kind or of both there are; the answer may be 0."""
    by = rng.choice(("colour", "shape", "both"))
    shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_ORDER)
    if scene.things and rng.random() < 0.75:
        thing = rng.choice(scene.things)
        shape, colour = thing.shape, thing.colour
    n = sum((by == "shape" or t.colour == colour) and (by == "colour" or t.shape == shape) for t in scene.things)
    asked_c, asked_s = ask_colour(rng, lang, colour), ask_shape(rng, lang, shape)
    if lang == "en":
        noun = {"colour": f"{colour} shape", "shape": shape, "both": f"{colour} {shape}"}[by]
        kind = rng.choice(("shape", "shape", "object", "thing", "one"))
        asked = {"colour": f"{asked_c} {kind}", "shape": asked_s, "both": f"{asked_c} {asked_s}"}[by]
        asked = plural(asked)
    else:
        noun = {
            "colour": f"{ZH_COLOUR[colour]}的图形",
            "shape": ZH_SHAPE[shape],
            "both": f"{ZH_COLOUR[colour]}的{ZH_SHAPE[shape]}",
        }[by]
        of = "的" if asked_c.endswith("色") and rng.random() < 0.8 else ""
        kind = rng.choice(("图形", "形状", "图形", "物体"))
        asked = {"colour": asked_c + of + kind, "shape": asked_s, "both": asked_c + of + asked_s}[by]
    question = pick(rng, lang, *COUNT_OF, n=asked)
    if rng.random() < 0.1:
        return Turn(one_word(rng, lang, question, "number"), str(n), "count")
    return Turn(question, _count_answer(lang, n, noun), "count", state={"counted": by})


def count_again(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Follow a counting question up with another colour or shape."""
    if not scene.things:
        return None
    thing = rng.choice(scene.things) if rng.random() < 0.7 else None
    if rng.random() < 0.5:
        colour = thing.colour if thing else rng.choice(COLOUR_ORDER)
        n = sum(t.colour == colour for t in scene.things)
        if lang == "en":
            question = pick(
                rng,
                lang,
                "And {c} ones?|And the {c} ones?|What about {c}?|And {c}?|How about {c} ones?",
                "",
                c=ask_colour(rng, lang, colour),
            )
            return Turn(question, _count_answer(lang, n, f"{colour} shape"), "follow")
        question = pick(rng, lang, "", "那{c}的呢？|{c}的呢？|{c}呢？|那{c}的有几个？", c=ask_colour(rng, lang, colour))
        return Turn(question, _count_answer(lang, n, ZH_COLOUR[colour] + "的图形"), "follow")
    shape = thing.shape if thing else rng.choice(SHAPES)
    n = sum(t.shape == shape for t in scene.things)
    question = pick(
        rng,
        lang,
        "And {s}?|What about {s}?|And the {s}?|How about {s}?",
        "那{s}呢？|{s}呢？|那{s}有几个？",
        s=plural(ask_shape(rng, lang, shape)) if lang == "en" else ask_shape(rng, lang, shape),
    )
    return Turn(question, _count_answer(lang, n, shape if lang == "en" else ZH_SHAPE[shape]), "follow")


def _unique(rng: random.Random, scene: Scene, key: Callable[[Thing], object]) -> Thing | None:
    """Choose a thing that is the only one with its key."""
    counts = Counter(key(t) for t in scene.things)
    single = [t for t in scene.things if counts[key(t)] == 1]
    return rng.choice(single) if single else None


def _colour_answer(lang: str, thing: Thing) -> str:
    return (
        f"The {thing.shape} is {thing.colour}."
        if lang == "en"
        else f"{ZH_SHAPE[thing.shape]}是{ZH_COLOUR[thing.colour]}的。"
    )


COLOUR_OF = (
    "What colour is the {s}?|Which colour is the {s}?|What is the colour of the {s}?|What's the colour of the {s}?"
    "|Tell me the colour of the {s}.|What colour does the {s} have?|The {s} is what colour?"
    "|What colour is the {s} in the {p}?"
    "|Name the colour of the {s}.|Colour of the {s}?",
    "{s}是什么颜色？|{s}是什么颜色的？|{s}的颜色是什么？|{p}里的{s}是什么颜色？"
    "|{p}中{s}是什么颜色的？|{s}什么颜色？|这个{s}是什么颜色？|请说出{s}的颜色。"
    "|那个{s}是什么颜色的？"
    "|{s}是哪种颜色？",
)


def colour_of(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask for the colour of the only shape of its kind, or of the only shape."""
    thing = _unique(rng, scene, lambda t: t.shape)
    if len(scene.things) > 1 and len({t.shape for t in scene.things}) == 1 == len({t.colour for t in scene.things}):
        thing = scene.things[0]
        shape = plural(ask_shape(rng, lang, thing.shape)) if lang == "en" else ask_shape(rng, lang, thing.shape)
        question = pick(
            rng,
            lang,
            "What colour are the {s}?|What colour are they?|Which colour are the {s}?",
            "{s}是什么颜色？|{s}都是什么颜色的？|它们是什么颜色？",
            s=shape,
        )
        answer = f"The {plural(thing.shape)} are {thing.colour}." if lang == "en" else _colour_answer(lang, thing)
        return Turn(question, answer, "colour")
    if not thing:
        return None
    if len(scene.things) == 1 and rng.random() < 0.4:
        question = pick(
            rng,
            lang,
            "What colour is it?|What colour is the shape?|Which colour is the shape?|What colour is this?"
            "|What is the colour?"
            "|What is the colour of the shape?|What colour is the object in the {p}?|What colour?"
            "|What colour do you see?"
            "|What colour is the shape in the {p}?",
            "它是什么颜色？|它是什么颜色的？|图形是什么颜色？|这个图形是什么颜色的？|什么颜色？"
            "|这是什么颜色？|{p}里的图形是什么颜色？|颜色是什么？|这个形状是什么颜色？",
        )
    else:
        question = pick(rng, lang, *COLOUR_OF, s=ask_shape(rng, lang, thing.shape))
    if rng.random() < 0.15:
        return Turn(
            one_word(rng, lang, question),
            thing.colour if lang == "en" else ZH_COLOUR[thing.colour],
            "colour",
            state={"it": thing},
        )
    return Turn(question, _colour_answer(lang, thing), "colour", state={"it": thing, "asked": "colour"})


def colour_again(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Follow a colour question up with another shape."""
    thing = _unique(rng, scene, lambda t: t.shape)
    if not thing:
        return None
    question = pick(
        rng,
        lang,
        "And the {s}?|What about the {s}?|And what about the {s}?|How about the {s}?",
        "那{s}呢？|{s}呢？|那么{s}呢？",
        s=ask_shape(rng, lang, thing.shape),
    )
    return Turn(question, _colour_answer(lang, thing), "follow", state={"it": thing, "asked": "colour"})


def shape_of(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask what shape the only shape is, or the only one of its colour."""
    thing = _unique(rng, scene, lambda t: t.colour)
    if not thing:
        return None
    if len(scene.things) == 1 and rng.random() < 0.5:
        question = pick(
            rng,
            lang,
            "What shape is it?|What shape is this?|Which shape is this?|What shape is in the {p}?|What is the shape?"
            "|Which shape is in the {p}?|What shape do you see?|Name the shape.|What kind of shape is this?|What shape?"
            "|What shape is shown?|What is the shape in the {p}?|What shape is the object?|Identify the shape.",
            "这是什么形状？|这是什么图形？|{p}里是什么图形？|{p}中是什么形状？|它是什么形状？"
            "|是什么形状的？|什么形状？|什么图形？|这个图形是什么形状？|{p}里的图形是什么形状？"
            "|说出{p}中的形状。|形状是什么？",
        )
    else:
        question = pick(
            rng,
            lang,
            "What shape is {c}?|Which shape is {c}?|What is the {c} shape?|What shape is the {c} one?|What is {c}?"
            "|What shape is the {c} object?|What shape is the {c} thing?|Which shape is the {c} one?"
            "|The {c} shape is what?"
            "|What is the shape of the {c} object?|What kind of shape is the {c} one?",
            "{c}的是什么形状？|{c}的图形是什么形状？|哪个图形是{c}的？|什么图形是{c}的？"
            "|{c}的是什么图形？|{c}的是什么？|{c}的物体是什么形状？|什么形状是{c}的？",
            c=ask_colour(rng, lang, thing.colour),
        )
    if rng.random() < 0.15:
        return Turn(
            one_word(rng, lang, question),
            thing.shape if lang == "en" else ZH_SHAPE[thing.shape],
            "shape",
            state={"it": thing},
        )
    answer = f"It is {article(thing.shape)}." if lang == "en" else f"是{ZH_SHAPE[thing.shape]}。"
    return Turn(question, answer, "shape", state={"it": thing, "asked": "shape"})


def shape_again(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Follow a shape question up with another colour."""
    thing = _unique(rng, scene, lambda t: t.colour)
    if not thing:
        return None
    question = pick(
        rng,
        lang,
        "And the {c} one?|What about the {c} one?|And {c}?",
        "那{c}的呢？|{c}的呢？|那{c}呢？",
        c=ask_colour(rng, lang, thing.colour),
    )
    answer = f"It is {article(thing.shape)}." if lang == "en" else f"是{ZH_SHAPE[thing.shape]}。"
    return Turn(question, answer, "follow", state={"it": thing, "asked": "shape"})


def cell_of(thing: Thing) -> tuple[int, int] | None:
    """Return the cell of the 3x3 grid that a thing is in, or None when it is too near to a border."""
    if any(abs(v - edge) < 0.035 for v in (thing.x, thing.y) for edge in (1 / 3, 2 / 3)):
        return None
    return int(thing.x * 3), int(thing.y * 3)


def _position_answer(lang: str, thing: Thing, cell: tuple[int, int]) -> str:
    if lang == "en":
        return f"The {thing_name(lang, thing)} is {EN_CELL[cell]}."
    return f"{thing_name(lang, thing)}在{ZH_CELL[cell]}。"


def position_of(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask where a thing is."""
    thing = _unique(rng, scene, lambda t: (t.shape, t.colour))
    cell = cell_of(thing) if thing else None
    if not thing or not cell:
        return None
    shape = ask_shape(rng, lang, thing.shape)
    lone = sum(t.shape == thing.shape for t in scene.things) == 1 and rng.random() < 0.5
    colour = ask_colour(rng, lang, thing.colour)
    name = shape if lone else f"{colour} {shape}" if lang == "en" else colour + "的" * colour.endswith("色") + shape
    question = pick(
        rng,
        lang,
        "Where is the {n}?|Where is the {n} in the {p}?|In which part of the {p} is the {n}?"
        "|What is the position of the {n}?|Where's the {n}?|Where in the {p} is the {n}?"
        "|Find the {n}.|Locate the {n}.",
        "{n}在哪里？|{n}在哪儿？|{n}在{p}的什么位置？|{n}在什么位置？|{n}在{p}的哪里？|{n}的位置在哪里？",
        n=name,
    )
    return Turn(question, _position_answer(lang, thing, cell), "position", state={"it": thing, "asked": "position"})


def at_position(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask what is in one cell of the picture."""
    cells = [cell_of(t) for t in scene.things]
    if None in cells or not cells:
        return None
    cell = rng.choice(cells) if rng.random() < 0.8 else (rng.randrange(3), rng.randrange(3))
    found = tuple(t for t, c in zip(scene.things, cells, strict=True) if c == cell)
    where = EN_CELL[cell] if lang == "en" else ZH_CELL[cell]
    if lang == "en" and rng.random() < 0.3:
        where += " corner" if cell[0] != 1 and cell[1] != 1 else " of the picture"
    question = pick(
        rng,
        lang,
        "What is {w}?|What is {w}?|What's {w}?|Which shape is {w}?|What shape is {w}?|What can you see {w}?",
        "{w}有什么？|{w}是什么？|{p}{w}有什么？|{w}是什么图形？|{p}的{w}是什么？",
        w=where,
    )
    if found:
        return Turn(question, description(lang, found), "position")
    return Turn(question, "Nothing." if lang == "en" else "没有东西。", "position")


RELATIONS = (("to the left of", "左边"), ("to the right of", "右边"), ("above", "上面"), ("below", "下面"))


def _holds(kind: int, a: Thing, b: Thing) -> bool | None:
    """Say whether relation number `kind` holds from a to b; None when it is hard to tell."""
    gap = (b.x - a.x, a.x - b.x, b.y - a.y, a.y - b.y)[kind]
    return None if abs(gap) < 0.1 else gap > 0


def relation(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask whether one thing is left of, right of, above or below another, or what is there."""
    names = Counter((t.shape, t.colour) for t in scene.things)
    single = [t for t in scene.things if names[t.shape, t.colour] == 1]
    if len(single) < 2:
        return None
    a, b = rng.sample(single, 2)
    kind = rng.randrange(4)
    holds = _holds(kind, a, b)
    if holds is None:
        return None
    en, zh = RELATIONS[kind]
    name_a, name_b = thing_name(lang, a), thing_name(lang, b)
    shapes = Counter(t.shape for t in scene.things)
    if shapes[a.shape] == 1 == shapes[b.shape] and rng.random() < 0.4:
        name_a, name_b = ask_shape(rng, lang, a.shape), ask_shape(rng, lang, b.shape)
    if len(scene.things) == 2 and holds and rng.random() < 0.5:
        question = pick(
            rng,
            lang,
            "What is {r} the {b}?|Which shape is {r} the {b}?|What shape is {r} the {b}?",
            "{b}的{r}是什么？|{b}{r}是什么？|{b}的{r}有什么？|什么在{b}的{r}？",
            r=en if lang == "en" else zh,
            b=name_b,
        )
        return Turn(question, description(lang, (a,)), "relation", state={"it": a})
    en = rng.choice(
        {"below": ("below", "under", "beneath", "below"), "above": ("above", "over", "above")}.get(en, (en,))
    )
    zh_r = rng.choice((zh, zh, {"左边": "左侧", "右边": "右侧", "上面": "上方", "下面": "下方"}[zh]))
    question = pick(
        rng,
        lang,
        "Is the {a} {r} the {b}?",
        "{a}在{b}的{r}吗？|{a}是在{b}的{r}吗？|{a}在{b}{r}吗？",
        a=name_a,
        b=name_b,
        r=en if lang == "en" else zh_r,
    )
    if rng.random() < 0.1:
        word = ("Yes" if holds else "No") if lang == "en" else ("是" if holds else "不是")
        return Turn(one_word(rng, lang, question), word, "relation")
    en = RELATIONS[kind][0]
    if lang == "en":
        body = f"the {a.shape} is {'' if holds else 'not '}{en} the {b.shape}."
        return Turn(question, ("Yes, " if holds else "No, ") + body, "relation")
    body = f"{ZH_SHAPE[a.shape]}{'' if holds else '不'}在{ZH_SHAPE[b.shape]}的{zh}。"
    return Turn(question, ("是的，" if holds else "不是，") + body, "relation")


def exists(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask whether there is a thing of a colour, of a shape or of both."""
    by = rng.choice(("colour", "shape", "both"))
    shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_ORDER)
    if scene.things and rng.random() < 0.6:
        thing = rng.choice(scene.things)
        shape, colour = (thing.shape, thing.colour) if by != "both" or rng.random() < 0.7 else (thing.shape, colour)
    yes = any((by == "shape" or t.colour == colour) and (by == "colour" or t.shape == shape) for t in scene.things)
    asked_c, asked_s = ask_colour(rng, lang, colour), ask_shape(rng, lang, shape)
    if lang == "en":
        noun = {"colour": f"{colour} shape", "shape": shape, "both": f"{colour} {shape}"}[by]
        asked = {
            "colour": f"{asked_c} {rng.choice(('shape', 'object', 'thing'))}",
            "shape": asked_s,
            "both": f"{asked_c} {asked_s}",
        }[by]
        question = pick(
            rng,
            lang,
            "Is there {a} in the {p}?|Is there {a}?|Do you see {a}?|Can you see {a}?"
            "|Does the {p} show {a}?|Is there {a} in this {p}?|Does the {p} contain {a}?|Are there any {s}?"
            "|Are there any {s} in the {p}?",
            "",
            a=article(asked),
            s=plural(asked),
        )
        word, full = ("Yes", f"Yes, there is {article(noun)}.") if yes else ("No", f"No, there is no {noun}.")
    else:
        of = "的" if asked_c.endswith("色") else ""
        noun = {
            "colour": f"{ZH_COLOUR[colour]}的图形",
            "shape": ZH_SHAPE[shape],
            "both": f"{ZH_COLOUR[colour]}的{ZH_SHAPE[shape]}",
        }[by]
        asked = {
            "colour": asked_c + of + rng.choice(("图形", "图形", "物体")),
            "shape": asked_s,
            "both": asked_c + of + asked_s,
        }[by]
        question = pick(
            rng,
            lang,
            "",
            "{p}里有{a}吗？|有{a}吗？|{p}中有没有{a}？|有没有{a}？|你看到{a}了吗？|{p}里是否有{a}？"
            "|能看到{a}吗？|{p}里面有{a}吗？",
            a=asked,
        )
        word, full = ("有", f"有，有{noun}。") if yes else ("没有", f"没有{noun}。")
    if rng.random() < 0.12:
        return Turn(one_word(rng, lang, question), word, "exists")
    return Turn(question, full, "exists", state={"sure": True})


def list_colours(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask which colours or which shapes there are."""
    if not scene.things:
        return None
    if rng.random() < 0.5:
        used = [c for c in COLOUR_ORDER if any(t.colour == c for t in scene.things)]
        question = pick(
            rng,
            lang,
            "Which colours are there?|What colours are the shapes?|What colours do you see?"
            "|List the colours."
            "|What colours are in the {p}?|Name the colours of the shapes.|Which colours are in the {p}?",
            "有哪些颜色？|{p}里有哪些颜色？|图形有哪些颜色？|列出所有颜色。|有什么颜色？|{p}中的图形是什么颜色？",
        )
        text = join_en(used) if lang == "en" else join_zh([ZH_COLOUR[c] for c in used])
    else:
        used = [s for s in SHAPES if any(t.shape == s for t in scene.things)]
        question = pick(
            rng,
            lang,
            "Which shapes are there?|What shapes are there?|What shapes are in the {p}?|Name the shapes."
            "|What kinds of shapes are there?|Which kinds of shapes do you see?"
            "|Which shapes are in the {p}?",
            "有哪些形状？|有哪几种图形？|{p}里有哪几种形状？|有什么形状？|有哪些种类的图形？",
        )
        text = join_en(used) if lang == "en" else join_zh([ZH_SHAPE[s] for s in used])
    return Turn(question, text[0].upper() + text[1:] + "." if lang == "en" else text + "。", "colours")


# Text


def read(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask for the number or the word in the picture."""
    text = scene.text
    general = rng.random() < 0.5
    en = (
        "What does it say?|What does the {p} say?|Read the text.|What is written in the {p}?|What text is in the {p}?"
        "|Read the text in the {p}.|What is written here?|What is the text?|Read this."
        "|What does the text say?|Read it."
        "|What is written?|Can you read this?|Read the {p}.|What text do you see?"
        "|Please read the text.|Transcribe the text."
    )
    zh = (
        "{p}里写了什么？|{p}上写着什么？|写了什么？|读出{p}中的文字。|{p}里的文字是什么？"
        "|上面写着什么？|这写的是什么？|读一下。|请读出{p}里的文字。|{p}上的文字是什么？"
        "|写的是什么？|识别{p}中的文字。|上面写了什么？"
    )
    if scene.kind in ("shapes", "blank"):
        question = pick(
            rng,
            lang,
            en + "|What number is this?|Is there any text in the {p}?",
            zh + "|{p}里有文字吗？|这是什么数字？",
        )
        return Turn(question, "There is no text in the picture." if lang == "en" else "图片里没有文字。", "no_text")
    if not general:
        if scene.kind == "word":
            en = (
                "What word is this?|Which word is in the {p}?|What word is written?|Read the word."
                "|What word do you see?"
                "|What is the word?|Which word is it?|What word is in the {p}?|What word does the {p} show?"
                "|Read the word in the {p}."
            )
            zh = (
                "这是什么单词？|{p}里是什么单词？|读出这个单词。|{p}上写的是什么词？|单词是什么？"
                "|{p}里的单词是什么？|这是什么词？|是什么单词？"
            )
        elif scene.kind == "digits":
            en = (
                "What number is this?|Which number is in the {p}?|What number is in the {p}?"
                "|What is the number?|Read the number."
                "|What number do you see?|Which number is it?|What digits are in the {p}?|Read the digits."
                "|What number is shown?"
                "|What number is written?|Read the number in the {p}.|What are the digits?"
                "|What number does the {p} show?|Which number?"
            )
            zh = (
                "这是什么数字？|{p}里是什么数字？|{p}中的数字是多少？|数字是多少？|读出{p}里的数字。"
                "|是什么数字？|这个数字是多少？|{p}上写的数字是什么？"
                "|读一下数字。|数字是什么？|{p}里写的是多少？|这是几？|读出这个数字。"
            )
    question = pick(rng, lang, en, zh)
    if scene.kind == "digits":
        if rng.random() < 0.15:
            return Turn(one_word(rng, lang, question, "number"), text, "digits", text)
        return Turn(question, f"The number is {text}." if lang == "en" else f"数字是{text}。", "digits", text)
    if scene.kind == "sum":
        text = "{} + {}".format(*scene.numbers)
        return Turn(question, f"It says {text}." if lang == "en" else f"写着{text}。", "read_sum", text)
    if rng.random() < 0.1:
        return Turn(one_word(rng, lang, question), text, "word", text)
    return Turn(question, f"It says {text}." if lang == "en" else f"写着{text}。", "word", text)


def add_up(rng: random.Random, scene: Scene, lang: str) -> Turn | None:
    """Ask for the result of the sum in the picture."""
    question = pick(
        rng,
        lang,
        "What is the sum?|What is the result?|Calculate.|Calculate the sum.|Solve this."
        "|How much is it?|What is the answer?"
        "|Work out the sum in the {p}.|Solve the sum in the {p}.|Add the numbers."
        "|What is the sum of the two numbers?|Add them up."
        "|What does this add up to?|How much is that?|Compute the result.|What is the total?"
        "|Do the sum.|Do the sum in the {p}."
        "|What is the answer to the sum in the {p}?|Solve the problem in the {p}."
        "|Calculate the result of the expression."
        "|What is the result of the addition?|How much is this?"
        "|What do you get when you add the numbers?|Solve it.|Evaluate the expression."
        "|What does it equal?|What does this equal?|Compute the sum.|Answer the question in the {p}."
        "|What is the sum in the {p}?",
        "结果是多少？|等于多少？|算一算。|计算{p}中的算式。|答案是多少？|和是多少？"
        "|{p}里的算式等于多少？|这道题的答案是多少？|计算结果。|请计算。|两个数的和是多少？"
        "|把两个数加起来。"
        "|这道加法题的结果是什么？|算式的结果是多少？|请算出结果。|{p}中的算式结果是多少？|算一下。"
        "|得多少？|加起来是多少？|一共是多少？|求和。|计算一下{p}里的题目。",
    )
    if scene.kind != "sum":
        if scene.kind == "shapes" and "how much" in question.lower():
            return None
        return Turn(question, "There is no sum in the picture." if lang == "en" else "图片里没有算式。", "no_sum")
    a, b = scene.numbers
    if rng.random() < 0.15:
        return Turn(one_word(rng, lang, question, "number"), str(a + b), "sum_short", str(a + b))
    answer = f"{a} + {b} = {a + b}"
    return Turn(question, answer, "sum", answer)


def typed_sum(rng: random.Random, scene: Scene | None, lang: str) -> Turn | None:
    """Ask for the sum of two typed numbers."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    n = rng.choice(("{} + {}", "{}+{}", "{} + {}")).format(a, b)
    if rng.random() < 0.4:
        question = n + rng.choice(("", " =", "=", "=?", " = ?", "?"))
    else:
        question = pick(
            rng,
            lang,
            "What is {n}?|How much is {n}?|Calculate {n}.|Add {a} and {b}.|What is {a} plus {b}?|Compute {n}.",
            "{n}等于多少？|{n}等于几？|计算{n}。|{a}加{b}等于多少？|{n}是多少？|请算{n}。",
            n=n,
            a=str(a),
            b=str(b),
        )
    answer = f"{a} + {b} = {a + b}"
    return Turn(question, answer, "typed_sum", answer)


# Conversation


GREETING_EN = (
    "Hello!|Hi!|Hello|Hi there!|Hey!|Good morning!|Good evening.|Hello, how are you?|Hi, how are you?|How are you?"
)
GREETING_ZH = "你好！|你好|您好！|早上好！|晚上好。|你好吗？|嗨！|你好呀！|大家好！"
WHO_EN = (
    "Who are you?|What are you?|What is your name?|Tell me about yourself.|Introduce yourself.|What can you do?"
    "|What's your name?|Are you a language model?|Which model are you?|What model is this?"
    "|Who am I talking to?|How can you help me?"
    "|What are you able to do?|Help"
)
WHO_ZH = (
    "你是谁？|你叫什么名字？|介绍一下你自己。|你是什么模型？|你能做什么？|你会做什么？"
    "|请介绍一下自己。|你叫什么？|你是什么？|你可以帮我做什么？|帮助"
)
THANKS_EN = (
    "Thanks!|Thank you!|Thanks a lot.|Great, thank you.|Thank you very much!|Well done!|Good job!|Very good.|Great!"
)
THANKS_ZH = "谢谢！|谢谢你！|非常感谢。|多谢！|谢谢|太好了，谢谢！|做得好！|很好！"
BYE_EN = "Bye!|Goodbye!|See you later.|Good night!"
BYE_ZH = "再见！|拜拜！|晚安！|下次见。"
OFF_TOPIC_EN = (
    "What is the capital of France?|Who wrote Hamlet?|Tell me a joke.|Write a poem about the sea."
    "|What is the weather today?"
    "|How do I cook rice?|Explain quantum physics.|Write a Python program.|What time is it?|Who is the president?"
    "|Translate this into French.|What is the meaning of life?|How tall is Mount Everest?"
    "|Tell me a story.|Sing a song for me."
    "|What is 12 times 7?|Who won the match yesterday?|What is the best film of all time?"
    "|How far is the moon?|Write an email to my boss."
    "|What is the square root of 16?|Where is Paris?|What should I eat tonight?"
    "|When was Einstein born?|Is it going to rain tomorrow?"
    "|Who is the person in the picture?|What is machine learning?|Give me some advice."
    "|Recommend a good book.|How do planes fly?"
    "|Which animal is in the picture?|Tell me the news.|Can you play chess?"
    "|What is the largest country in the world?|Why is the sky blue?"
)
OFF_TOPIC_ZH = (
    "法国的首都是哪里？|讲个笑话。|写一首关于大海的诗。|今天天气怎么样？|怎么做米饭？"
    "|解释一下量子物理。|写一个程序。|现在几点了？|谁是总统？|把这句话翻译成英语。"
    "|人生的意义是什么？|珠穆朗玛峰有多高？|讲一个故事。|唱一首歌。|十二乘以七是多少？"
    "|昨天谁赢了比赛？|最好的电影是哪一部？|月亮有多远？|帮我写一封邮件。|中国有多少人口？"
    "|北京在哪里？|今晚吃什么好？|爱因斯坦是哪一年出生的？|明天会下雨吗？|照片里的人是谁？"
    "|什么是机器学习？|给我一些建议。|推荐一本好书。|飞机为什么会飞？|{p}里是什么动物？"
    "|天空为什么是蓝色的？"
    "|告诉我今天的新闻。|你会下棋吗？|世界上最大的国家是哪个？|长江有多长？"
)

# The same with many different subjects, so that the model refuses the kind of question and not the few it has seen.
OFF_TOPIC_ABOUT_EN = (
    "What is the capital of {c}?|How many people live in {c}?|Where is {c}?|What language do they speak in {c}?"
    "|Who is the president of {c}?|Write a poem about {t}.|Write a story about {t}.|Tell me about {t}.|Explain {t}."
    "|How does {t} work?|Who invented {t}?|Why is {t} important?|What do you think about {t}?|Do you like {t}?"
    "|What is the history of {t}?|Give me five facts about {t}.|How much does {t} cost?|Where can I buy {t}?"
    "|Write an essay about {t}.|Tell me a joke about {t}.|Translate {t} into Spanish.|How can I learn {t}?"
    "|Who is best at {t}?|What is the future of {t}?|Recommend a book about {t}.|When is the best time to visit {c}?"
    "|Can you help me with {t}?|Write code for {t}.|Summarize the history of {c}.|What does {t} mean?"
)
OFF_TOPIC_ABOUT_ZH = (
    "{c}的首都是哪里？|{c}有多少人口？|{c}在哪里？|{c}人说什么语言？|{c}的总统是谁？|写一首关于{t}的诗。|写一个关于{t}的故事。"
    "|给我讲讲{t}。|解释一下{t}。|{t}是怎么工作的？|谁发明了{t}？|为什么{t}很重要？|你觉得{t}怎么样？|你喜欢{t}吗？"
    "|{t}的历史是什么？|说五个关于{t}的事实。|{t}多少钱？|在哪里可以买到{t}？|写一篇关于{t}的文章。|讲一个关于{t}的笑话。"
    "|把{t}翻译成英文。|怎么学习{t}？|推荐一本关于{t}的书。|什么时候去{c}最好？|你能帮我处理{t}吗？"
    "|介绍一下{c}的历史。|{t}是什么意思？"
)
TOPICS_EN = (
    "music|football|history|physics|love|cooking|chess|the moon|dogs|cats|cars|climate change|art|computers|money"
    "|mathematics|the sea|dinosaurs|bread|gardening|school|health|politics|guitars|space|winter|books|films"
    "|trains|the internet|robots|tea|my job|travel|fashion|tennis|birds|wine|biology|medicine|law|poetry|the universe"
    "|pizza|gravity|taxes|flowers|mountains|dreams|language|time|happiness|electricity|swimming|a good breakfast"
)
TOPICS_ZH = (
    "音乐|足球|历史|物理|爱情|做饭|围棋|月亮|小狗|猫|汽车|气候|艺术|电脑|咖啡|钱|数学|大海|恐龙|面包|花园|学校|健康|政治|哲学"
    "|冬天|书|电影|火车|互联网|机器人|茶|工作|旅行|时尚|网球|鸟|酒|生物|医学|法律|诗歌|宇宙|披萨|重力|花|山|梦|语言|时间|幸福|电|游泳|早餐"
)
COUNTRIES_EN = (
    "France|Spain|Germany|Italy|China|Japan|India|Brazil|Canada|Australia|England|Russia|Egypt|Mexico|Poland|Sweden"
    "|Norway|Turkey|Kenya|Peru|Chile|Greece|Portugal|Korea|Vietnam|Thailand|Austria|Ireland|Finland|the United States"
)
COUNTRIES_ZH = (
    "法国|西班牙|德国|意大利|中国|日本|印度|巴西|加拿大|澳大利亚|英国|俄罗斯|埃及|墨西哥|波兰"
    "|瑞典|挪威|土耳其|希腊|葡萄牙|韩国|越南|泰国|美国"
)


def chat(rng: random.Random, scene: Scene | None, lang: str) -> Turn:
    """Make a turn of small talk, a question about the model, or one that it cannot answer."""
    kind = rng.choices(("hello", "who", "thanks", "bye", "off"), (3, 4, 2, 1, 5))[0]
    questions = {
        "hello": (GREETING_EN, GREETING_ZH),
        "who": (WHO_EN, WHO_ZH),
        "thanks": (THANKS_EN, THANKS_ZH),
        "bye": (BYE_EN, BYE_ZH),
        "off": (OFF_TOPIC_EN, OFF_TOPIC_ZH),
    }[kind]
    answers = {
        "hello": ("Hello! I am tiny. Show me a picture.", "你好！我是 tiny。给我看一张图片吧。"),
        "who": (ABOUT_EN, ABOUT_ZH),
        "thanks": ("You are welcome!", "不客气！"),
        "bye": ("Goodbye!", "再见！"),
        "off": (CANNOT_EN, CANNOT_ZH),
    }[kind]
    topics, countries = (TOPICS_EN, COUNTRIES_EN) if lang == "en" else (TOPICS_ZH, COUNTRIES_ZH)
    if kind == "off" and rng.random() < 0.75:
        questions = (OFF_TOPIC_ABOUT_EN, OFF_TOPIC_ABOUT_ZH)
    question = pick(rng, lang, *questions, t=rng.choice(topics.split("|")), c=rng.choice(countries.split("|")))
    return Turn(question, answers[lang != "en"], f"chat_{kind}")


def no_picture(rng: random.Random, scene: Scene | None, lang: str) -> Turn:
    """Ask about a picture that was not sent."""
    maker = rng.choice((describe, count_all, read))
    turn = maker(rng, Scene(rng.choice(("digits", "word")), text="0"), lang)
    assert turn is not None
    return Turn(turn.question, NO_PICTURE_EN if lang == "en" else NO_PICTURE_ZH, "no_picture")


def are_you_sure(rng: random.Random, scene: Scene | None, lang: str) -> Turn:
    """Doubt the last answer."""
    return Turn(
        pick(rng, lang, "Are you sure?|Really?|Are you certain?|Is that right?", "你确定吗？|确定吗？|真的吗？|对吗？"),
        "Yes, I am sure." if lang == "en" else "是的，我确定。",
        "sure",
    )


def about_it(rng: random.Random, scene: Scene, lang: str, it: Thing) -> Turn | None:
    """Ask for another property of the thing that the last turn was about."""
    kind = rng.choice(("colour", "shape", "position"))
    if kind == "colour":
        question = pick(
            rng,
            lang,
            "What colour is it?|And what colour is it?|And its colour?|Which colour is it?|And the colour?",
            "它是什么颜色？|它是什么颜色的？|那它是什么颜色？|什么颜色？|颜色呢？",
        )
        return Turn(question, _colour_answer(lang, it), "follow", state={"it": it, "asked": "colour"})
    if kind == "shape":
        question = pick(
            rng,
            lang,
            "What shape is it?|And what shape is it?|And its shape?|Which shape is it?",
            "它是什么形状？|它是什么图形？|什么形状？|那它是什么形状的？|形状呢？",
        )
        answer = f"It is {article(it.shape)}." if lang == "en" else f"是{ZH_SHAPE[it.shape]}。"
        return Turn(question, answer, "follow", state={"it": it, "asked": "shape"})
    cell = cell_of(it)
    if not cell:
        return None
    question = pick(
        rng, lang, "Where is it?|And where is it?|And its position?", "它在哪里？|它在哪儿？|那它在什么位置？|位置呢？"
    )
    return Turn(question, _position_answer(lang, it, cell), "follow", state={"it": it, "asked": "position"})


# Conversations


Maker = Callable[[random.Random, Scene, str], Turn | None]
MAKERS: dict[str, tuple[tuple[Maker, float], ...]] = {
    "shapes": (
        (describe, 14),
        (count_all, 3.5),
        (count_some, 3),
        (colour_of, 4),
        (shape_of, 3),
        (position_of, 4),
        (at_position, 1.8),
        (relation, 3),
        (exists, 2),
        (list_colours, 1),
        (read, 0.3),
        (add_up, 0.1),
        (chat, 0.3),
    ),
    "digits": ((read, 6), (describe, 1), (typed_sum, 1.5), (count_all, 0.1), (exists, 0.1), (add_up, 0.1), (chat, 0.3)),
    "word": ((read, 6), (describe, 1), (typed_sum, 1.2), (count_all, 0.1), (exists, 0.1), (add_up, 0.1), (chat, 0.3)),
    "sum": ((add_up, 6), (read, 0.8), (describe, 0.6), (typed_sum, 2), (count_all, 0.1), (chat, 0.3)),
    "blank": ((describe, 2), (count_all, 2), (count_some, 1), (exists, 1), (read, 1), (add_up, 0.3), (chat, 0.2)),
}


def follow_up(rng: random.Random, scene: Scene, lang: str, last: Turn) -> Turn | None:
    """Make a question that needs the turn before it."""
    if rng.random() < 0.1:
        return are_you_sure(rng, scene, lang)
    if "counted" in last.state and last.state["counted"] != "shape":
        return count_again(rng, scene, lang)
    if last.state.get("asked") == "colour" and rng.random() < 0.5:
        return colour_again(rng, scene, lang)
    if last.state.get("asked") == "shape" and rng.random() < 0.5:
        return shape_again(rng, scene, lang)
    if "it" in last.state:
        return about_it(rng, scene, lang, last.state["it"])
    return None


def next_turn(rng: random.Random, scene: Scene | None, lang: str, last: Turn | None) -> Turn:
    """Make the next turn of a conversation; `scene` is None while no picture has been sent."""
    if scene is None:
        return rng.choices((chat, typed_sum, no_picture), (7, 3, 1.5))[0](rng, scene, lang)
    if last is not None and rng.random() < 0.3:
        turn = follow_up(rng, scene, lang, last)
        if turn:
            return turn
    makers, weights = zip(*MAKERS[scene.kind], strict=True)
    while True:
        turn = rng.choices(makers, weights)[0](rng, scene, lang)
        if turn:
            return turn


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful and friendly assistant.",
    "Answer politely.",
    "You are a helpful AI assistant.",
    "Please be brief.",
    "You are tiny, a small model.",
    "Answer the questions about the picture.",
    "你是一个有用的助手。",
    "你是一个乐于助人的助手。",
    "请礼貌地回答。",
    "请简短回答。",
    "请回答关于图片的问题。",
    "You are a careful assistant. Look at the picture first.",
    "This is a chat between a curious human and an AI assistant.",
    "You are a polite assistant who answers truthfully.",
)
