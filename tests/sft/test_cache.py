"""Features and rows that are kept change nothing but the time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtool.args import SftArgs
from mmtool.sft.batches import Collator, RowDataset
from mmtool.sft.features import DiskFeatures, MemoryFeatures, SeenRows, light_row
from mmtool.sft.main import sft_main
from mmtool.template.base import MediaInput


def losses(run: Path) -> list[float]:
    lines = (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_losses_are_to_the_last_bit_those_without(sft_args: Callable[..., SftArgs], tmp_path: Path) -> None:
    found = {}
    for number, asked in enumerate(("off", "memory", "disk")):
        args = sft_args(
            cache_media_features=asked,
            max_steps=-1,
            num_train_epochs=2.0,
            batch_size=6,
            learning_rate=1e-3,
            lora_dropout=0.1,
            dataloader_num_workers=1,
            save_steps=100,
            seed=5,
            output_dir=str(tmp_path / str(number)),
        )
        sft_main(args)
        found[asked] = losses(tmp_path / str(number))
    assert len(found["off"]) == 6
    assert found["memory"] == found["disk"] == found["off"]


def medium(key: str, value: float) -> MediaInput:
    return MediaInput("image", 1, 2, {"pixel_values": torch.full((1, 3), value)}, key, None, (0, 1))


class Rows:
    """Counts how often each row is encoded."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4], "row": f"f:{index}"}
        return row | {"media": [medium("ab"[index], float(index))] if index < 2 else []}


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_row_is_encoded_again_unless_all_its_features_are_kept(kind: str, tmp_path: Path) -> None:
    cache: Any = MemoryFeatures(2**20) if kind == "memory" else DiskFeatures(tmp_path)
    rows, seen = Rows(), SeenRows()
    dataset = RowDataset(rows, seen=seen)
    first = [dataset[index] for index in range(3)]
    assert "light" in first[0]
    assert "light" not in first[2], "a row without media costs little"
    cache.put("a", torch.ones(2, 4))
    for index, light in (first[0]["light"], first[1]["light"]):
        seen.add(index, light, cache)
    again = [dataset[index] for index in range(3)]
    assert rows.asked == [0, 1, 2, 1, 2]
    assert len(seen) == 1
    for name in ("input_ids", "labels", "row"):
        assert again[0][name] == first[0][name]
    assert again[0]["media"][0].inputs == {}
    assert again[0]["media"][0].key == "a"
    assert SeenRows.__getstate__(seen) == {"_rows": {}}


def test_kept_and_new_media_share_a_batch(tmp_path: Path) -> None:
    rows = Rows()
    light = light_row(rows[0])
    assert light is not None
    known = light | {name: light[name].tolist() for name in ("input_ids", "labels")}
    batch = Collator(Stub())([known, rows[1]])
    image = batch["media"]["image"]
    assert image["keys"] == ["a", "b"]
    assert image["rows"] == {"pixel_values": [0, 1]}
    assert image["inputs"]["pixel_values"].tolist() == [[1.0, 1.0, 1.0]]
    assert light_row({"error": "gone", "row": "f:1"}) is None


class Stub:
    """Stands for a template with rows of one length."""

    def collate(self, rows: list[dict], padding_side: str) -> dict[str, torch.Tensor]:
        ids = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return ids | {"attention_mask": torch.ones_like(ids["input_ids"]), "position_ids": torch.arange(4).expand(2, 4)}
