"""Golden data: recorded runs of the original models. The whole set lies beside the repository, a selection in it."""

import atexit
import functools
import json
import logging
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
# One thread for all tests and the commands that they start, set before anything imports torch: the last bits of results
# depend on the number of threads, some tests compare them between processes, and small models gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts what runs in the background with Ctrl-C ignored, and commands that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The first that has the family: asked for, the whole set next to the repository, the selection in the repository.
PLACES = (os.environ.get("MMTOOL_GOLDEN"), TESTS.parents[1] / "shared" / "golden", TESTS / "golden")
SELECTIONS: set[str] = set()  # folders that archives were unpacked to; they have a part of the cases


def golden_dir(family: str) -> Path:
    """Return the folder with the golden data of ``family`` (``yi-vl``, ``fm9g/gqa``), or skip the test."""
    for place in PLACES:
        if place is not None:
            folder = unpacked(Path(place), family.partition("/")[0]) / family
            if (folder / "checkpoint").is_dir() or any(folder.glob("*.json")):
                return folder
    pytest.skip(f"no golden data of {family} in {', '.join(str(place) for place in PLACES if place)}")


@functools.cache
def unpacked(place: Path, family: str) -> Path:
    """Return ``place``, or where archives that it has of ``family`` are unpacked until the tests end."""
    archives = sorted((*place.glob(f"{family}.tar.xz"), *place.glob(f"{family}.*.tar.xz")))
    if not archives:
        return place
    folder = Path(tempfile.mkdtemp(prefix="mmtool-golden-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    SELECTIONS.add(str(folder))
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def skip_what_a_selection_lacks() -> Iterator[Any]:
    """Skip a test that fails for a file of the golden data that the selection in the repository does not have."""
    try:
        return (yield)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            missing = str(cause) if isinstance(cause, FileNotFoundError) else ""  # with the path, whoever raised it
            for folder in SELECTIONS:
                if folder in missing:
                    path = missing.rpartition(folder)[2].strip("/'")
                    pytest.skip(f"needs the whole golden data (MMTOOL_GOLDEN): {path}")
            cause = cause.__cause__ or cause.__context__
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[Any]:
    return (yield from skip_what_a_selection_lacks())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[Any]:
    return (yield from skip_what_a_selection_lacks())


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


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path, str], Path]:
    """``copy_of(folder, "release")`` is a copy in ``tmp_path`` that a test may change, by that name."""

    def make(folder: Path, name: str) -> Path:
        copy = shutil.copytree(folder, tmp_path / name, copy_function=shutil.copyfile)
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        return copy

    return make


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
