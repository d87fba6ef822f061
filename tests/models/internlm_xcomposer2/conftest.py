"""The golden InternLM-XComposer2 checkpoints, each loaded once, and what the golden cases feed them."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtool.models.internlm_xcomposer2 import template as templates
from mmtool.models.internlm_xcomposer2.modeling_internlm_xcomposer2 import XComposer2ForConditionalGeneration
from mmtool.models.internlm_xcomposer2.processing_internlm_xcomposer2 import XComposer2Processor

IMAGE_TOKEN = 258
TEMPLATES = {
    "internlm-xcomposer2": templates.XComposer2Template,
    "internlm-xcomposer2/variant_4khd": templates.XComposer24KHDTemplate,
    "internlm-xcomposer2_5": templates.XComposer25Template,
}


class Golden:
    """One golden set: its checkpoint, and its cases as mmtool encodes them."""

    def __init__(self, family: str, root: Path) -> None:
        self.family, self.root, self.checkpoint = family, root, root / "checkpoint"

    @cached_property
    def model(self) -> XComposer2ForConditionalGeneration:
        return self.load(attn_implementation="sdpa")

    def load(self, **settings: Any) -> XComposer2ForConditionalGeneration:
        model = XComposer2ForConditionalGeneration.from_pretrained(self.checkpoint, **settings)
        model.generation_config.eos_token_id = None  # recorded answers go on behind an end token
        return model

    @cached_property
    def processor(self) -> XComposer2Processor:
        return XComposer2Processor.from_pretrained(self.checkpoint)

    def case(self, name: str) -> tuple[dict, dict]:
        folder = self.root / "cases" / name
        return tuple(json.loads((folder / f"{kind}.json").read_text("utf-8")) for kind in ("case", "expected"))

    def template(self, case: dict) -> Any:
        settings: dict[str, Any] = {"hd_num": case.get("hd_num")}
        if case.get("kind") == "infer_auto_position":
            settings["image_position"] = "auto"
        return TEMPLATES[self.family](self.processor, system="", **settings)

    def messages(self, case: dict) -> list[dict]:
        """The conversation with pictures that can be opened; one that a case lists apart joins the last question."""
        messages = json.loads(json.dumps(case["messages"]))
        if case.get("kind") == "infer_auto_position":
            messages[-1]["content"].append({"type": "image", "image": case["images"][0]})
        for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
            part["image"] = str(self.root / part["image"])
        return messages

    def encode(self, case: dict, train: bool = False) -> dict:
        return self.template(case).encode(self.messages(case), train=train)

    def batch(self, *encoded: dict) -> dict[str, torch.Tensor]:
        return TEMPLATES[self.family](self.processor).collate(encoded)

    def ask(self, *pictures: str, text: str = "What is it?") -> dict[str, torch.Tensor]:
        """A prompt as the model takes it: pictures of the set's media, then text."""
        content = [{"type": "image", "image": f"media/{name}"} for name in pictures] + [{"type": "text", "text": text}]
        return self.batch(self.encode({"messages": [{"role": "user", "content": content}]}))

    def generate(self, inputs: dict[str, torch.Tensor], count: int = 16) -> list[list[int]]:
        output = self.model.generate(**inputs, max_new_tokens=count, do_sample=False)
        return output[:, inputs["input_ids"].shape[1] :].tolist()


def expanded(expected: dict, name: str = "input_ids") -> list[int]:
    """Recorded ids, in which -1 stands for a picture, with a placeholder at each of its positions."""
    counts = iter(expected["num_image_tokens"])
    return [new for token in expected[name] for new in ([IMAGE_TOKEN] * next(counts) if token == -1 else [token])]


@pytest.fixture(scope="session")
def xcomposer(golden: Callable[[str], Path]) -> Callable[[str], Golden]:
    """``xcomposer("internlm-xcomposer2_5")`` is that golden set."""
    sets: dict[str, Golden] = {}

    def find(family: str) -> Golden:
        if family not in sets:
            sets[family] = Golden(family, golden(family))
        return sets[family]

    return find


@pytest.fixture
def plain(xcomposer: Callable[[str], Golden]) -> Golden:
    """InternLM-XComposer2 at 224 pixels."""
    return xcomposer("internlm-xcomposer2")


@pytest.fixture
def tiled(xcomposer: Callable[[str], Golden]) -> Golden:
    """InternLM-XComposer2.5."""
    return xcomposer("internlm-xcomposer2_5")


@pytest.fixture
def hd(xcomposer: Callable[[str], Golden]) -> Golden:
    """InternLM-XComposer2-4KHD."""
    return xcomposer("internlm-xcomposer2/variant_4khd")


@pytest.fixture
def wanted_ids() -> Callable[..., list[int]]:
    return expanded


@pytest.fixture
def release(copy_of: Callable[[Path, str], Path]) -> Callable[[Golden], Path]:
    """``release(plain)`` is a copy of a golden checkpoint that a test may change."""
    return lambda golden_set: copy_of(golden_set.checkpoint, "release")
