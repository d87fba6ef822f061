from pathlib import Path

import pytest

FILES = ("a.png", "b.png", "c.png", "a.jpg", "b.jpg", "pics/a.png", "pics/c.png", "images/a.jpg", "audios/q.wav")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the media files that the examples name; their content is never looked at."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path
