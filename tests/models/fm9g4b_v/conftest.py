"""The golden FM9G4B-V checkpoint, loaded once, and what the golden cases feed it."""

import json
from collections.abc import Callable, Iterator
from errno import ENOENT
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmtool.models.fm9g4b_v.modeling_fm9g4b_v import FM9GVForConditionalGeneration
from mmtool.models.fm9g4b_v.processing_fm9g4b_v import FM9GVProcessor
from mmtool.models.fm9g4b_v.template import FM9GVTemplate

PATCH = 14


@pytest.fixture(scope="session")
def root(golden: Callable[[str], Path]) -> Path:
    return golden("fm9g4b-v")


@pytest.fixture(scope="session")
def checkpoint(root: Path) -> Path:
    return root / "checkpoint"


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> FM9GVForConditionalGeneration:
    return FM9GVForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager")


@pytest.fixture(scope="session")
def sdpa_model(checkpoint: Path) -> FM9GVForConditionalGeneration:
    return FM9GVForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="sdpa")


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> FM9GVProcessor:
    return FM9GVProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def template(processor: FM9GVProcessor) -> FM9GVTemplate:
    return FM9GVTemplate(processor)


class Case:
    """A golden case: conversations as a user gives them, expectations per conversation, recorded tensors."""

    def __init__(self, folder: Path, root: Path, processor: FM9GVProcessor) -> None:
        self.name = folder.name
        case, self.expected = (
            json.loads((folder / f"{kind}.json").read_text("utf-8")) for kind in ("case", "expected")
        )
        self.tensors = load_file(folder / "tensors.safetensors")
        self.conversations = [row["messages"] for row in case.get("batch", [case])]
        self.rows: list[dict[str, Any]] = self.expected.get("rows", [self.expected])
        for part in (part for messages in self.conversations for message in messages for part in message["content"]):
            if part["type"] == "image":
                part["image"] = str(root / part["image"])
        self.train = self.name.startswith("train")
        settings = {name: getattr(processor.image_processor, name) for name in vars(processor.image_processor)}
        image_processor = type(processor.image_processor)(**settings)
        for name, value in self.expected.get("options", {}).items():
            setattr(image_processor, name, value)
        self.template = FM9GVTemplate(FM9GVProcessor(image_processor, processor.tokenizer))
        self.encoded = [self.template.encode(messages, train=self.train) for messages in self.conversations]

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        return self.template.collate(self.encoded)


@pytest.fixture(scope="session")
def cases(root: Path, processor: FM9GVProcessor) -> Callable[..., Iterator[Case]]:
    """``cases("train")`` are the golden cases whose name starts so; without those that type control tokens."""
    known: dict[str, Case] = {}

    def find(prefix: str = "") -> Iterator[Case]:
        folders = sorted(path for path in (root / "cases").iterdir() if path.name.startswith(prefix))
        if not folders:
            raise FileNotFoundError(ENOENT, "there is no such case", str(root / "cases" / prefix))
        for folder in folders:
            if folder.name not in known:
                known[folder.name] = Case(folder, root, processor)
            if prefix or not folder.name.startswith("inject"):
                yield known[folder.name]

    return find
