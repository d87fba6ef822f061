"""Datasets that can be named instead of given as a file; data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One named dataset; ``source`` is a path, ``format`` one of ``data.formats`` or None to tell it from the rows."""

    name: str
    source: str
    format: str | None = None
    description: str = ""


DATASETS: dict[str, DatasetSpec] = {}
