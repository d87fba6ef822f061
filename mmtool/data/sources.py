"""What ``--dataset`` names -> data files: a name, a file, a folder, a list of files, or a place on a hub.

``#500`` behind any of them asks for that many rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtool.data.dataset import SUFFIXES
from mmtool.data.fetch import fetch_files
from mmtool.data.registry import DatasetSpec, Hub, HubSet
from mmtool.errors import MMToolError
from mmtool.utils import did_you_mean

_SAMPLE = re.compile(r"(?P<name>.+)#(?P<count>-?\d+)")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?")
HUBS: dict[str, Hub] = {"hf": "hf", "ms": "ms"}
_PATTERNS = ("*.jsonl", "*.json", "*.csv", "*.parquet", "data/*.jsonl", "data/*.json", "data/*.csv", "data/*.parquet")


@dataclass(frozen=True)
class DataSource:
    """One entry of ``--dataset``.

    Attributes:
        name: what was written, without the number of rows.
        files: its data files, in the order their rows have.
        sample: how many rows to take, more than there are to take some again; None for all.
        format: the format of its rows, None to tell it from them.
        columns: new names of columns.
        constants: columns that every row gets where it has none of its own.
        media_root: where relative media paths start first.
    """

    name: str
    files: tuple[Path, ...]
    sample: int | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    media_root: str | None = None


def find_sources(text: str, known: Mapping[str, DatasetSpec], hub: Hub, option: str = "dataset") -> list[DataSource]:
    """Return what an entry of ``--dataset`` means; more than one for a list of files.

    >>> from mmtool.data.registry import DATASETS
    >>> [(source.name, source.sample) for source in find_sources("tiny-shapes#10", DATASETS, "ms")]
    [('tiny-shapes', 10)]

    Args:
        text: the entry.
        known: datasets by name.
        hub: where named sets come from that are not in the package.
        option: for messages.

    Raises:
        MMToolError: for what is none of these, and for a set that cannot be fetched.
    """
    place, colons, rest = text.partition("::")
    if colons and place.lower() in HUBS:  # HF::name, as ms-swift has it
        return find_sources(rest, known, HUBS[place.lower()], option)
    name, sample = text, None
    match = _SAMPLE.fullmatch(text)
    if match is not None and not Path(text).expanduser().exists():
        name, sample = match["name"], int(match["count"])
        if sample == 0 or sample < -1:
            raise MMToolError(f"--{option} {text}: {sample} rows", "Write a number above 0 behind #, or -1 for all.")
        sample = None if sample == -1 else sample
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == ".txt":
        return _read_list(path, sample, option)
    if path.exists():
        return [DataSource(name, files_of(path, option), sample)]
    spec = known.get(name) or known.get(name.replace("_", "-"))
    if spec is not None:
        files = files_of(Path(spec.source), option) if spec.source else fetch_files(spec, hub)
        return [DataSource(name, files, sample, spec.format, spec.columns, spec.constants, spec.media_root)]
    place = _HUB_ID.fullmatch(name)
    if place is not None and path.suffix.lower() not in (*SUFFIXES, ".txt") and not path.parent.exists():
        spec = _hub_spec(name, place["repo"], place["split"])
        return [DataSource(name, fetch_files(spec, hub), sample)]
    if "," in text and all(part.strip() for part in text.split(",")):
        return [source for part in text.split(",") for source in find_sources(part.strip(), known, hub, option)]
    raise MMToolError(
        f"--{option} {text}: there is no such file and no dataset of this name",
        did_you_mean(name, known, f"Give a file ({', '.join(SUFFIXES)}), or a name: {', '.join(known)}."),
    )


def files_of(path: Path, option: str = "dataset") -> tuple[Path, ...]:
    """Return the data file at ``path``, or those in the folder at ``path``, by name.

    Raises:
        MMToolError: where there is none.
    """
    if not path.is_dir():
        return (path,)
    files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()))
    if not files:
        raise MMToolError(
            f"--{option} {path}: the folder has no data file", f"Name one that ends with one of {', '.join(SUFFIXES)}."
        )
    return files


def single_file(spec: DatasetSpec) -> Path:
    """Return the one file of a named set, from ModelScope where the package does not have it.

    Raises:
        MMToolError: where it has several, or cannot be fetched.
    """
    files = files_of(Path(spec.source)) if spec.source else fetch_files(spec, "ms")
    if len(files) > 1:
        raise MMToolError(
            f"dataset {spec.name} has {len(files)} files, and one is needed here",
            f"Name one of them: {', '.join(map(str, files))}.",
        )
    return files[0]


def _hub_spec(name: str, repo: str, split: str | None) -> DatasetSpec:
    """Return a set that is named by its id on a hub; a split is the beginning of the names of its files."""
    patterns = _PATTERNS
    if split is not None:
        folders = ("", "data/", f"{split}/")
        patterns = tuple(
            f"{folder}{'' if folder == f'{split}/' else split}*{end}" for folder in folders for end in SUFFIXES
        )
    place = HubSet(repo=repo, files=patterns)
    return DatasetSpec(name=name, hf=place, ms=place)


def _read_list(path: Path, sample: int | None, option: str) -> list[DataSource]:
    """Read a list of files as InternLM-XComposer's training has it: a path and thousands of rows, per line."""
    if sample is not None:
        raise MMToolError(f"--{option} {path}#{sample}: a list of files says itself how many rows to take")
    sources = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        name, _, thousands = line.strip().rpartition(" ")
        try:
            count = round(float(thousands) * 1000) if name else None
        except ValueError:
            name, count = "", None
        name = name or line.strip()
        file = next((place for place in (path.parent / name, Path(name)) if place.exists()), None)
        if file is None or file.is_dir():
            raise MMToolError(
                f"{path}:{number}: no such file {name!r}", "A line is a path and a number: thousands of rows."
            )
        if count is not None and count < 1:
            raise MMToolError(f"{path}:{number}: {thousands} thousand rows", "Write 0.02 for 20 rows.")
        sources.append(DataSource(name, (file,), count))
    if not sources:
        raise MMToolError(f"--{option} {path}: the list is empty", "A line is a path and a number: thousands of rows.")
    return sources
