"""Datasets that can be named instead of given as a file; data only, and the reader of more of it from a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mmtool.errors import MMToolError
from mmtool.utils import did_you_mean

Hub: TypeAlias = Literal["hf", "ms"]

EMBEDDED = Path(__file__).parent / "embedded"
DEFAULT_DATASET = "tiny-shapes"
"""The set that comes with the package; what training takes where none is named."""


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """Where a dataset is on a hub.

    Attributes:
        repo: ``owner/name``.
        files: patterns of its data files (.jsonl, .json, .csv, .parquet).
        subset: for sets that only the hub's own library can load, the subset; ``files`` is empty then.
        splits: and the splits.
    """

    repo: str
    files: tuple[str, ...] = ()
    subset: str | None = None
    splits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One named dataset: a file, or a place on one or both hubs.

    Attributes:
        name: what the user writes.
        source: a data file, or a folder of them; empty for a set on a hub.
        format: one of ``data.formats``, None to tell it from the rows.
        description: for lists.
        hf: its place on Hugging Face.
        ms: its place on ModelScope.
        columns: new names of columns.
        constants: columns that every row gets where it has none of its own.
        media_root: where relative media paths start first.
    """

    name: str
    source: str = ""
    format: str | None = None
    description: str = ""
    hf: HubSet | None = None
    ms: HubSet | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    media_root: str | None = None

    @property
    def where(self) -> str:
        """The place in a few words, for lists."""
        if self.source:
            return "in the package" if Path(self.source).is_relative_to(EMBEDDED) else self.source
        return ", ".join(f"{hub}: {place.repo}" for hub, place in (("ms", self.ms), ("hf", self.hf)) if place)


# ModelScope has the pictures in an archive that only its library opens. On Hugging Face there is a copy of the
# validation split, in tables that hold the pictures; a row has all captions of a picture, of which the first counts.
_COCO = "modelscope/coco_2014_caption"
_COCO_SUBSET = "coco_2014_caption"
_COCO_QUERY = {"query": "please describe the image."}
_COCO_COLUMNS = {"image": "images", "caption": "response", "answer": "response"}
_HF_VALIDATION = HubSet(repo="lmms-lab/COCO-Caption", files=("data/val-*.parquet",), splits=("val",))


def _coco(name: str, description: str, splits: tuple[str, ...], hf: HubSet | None = None) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        description=description,
        format="swift",
        ms=HubSet(repo=_COCO, subset=_COCO_SUBSET, splits=splits),
        hf=hf,
        columns=_COCO_COLUMNS,
        constants=_COCO_QUERY,
    )


_ALL = ("train", "validation")
_SPECS = (
    DatasetSpec(
        name=DEFAULT_DATASET,
        source=str(EMBEDDED / "tiny_shapes" / "rows.jsonl"),
        format="swift",
        description="48 drawn pictures, 144 questions in English and Chinese; in the package",
    ),
    _coco("coco-en", "COCO 2014, photographs with captions, 454617 rows", _ALL),
    _coco("coco-en-mini", "the validation part of coco-en, 40504 rows", ("validation",), _HF_VALIDATION),
    _coco("coco-en-2", "coco-en, for models that take a list of images; here the same", _ALL),
    _coco("coco-en-2-mini", "coco-en-mini, likewise", ("validation",), _HF_VALIDATION),
)

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}

# Our name of an entry's key -> the other names it may have, of swift's and of LLaMA-Factory's files.
_KEYS = {
    "path": ("path", "dataset_path", "file_name", "source"),
    "hf": ("hf", "hf_dataset_id", "hf_hub_url"),
    "ms": ("ms", "dataset_id", "ms_hub_url"),
    "files": ("files",),
    "format": ("format",),
    "columns": ("columns",),
    "constants": ("constants",),
    "media_root": ("media_root", "media_dir"),
    "description": ("description", "help"),
}
_IGNORED = ("tags", "dataset_name")
_FILES = ("*.jsonl", "*.json", "*.csv", "*.parquet", "data/*")


def read_dataset_info(path: str | Path) -> dict[str, DatasetSpec]:
    """Read a ``--custom_dataset_info`` file: an object of datasets by name, or a list of objects with a ``name``.

    ``{"mine": {"path": "rows.jsonl", "format": "swift", "columns": {"caption": "response"}}}``; paths start at the
    folder of the file. Instead of ``path``, ``hf`` or ``ms`` names a repository on a hub, ``files`` its data files.

    Raises:
        MMToolError: naming file, dataset and key.
    """
    path = Path(path).expanduser()
    where = f"--custom_dataset_info {path}"
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise MMToolError(f"{where}: {reason}", 'Give a file such as {"mine": {"path": "rows.jsonl"}}.') from None
    if isinstance(data, list) and all(isinstance(item, dict) for item in data):
        data = {item.get("name") or item.get("dataset_name"): item for item in data}
    if not isinstance(data, dict):
        raise MMToolError(f"{where}: expected an object", 'Write {"mine": {"path": "rows.jsonl"}}.')
    return {name: _read_entry(name, entry, path.parent, where) for name, entry in data.items()}


def _read_entry(name: Any, entry: Any, folder: Path, where: str) -> DatasetSpec:
    if not isinstance(name, str) or not name or "#" in name or "/" in name:
        raise MMToolError(f"{where}: {name!r} cannot be a name", "Use letters, digits, - and _.")
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        raise MMToolError(f"{where}: {name}: expected an object", 'Write {"path": "rows.jsonl"}.')
    values = _take_keys(entry, f"{where}: {name}")
    for key in ("columns", "constants"):
        if not isinstance(values.setdefault(key, {}), dict):
            raise MMToolError(f"{where}: {name}: {key}: expected an object", 'Write {"caption": "response"}.')
    files = values.get("files") or _FILES
    files = (files,) if isinstance(files, str) else tuple(files)
    hubs = {hub: HubSet(repo=values[hub], files=files) for hub in ("hf", "ms") if values.get(hub)}
    if not values.get("path") and not hubs:
        raise MMToolError(f"{where}: {name}: says neither path nor hf nor ms", "Name a file, or a place on a hub.")
    path, root = values.get("path"), values.get("media_root")
    return DatasetSpec(
        name=name,
        source=str(folder / Path(path).expanduser()) if path else "",
        format=values.get("format"),
        description=values.get("description") or "",
        columns=values["columns"],
        constants=values["constants"],
        media_root=str(folder / Path(root).expanduser()) if root else None,
        **hubs,
    )


def _take_keys(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values of an entry under our names of the keys."""
    known = {other: key for key, others in _KEYS.items() for other in others}
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key in known:
            values[known[key]] = value
        elif key not in (*_IGNORED, "name"):
            raise MMToolError(f"{where}: unknown key {key!r}", did_you_mean(key, known, f"Use {', '.join(_KEYS)}."))
    return values
