"""Golden data: recorded runs of the original models. The whole set lies beside the repository, a selection in it."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# The first that has the family: asked for, the whole set next to the repository, the selection in the repository.
PLACES = (os.environ.get("MMTOOL_GOLDEN"), TESTS.parents[1] / "shared" / "golden", TESTS / "golden")


def golden_dir(family: str) -> Path:
    """Return the folder with the golden data of ``family`` (``yi-vl``), or skip the test."""
    for place in PLACES:
        if place is not None and (Path(place) / family).is_dir():
            return Path(place) / family
    pytest.skip(f"no golden data of {family} in {', '.join(str(place) for place in PLACES if place)}")


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """Leave the logger as a new process has it: commands that run inside a test set it up for good."""
    yield
    root = logging.getLogger("mmtool")
    root.handlers[:], root.propagate = [], True
    root.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """``golden(family)`` is ``golden_dir(family)``, for files that cannot import this one."""
    return golden_dir


@pytest.fixture(scope="session")
def real_tokenizer() -> Callable[[str], Path]:
    """``real_tokenizer("yi")`` is a folder with the released ``tokenizer.model``, or skips the test."""

    def find(family: str) -> Path:
        for place in PLACES[:2]:
            if place is not None and (folder := Path(place).parent / "tokenizers" / family).is_dir():
                return folder
        pytest.skip(f"no tokenizer of {family} beside the golden data")

    return find


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden_cases(family): run once for each golden case; its folder is `case_dir`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden_cases")
    if marker is None:
        return
    try:
        folders = sorted(path for path in (golden_dir(*marker.args) / "cases").iterdir() if path.is_dir())
    except pytest.skip.Exception as reason:
        folders = [pytest.param(None, marks=pytest.mark.skip(reason=str(reason)), id="none")]
    metafunc.parametrize("case_dir", folders, ids=lambda path: getattr(path, "name", "none"))


@pytest.fixture
def expected(case_dir: Path) -> dict:
    """What the original model gave for a golden case."""
    return json.loads((case_dir / "expected.json").read_text(encoding="utf-8"))
