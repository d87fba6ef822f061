"""Opening pictures: every kind of source, every kind of broken one, and what a server must not fetch."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmtool import download
from mmtool.errors import MediaError
from mmtool.media import MediaLimits, load_image

PUBLIC_ONLY = MediaLimits(allow_local=False, allow_private=False, timeout=3)


def picture(size: tuple[int, int] = (24, 16), mode: str = "RGB") -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def encoded(kind: str = "PNG", image: PIL.Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG whose header promises more pixels than its data holds."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def failure(source: object, limits: MediaLimits | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        load_image(source, *([limits] if limits else []))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint
    return caught.value


# -- local sources


def test_local_sources_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded()
    path = tmp_path / "a b#c?d%20é.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    plain_uri = "data:," + "".join(f"%{byte:02x}" for byte in data)
    quoted = str(path).replace("%", "%25").replace(" ", "%20")
    sources = [path, str(path), f"~/{path.name}", f"file://{quoted}", f"FILE://localhost{quoted}", data, uri, plain_uri]
    for source in [*sources, bytearray(data), picture(), uri.replace("data:", "DATA:"), uri[:40] + "\n " + uri[40:]]:
        assert load_image(source).tobytes() == picture().tobytes(), source


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "TGA", "JPEG2000"])
def test_formats(kind: str) -> None:
    assert load_image(encoded(kind)).size == ((24, 16) if kind != "ICO" else (16, 11))


def test_mode_and_exif_stay_as_they_are() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = load_image(encoded("JPEG", exif=exif))
    assert image.size == (24, 16)
    assert image.getexif()[0x0112] == 6
    assert load_image(encoded(image=picture(mode="P"))).mode == "P"
    assert load_image(encoded(image=picture(mode="L"))).mode == "L"


def test_animations_give_their_first_frame() -> None:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(kind, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(data).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_paths_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        "none.png": "no such file",
        "notes.txt": "not a picture",
        "empty.png": "it is empty",
        "pipe": "not a file",
    }
    for name, reason in reasons.items():
        message = failure(tmp_path / name).message
        assert reason in message and str(tmp_path / name) in message
    assert "is a directory" in failure(str(tmp_path)).message or "not a file" in failure(str(tmp_path)).message
    assert "cannot open image" in failure("a\0b").message
    assert "too long" in failure("x" * 100_000).message
    assert "not a file" in failure("/dev/zero").message
    assert "another machine" in failure("file://host/x.png").message
    assert "unknown scheme ftp://" in failure("ftp://host/x.png").message


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "broken base64"),
        ("data:image/png;base64,iVBORw0", "broken base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
        ("data:image/png;base64,é", "broken base64"),
        ("data:image/png;base64,", "it is empty"),
        ("data:image/png;base64," + "A" * 200_000, "not a picture"),
    ],
)
def test_broken_data_uris_are_named_in_short(uri: str, reason: str) -> None:
    assert reason in failure(uri).message


def test_bytes_that_are_no_picture() -> None:
    for data in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        failure(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000"])
def test_truncated_pictures_are_errors(kind: str) -> None:
    data = encoded(kind, picture((64, 64)))
    for share in (0.02, 0.3, 0.6, 0.9):
        failure(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about the damage
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_pictures_are_pictures_or_media_errors() -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "TGA", "JPEG2000"):
        data = np.frombuffer(encoded(kind, picture((16, 16))), dtype=np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
            try:
                load_image(broken.tobytes(), MediaLimits(max_pixels=100_000))
            except MediaError as error:
                assert "\n" not in error.message


# -- limits


@pytest.mark.parametrize("size", [(8000, 8000), (10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(size: tuple[int, int]) -> None:
    start = time.perf_counter()
    assert "pixels" in failure(huge_png(*size)).message
    assert time.perf_counter() - start < 0.5


def test_a_jpeg_of_thousands_of_scans_is_not_decoded() -> None:
    data = encoded("JPEG", progressive=True)
    first = data.index(b"\xff\xda")
    scans = data[first:-2]
    assert load_image(data).size == load_image(data[:first] + scans * 5 + data[-2:]).size == (24, 16)
    assert "more than 100 scans" in failure(data[:first] + scans * 20 + data[-2:]).message


def test_limits_hold_for_every_kind_of_source(tmp_path: Path) -> None:
    data = encoded()
    path = tmp_path / "x.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, path, uri):
        assert "larger than the limit" in failure(source, MediaLimits(max_bytes=len(data) - 1)).message
        load_image(source, MediaLimits(max_bytes=len(data)))
    for source in (data, path, uri, picture()):
        assert "24 x 16 pixels" in failure(source, MediaLimits(max_pixels=383)).message
        load_image(source, MediaLimits(max_pixels=384))


def test_local_files_can_be_forbidden(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded())
    for source in (path, str(path), f"file://{path}"):
        assert "local files are not allowed" in failure(source, PUBLIC_ONLY).message
    load_image(encoded(), PUBLIC_ONLY)


# -- downloads


class Handler(BaseHTTPRequestHandler):
    """Answers by path; ``seen`` records the Host headers."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.headers["Host"])
        getattr(self, "answer_" + self.path.partition("?")[0].strip("/").replace(".", "_"))()

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_x_png(self) -> None:
        self.send(200, encoded())

    def answer_text_that_is_png(self) -> None:
        self.send(200, encoded(), Content_Type="text/html")

    def answer_page_png(self) -> None:
        self.send(200, b"<html>login first</html>", Content_Type="image/png")

    def answer_missing(self) -> None:
        self.send(404)

    def answer_moved(self) -> None:
        self.send(302, Location="/x.png")

    def answer_loop(self) -> None:
        self.send(302, Location="/loop")

    def answer_to_file(self) -> None:
        self.send(302, Location="file:///etc/passwd")

    def answer_short(self) -> None:
        self.send(200, encoded()[:50], Content_Length="500")

    def answer_big(self) -> None:
        self.send(200, b"", Content_Length=str(10**12))

    def answer_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 65536)

    def answer_slow_body(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10000")
        self.end_headers()
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def answer_slow_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Name: ")
        while True:
            self.wfile.write(b"y")
            time.sleep(0.05)

    def answer_silent(self) -> None:
        time.sleep(2)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def handle(self) -> None:
        """Serve until the client leaves."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Handler.seen = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("path", ["x.png", "x.png?size=%20large", "moved", "text_that_is_png"])
def test_urls_are_fetched_and_judged_by_content(server: str, path: str) -> None:
    assert load_image(f"{server}/{path}").tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing", "the server answered 404"),
        ("page.png", "not a picture"),
        ("loop", "redirects more than 3 times"),
        ("to_file", "redirects to a file address"),
        ("short", "cannot open image"),
        ("big", "larger than the limit of 50 MiB"),
        ("endless", "larger than the limit of 50 MiB"),
    ],
)
def test_what_a_server_may_do_wrong(server: str, path: str, reason: str) -> None:
    message = failure(f"{server}/{path}").message
    assert reason in message and path in message


@pytest.mark.parametrize("path", ["slow_body", "slow_head", "silent"])
def test_the_deadline_is_for_all_of_it(server: str, path: str) -> None:
    start = time.perf_counter()
    assert "no complete answer within 0.4 s" in failure(f"{server}/{path}", MediaLimits(timeout=0.4)).message
    assert time.perf_counter() - start < 1
    time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "mmtool-download"]


def test_a_slow_name_server_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(1) or [])
    start = time.perf_counter()
    assert "no complete answer" in failure("http://slow.example/x.png", MediaLimits(timeout=0.2)).message
    assert time.perf_counter() - start < 0.6


def test_dead_addresses(server: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "cannot connect" in failure(f"http://127.0.0.1:{unused.getsockname()[1]}/x.png").message
    assert "is not known" in failure("http://no-such-host.invalid/x.png").message
    for url in ("http://", "http:///x.png", "http://[::1/x.png", "http://a:99999/", "http://" + "a" * 300 + "/"):
        failure(url)
    failure(server.replace("http:", "https:") + "/x.png")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "10.1.2.3",
        "169.254.169.254",
        "2130706433",
        "0x7f.1",
    ],
)
def test_private_addresses_are_refused_when_asked(server: str, host: str) -> None:
    port = server.rpartition(":")[2]
    message = failure(f"http://{host}:{port}/x.png", PUBLIC_ONLY).message
    assert "is not a public address" in message or "is not known" in message


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::8.8.8.8", True),
        ("127.8.0.1", False),
        ("192.168.0.1", False),
        ("172.16.0.1", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("239.1.1.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2002:a00:1::", False),
        ("2001:0:1:2:3:4:5:6", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert download.is_public(address) is public


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let names resolve to ``answers``, one list per look-up; return the names as they are asked for."""
    asked: list[str] = []
    real, remaining = socket.getaddrinfo, list(answers)

    def resolve(host: str, port: int, *args: object, **kwargs: object) -> list:
        asked.append(host)
        return [entry for address in remaining.pop(0) for entry in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_the_checked_address_is_the_one_connected_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "is_public", lambda address: True)
    port = server.rpartition(":")[2]
    asked = resolving(monkeypatch, ["127.0.0.1"])
    load_image(f"http://pictures.example:{port}/x.png", PUBLIC_ONLY)
    assert asked == ["pictures.example"]
    assert Handler.seen[-1] == f"pictures.example:{port}"


def test_one_private_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, ["8.8.8.8", "127.0.0.1"])
    assert "is not a public address" in failure("http://both.example/x.png", PUBLIC_ONLY).message


def test_each_redirect_is_checked_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([True, False])
    monkeypatch.setattr(download, "is_public", lambda address: next(verdicts))
    port = server.rpartition(":")[2]
    asked = resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.1"])
    monkeypatch.setattr(
        Handler,
        "answer_elsewhere",
        lambda self: self.send(302, Location=f"http://inside.example:{port}/x.png"),
        raising=False,
    )
    assert (
        "inside.example is not a public address" in failure(f"http://a.example:{port}/elsewhere", PUBLIC_ONLY).message
    )
    assert asked == ["a.example", "inside.example"]


def test_proxies_of_the_environment_are_for_people_only(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(download, "is_public", lambda address: True)
    port = server.rpartition(":")[2]
    asked = resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.1"])
    load_image(f"http://direct.example:{port}/x.png", PUBLIC_ONLY)
    failure(f"http://proxied.example:{port}/missing", MediaLimits(timeout=3))
    assert asked == ["direct.example", "127.0.0.1"]


def test_local_pictures_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded())
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    load_image(path)
    load_image(f"file://{path}")
