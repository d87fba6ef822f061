"""The example of docs/engine.md runs as it stands."""

import re
from pathlib import Path

import mmtool

ROOT = Path(mmtool.__file__).parents[1]


def test_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/engine.md", "exec"), {})
    once, again = capsys.readouterr().out.splitlines()
    assert "red" in once
    assert again.startswith(once) and "cached_tokens=" in again
