"""The tables of ``mmtool list``: models, templates and named datasets, for people or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtool.data.registry import DATASETS
from mmtool.registry import MODELS, TEMPLATES

_FILES_TOO = "--dataset and --val_dataset also take the path of any .jsonl, .json, .csv or .parquet file."


def rows_of(table: str) -> list[dict[str, Any]]:
    """Return the rows of ``models``, ``templates`` or ``datasets`` as JSON-ready dicts."""
    if table == "datasets":
        return [
            {
                "name": spec.name,
                "where": spec.where,
                "format": spec.format,
                "description": spec.description,
                **{hub: place.repo if place else None for hub, place in (("hf", spec.hf), ("ms", spec.ms))},
            }
            for spec in DATASETS.values()
        ]
    if table == "templates":
        return [
            {
                "template_type": name,
                "model_types": [spec.model_type for spec in MODELS.values() if spec.template_type == name],
                "template_class": path,
            }
            for name, path in TEMPLATES.items()
        ]
    return [
        {
            "model_type": spec.model_type,
            "family": spec.family,
            "media": list(spec.modalities),
            "template_type": spec.template_type,
            "hf_id": spec.hf_id,
            "ms_id": spec.ms_id,
            "embedded": spec.embedded is not None,
            "description": spec.description,
            "docs": spec.docs,
        }
        for spec in MODELS.values()
    ]


# What the table for people leaves out, because it would not fit beside the rest.
_JSON_ONLY = ("family", "ms_id", "embedded", "docs", "hf", "ms")


def print_table(table: str, as_json: bool = False) -> None:
    """Print one table to stdout; without a terminal, one line per row whatever its length."""
    rows = rows_of(table)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    names = [name for name in rows[0] if name not in _JSON_ONLY]
    printed = Table(*names, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        printed.add_row(*(_cell(row[name]) for name in names))
    if sys.stdout.isatty():
        Console().print(printed)
    else:
        wide = Console(width=1000)
        with wide.capture() as captured:
            wide.print(printed)
        print("\n".join(line.rstrip() for line in captured.get().rstrip().split("\n")))
    if table == "datasets":
        print(_FILES_TOO)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None or value == "" else str(value)
