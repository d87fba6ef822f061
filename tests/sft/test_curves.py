import struct
from pathlib import Path

import PIL.Image
import pytest

from mmtool.sft.events import EventFile, _masked_crc
from mmtool.sft.plots import plot_curve, running_mean, ticks
from mmtool.sft.progress import draw_plots, read_log


def test_checksums_are_those_of_tfrecord() -> None:
    # The record header of TensorBoard's own first record, 24 bytes long.
    assert _masked_crc(struct.pack("<Q", 24)) == 0x224B7FA3


def test_records_follow_one_another(tmp_path: Path) -> None:
    events = EventFile(tmp_path)
    events.add(300, {"train/loss": 1.5})
    events.close()
    (path,) = tmp_path.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == _masked_crc(data[:8])
        event, data = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[:4])[0] == _masked_crc(event)
        found.append(event)
        data = data[4:]
    assert b"brain.Event:2" in found[0]
    assert b"train/loss" in found[1]
    assert found[1].endswith(struct.pack("<f", 1.5))
    assert b"\x10\xac\x02" in found[1], "the step, 300, as a varint"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (3.2, 3.7), (1e-5, 9e-5), (-4.0, 1200.0), (2.0, 2.0), (0.0, 0.0)]
)
def test_ticks_are_round_and_reach_round_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 9


def test_a_running_mean_starts_at_the_first_value() -> None:
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_curves_are_drawn_from_the_log(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "loss": {5 / step}, "learning_rate": 0.001}}\n' for step in range(1, 30)]
    (tmp_path / "logging.jsonl").write_text("".join([*lines, '{"step": 29, "eval_loss": 0.3}\n', '{"step": 30, "lo']))
    assert len(read_log(tmp_path / "logging.jsonl")) == 30
    draw_plots(tmp_path)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "eval_loss.png",
        "learning_rate.png",
        "loss.png",
    ]
    with PIL.Image.open(tmp_path / "images" / "loss.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 5


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    plot_curve(tmp_path / "a.png", "a", [1, 2], [float("nan"), 1.0])
    assert (tmp_path / "a.png").exists()
    plot_curve(tmp_path / "b.png", "b", [1], [float("inf")])
    assert not (tmp_path / "b.png").exists()
