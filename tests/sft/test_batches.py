import numpy as np
import pytest
import torch

from mmtool.sft.batches import EMPTY, Collator, Packs, RowDataset, StepBatches, empty_row, gather_media, pack_rows
from mmtool.template.base import MediaInput


def steps(num_rows: int, batch_size: int, world_size: int, passes: int = 1, **more: object) -> list[list[int]]:
    """Return the rows of each pass on all ranks."""
    ranks = [
        list(StepBatches(num_rows, batch_size, passes=passes, rank=rank, world_size=world_size, seed=1, **more))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "every rank has as many batches"
    return [[row for batch in step for row in batch] for step in zip(*ranks, strict=True)]


LENGTHS = np.random.default_rng(0).integers(1, 99, 53).astype(np.int32)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["plain", "grouped"])
def test_a_step_has_the_same_rows_however_many_ranks_and_passes_make_it(lengths: np.ndarray | None) -> None:
    one = [set(step) for step in steps(53, 4, 1, lengths=lengths)]
    two = [set(step) for step in steps(53, 2, 2, lengths=lengths)]
    assert [step - {EMPTY} for step in two] == [step - {EMPTY} for step in one]
    passes = [set(step) for step in steps(53, 2, 1, passes=2, lengths=lengths)]
    joined = [passes[at] | (passes[at + 1] if at + 1 < len(passes) else set()) for at in range(0, len(passes), 2)]
    assert [step - {EMPTY} for step in joined] == [step - {EMPTY} for step in one]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["plain", "grouped"])
def test_every_row_comes_once_per_epoch_in_another_order_each_time(lengths: np.ndarray | None) -> None:
    batches = StepBatches(53, 4, seed=1, lengths=lengths, window=3)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        rows = [row for batch in batches for row in batch]
        assert len(batches) == len(rows) // 4 == 14
        assert sorted(row for row in rows if row != EMPTY) == list(range(53))
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    batches.set_epoch(0)
    assert [row for batch in batches for row in batch] == orders[0]


def test_grouping_puts_like_lengths_together() -> None:
    def padding(lengths: np.ndarray | None) -> int:
        batches = StepBatches(53, 4, seed=1, lengths=lengths)
        return sum(
            int((LENGTHS[b].max() - LENGTHS[b]).sum()) for b in (np.array([r for r in x if r >= 0]) for x in batches)
        )

    assert padding(LENGTHS) < padding(None) / 4


def test_rows_to_evaluate_on_keep_their_order() -> None:
    assert list(StepBatches(5, 2)) == [[0, 1], [2, 3], [4, EMPTY]]


def test_packs_hold_every_row_once_and_are_nearly_full() -> None:
    lengths = np.random.default_rng(1).integers(5, 120, 700).astype(np.int32)
    packs = pack_rows(lengths, 128, seed=3, window=256)
    found = [packs[number] for number in range(len(packs))]
    assert sorted(row for pack in found for row in pack) == list(range(700))
    sizes = [int(lengths[pack].sum()) for pack in found]
    assert max(sizes) <= 128
    assert sum(sizes) / (128 * len(sizes)) > 0.93
    assert pack_rows(lengths, 128, seed=3, window=256).rows.tolist() == packs.rows.tolist()


def medium(start: int, length: int, rows: int, key: str, index: tuple[int, ...] | None = None) -> MediaInput:
    return MediaInput("image", start, length, {"pixel_values": torch.full((rows, 2), float(rows))}, key, None, index)


def test_media_are_placed_in_the_flattened_batch() -> None:
    batch = gather_media([[medium(1, 2, 1, "a")], [], [medium(0, 4, 2, "b", (1, 3)), medium(4, 1, 1, "a")]], 10)[
        "image"
    ]
    assert batch["places"].tolist() == [1, 2, 21, 23, 24]
    assert (batch["lengths"], batch["keys"]) == ([2, 2, 1], ["a", "b", "a"])
    assert batch["rows"] == {"pixel_values": [1, 2, 1]}
    assert batch["inputs"]["pixel_values"][:, 0].tolist() == [1, 2, 2, 1]


class Stub:
    """Stands for a template: pads with 9."""

    def collate(self, rows: list[dict], padding_side: str) -> dict[str, torch.Tensor]:
        assert padding_side == "right"
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        ids = {"input_ids": padded("input_ids", 9), "labels": padded("labels", -100)}
        return ids | {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def row(*labels: int, name: str = "") -> dict:
    ids = [abs(label) for label in labels]
    return {"input_ids": ids, "labels": [label if label > 0 else -100 for label in labels], "media": [], "row": name}


def test_labels_stand_where_they_are_predicted() -> None:
    batch = Collator(Stub())([row(-1, -2, 3, 4, name="f:1"), row(-5, 6, name="f:2")])
    assert batch["labels"].tolist() == [[-100, 3, 4, -100], [6, -100, -100, -100]]
    assert batch["origins"] == ["f:1", "f:2"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_row_that_cannot_be_used_becomes_an_empty_one() -> None:
    batch = Collator(Stub())([row(-1, 2), {"error": "f:7: gone", "row": "f:7"}])
    assert batch["errors"] == ["f:7: gone"]
    assert batch["labels"].tolist() == [[2, -100], [-100, -100]]


def test_rows_that_share_one_start_anew_and_predict_nothing_of_the_next() -> None:
    first, second = row(-1, 2, 3), row(-4, 5)
    first["media"] = [medium(0, 1, 1, "a")]
    second["media"] = [medium(1, 1, 1, "b")]
    batch = Collator(Stub())([[first, second], [empty_row()]])
    assert batch["attention_mask"] is None
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[2, 3, -100, 5, -100], [-100] * 5]
    assert batch["media"]["image"]["places"].tolist() == [0, 4]


def test_the_dataset_gives_rows_packs_and_empty_ones() -> None:
    rows = [row(-1, 2), row(-3, 4)]
    assert RowDataset(rows)[1] is rows[1]
    assert RowDataset(rows)[EMPTY] == empty_row()
    packed = RowDataset(rows, Packs(np.array([1, 0]), np.array([0, 2])))
    assert (len(packed), packed[0], packed[EMPTY]) == (1, [rows[1], rows[0]], [empty_row()])
