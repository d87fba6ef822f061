"""The table at the end: what was written, how large it is, what was checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtool.export.output import folder_size
from mmtool.utils import counted


def format_size(size: float) -> str:
    """Return bytes as people read them: ``13.4 GB``."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def written_rows(folder: Path) -> list[tuple[str, str]]:
    """Return a row for the weight files of a folder, and one for the rest."""
    weights = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf", ".bin", ".pt")]
    size = sum(path.stat().st_size for path in weights)
    others = sum(1 for path in folder.rglob("*") if path.is_file()) - len(weights)
    return [
        ("weights", f"{format_size(size)} in {counted(len(weights), 'file')}"),
        ("other files", f"{counted(others, 'file')}, {format_size(folder_size(folder) - size)}"),
    ]


def format_rows(rows: Sequence[tuple[str, str]]) -> str:
    """Return the table as text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
