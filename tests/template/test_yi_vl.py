"""The Yi-VL template against the release: golden prompts, and how a prompt may be cut into strings to tokenise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtool.messages import Image, Message, Text
from mmtool.models.common.tokenization import SentencePieceTokenizer
from mmtool.models.yi_vl.processing_yi_vl import YiVLImageProcessor, YiVLProcessor
from mmtool.models.yi_vl.template import YiVLTemplate

PLACEHOLDER = "<image_placeholder>"
PIECES = [
    "",
    " ",
    "  ",
    "\n",
    "#",
    "##",
    "###",
    "####",
    ":",
    "0",
    "12",
    "a",
    "The",
    "你好",
    "。",
    "🙂",
    "▁",
    "\t",
    "<",
    "<h",
]
PIECES += ["<|im_end|>", "<|endoftext|>", "<unk>", "### Human:", "### Assistant:", PLACEHOLDER, "<image", "```", "---"]

PICTURE = PIL.Image.new("RGB", (2, 2))

texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.text(max_size=12))


@pytest.fixture(scope="module")
def template(golden: Callable[[str], Path]) -> YiVLTemplate:
    return YiVLTemplate(YiVLProcessor.from_pretrained(golden("yi-vl") / "checkpoint"))


def rows_of(folder: Path) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return messages and expectations of a case; a batch case has several."""
    case, expected = (json.loads((folder / f"{kind}.json").read_text()) for kind in ("case", "expected"))
    pairs = zip(case["batch"], expected["batch"], strict=True) if "batch" in case else [(case, expected)]
    rows = [(given["messages"], wanted) for given, wanted in pairs]
    for messages, _ in rows:
        for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
            part["image"] = folder.parents[1] / part["image"]
    return rows


@pytest.mark.golden_cases("yi-vl")
def test_prompt_text_ids_and_labels_are_those_of_the_release(template: YiVLTemplate, case_dir: Path) -> None:
    for messages, expected in rows_of(case_dir):
        train = "labels" in expected
        encoded = template.encode(messages, train)
        count = template.processor.num_tokens_per_image
        labels = expected.get("labels", [0] * len(expected["input_ids"]))
        pairs = [
            pair
            for index, label in zip(expected["input_ids"], labels, strict=True)
            for pair in ([(9, -100)] * count if index == -200 else [(index, label)])
        ]
        assert encoded["input_ids"] == [index for index, _ in pairs]
        assert encoded.get("labels") == ([label for _, label in pairs] if train else None)
        spans = [[item.start, item.start + item.length] for item in encoded["media"]]
        assert spans == expected.get("image_spans_merged", spans)
        text = "".join(PLACEHOLDER if piece.media else piece.text for piece in template.render(messages, train))
        assert text == expected.get("prompt_text", text)


def test_typed_control_strings_are_treated_as_the_release_does(
    template: YiVLTemplate, golden: Callable[[str], Path]
) -> None:
    cases = golden("yi-vl") / "cases"
    (messages, expected), *_ = rows_of(cases / "inject_special_tokens")
    assert {7, 2} <= set(template.encode(messages)["input_ids"])  # <|im_end|> and <|endoftext|> become ids
    assert template.encode(messages)["input_ids"] == expected["input_ids"]
    for name, pictures in (("inject_placeholder_text", 0), ("inject_placeholder_image", 1)):
        (messages, _), *_ = rows_of(cases / name)  # the picture placeholder stays text
        assert len(template.encode(messages)["media"]) == pictures
    assert 9 not in template.text_ids("<|reserved003|>")


def test_answers_end_at_the_first_hashes(template: YiVLTemplate, golden: Callable[[str], Path]) -> None:
    for row in json.loads((golden("yi-vl") / "stop_cases.json").read_text())["rows"]:
        assert template.decode(row["ids"]) == row["recommended_output"], row["text"]


@pytest.fixture(scope="module", params=["golden", "release"])
def tokenizer(
    request: pytest.FixtureRequest, golden: Callable[[str], Path], real_tokenizer: Callable[[str], Path]
) -> SentencePieceTokenizer:
    """The tokenizer of the golden data, and that of the release."""
    folder = real_tokenizer("yi") if request.param == "release" else golden("yi-vl") / "checkpoint"
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return SentencePieceTokenizer.from_pretrained(folder, **special)


def reference_chunks(system: str, rounds: list[tuple[int, str, str]]) -> list[str]:
    """Return the strings that the release tokenises: the whole prompt as text, split at the pictures."""
    chunks = [f"{system}\n\n###" if system else "###"]
    for pictures, question, answer in rounds:
        chunks[-1] += " Human: "
        chunks += [""] * pictures
        newline = "\n" if pictures else ""
        chunks[-1] += f"{newline}{question}\n### Assistant: {answer}\n###"
    return chunks


@settings(max_examples=150, deadline=None)
@given(system=texts, rounds=st.lists(st.tuples(st.integers(0, 2), texts, texts), min_size=1, max_size=3))
def test_ids_equal_those_of_whole_chunks(
    tokenizer: SentencePieceTokenizer, system: str, rounds: list[tuple[int, str, str]]
) -> None:
    image_processor = YiVLImageProcessor(size=14, crop_size=14)
    template = YiVLTemplate(YiVLProcessor(image_processor, tokenizer))
    messages = [Message("system", (Text(system),))]
    for pictures, question, answer in rounds:
        messages += [
            Message("user", (*[Image(PICTURE)] * pictures, Text(question))),
            Message("assistant", (Text(answer),)),
        ]
    runs: list[list[int]] = [[]]
    for segment in template.segments(messages, train=True):
        if segment.media is None:
            runs[-1] += segment.ids
        else:
            runs.append([])
    assert runs == [tokenizer.encode(chunk, add_special_tokens=False) for chunk in reference_chunks(system, rounds)]


def test_no_piece_of_the_vocabulary_reaches_over_a_boundary(tokenizer: SentencePieceTokenizer) -> None:
    """Why the above holds: text is cut before a space that follows a letter, and before a newline, only."""
    model = tokenizer.sp_model
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    assert not [piece for piece in pieces if "▁" in piece.lstrip("▁") or "\n" in piece[1:]]
