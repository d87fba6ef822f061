"""Datasets by name: what comes with the package, and what a JSON file adds."""

import json
from pathlib import Path

import pytest

from mmtool.data.dataset import read_conversations
from mmtool.data.formats import FORMATS
from mmtool.data.registry import DATASETS, DEFAULT_DATASET, read_dataset_info
from mmtool.errors import DataError, MMToolError


def test_every_set_has_a_place_and_a_known_format() -> None:
    for name, spec in DATASETS.items():
        assert spec.name == name
        assert spec.where
        assert spec.description
        assert spec.format in FORMATS


def test_the_embedded_set_is_whole() -> None:
    import PIL.Image

    found = list(read_conversations(DATASETS[DEFAULT_DATASET].source, purpose="train"))
    assert len(found) == 144
    for _, conversation in found:
        assert not isinstance(conversation, DataError)
        (image,) = conversation.media
        with PIL.Image.open(image.source) as picture:
            picture.load()


def test_a_file_registers_sets_relative_to_itself(tmp_path: Path) -> None:
    info = {
        "mine": {"path": "rows.jsonl", "format": "swift", "columns": {"caption": "response"}, "media_root": "pics"},
        "short": "other.csv",
        "swift-like": {"dataset_path": "/data/x.json", "hf_dataset_id": "a/b", "tags": ["chat"]},
        "far": {"ms": "owner/name", "files": ["train/*.jsonl"]},
    }
    (tmp_path / "info.json").write_text(json.dumps(info))
    found = read_dataset_info(tmp_path / "info.json")
    assert found["mine"].source == str(tmp_path / "rows.jsonl")
    assert found["mine"].media_root == str(tmp_path / "pics")
    assert found["mine"].columns == {"caption": "response"}
    assert found["short"].source == str(tmp_path / "other.csv")
    assert found["swift-like"].source == "/data/x.json"
    assert found["far"].ms.repo == "owner/name"
    assert found["far"].ms.files == ("train/*.jsonl",)
    (tmp_path / "list.json").write_text(json.dumps([{"name": "mine", "path": "rows.jsonl"}]))
    assert list(read_dataset_info(tmp_path / "list.json")) == ["mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("3", "expected an object"),
        ('{"a#1": {"path": "x"}}', "'a#1' cannot be a name"),
        ('{"a": 3}', "a: expected an object"),
        ('{"a": {}}', "a: says neither path nor hf nor ms"),
        ('{"a": {"pth": "x"}}', "a: unknown key 'pth'"),
        ('{"a": {"path": "x", "columns": ["b"]}}', "a: columns: expected an object"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "info.json").write_text(content)
    with pytest.raises(MMToolError, match=message) as caught:
        read_dataset_info(tmp_path / "info.json")
    assert "--custom_dataset_info" in str(caught.value)
    assert caught.value.hint
