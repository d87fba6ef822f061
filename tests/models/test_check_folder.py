"""`examples/check_folder.py` on recorded cases: one line for each, and an exit code that says whether all are met."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "check_folder.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """``check(folder)`` is the exit code and the printed lines."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["check_folder.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("family", ["fm9g/gqa", "internlm-xcomposer2/variant_4khd"])
def test_every_case_of_a_folder_is_met(family: str, golden: Callable[[str], Path], check: Callable) -> None:
    folder = golden(family)
    code, lines = check(folder)
    cases = sorted(path.name for path in (folder / "cases").iterdir())
    assert lines[0] == str(folder)
    assert [line.split()[:2] for line in lines[1:-1]] == [["ok", name] for name in cases]
    assert lines[-1] == f"{len(cases)} cases, 0 failed"
    assert code == 0


def test_a_case_that_is_not_met_fails(
    golden: Callable[[str], Path], check: Callable, copy_of: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    copy = copy_of(golden("fm9g/gqa"), "copy")
    path = copy / "cases" / "text_only" / "expected.json"
    expected = json.loads(path.read_text("utf-8"))
    expected["generated_ids"][3] += 1
    path.write_text(json.dumps(expected), "utf-8")
    code, lines = check(tmp_path, "--case", "text_only")
    assert code == 1
    assert lines[1].startswith("  FAIL text_only")
    assert "greedy" in lines[1]
    assert lines[-1] == "1 cases, 1 failed"
