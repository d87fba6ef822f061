"""The golden Yi-VL checkpoint, loaded once, and what the golden cases feed it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration
from mmtool.models.yi_vl.processing_yi_vl import YiVLProcessor

IMAGE_TOKEN = 9


@pytest.fixture(scope="session")
def yi_vl(golden: Callable[[str], Path]) -> Path:
    return golden("yi-vl")


@pytest.fixture(scope="session")
def checkpoint(yi_vl: Path) -> Path:
    return yi_vl / "checkpoint"


@pytest.fixture
def release(checkpoint: Path, copy_of: Callable[[Path, str], Path]) -> Path:
    """A copy of the golden checkpoint that a test may change; of the one that a folder of tests below has."""
    return copy_of(checkpoint, "release")


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> YiVLForConditionalGeneration:
    return YiVLForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager")


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> YiVLProcessor:
    return YiVLProcessor.from_pretrained(checkpoint)


def expand(values: list[int], ids: list[int], num_image_tokens: list[int], fill: int) -> list[int]:
    """Return ``values`` with ``fill`` at the positions of each picture: one -200 in the reference's ``ids``."""
    counts = iter(num_image_tokens)
    pairs = zip(values, ids, strict=True)
    return [new for value, token in pairs for new in ([fill] * next(counts) if token == -200 else [value])]


def pictures(messages: list[dict], root: Path) -> list[Image.Image]:
    parts = [part for message in messages for part in message["content"]]
    return [Image.open(root / part["image"]) for part in parts if part["type"] == "image"]


@pytest.fixture
def inputs_of(yi_vl: Path, processor: YiVLProcessor) -> Callable[[dict, dict], dict[str, torch.Tensor]]:
    """``inputs_of(case, expected)``: ids and labels as the reference made them, pictures as we prepare them."""

    def make(case: dict, expected: dict) -> dict[str, torch.Tensor]:
        ids, counts = expected["input_ids"], expected["num_image_tokens"]
        inputs = {"input_ids": torch.tensor([expand(ids, ids, counts, IMAGE_TOKEN)])}
        if "labels" in expected:
            inputs["labels"] = torch.tensor([expand(expected["labels"], ids, counts, -100)])
        if images := pictures(case["messages"], yi_vl):
            inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return inputs

    return make
