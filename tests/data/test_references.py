import base64
from pathlib import Path

import pytest

from mmtool.data.references import MediaFolders, is_absent, is_reference
from mmtool.errors import DataError


@pytest.mark.parametrize("source", ["http://host/a b.png", "HTTPS://host/ü.png", "data:image/png;base64,AAAA", b"x"])
def test_urls_data_uris_and_bytes_stay_as_they_are(source: str | bytes) -> None:
    assert MediaFolders(Path("/nowhere")).resolve(source, "image") == source


@pytest.mark.parametrize("name", ["a.png", "sub/a b.png", "图片 %20#.png", "[1].png"])
def test_names_are_not_escaped(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.touch()
    folders = MediaFolders(tmp_path)
    assert folders.resolve(name, "image") == place
    assert folders.resolve(str(place), "image") == place
    assert folders.resolve(place, "image") == place
    assert folders.resolve(place.as_uri(), "image") == place
    assert folders.resolve({"path": name, "bytes": None}, "image") == place


def test_the_media_root_comes_first(tmp_path: Path) -> None:
    data, root = tmp_path / "data", tmp_path / "root"
    for folder in (data, root):
        folder.mkdir()
        (folder / "both.png").touch()
    (data / "here.png").touch()
    folders = MediaFolders(data, root)
    assert folders.resolve("both.png", "image") == root / "both.png"
    assert folders.resolve("here.png", "image") == data / "here.png"


def test_bytes_win_over_the_path_and_may_be_base64() -> None:
    folders = MediaFolders(Path("/nowhere"))
    assert folders.resolve({"path": "gone.png", "bytes": b"xy"}, "image") == b"xy"
    assert folders.resolve({"bytes": base64.b64encode(b"xy").decode()}, "image") == b"xy"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gone.png", "images[0]: no such file 'gone.png'"),
        ("/gone.png", "images[0]: no such file '/gone.png'"),
        (".", "images[0]: no such file '.'"),
        ("nul\0.png", "images[0]: no such file 'nul\\x00.png'"),
        ("n" * 5000, "images[0]: no such file 'nnn"),
        ("s3://bucket/a.png", "images[0]: cannot read 's3://bucket/a.png'"),
        ("file:///gone.png", "images[0]: no such file '/gone.png'"),
        ("data:image/png", "images[0]: a data URI needs a comma"),
        ("", "images[0]: is empty"),
        (3, "images[0]: expected a path, a URL, a data URI or {path, bytes}, got int"),
        ({"url": "a.png"}, "images[0]: neither 'path' nor 'bytes' has a value"),
        ({"bytes": "?"}, "images[0].bytes: is not base64"),
        ({"path": "gone.png"}, "images[0].path: no such file"),
    ],
)
def test_what_cannot_be_found_or_read_is_named(tmp_path: Path, reference: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        MediaFolders(tmp_path).resolve(reference, "images[0]")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


def test_the_hint_names_the_folders_that_were_searched(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        MediaFolders(tmp_path / "data", tmp_path / "root").resolve("a.png", "image")
    assert (
        caught.value.hint == f"Looked in {tmp_path / 'root'} and {tmp_path / 'data'}; name another with --media_root."
    )


def test_shapes_of_references() -> None:
    assert [is_reference(value) for value in ("a", b"a", Path("a"), {"path": "a"}, {}, [], {"<image>": "a"}, 3)] == [
        *[True] * 4,
        *[False] * 4,
    ]
    assert [is_absent(value) for value in (None, "", b"", {"path": None, "bytes": None}, {}, "a", 0)] == [
        *[True] * 4,
        *[False] * 3,
    ]
