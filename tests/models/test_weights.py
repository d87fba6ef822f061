"""Lazy tensors: the bytes in the file, in the dtype asked for, whatever the file format."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmtool.errors import CheckpointError
from mmtool.models.common import weights
from mmtool.models.common.weights import read_weights

VALUES = torch.linspace(-3, 3, 600).view(20, 30)
TENSORS = {
    "float32": VALUES,
    "bfloat16": VALUES.bfloat16(),
    "float16": VALUES.half(),
    "int64": torch.arange(7),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(params=["pytorch_model.bin", "model.safetensors"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save = torch.save if request.param.endswith(".bin") else save_file
    save(TENSORS, tmp_path / request.param)
    return tmp_path


@pytest.mark.parametrize("chunk", [8 << 20, 64])
def test_values_are_those_in_the_file(folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(weights, "_thread", threading.local())
    found = read_weights(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tensor.shape
        assert found[name].stored_dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor)
        for dtype in (torch.float32, torch.bfloat16):
            wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(found[name].astype(dtype)[...], wanted)


def test_views_and_parameters_of_a_bin_file_keep_their_elements(tmp_path: Path) -> None:
    views = {"turned": VALUES.T, "part": VALUES[3:9, 5:], "shared": VALUES, "parameter": torch.nn.Parameter(VALUES)}
    torch.save(views, tmp_path / "pytorch_model.bin")
    found = read_weights(tmp_path)
    for name, tensor in views.items():
        assert torch.equal(found[name].astype(torch.bfloat16).read(), tensor.bfloat16())
        assert found[name].read().is_contiguous()


def test_a_folder_without_weights_gives_none(tmp_path: Path) -> None:
    assert read_weights(tmp_path) == {}


@pytest.mark.parametrize("content", [[VALUES], {"epoch": 3}, {"state": {"a": VALUES}}])
def test_a_bin_file_with_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain dictionary of tensors"):
        read_weights(tmp_path)


def test_the_old_bin_format_is_named(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6"):
        read_weights(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(folder: Path) -> None:
    found = read_weights(folder)
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:64])
    with pytest.raises(CheckpointError, match="ends before"):
        found["float32"].read()
