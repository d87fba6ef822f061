"""Sets from hubs, with stand-ins for the network: a folder where a download would have put it, rows as a library
gives them."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest

from mmtool.data.dataset import read_conversations
from mmtool.data.fetch import fetch_files
from mmtool.data.registry import DATASETS, DatasetSpec, HubSet
from mmtool.errors import MMToolError


def encoded(colour: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def modelscope(monkeypatch, tmp_path: Path) -> dict[str, Any]:
    """A stand-in for the package: ``rows`` by split, what was asked for under ``asked``, ``folder`` for downloads."""
    state: dict[str, Any] = {"rows": {}, "asked": [], "folder": tmp_path / "snapshot"}

    class MsDataset:
        @staticmethod
        def load(repo: str, subset_name: str, split: str) -> Any:
            state["asked"].append((repo, subset_name, split))
            return state["rows"][split]

    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("modelscope", dataset_snapshot_download=lambda repo, allow_patterns: str(state["folder"]))
    module("modelscope.msdatasets", MsDataset=MsDataset)
    for name in ("modelscope.hub", "modelscope.hub.utils"):
        module(name)
    module("modelscope.hub.utils.utils", get_endpoint=lambda: "https://ms")
    monkeypatch.setattr("mmtool.data.fetch.reachable", lambda url, timeout: url == "https://ms")
    return state


def answers(path: Path) -> list[tuple[str, str, tuple[int, int]]]:
    found = []
    for _, conversation in read_conversations(path, purpose="train"):
        (image,) = conversation.media
        with PIL.Image.open(image.source) as picture:
            found.append((conversation.messages[0].text, conversation.label, picture.size))
    return found


QUERY = "please describe the image."


def test_coco_from_modelscope_is_written_out_once(modelscope, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "there.jpg").write_bytes(encoded("blue"))
    modelscope["rows"]["validation"] = [
        {"image_id": 1, "image": {"bytes": encoded("red"), "path": "x.jpg"}, "caption": "A cup.&&A red cup."},
        {"image_id": 2, "image": {"bytes": None, "path": str(tmp_path / "there.jpg")}, "caption": "A dog."},
        {"image_id": 3, "image": PIL.Image.new("RGB", (8, 6)), "caption": "Night."},
    ]
    (path,) = fetch_files(DATASETS["coco-en-2-mini"], "ms")
    assert path.is_relative_to(cache)
    assert answers(path) == [(QUERY, "A cup.", (8, 6)), (QUERY, "A dog.", (8, 6)), (QUERY, "Night.", (8, 6))]
    assert modelscope["asked"] == [("modelscope/coco_2014_caption", "coco_2014_caption", "validation")]
    assert fetch_files(DATASETS["coco-en-mini"], "ms") == (path,)  # the same rows: nothing is loaded again
    modelscope["rows"]["train"] = modelscope["rows"]["validation"][:1]
    files = fetch_files(DATASETS["coco-en"], "ms")
    assert files[1] == path
    assert [split for _, _, split in modelscope["asked"]] == ["validation", "train"]


def test_a_set_that_broke_off_is_not_taken_for_whole(modelscope, cache: Path) -> None:
    modelscope["rows"]["validation"] = [{"image": {"bytes": encoded("red")}, "caption": "A."}, {"caption": "B."}]
    with pytest.raises(KeyError):
        fetch_files(DATASETS["coco-en-mini"], "ms")
    assert not list(cache.rglob("rows.jsonl"))


def test_coco_from_hugging_face_takes_the_first_caption(monkeypatch, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = {"bytes": encoded("red"), "path": "1.jpg"}
    rows = [{"question_id": "1", "question": "Caption it.", "image": image, "answer": ["A.", "B."]}]
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "snapshot/data/val-00000-of-00001.parquet")
    asked = stand_in_for_hugging_face(monkeypatch, tmp_path / "snapshot")
    (path,) = fetch_files(DATASETS["coco-en-2-mini"], "hf")
    assert answers(path) == [(QUERY, "A.", (8, 6))]
    assert asked == [("lmms-lab/COCO-Caption", "dataset", ["data/val-*.parquet"], False)]
    with pytest.raises(MMToolError, match="coco-en is not on Hugging Face") as caught:
        fetch_files(DATASETS["coco-en"], "hf")
    assert caught.value.hint == "Pass --dataset_hub ms."


def stand_in_for_hugging_face(monkeypatch, folder: Path, online: bool = True, cached: bool = True) -> list[Any]:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(repo, repo_type, allow_patterns, local_files_only=False):
        asked.append((repo, repo_type, allow_patterns, local_files_only))
        if local_files_only and not cached:
            raise LocalEntryNotFoundError("not there")
        return str(folder)

    def dataset_info(self, repo, timeout):
        if not online:
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


SPEC = DatasetSpec(name="far", hf=HubSet(repo="a/b", files=("*.jsonl",)), ms=HubSet(repo="a/b", files=("*.jsonl",)))


def test_plain_files_are_used_as_they_are(monkeypatch, modelscope, tmp_path: Path) -> None:
    folder = modelscope["folder"]
    folder.mkdir()
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl", "notes.txt"):
        (folder / name).write_text(json.dumps({"query": "q", "response": "a"}))
    assert [file.name for file in fetch_files(SPEC, "ms")] == ["train-0.jsonl", "train-1.jsonl"]
    stand_in_for_hugging_face(monkeypatch, folder)
    assert [file.name for file in fetch_files(SPEC, "hf")] == ["train-0.jsonl", "train-1.jsonl"]


def test_without_a_network_the_cache_is_taken_or_the_reason_told(monkeypatch, tmp_path: Path, caplog) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "rows.jsonl").touch()
    stand_in_for_hugging_face(monkeypatch, tmp_path / "snapshot", online=False)
    assert [file.name for file in fetch_files(SPEC, "hf")] == ["rows.jsonl"]
    assert "using the copy in the cache" in caplog.text
    stand_in_for_hugging_face(monkeypatch, tmp_path / "snapshot", online=False, cached=False)
    with pytest.raises(MMToolError, match="cannot get dataset far from Hugging Face: no network"):
        fetch_files(SPEC, "hf")
    stand_in_for_hugging_face(monkeypatch, tmp_path)
    with pytest.raises(MMToolError, match=r"has no data file like \*\.jsonl"):
        fetch_files(SPEC, "hf")


def test_modelscope_that_is_not_there_is_named(monkeypatch, modelscope) -> None:
    monkeypatch.setattr("mmtool.data.fetch.reachable", lambda url, timeout: False)
    with pytest.raises(MMToolError, match="from ModelScope: https://ms cannot be reached"):
        fetch_files(DATASETS["coco-en-mini"], "ms")
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(MMToolError, match="needs a package") as caught:
        fetch_files(DATASETS["coco-en-mini"], "ms")
    assert "modelscope[datasets]" in caught.value.hint
