"""Measure the tiny model on pictures that it never saw: one question each, greedy decoding, exact answers."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from model import TinyVL, load_release
from pictures import Scene, make_picture, pad_and_resize
from questions import (
    Maker,
    Turn,
    add_up,
    at_position,
    colour_of,
    count_all,
    count_some,
    describe,
    exists,
    position_of,
    read,
    relation,
    shape_of,
    typed_sum,
)
from tokenizer import ASSISTANT, END, IMAGE, PAD, USER, load_tokenizer

CHECKPOINT = Path(__file__).parent.parent.parent / "mmtool" / "models" / "tiny" / "checkpoint"
TASKS: dict[str, tuple[str, Maker]] = {
    "colour": ("shapes", colour_of),
    "shape": ("shapes", shape_of),
    "count": ("shapes", count_all),
    "count of a kind": ("shapes", count_some),
    "describe": ("shapes", describe),
    "position": ("shapes", position_of),
    "what is where": ("shapes", at_position),
    "relation": ("shapes", relation),
    "exists": ("shapes", exists),
    "digits": ("digits", read),
    "word": ("word", read),
    "sum": ("sum", add_up),
    "typed sum": ("shapes", typed_sum),
}


class Answerer:
    """Answer single questions about single pictures, many at a time."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.model: TinyVL = load_release(folder).to(device)
        self.tokenizer = load_tokenizer(folder)
        self.device = torch.device(device)

    def prompt(self, question: str, picture: bool) -> list[int]:
        """Return the token ids of a conversation that waits for its first answer."""
        images = [IMAGE] * (self.model.dims.image_tokens if picture else 0)
        return [USER, *images, *self.tokenizer.encode(question), END, ASSISTANT]

    @torch.inference_mode()
    def answer(self, questions: list[str], pictures: list[np.ndarray] | None = None, limit: int = 96) -> list[str]:
        """Decode greedily; `pictures` holds one padded and resized picture for each question, or is None."""
        prompts = [self.prompt(q, pictures is not None) for q in questions]
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        pixels = torch.from_numpy(np.stack(pictures)).to(self.device) if pictures is not None else None
        embeds, cache = self.model.embed(ids, pixels)[0], None
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        written: list[list[int]] = [[] for _ in prompts]
        for _ in range(limit):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            out = self.model.llm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, following = out.past_key_values, out.logits[:, -1].argmax(-1)
            done |= following == END
            if done.all():
                break
            for tokens, token, stop in zip(written, following.tolist(), done.tolist(), strict=True):
                if not stop:
                    tokens.append(token)
            embeds = self.model.llm.model.embed_tokens(following[:, None])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return [self.tokenizer.decode(tokens) for tokens in written]


def cases(task: str, lang: str, seed: int, count: int, size: int) -> Iterator[tuple[Turn, np.ndarray, Scene]]:
    """Draw held-out pictures and ask one question about each."""
    rng = random.Random(f"{seed} {task} {lang}")
    kind, maker = TASKS[task]
    made = 0
    while made < count:
        image, scene = make_picture(rng, kind)
        turn = maker(rng, scene, lang)
        if turn is not None:
            made += 1
            yield turn, pad_and_resize(image, size), scene


def is_right(task: str, wanted: str, got: str) -> bool:
    """Compare an answer with the wanted one; the case of a read word is not held against the model."""
    return wanted.casefold() == got.casefold() if task == "word" else wanted == got


def measure(answerer: Answerer, task: str, lang: str, seed: int, count: int, batch: int, show: int) -> float:
    """Return the share of right answers of a task in a language; print a few wrong ones."""
    items = list(cases(task, lang, seed, count, answerer.model.dims.image_size))
    right = 0
    for i in range(0, len(items), batch):
        part = items[i : i + batch]
        texts = answerer.answer([turn.question for turn, _, _ in part], [picture for _, picture, _ in part])
        for (turn, _, scene), text in zip(part, texts, strict=True):
            ok = is_right(task, turn.answer, text)
            right += ok
            if not ok and show > 0:
                show -= 1
                print(f"    {turn.question} -> {text}   (wanted: {turn.answer}; {scene.text or len(scene.things)})")
    return right / count


def write_table(path: Path, report: dict) -> None:
    """Replace what stands between the two accuracy comments of a Markdown file."""
    start, end = "<!-- accuracy -->", "<!-- end of accuracy -->"
    lines = ["", "| task | English | Chinese |", "| --- | ---: | ---: |"]
    for task, values in report["accuracy"].items():
        cells = [f"{100 * values[lang]:.1f} %" if lang in values else "" for lang in ("en", "zh")]
        lines.append(f"| {task} | {cells[0]} | {cells[1]} |")
    lines += ["", f"{report['samples']} questions for each figure, seed {report['seed']}.", ""]
    text = path.read_text(encoding="utf-8")
    before, after = text.split(start)[0], text.split(end)[1]
    path.write_text(before + start + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def main() -> None:
    """Print a table of accuracies and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="checkpoint folder")
    parser.add_argument("--seed", type=int, default=4242, help="seed of the pictures; training uses other streams")
    parser.add_argument("--samples", type=int, default=500, help="questions for each task and language")
    parser.add_argument("--lang", choices=("en", "zh", "both"), default="both")
    parser.add_argument("--tasks", default="", help="comma-separated tasks (default: all)")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers of each task")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--readme", type=Path, help="also write the table into this Markdown file")
    args = parser.parse_args()
    answerer = Answerer(args.folder, args.device)
    langs = ("en", "zh") if args.lang == "both" else (args.lang,)
    tasks = [t.strip() for t in args.tasks.split(",")] if args.tasks else list(TASKS)
    start = time.time()
    accuracy: dict[str, dict[str, float]] = {}
    print(f"{'task':18}" + "".join(f"{lang:>8}" for lang in langs))
    for task in tasks:
        accuracy[task] = {
            lang: round(measure(answerer, task, lang, args.seed, args.samples, args.batch, args.show), 4)
            for lang in langs
        }
        print(f"{task:18}" + "".join(f"{100 * v:7.1f}%" for v in accuracy[task].values()), flush=True)
    print(f"{args.samples} questions per task and language, seed {args.seed}, {time.time() - start:.0f} s")
    report = {"seed": args.seed, "samples": args.samples, "decoding": "greedy", "accuracy": accuracy}
    if args.readme:
        write_table(args.readme, report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
