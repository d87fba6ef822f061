"""Generated parts of the docs say what the code says."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmtool.args import COMMANDS
from mmtool.options import read_args
from mmtool.registry import MODELS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A line of a page that calls the tool, as it stands in an indented or fenced block or behind a prompt or a pipe.
_CALL = re.compile(r"^(?:.*\| |\$ | {4})?mmtool ([a-z]+)((?: [^`|\n]*)?)$", re.MULTILINE)
_SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TEXTS = {page.name: page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES}
CALLS = [(page, match[1], match[2]) for page, text in TEXTS.items() for match in _CALL.finditer(text)]
BLOCKS = [(page, block) for page, text in TEXTS.items() for block in _SHELL_BLOCK.findall(text)]


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
        assert generate.rewritten(text, page.parent) == text, f"{page.name}: run `make docs`"


def test_every_command_with_a_page_has_its_options_there() -> None:
    for command in COMMANDS:
        page = ROOT / "docs" / f"{command}.md"
        if page.exists():
            assert f"<!-- options:{command} -->" in page.read_text(encoding="utf-8")


def test_every_model_type_has_a_row(generate: ModuleType) -> None:
    for model_type in MODELS:
        assert f"`{model_type}`" in generate.models_table()


def test_a_table_is_put_between_its_comments(generate: ModuleType) -> None:
    page = "before\n<!-- options:list -->\noutdated\n<!-- /options:list -->\nafter\n<!-- models -->\n<!-- /models -->\n"
    new = generate.rewritten(page)
    assert new.startswith("before\n<!-- options:list -->\n\n**")
    assert "| `--json` | `true\\|false` |" in new
    assert "outdated" not in new
    assert "| `tiny` |" in new
    assert generate.rewritten(new) == new


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(("page", "command", "rest"), CALLS)
def test_options_of_every_call_exist(page: str, command: str, rest: str) -> None:
    words = shlex.split(rest, comments=True)
    if "--help" not in words:
        read_args(COMMANDS[command], words, command)


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=lambda value: value.split("\n")[0][:40])
def test_shell_blocks_run(page: str, block: str, tmp_path: Path) -> None:
    script = "set -euo pipefail\n" + block.replace("/tmp/", f"{tmp_path}/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
