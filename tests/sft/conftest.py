"""A tiny model, a few rows with pictures, and a run of `mmtool sft` in this process."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import pytest

from mmtool.args import SftArgs
from mmtool.messages import Image, Message, Text
from mmtool.options import options_of


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with a picture and six without, mixed."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(12):
        colour = rng.choice(["red", "blue", "green"])
        picture = PIL.Image.new("RGB", (64, 48), "white")
        PIL.ImageDraw.Draw(picture).ellipse((number, 8, 40, 38), fill=colour)
        picture.save(folder / f"{number}.png")
        rows.append({"query": "What is this?", "response": f"a {colour} thing", "images": [f"{number}.png"]})
    rows += [{"query": f"say {number}", "response": f"I say {number}."} for number in range(6)]
    rng.shuffle(rows)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _picture(colour: str) -> Image:
    return Image(PIL.Image.new("RGB", (50, 40), colour))


@pytest.fixture(scope="session")
def conversations() -> list[list[Message]]:
    """Text alone; one picture; two pictures, one of them the same, in several turns."""
    return [
        [Message("user", (Text("Hello"),)), Message("assistant", (Text("Good day to you."),))],
        [Message("user", (_picture("red"), Text("What is it?"))), Message("assistant", (Text("A red circle."),))],
        [
            Message("user", (_picture("red"), Text("And this?"))),
            Message("assistant", (Text("Red."),)),
            Message("user", (_picture("blue"), Text("And this?"))),
            Message("assistant", (Text("Blue, I think."),)),
        ],
    ]


@pytest.fixture
def sft_args(data_file: Path, tmp_path: Path) -> Callable[..., SftArgs]:
    """``sft_args(batch_size=2)`` are options for a short run, with some changed."""

    def make(**changed: Any) -> SftArgs:
        values: dict[str, Any] = {
            "dataset": [str(data_file)],
            "dataset_test_ratio": 0.0,
            "dataloader_num_workers": 0,
            "max_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "batch_size": 2,
            "lora_dropout": 0.0,
            "output_dir": str(tmp_path / "run"),
            "add_output_dir_suffix": False,
            "tensorboard": False,
        } | changed
        groups: dict[str, dict[str, Any]] = {}
        by_name = {option.name: option for option in options_of(SftArgs)}
        for name, value in values.items():
            groups.setdefault(by_name[name].group or "", {})[name] = value
        own = groups.pop("", {})
        hints = SftArgs.__annotations__
        return SftArgs(
            **{group: hints[group](**values) for group, values in groups.items()}, **own, explicit=frozenset(values)
        )

    return make
