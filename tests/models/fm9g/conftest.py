"""The three golden FM9G checkpoints, loaded once, and their cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from errno import ENOENT
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmtool.models.fm9g.modeling_fm9g import FM9GForCausalLM
from mmtool.models.fm9g.processing_fm9g import FM9GProcessor
from mmtool.models.fm9g.template import FM9GTemplate

KINDS = ("gqa", "mha", "mla")


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which attention: grouped with MuP (4B), plain with biases (7B, 70B), latent with MuP."""
    return request.param


@pytest.fixture(scope="session")
def root(golden: Callable[[str], Path], kind: str) -> Path:
    return golden(f"fm9g/{kind}")


@pytest.fixture(scope="session")
def checkpoint(root: Path) -> Path:
    return root / "checkpoint"


@pytest.fixture(scope="session")
def load(checkpoint: Path) -> Callable[[str], FM9GForCausalLM]:
    """``load("sdpa")`` is the model with that attention, loaded once."""
    models: dict[str, FM9GForCausalLM] = {}

    def get(attention: str = "eager") -> FM9GForCausalLM:
        if attention not in models:
            models[attention] = FM9GForCausalLM.from_pretrained(checkpoint, attn_implementation=attention).eval()
        return models[attention]

    return get


@pytest.fixture(scope="session")
def model(load: Callable[..., FM9GForCausalLM]) -> FM9GForCausalLM:
    return load("eager")


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> FM9GProcessor:
    return FM9GProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def template(processor: FM9GProcessor) -> FM9GTemplate:
    return FM9GTemplate(processor)


@pytest.fixture(scope="session")
def cases(root: Path) -> Callable[..., Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]]]:
    """``cases("train")``: name, case, expectation and tensors of the cases whose name starts so."""

    def find(prefix: str = "") -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]]:
        folders = sorted(path for path in (root / "cases").iterdir() if path.name.startswith(prefix))
        if not folders:
            raise FileNotFoundError(ENOENT, "there is no such case", str(root / "cases" / prefix))
        for folder in folders:
            case, expected = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("case", "expected"))
            yield folder.name, case, expected, load_file(folder / "tensors.safetensors")

    return find
