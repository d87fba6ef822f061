"""Features of frozen towers, kept from the first time a medium is seen: in memory, or in the folder of the run.

Rows whose media are all kept are remembered without them, so that in later epochs nothing of theirs is opened again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtool.log import get_logger

logger = get_logger(__name__)

SHARE_OF_MEMORY = 0.25  # of what is free when the run starts; shared by the processes of a machine


class Features(Protocol):
    """Features ``(positions, hidden)`` by content key, on the CPU."""

    def get(self, key: str) -> Tensor | None:
        """Return what is kept under ``key``."""

    def put(self, key: str, features: Tensor) -> None:
        """Keep features, if there is room."""

    def __contains__(self, key: str) -> bool:
        """Tell whether features were kept under ``key``, so that ``get`` will find them."""


class MemoryFeatures:
    """Keeps the first features that fit.

    Nothing is dropped for something newer: every medium comes back once per epoch, so that the oldest would always be
    dropped shortly before it is wanted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor | None:
        """Return what is kept under ``key``."""
        return self._kept.get(key)

    def put(self, key: str, features: Tensor) -> None:
        """Keep features while they fit."""
        if key in self._kept or self.num_bytes > self.max_bytes:
            return
        kept = features.detach().to("cpu", copy=True)
        self.num_bytes += kept.nbytes
        if self.num_bytes > self.max_bytes:
            logger.info(
                "features of %d media are kept in %.1f GiB of memory; the towers run for the others in every epoch "
                "(--cache_media_features disk keeps them all)",
                len(self._kept),
                self.max_bytes / 2**30,
            )
            return
        self._kept[key] = kept

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)


class DiskFeatures:
    """Keeps features as files, one each; several processes may share a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.full = False
        self._whole: set[str] = set()  # keys of files that this process has written or read

    def get(self, key: str) -> Tensor | None:
        """Read what is kept under ``key``; a file that a kill left broken counts as none."""
        try:
            features = load_file(self._path(key))["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        self._whole.add(key)
        return features

    def put(self, key: str, features: Tensor) -> None:
        """Write features; a full disk ends that, not the run."""
        if self.full:
            return
        path = self._path(key)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({"features": features.detach().cpu().contiguous()}, partial)
            os.replace(partial, path)
            self._whole.add(key)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            self.full = True
            logger.warning("media features are no longer kept on disk: %s", error)

    def clear(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __contains__(self, key: str) -> bool:
        return key in self._whole

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*/*.safetensors"))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class SeenRows:
    """Encoded rows by their number, without the tensors of their media, whose features are kept.

    Processes that load data are started anew in every epoch, and know what was here then.
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": {}}  # too much to send; a process that is not a fork of this one encodes its rows

    def get(self, index: int) -> dict[str, Any] | None:
        """Return a row as ``Template.encode`` made it, its media without ``inputs``."""
        row = self._rows.get(index)
        if row is None:
            return None
        return row | {name: row[name].tolist() for name in ("input_ids", "labels")}

    def add(self, index: int, row: Mapping[str, Any], kept: Features) -> None:
        """Remember a row of ``light_row`` if the features of all its media are kept."""
        if all(item.key in kept for item in row["media"]):
            self._rows[index] = dict(row)

    def __len__(self) -> int:
        return len(self._rows)


def light_row(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row without what its towers take, None for one without media or with an error."""
    if "error" in row or not row["media"]:
        return None
    ids = {name: np.array(row[name], np.int32) for name in ("input_ids", "labels")}
    return {**ids, "media": [replace(item, inputs={}) for item in row["media"]], "row": row.get("row")}


def open_features(asked: str, run: Path, num_processes: int) -> Features | None:
    """Return where ``--cache_media_features`` keeps features, None for nowhere."""
    if asked == "off":
        return None
    if asked == "disk":
        return DiskFeatures(run / "features")
    return MemoryFeatures(int(SHARE_OF_MEMORY * free_memory() / num_processes))


def free_memory() -> int:
    """Return the bytes of memory that nothing uses."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
        available = pages * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 8 * 2**30
    return min(available, _limit())


def _limit() -> int:
    """Return what the container still gives."""
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8").strip()
        return 2**62 if most == "max" else int(most) - int(used)
    except (OSError, ValueError):
        return 2**62
