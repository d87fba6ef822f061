"""The model card: README.md with base, data and hyper-parameters of a model, and the plot of its loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmtool import __version__
from mmtool.export.source import Source
from mmtool.sft.progress import LOG_FILE, read_log

CARD = "README.md"
PLOT = Path("images") / "loss.png"
# Groups of options that say how a model was trained.
_TRAINING_GROUPS = ("tuner", "parts", "train", "template")


def write_card(folder: Path, source: Source, table: Sequence[tuple[str, str]], name: str) -> None:
    """Write the card of what was exported to a folder, with the plot of the run where there is one.

    Args:
        folder: the folder that the card belongs to.
        source: what was exported.
        table: what was written and checked.
        name: title of the page.
    """
    run = None if source.finetuned is None else source.finetuned.run
    plot = run / PLOT if run is not None else None
    has_plot = plot is not None and plot.is_file()
    if has_plot and plot is not None:
        (folder / PLOT.parent).mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / PLOT)
    text = card(source, table, name, has_plot=has_plot, losses=_last_losses(run))
    (folder / CARD).write_text(text, encoding="utf-8")


def card(
    source: Source, table: Sequence[tuple[str, str]], name: str, *, has_plot: bool, losses: Mapping[str, float]
) -> str:
    """Return the page."""
    base = source.spec.hf_id or source.folder.name
    sources = (source.settings.get("data") or {}).get("sources") or []
    head = {
        "library_name": "mmtool" if not source.adapters else "peft",
        "base_model": base,
        "base_model_relation": "adapter" if source.adapters and not _is_merged(table) else "finetune",
        "pipeline_tag": "image-text-to-text" if source.spec.modalities else "text-generation",
        "tags": ["mmtool", source.spec.model_type],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"Made by `mmtool` {__version__} from `{base}` (model type `{source.spec.model_type}`).",
        _section("Files", [f"| {key} | {value} |" for key, value in table if key != "source"]),
        _section("Base", [f"| base | `{base}` |", f"| model type | `{source.spec.model_type}` |"]),
        _section("Data", [_data_row(each) for each in sources]),
        _section("Hyper-parameters", _hyper_parameters(source.settings)),
        _section("Result", [f"| {key} | {value:.4f} |" for key, value in losses.items()]),
        f"![loss]({PLOT.as_posix()})" if has_plot else "",
        f"## Use\n\n```text\nmmtool infer --ckpt_dir {name.rpartition('/')[2]}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_merged(table: Sequence[tuple[str, str]]) -> bool:
    return any(key == "merged" for key, _ in table)


def _section(title: str, rows: Sequence[str]) -> str:
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows) if rows else ""


def _data_row(source: Mapping[str, Any]) -> str:
    return f"| `{Path(str(source.get('name'))).name}` | {source.get('taken')} of {source.get('rows')} rows |"


def _hyper_parameters(settings: Mapping[str, Any]) -> list[str]:
    options = settings.get("options") or {}
    if not options:
        return []
    rows = [f"| sft_type | {settings.get('sft_type')} |"]
    for group in _TRAINING_GROUPS:
        for key, value in (options.get(group) or {}).items():
            if value not in (None, [], {}, False) and key not in ("sft_type", "resume_from_checkpoint"):
                rows.append(f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |")
    return rows


def _last_losses(run: Path | None) -> dict[str, float]:
    if run is None or not (run / LOG_FILE).is_file():
        return {}
    found: dict[str, float] = {}
    for line in read_log(run / LOG_FILE):
        found |= {key: line[key] for key in ("loss", "eval_loss") if key in line}
    return found
