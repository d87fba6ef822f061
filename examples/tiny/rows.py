"""Build training rows: conversations about pictures as token ids, labels and pixels."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import numpy as np
import sentencepiece as spm
import torch
from pictures import Scene, make_picture, mark_patches, pad_and_resize
from questions import SYSTEM_PROMPTS, Turn, chat, next_turn, typed_sum
from tokenizer import ASSISTANT, END, IMAGE, PAD, SYSTEM, USER, encode_answer

IGNORE = -100


@dataclass
class Mix:
    """How the rows of one training step are made up."""

    shape_rows: int = 24
    text_rows: int = 28  # short rows: mostly pictures of text, and some of shapes
    two_pictures: int = 2  # of the shape rows
    no_picture: int = 1  # of the shape rows
    shape_length: int = 112  # tokens besides the picture
    text_length: int = 44
    easy_steps: int = 1500  # until this step ever fewer pictures are easy: one shape, or one or two digits
    text_kinds: dict[str, float] = field(
        default_factory=lambda: {"sum": 0.26, "digits": 0.18, "word": 0.2, "shapes": 0.36}
    )


class Row:
    """One conversation under construction, with a limited number of tokens."""

    def __init__(self, sp: spm.SentencePieceProcessor, room: int, image_tokens: int) -> None:
        self.sp, self.room, self.image_tokens = sp, room, image_tokens
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.pictures: list[np.ndarray] = []
        self.marks: list[np.ndarray] = []
        self.first_task = ""

    def system(self, text: str) -> None:
        """Start with a system prompt."""
        self._put([SYSTEM, *self.sp.encode(text), END], False)

    def _put(self, ids: list[int], train: bool) -> None:
        self.ids += ids
        self.labels += ids if train else [IGNORE] * len(ids)

    def add(self, turn: Turn, picture: np.ndarray | None = None, room: int | None = None, dropout: float = 0) -> bool:
        """Append a turn, with a picture before its text if given; return whether there was room for it."""
        if dropout:
            question = self.sp.encode(turn.question, enable_sampling=True, alpha=dropout, nbest_size=-1)
        else:
            question = self.sp.encode(turn.question)
        answer = encode_answer(self.sp, turn.answer, turn.spell)
        if len(question) + len(answer) + 4 > (self.room if room is None else room):
            return False
        self.room -= len(question) + len(answer) + 4
        self._put(
            [USER, *([IMAGE] * self.image_tokens if picture is not None else []), *question, END, ASSISTANT], False
        )
        self._put([*answer, END], True)
        if picture is not None:
            self.pictures.append(picture)
        self.first_task = self.first_task or turn.task
        return True


def _language(rng: random.Random, lang: str) -> str:
    return lang if rng.random() < 0.92 else rng.choice(("en", "zh"))


def _talk(
    rng: random.Random,
    row: Row,
    scene: Scene | None,
    lang: str,
    picture: np.ndarray | None,
    turns: int,
    reserve: int = 0,
) -> None:
    """Append turns about one scene until there is no room; the picture goes with the first of them."""
    last: Turn | None = None
    misses = 0
    dropout = 0.1 if rng.random() < 0.12 else 0.0
    while turns > 0 and misses < 4:
        if scene is not None and scene.text and last is not None and rng.random() < 0.6:
            # What stands in the picture was read already; reading it again teaches nothing.
            turn: Turn | None = (typed_sum if rng.random() < 0.8 else chat)(rng, scene, _language(rng, lang))
        else:
            turn = next_turn(rng, scene, _language(rng, lang), last)
        if turn and row.add(turn, picture, row.room - reserve, dropout):
            last, picture, turns = turn, None, turns - 1
        elif picture is None:
            misses += 1
        else:
            dropout = 0.0


def build_row(
    rng: random.Random,
    sp: spm.SentencePieceProcessor,
    kinds: list[str],
    room: int,
    size: int,
    image_tokens: int,
    easy: bool = False,
) -> Row:
    """Make a conversation about as many pictures as `kinds` names; none means small talk only."""
    row = Row(sp, room, image_tokens)
    lang = rng.choice(("en", "zh"))
    if len(kinds) == 1 and room > 60 and rng.random() < 0.06:
        system = rng.choice(SYSTEM_PROMPTS)
        row.system(system)
        row.room -= len(row.ids)
    if len(kinds) == 1 and room > 60 and rng.random() < 0.08:
        _talk(rng, row, None, lang, None, rng.randint(1, 2), 50)  # the picture comes later
    for i, kind in enumerate(kinds):
        image, scene = make_picture(rng, kind, easy)
        row.marks.append(mark_patches(scene, *image.size, round(image_tokens**0.5)))
        last_one = i == len(kinds) - 1
        _talk(
            rng,
            row,
            scene,
            lang,
            pad_and_resize(image, size),
            99 if last_one else rng.randint(1, 2),
            0 if last_one else 28,
        )
    if not kinds:
        _talk(rng, row, None, lang, None, 99)
    return row


def stack(rows: list[Row], length: int) -> dict[str, torch.Tensor]:
    """Pad rows at the right and stack them; labels are already shifted to the position that predicts them."""
    ids = np.full((len(rows), length), PAD, np.int64)
    labels = np.full((len(rows), length), IGNORE, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        labels[i, : len(row.ids) - 1] = row.labels[1:]
    pixels = [p for row in rows for p in row.pictures]
    batch = {"ids": ids, "labels": labels, "pixels": np.stack(pixels)}
    marks = [m for row in rows for m in row.marks]
    if marks:
        batch["marks"] = np.stack(marks)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def build_step(
    seed: int, step: int, sp: spm.SentencePieceProcessor, mix: Mix, size: int, image_tokens: int
) -> list[dict[str, torch.Tensor]]:
    """Return the two batches of a training step, about shapes and about text. Numbers of pictures and lengths are
    the same in every step, so that the compiled model needs only one version of each."""
    rng = random.Random(seed * 1_000_003 + step)
    spm.set_random_generator_seed(rng.getrandbits(31))
    ease = 0.7 * max(0.0, 1 - step / max(1, mix.easy_steps))

    def text_kind() -> str:
        return rng.choices(list(mix.text_kinds), list(mix.text_kinds.values()))[0]

    def shape_kind() -> str:
        return "blank" if rng.random() < 0.02 else "shapes"

    shape_rows = []
    room = mix.shape_length
    for i in range(mix.shape_rows):
        if i < mix.two_pictures:
            kinds = [rng.choice((shape_kind(), text_kind())) for _ in range(2)]
            row = build_row(rng, sp, kinds, room - image_tokens, size, image_tokens)
        elif i < mix.two_pictures + mix.no_picture:
            row = build_row(rng, sp, [], room + image_tokens, size, image_tokens)
        else:
            row = build_row(rng, sp, [shape_kind()], room, size, image_tokens, rng.random() < ease)
        shape_rows.append(row)
    text_rows = []
    for _ in range(mix.text_rows):
        easy = rng.random() < ease
        kinds = [rng.choice(("digits", "shapes")) if easy else text_kind()]
        text_rows.append(build_row(rng, sp, kinds, mix.text_length, size, image_tokens, easy))
    batches = []
    if shape_rows:
        batches.append(stack(shape_rows, room + image_tokens))
    if text_rows:
        batches.append(stack(text_rows, mix.text_length + image_tokens))
    return batches


class Pictures(torch.utils.data.Dataset):
    """Steps of pictures without conversations, to train the ViT alone. Half of each step's pictures are new, and the
    rest come from earlier steps, because drawing takes as long as looking."""

    def __init__(self, seed: int, first: int, last: int, count: int, mix: Mix, size: int, grid: int) -> None:
        self.args = (seed, first, last, count, mix, size, grid)
        self.pool: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return self.args[2] - self.args[1]

    def __getitem__(self, index: int) -> list[dict[str, torch.Tensor]]:
        seed, first, _, count, mix, size, grid = self.args
        rng = random.Random(f"pictures {seed} {first + index}")
        if not self.pool and torch.utils.data.get_worker_info() is not None:
            os.nice(14)
        kinds, shares = zip(*mix.text_kinds.items(), strict=True)
        new = []
        for _ in range(count // 2 if self.pool else count):
            image, scene = make_picture(rng, rng.choices(kinds, shares)[0], rng.random() < 0.1)
            new.append((pad_and_resize(image, size), mark_patches(scene, *image.size, grid)))
        chosen = new + (rng.sample(self.pool, count - len(new)) if self.pool else [])
        self.pool = (self.pool + new)[-6000:]
        pixels, marks = (torch.from_numpy(np.stack(part)) for part in zip(*chosen, strict=True))
        return [{"pixels": pixels, "marks": marks}]


class Steps(torch.utils.data.Dataset):
    """Training steps by number: step n is the same whichever worker makes it."""

    def __init__(
        self, seed: int, first: int, last: int, tokenizer: str, mix: Mix, size: int, image_tokens: int
    ) -> None:
        self.args = (seed, first, last, tokenizer, mix, size, image_tokens)
        self.sp: spm.SentencePieceProcessor | None = None

    def __len__(self) -> int:
        return self.args[2] - self.args[1]

    def __getitem__(self, index: int) -> list[dict[str, torch.Tensor]]:
        seed, first, _, tokenizer, mix, size, image_tokens = self.args
        if self.sp is None:
            if torch.utils.data.get_worker_info() is not None:
                os.nice(14)  # drawing fills the gaps that training leaves, instead of interrupting it
            self.sp = spm.SentencePieceProcessor(model_file=tokenizer)
        return build_step(seed, first + index, self.sp, mix, size, image_tokens)
