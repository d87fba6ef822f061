import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILES = ("a.png", "b.png", "c.png", "a.jpg", "b.jpg", "pics/a.png", "pics/c.png", "images/a.jpg", "audios/q.wav")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the media files that the examples name; their content is never looked at."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write("a.jsonl", row, row)`` writes a file of one object, or one given line, per line."""

    def write_file(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., str]:
    """``picture("a.png")`` draws a small picture and returns its name."""
    import PIL.Image

    def draw(name: str = "a.png", size: tuple[int, int] = (40, 30), colour: str = "red") -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", size, colour).save(tmp_path / name)
        return name

    return draw


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Callable[..., Any]]:
    """The spec of the embedded model, and ``template(max_length=..)``."""
    from mmtool.loader import get_template, load_processor, open_folder

    spec, place = open_folder("tiny")
    processor = load_processor(spec, place)
    return spec, lambda **settings: get_template(spec, processor, **settings)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmtool"
