"""Rewrite the generated tables of the pages beside this file: `make docs`. `tests/test_docs.py` compares them.

A page holds a pair of comments, `<!-- options:infer -->` and `<!-- /options:infer -->` or `<!-- models -->` and
`<!-- /models -->`, and whatever stands between them is replaced.
"""

import os
import re
from pathlib import Path

from mmtool.args import COMMANDS
from mmtool.options import markdown_table
from mmtool.registry import MODELS

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- (models|options:(\w+)) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def models_table(folder: Path = ROOT / "docs") -> str:
    """Return the registry as Markdown; links start in ``folder``."""
    rows = ["| model type | takes | template | hub id | |", "|---|---|---|---|---|"]
    for spec in MODELS.values():
        link = os.path.relpath(ROOT / "docs" / spec.docs, folder)
        name = f"[`{spec.model_type}`]({link})" if spec.docs else f"`{spec.model_type}`"
        media = ", ".join(("text", *spec.modalities))
        hub_id = "in the package" if spec.embedded else f"`{spec.hf_id}`" if spec.hf_id else "a local folder"
        rows.append(f"| {name} | {media} | `{spec.template_type}` | {hub_id} | {spec.description} |")
    return "\n".join(rows)


def rewritten(text: str, folder: Path = ROOT / "docs") -> str:
    """Return a page of ``folder`` with the tables of today."""

    def table(match: re.Match[str]) -> str:
        command = match[3]
        made = markdown_table(COMMANDS[command]) if command else models_table(folder)
        return f"{match[1]}\n{made}\n\n{match[4]}"

    return _BLOCK.sub(table, text)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Rewrite every page whose tables are out of date."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text, page.parent)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"rewrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
