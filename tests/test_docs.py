"""Generated parts of the docs say what the code says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from mmtool.args import COMMANDS
from mmtool.registry import MODELS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(generate: ModuleType) -> None:
    for page in generate.pages():
        text = page.read_text(encoding="utf-8")
        assert generate.rewritten(text) == text, f"{page.name}: run `make docs`"


def test_every_command_with_a_page_has_its_options_there() -> None:
    for command in COMMANDS:
        page = ROOT / "docs" / f"{command}.md"
        if page.exists():
            assert f"<!-- options:{command} -->" in page.read_text(encoding="utf-8")


def test_every_model_type_has_a_row(generate: ModuleType) -> None:
    for model_type in MODELS:
        assert f"`{model_type}`" in generate.models_table()


def test_a_table_is_put_between_its_comments(generate: ModuleType) -> None:
    page = "before\n<!-- options:list -->\nold\n<!-- /options:list -->\nafter\n<!-- models -->\n<!-- /models -->\n"
    new = generate.rewritten(page)
    assert new.startswith("before\n<!-- options:list -->\n\n**")
    assert "| `--json` | `true\\|false` |" in new
    assert "old" not in new
    assert "| `tiny` |" in new
    assert generate.rewritten(new) == new


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
