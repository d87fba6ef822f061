"""Weight files of a folder as lazy tensors: which file, which bytes, which shape; read when asked for.

transformers loads a state dict value by value with ``value[...]``; a ``LazyTensor`` answers that with one fresh tensor
in the final dtype, read straight from the file. So the peak is the model itself: no file is held or mapped beside it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmtool.errors import CheckpointError
from mmtool.models.common.bnb import join_bnb
from mmtool.models.common.folders import read_json
from mmtool.models.common.quantised import join_pieces

# In order of preference, as in transformers.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_CHUNK_BYTES = 512 << 10
_AGAIN = "Download the file again."
_thread = threading.local()
_SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        path: the file.
        offset: byte where its first element starts.
        shape: its shape; the elements lie one after the other unless ``stride`` says otherwise.
        stored_dtype: how it is stored.
        dtype: how it is wanted; the same unless ``astype`` changed it.
        stride: elements between neighbours, per dimension; None for a contiguous tensor.
    """

    path: Path
    offset: int
    shape: torch.Size
    stored_dtype: torch.dtype
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None

    def astype(self, dtype: torch.dtype) -> LazyTensor:
        """Return the same tensor, wanted in ``dtype`` where it holds floating point numbers."""
        return replace(self, dtype=dtype) if self.stored_dtype.is_floating_point else self

    def is_floating_point(self) -> bool:
        """Tell whether it holds floating point numbers; transformers asks where weights are quantised already."""
        return self.stored_dtype.is_floating_point

    def read(self) -> torch.Tensor:
        """Read the tensor into fresh memory, in ``dtype``; half a MiB of the stored form is held beside it."""
        if self.stride is not None:
            span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
            flat = replace(self, shape=torch.Size([span if self.shape.numel() else 0]), stride=None).read()
            return flat.as_strided(self.shape, self.stride).contiguous()
        result = torch.empty(self.shape, dtype=self.dtype)
        flat = result.view(-1)
        with open(self.path, "rb", buffering=0) as file:
            if self.dtype == self.stored_dtype:
                self._fill(file, self.offset, flat)
                return result
            buffer = _buffer().view(self.stored_dtype)
            for start in range(0, flat.numel(), buffer.numel()):
                chunk = buffer[: flat.numel() - start]
                self._fill(file, self.offset + start * self.stored_dtype.itemsize, chunk)
                flat[start : start + chunk.numel()] = chunk
        return result

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return ``read()[index]``; transformers asks for ``[...]``, which is all of it."""
        return self.read() if index is Ellipsis else self.read()[index]

    def _fill(self, file: Any, offset: int, flat: torch.Tensor) -> None:
        target = memoryview(flat.view(torch.uint8).numpy())
        done = 0
        while done < len(target):  # one call returns at most 2 GiB
            count = os.preadv(file.fileno(), [target[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ends before its last tensor does", _AGAIN)
            done += count


def _buffer() -> torch.Tensor:
    """Return the bytes through which this thread converts; kept, or they would leave holes between the weights."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
    return _thread.buffer


def read_weights(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a folder by name: from one file or the shards of an index, safetensors or ``.bin``.

    Returns an empty dict where the folder has no weight file.
    """
    for name in _WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return join_bnb(join_pieces(_read_shards(path) if name.endswith(".json") else _read_file(path)))
    return {}


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise CheckpointError(f"{index} names no weights", _AGAIN)
    shards: dict[str, dict[str, LazyTensor]] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a file outside its folder: {shard!r}")
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {index.name} names it", "Download the missing shard.")
        shards[shard] = _read_file(path)
    lost = [name for name, shard in places.items() if name not in shards[shard]]
    if lost:
        raise CheckpointError(f"{index} says that {lost[0]} is in {places[lost[0]]}, but it is not", _AGAIN)
    return {
        **{name: tensor for shard in shards.values() for name, tensor in shard.items()},
        **{name: shards[shard][name] for name, shard in places.items()},
    }


def _read_file(path: Path) -> dict[str, LazyTensor]:
    if path.stat().st_size < 1024:
        _refuse_pointer(path)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
    end, size = max((_end(tensor) for tensor in tensors.values()), default=0), path.stat().st_size
    if end > size:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors need {end}: it is cut off", _AGAIN)
    return tensors


def _refuse_pointer(path: Path) -> None:
    """Raise CheckpointError for what a clone without git-lfs leaves in place of a large file."""
    if path.read_bytes().startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the file itself", "Run `git lfs pull` in the folder, or download it."
        )


def _end(tensor: LazyTensor) -> int:
    return tensor.offset + (0 if tensor.stride else tensor.shape.numel() * tensor.stored_dtype.itemsize)


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _safetensor(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}", _AGAIN) from error


def _safetensor(path: Path, start: int, entry: Mapping[str, Any]) -> LazyTensor:
    dtype, shape, (begin, end) = _SAFETENSORS_DTYPES[entry["dtype"]], torch.Size(entry["shape"]), entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a {entry['dtype']} tensor of shape {list(shape)}")
    return LazyTensor(path, start + begin, shape, dtype, dtype)


def _read_bin(path: Path) -> dict[str, LazyTensor]:
    try:
        # Under a fake mode torch reads the structure only and notes where each storage starts in the file.
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to turn weights_only off, which runs what is in there
        reason = "it holds more than tensors, or something else altogether, and no code of a file is run"
        raise CheckpointError(f"{path} is not a readable PyTorch file: {reason}", _AGAIN) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a readable PyTorch file: {reason}", _AGAIN) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):  # as training tools wrap it
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} does not hold a plain dictionary of tensors")
    return {name: _bin_tensor(path, tensor) for name, tensor in state.items()}


def _bin_tensor(path: Path, tensor: torch.Tensor) -> LazyTensor:
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise CheckpointError(
            f"{path} is in the old PyTorch format from before version 1.6",
            "Save it again: torch.save(torch.load(path, weights_only=True), path).",
        )
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    stride = None if tensor.is_contiguous() else tensor.stride()
    return LazyTensor(path, offset, tensor.shape, tensor.dtype, tensor.dtype, stride)
