"""Write safetensors files tensor by tensor: which tensor goes to which shard is known before the first is read.

The library's own writer takes all tensors of a file at once; here one is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmtool.errors import MMToolError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_BYTES = 8
_ALIGNMENT = 8
_DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: how it is stored.
        read: makes it; called once, when its turn comes.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in a file."""
        return self.shape.numel() * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Return the bytes of ``5GB`` or ``500MiB``; a plain number counts bytes.

    Raises:
        MMToolError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise MMToolError(f"--max_shard_size {text} is no size", "Write it like 5GB, 500MB or 2GiB.")
    return size


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Part tensors, in their order, into files of at most ``max_bytes``; a larger tensor has a file of its own."""
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not shards or (size + entry.nbytes > max_bytes and shards[-1]):
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_shards(
    folder: Path, entries: Sequence[Entry], max_bytes: int, written: Callable[[int], None] = lambda count: None
) -> list[Path]:
    """Write tensors to ``model.safetensors``, or to several files and their index.

    Args:
        folder: where to.
        entries: the tensors; not empty.
        max_bytes: largest size of a file, header left out.
        written: is told the bytes of each tensor that is on its way to disk.
    """
    shards = plan_shards(entries, max_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, written)
    paths = [folder / name for name in names]
    if len(shards) > 1:
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": dict(sorted(places.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        paths.append(folder / INDEX)
    return paths


def write_safetensors(
    path: Path, entries: Iterable[Entry], written: Callable[[int], None] = lambda count: None
) -> None:
    """Write one file. Wide elements go first, so that every tensor starts at a multiple of its element."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_HEADER_BYTES, "little"))
        file.write(text)
        for entry in ordered:
            tensor = entry.read()
            assert tensor.shape == entry.shape, f"{entry.name}: {list(tensor.shape)} instead of {list(entry.shape)}"
            flat = tensor.detach().to("cpu", entry.dtype).contiguous().view(-1)
            if flat.numel():
                file.write(memoryview(flat.view(torch.uint8).numpy()))
            del tensor, flat
            written(entry.nbytes)
