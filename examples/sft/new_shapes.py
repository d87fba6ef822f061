"""Teach the embedded model shapes it has never seen: data, training, and what it knows before and after.

    python examples/sft/new_shapes.py --folder /tmp/new_shapes

Draws pictures, runs `mmtool sft` on some hundred of them, mixed with a few rows of what the model knows already, and
asks about held-out pictures before and after. Then it merges the adapter into the weights, serves the result, and asks
about some pictures over HTTP. The words are new as well, so the head trains as a whole beside the adapters.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mmtool.cli import main as mmtool
from mmtool.data.train import load_training_data
from mmtool.finetuned import attach_adapter, open_finetuned
from mmtool.groups.sft import SftDataArgs
from mmtool.loader import get_template, load_model, open_folder
from mmtool.sft.batches import Collator
from mmtool.sft.learner import Learner

SIZE = 112
QUESTION = "What is the new shape?"
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
Box = tuple[float, float, float, float]


def crescent(draw: ImageDraw.ImageDraw, box: Box, ink: str) -> None:
    """Draw a disk with a bite as large as itself."""
    left, top, right, bottom = box
    shift = 0.38 * (right - left)
    draw.ellipse(box, fill=ink)
    draw.ellipse((left + shift, top - 0.08 * shift, right + shift, bottom - 0.08 * shift), fill="white")


def arrow(draw: ImageDraw.ImageDraw, box: Box, ink: str) -> None:
    """Draw an arrow to the right."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    neck, middle = left + 0.5 * width, top + height / 2
    draw.rectangle((left, middle - 0.15 * height, neck, middle + 0.15 * height), fill=ink)
    draw.polygon([(neck, top + 0.1 * height), (right, middle), (neck, bottom - 0.1 * height)], fill=ink)


def ring(draw: ImageDraw.ImageDraw, box: Box, ink: str) -> None:
    """Draw a circle with a hole."""
    left, top, right, bottom = box
    rim = 0.22 * (right - left)
    draw.ellipse(box, fill=ink)
    draw.ellipse((left + rim, top + rim, right - rim, bottom - rim), fill="white")


def spiral(draw: ImageDraw.ImageDraw, box: Box, ink: str) -> None:
    """Draw a line that winds outwards."""
    left, top, right, bottom = box
    radius, centre = (right - left) / 2, ((left + right) / 2, (top + bottom) / 2)
    points = []
    for step in range(90):
        turn, out = step / 89 * 2.6 * 2 * math.pi, step / 89 * radius
        points.append((centre[0] + out * math.cos(turn), centre[1] + out * math.sin(turn)))
    draw.line(points, fill=ink, width=max(3, round(radius / 7)))


def stairs(draw: ImageDraw.ImageDraw, box: Box, ink: str) -> None:
    """Draw four steps that rise to the right."""
    left, top, right, bottom = box
    width, height = (right - left) / 4, (bottom - top) / 4
    for step in range(4):
        draw.rectangle((left + step * width, bottom - (step + 1) * height, left + (step + 1) * width, bottom), fill=ink)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box, str], None]] = {
    "crescent": crescent,
    "arrow": arrow,
    "ring": ring,
    "spiral": spiral,
    "stairs": stairs,
}


def write_rows(folder: Path, name: str, count: int, seed: int) -> Path:
    """Draw ``count`` pictures and write a row about each."""
    rng = random.Random(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            shape = rng.choice(sorted(SHAPES))
            side = rng.uniform(0.45, 0.75) * SIZE
            left, top = rng.uniform(4, SIZE - side - 4), rng.uniform(4, SIZE - side - 4)
            picture = Image.new("RGB", (SIZE, SIZE), "white")
            SHAPES[shape](ImageDraw.Draw(picture), (left, top, left + side, top + side), rng.choice(COLOURS))
            picture.save(folder / name / f"{number}.png")
            article = "an" if shape[0] in "aeiou" else "a"
            row = {"query": QUESTION, "response": f"It is {article} {shape}.", "images": [f"{name}/{number}.png"]}
            file.write(json.dumps(row) + "\n")
    return path


def accuracy(rows: Path, result: Path, *more: str) -> float:
    """Return the share of rows that ``mmtool infer`` answers word for word."""
    words = ["infer", "--val_dataset", str(rows), "--result_path", str(result), "--overwrite", "true"]
    run([*words, "--max_batch_size", "16", "--max_new_tokens", "16", "--log_level", "warning", *more])
    answers = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    return sum(answer["response"].strip() == answer["label"].strip() for answer in answers) / len(answers)


def old_loss(checkpoint: Path | None) -> float:
    """Return the loss per token on the rows in the package, of the model as it is or with an adapter."""
    spec, folder = open_folder("tiny")
    model, processor = load_model(spec, folder)
    if checkpoint is not None:
        model = attach_adapter(model, open_finetuned(checkpoint).folder)
    template = get_template(spec, processor)
    options = SftDataArgs(dataset=["tiny-shapes"], dataset_test_ratio=0, check_dataset="off")
    rows = load_training_data(options, template, spec).train
    learner, collate, total, count = Learner(model).eval(), Collator(template), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            batch = collate([rows[index] for index in range(start, min(start + 16, len(rows)))])
            batch.pop("errors"), batch.pop("origins")
            total += float(learner(**batch)["total"])
            count += int((batch["labels"] != -100).sum())
    return total / count


def served_accuracy(model: Path, rows: Path, count: int) -> float:
    """Serve a model folder and return the share of the first ``count`` rows that clients get answered word for word."""
    command = [sys.executable, "-m", "mmtool", "serve", "--model_id_or_path", str(model), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--served_model_name", "shapes"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        address = next((found[1] for line in server.stderr if (found := re.search(r"serving at (\S+)", line))), None)
        if address is None:
            raise SystemExit(f"the server ended with {server.wait()}")
        right = 0
        for line in rows.read_text(encoding="utf-8").splitlines()[:count]:
            row = json.loads(line)
            right += ask(address, row["query"], rows.parent / row["images"][0]) == row["response"]
        return right / count
    finally:
        server.terminate()
        server.communicate()


def ask(address: str, question: str, picture: Path) -> str:
    """Return the answer of a server to a question about a picture."""
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": "shapes", "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": parts}]}
    request = urllib.request.Request(
        f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"].strip()


def run(words: Sequence[str]) -> None:
    """Run a command of mmtool in this process."""
    code = mmtool([*words])
    if code:
        raise SystemExit(code)


def main() -> None:
    """Measure, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("new_shapes"), help="for pictures, the run and answers")
    parser.add_argument("--rows", type=int, default=300, help="pictures to learn from")
    parser.add_argument("--held_out", type=int, default=100, help="pictures to be asked about")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--served", type=int, default=10, help="of the held-out pictures, to ask the server about")
    args = parser.parse_args()
    train = write_rows(args.folder, "train", args.rows, seed=1)
    held_out = write_rows(args.folder, "held_out", args.held_out, seed=2)
    before = accuracy(held_out, args.folder / "before.jsonl")
    old_before = old_loss(None)
    started = time.perf_counter()
    output = args.folder / "run"
    run(
        [
            *("sft", "--dataset", str(train), "tiny-shapes", "--dataset_test_ratio", "0"),
            *("--lora_target_modules", "ALL", "--modules_to_save", "lm_head", "--lora_rank", "16"),
            *("--lora_alpha", "32", "--lora_dropout", "0", "--learning_rate", "3e-3", "--batch_size", "16"),
            *("--num_train_epochs", str(args.epochs), "--save_steps", "1000", "--logging_steps", "10"),
            *("--output_dir", str(output), "--add_output_dir_suffix", "false"),
        ]
    )
    seconds = time.perf_counter() - started
    after = accuracy(held_out, args.folder / "after.jsonl", "--ckpt_dir", str(output))
    merged = args.folder / "merged"
    run(["export", "--ckpt_dir", str(output), "--merge_lora", "true", "--output_dir", str(merged)])
    report = {
        "accuracy_before": before,
        "accuracy_after": after,
        "old_loss_before": round(old_before, 4),
        "old_loss_after": round(old_loss(output), 4),
        "training_seconds": round(seconds, 1),
        "accuracy_served": served_accuracy(merged, held_out, min(args.served, args.held_out)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
