"""The golden Megrez checkpoints, loaded once, and their cases as messages."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtool.models.megrez.modeling_megrez import MegrezInstructForCausalLM, MegrezOmniForConditionalGeneration
from mmtool.models.megrez.processing_megrez import MegrezInstructProcessor, MegrezOProcessor
from mmtool.models.megrez.template import MegrezOmniTemplate, MegrezTemplate


@pytest.fixture(scope="session")
def omni(golden: Callable[[str], Path]) -> Path:
    return golden("megrez-3b-omni")


@pytest.fixture(scope="session")
def instruct(golden: Callable[[str], Path]) -> Path:
    return golden("megrez-3b-instruct")


@pytest.fixture(scope="session")
def model(omni: Path) -> MegrezOmniForConditionalGeneration:
    return MegrezOmniForConditionalGeneration.from_pretrained(omni / "checkpoint", attn_implementation="eager")


@pytest.fixture(scope="session")
def processor(omni: Path) -> MegrezOProcessor:
    return MegrezOProcessor.from_pretrained(omni / "checkpoint")


@pytest.fixture(scope="session")
def template(processor: MegrezOProcessor) -> MegrezOmniTemplate:
    return MegrezOmniTemplate(processor)


@pytest.fixture(scope="session")
def text_model(instruct: Path) -> MegrezInstructForCausalLM:
    return MegrezInstructForCausalLM.from_pretrained(instruct / "checkpoint", attn_implementation="eager")


@pytest.fixture(scope="session")
def text_template(instruct: Path) -> MegrezTemplate:
    return MegrezTemplate(MegrezInstructProcessor.from_pretrained(instruct / "checkpoint"))


@pytest.fixture(scope="session")
def read_case() -> Callable[[Path], list[list[dict]]]:
    """``read_case(case_dir)``: the conversations of a golden case, media as paths."""

    def read(case_dir: Path) -> list[list[dict]]:
        case = json.loads((case_dir / "case.json").read_text("utf-8"))
        conversations = [row["messages"] for row in case.get("batch", [case])]
        for part in (part for messages in conversations for message in messages for part in message["content"]):
            if part["type"] != "text":
                part[part["type"]] = str(case_dir.parents[1] / part[part["type"]])
        return conversations

    return read


@pytest.fixture
def release(omni: Path, copy_of: Callable[[Path, str], Path]) -> Path:
    """A copy of the golden Omni checkpoint that a test may change."""
    return copy_of(omni / "checkpoint", "release")


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(path, key=value)`` changes a JSON file; a value of None takes the key out."""

    def change(path: Path, **values: object) -> None:
        settings = json.loads(path.read_text("utf-8")) | values
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))

    return change
