"""Downloads byte by byte: packed bodies, chunks, redirects, logins, proxies, certificates; servers are sockets."""

from __future__ import annotations

import gzip
import itertools
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from mmtool import download, web
from mmtool.download import fetch, reachable
from mmtool.errors import MediaError

MIB = 2**20


class Server:
    """Answers every connection with ``answer(head)``: bytes, or pieces without an end; ``heads`` are the questions."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.names: list[str | None] = []  # that TLS asked for
        self.answer: Callable[[str], bytes | Iterable[bytes]] = lambda head: ok(b"body")
        self.tls: ssl.SSLContext | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(5)
            if self._head(sock).startswith("CONNECT"):
                sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
                self._head(sock)
            answer = self.answer(self.heads[-1])
            for piece in [answer] if isinstance(answer, bytes) else answer:
                sock.sendall(piece)
        except OSError:
            pass
        finally:
            sock.close()

    def _head(self, sock: socket.socket) -> str:
        if self.tls and not isinstance(sock, ssl.SSLSocket) and sock.recv(1, socket.MSG_PEEK) == b"\x16":
            return ""  # TLS begins at once
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = sock.recv(1)
            if not piece:
                raise OSError("gone")
            head += piece
        self.heads.append(head.decode("latin-1"))
        return self.heads[-1]

    def asked(self) -> list[str]:
        return [head.partition("\r\n")[0] for head in self.heads]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name}_proxy".upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = Server()
    yield found
    found.listener.close()


def ok(body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = ["HTTP/1.1 200 OK", *headers, *([f"Content-Length: {len(body)}"] if length else [])]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(url: str, **options: object) -> bytes:
    return fetch(url, **{"timeout": 5.0, "max_bytes": MIB, **options})


def failure(url: str, **options: object) -> str:
    with pytest.raises(MediaError) as caught:
        get(url, **options)
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    assert caught.value.hint
    return caught.value.message


def header(head: str, name: str) -> str | None:
    for line in head.split("\r\n")[1:]:
        key, _, value = line.partition(": ")
        if key.lower() == name.lower():
            return value
    return None


# Packed bodies. They are not asked for; some servers pack all the same.


@pytest.mark.parametrize("size", [0, 5, 65_536, 300_000])
def test_packed_bodies_are_unpacked(server: Server, size: int) -> None:
    body = bytes(index * 7 % 251 for index in range(size))
    halves = gzip.compress(body[: size // 2]) + gzip.compress(body[size // 2 :])
    for packing, packed in (("gzip", gzip.compress(body)), ("X-GZIP", halves), ("deflate", zlib.compress(body))):
        server.answer = lambda head, packing=packing, packed=packed: ok(packed, f"Content-Encoding: {packing}")
        assert get(server.url) == body
    assert header(server.heads[0], "Accept-Encoding") == "identity"


def test_a_body_that_unpacks_to_gigabytes_is_never_held(server: Server) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(MIB)) for _ in range(200)) + packer.flush()
    assert len(bomb) < 300_000
    server.answer = lambda head: ok(bomb, "Content-Encoding: gzip")
    tracemalloc.start()
    try:
        assert "larger than the limit of 1 MiB" in failure(server.url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * MIB


def test_a_packed_body_that_unpacks_to_nothing_for_ever_is_ended(server: Server) -> None:
    empty = gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * 10_000  # stored blocks without content, none of them the last
    server.answer = lambda head: itertools.chain(
        [ok(empty, "Content-Encoding: gzip", length=False)], repeated(empty[10:])
    )
    start = time.perf_counter()
    assert "larger than the limit" in failure(server.url)
    assert time.perf_counter() - start < 4


@pytest.mark.parametrize(
    ("packing", "body", "reason"),
    [
        ("gzip", b"no gzip at all", "cannot be unpacked"),
        ("gzip", gzip.compress(b"x" * 1000)[:-9], "not to its end"),
        ("gzip", gzip.compress(b"x")[:-8] + b"12345678", "cannot be unpacked"),
        ("gzip", b"", "not to its end"),
        ("br", b"x", "packed as br"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"x")), "packed as gzip, gzip"),
    ],
)
def test_packing_that_cannot_be_undone_is_told(server: Server, packing: str, body: bytes, reason: str) -> None:
    server.answer = lambda head: ok(body, f"Content-Encoding: {packing}")
    assert reason in failure(server.url)


# The shape of an answer


def repeated(piece: bytes) -> Iterator[bytes]:
    return itertools.repeat(piece, 10_000)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_chunks_are_put_together(server: Server) -> None:
    big = bytes(200_000)
    server.answer = lambda head: CHUNKED + b"5;x=y\r\nhello\r\n30d40\r\n" + big + b"\r\n0\r\nTrailer: x\r\n\r\n"
    assert get(server.url) == b"hello" + big
    server.answer = lambda head: ok(b"until the end", length=False)
    assert get(server.url) == b"until the end"


@pytest.mark.parametrize(
    ("start", "more", "reason"),
    [
        (CHUNKED + b"-1\r\n", b"x" * 65_536, ""),
        (CHUNKED, b"10000\r\n" + b"x" * 65_536 + b"\r\n", "larger than the limit"),
        (CHUNKED + b"ffffffffff\r\n", b"x" * 65_536, "larger than the limit"),
        (CHUNKED, b"1" * 65_536, "65536"),
        (CHUNKED + b"5\r\nhel", b"", "in pieces, and not to its end"),
        (CHUNKED + b"zz\r\n", b"", "in pieces, and not to its end"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Name: y\r\n" * 1000, "100 headers"),
        (b"HTTP/1.1 200 OK\r\nX-Name: ", b"y" * 65_536, "65536"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhalf", b"", "ended 496 bytes before the end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"x" * 65_536, "larger than the limit"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", b"", "SSH-2.0"),
        (b"", b"", "closed connection"),
    ],
)
def test_a_malformed_answer_ends_soon_and_holds_little(server: Server, start: bytes, more: bytes, reason: str) -> None:
    server.answer = lambda head: itertools.chain([start], repeated(more) if more else [])
    before = time.perf_counter()
    tracemalloc.start()
    try:
        assert reason in failure(server.url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - before < 4 and peak < 10 * MIB


def test_the_limit_is_the_last_size_that_is_taken(server: Server) -> None:
    server.answer = lambda head: ok(bytes(1000), length="long" in head)
    for path in ("/long", "/until-the-end"):
        assert len(get(server.url + path, max_bytes=1000)) == 1000
        assert "larger than the limit" in failure(server.url + path, max_bytes=999)


# What is asked


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("", "/"),
        ("?a=b c", "/?a=b%20c"),
        ("/a b/\u00e9%20.png?q=\u00fc&x=[1]#part", "/a%20b/%C3%A9%20.png?q=%C3%BC&x=[1]"),
        ("/~x;v=1/'(a)'*", "/~x;v=1/'(a)'*"),
        ("/a\r\nX: y", "/aX:%20y"),
    ],
)
def test_a_path_is_quoted_once(server: Server, path: str, line: str) -> None:
    assert get(server.url + path) == b"body"
    assert server.asked() == [f"GET {line} HTTP/1.1"]
    assert header(server.heads[0], "Host") == f"127.0.0.1:{server.port}"
    assert header(server.heads[0], "User-Agent") == "mmtool"


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("http://Example.COM:80/", "example.com"),
        ("https://example.com:443", "example.com"),
        ("https://example.com:80/", "example.com:80"),
        ("http://[::1]:8080/", "[::1]:8080"),
        ("http://[fe80::1%25eth0]/", "[fe80::1]"),
        ("http://m\u00fcnchen.example/", "xn--mnchen-3ya.example"),
        ("http://\u4f8b\u5b50\u3002example/", "xn--fsqu00a.example"),
        ("http://user:pass@example.com/", "example.com"),
    ],
)
def test_hosts(url: str, authority: str) -> None:
    assert web.place_of(url).authority() == authority


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "http:///x", "http:x", "http://a b/", "http://a:0x50/", "http://a:70000/", "http://[::1/"),
        *(
            "http://stra\u00dfe.example/",
            "http://a\u200db.example/",
            "http://a\x00b/",
            "http://a<b>/",
            "http://..\u00fc/",
        ),
        *("http://127.0.0.1\\@b.example/", "http://b.example\\c/"),
    ],
)
def test_hosts_that_are_none(url: str) -> None:
    with pytest.raises(ValueError):
        web.place_of(url)
    failure(url)


def test_a_redirect_is_read_as_utf_8_and_from_where_it_stands(server: Server) -> None:
    def answer(head: str) -> bytes:
        if head.startswith("GET /a/b?c"):
            return "HTTP/1.1 301 Moved\r\nLocation: ../é x?y\r\n\r\n".encode()
        return ok(b"there")

    server.answer = answer
    assert get(server.url + "/a/b?c") == b"there"
    assert server.asked()[1] == "GET /%C3%A9%20x?y HTTP/1.1"


def test_reachable_is_whoever_answers(server: Server) -> None:
    server.answer = lambda head: b"HTTP/1.1 404 Not Found\r\n\r\n"
    assert reachable(server.url, timeout=5)
    assert server.asked() == ["HEAD / HTTP/1.1"]
    server.answer = lambda head: b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"
    assert reachable(server.url, timeout=5)
    server.answer = lambda head: b""
    assert not reachable(server.url, timeout=5)
    server.listener.close()
    assert not reachable("http://127.0.0.1:1", timeout=5)
    assert not reachable("http://no-such-host.invalid", timeout=5)


# Who asks


def test_logins_of_the_url_and_of_the_file_go_to_their_host_only(server: Server, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    server.answer = lambda head: (
        f"HTTP/1.1 302 Found\r\nLocation: http://localhost:{server.port}/there\r\n\r\n".encode()
        if head.startswith("GET /elsewhere")
        else ok(b"body")
    )
    get(server.url)
    get(server.url.replace("//", "//you:p%40ss@"))
    get(server.url.replace("//", "//you:x@") + "/elsewhere")
    get(server.url, domains=["127.0.0.1"])  # a server asks in nobody's name
    found = [header(head, "Authorization") for head in server.heads]
    assert found == ["Basic bWU6c2VjcmV0", "Basic eW91OnBAc3M=", "Basic eW91Ong=", None, None]
    (tmp_path / "netrc").write_text("this is \x00 no such file\n")
    assert get(server.url) == b"body"


# Proxies


def test_a_proxy_is_told_the_whole_url_and_its_login(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", f"us:er@127.0.0.1:{server.port}")
    get("http://a:b@far.invalid/x y.png")
    assert server.asked() == ["GET http://far.invalid/x%20y.png HTTP/1.1"]
    assert header(server.heads[0], "Host") == "far.invalid"
    assert header(server.heads[0], "Proxy-Authorization") == "Basic dXM6ZXI="
    assert header(server.heads[0], "Authorization") == "Basic YTpi"
    assert "is not known" in failure("http://far.invalid/", domains=["far.invalid"])
    assert "is not known" in failure("http://far.invalid/", allow_private=False)


@pytest.mark.parametrize("spared", ["127.0.0.1", "127.0.0.0/8", "x.example, 127.0.0.1:PORT", "*", "::1,127.0.0.1/32"])
def test_hosts_that_need_no_proxy(server: Server, monkeypatch: pytest.MonkeyPatch, spared: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", spared.replace("PORT", str(server.port)))
    assert get(server.url) == b"body"
    monkeypatch.setenv("no_proxy", "x.example,10.0.0.0/8,,127.0.0.1:1")
    assert "cannot connect to 127.0.0.1:1" in failure(server.url)


def test_other_kinds_of_proxies_are_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    assert "proxy of kind socks5://" in failure(server.url)


def test_a_proxy_that_refuses_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setattr(Server, "_talk", lambda self, sock: (self._head(sock), sock.sendall(REFUSED), sock.close()))
    assert "the proxy answered 407 Who are you" in failure("https://far.invalid/")


REFUSED = b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n"


# Certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of its own for pictures.example, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    command += " -addext subjectAltName=DNS:pictures.example -keyout key.pem -out cert.pem"
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate with")
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def secure(server: Server, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with TLS, at whatever name."""
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(*certificate)
    server.tls.sni_callback = lambda sock, name, context: server.names.append(name)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kwargs: real("127.0.0.1", port, **kwargs))
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    return server


def test_the_certificate_is_checked_for_the_name_of_the_url(
    secure: Server, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://pictures.example:{secure.port}/x"
    assert "CERTIFICATE_VERIFY_FAILED" in failure(url)
    monkeypatch.setenv("CURL_CA_BUNDLE", str(certificate[0]))
    assert get(url) == get(url.replace("example:", "example.:")) == b"body"
    assert set(secure.names) == {"pictures.example"}
    assert header(secure.heads[0], "Host") == f"pictures.example:{secure.port}"
    for host in ("other.example", "127.0.0.1"):
        assert "CERTIFICATE_VERIFY_FAILED" in failure(url.replace("pictures.example", host))
    assert "CERTIFICATE_VERIFY_FAILED" in failure(url, domains=["pictures.example"]), "a server trusts the system only"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0].with_name("none.pem")))
    assert "which REQUESTS_CA_BUNDLE names" in failure(url)


def test_a_server_checks_address_and_certificate(
    secure: Server, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://pictures.example:{secure.port}/x"
    assert "is not a public address" in failure(url, allow_private=False)
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    monkeypatch.setattr(web, "_tls", lambda bundle: trusted if bundle is None else None)
    assert get(url, allow_private=False) == b"body"
    assert secure.names == ["pictures.example"]


def test_a_proxy_carries_tls_without_reading_it(
    secure: Server, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    monkeypatch.setenv("https_proxy", f"http://us:er@127.0.0.1:{secure.port}")
    assert get("https://a:b@pictures.example/x") == b"body"
    assert secure.asked() == ["CONNECT pictures.example:443 HTTP/1.1", "GET /x HTTP/1.1"]
    first, second = secure.heads
    assert header(first, "Proxy-Authorization") == "Basic dXM6ZXI=" and header(first, "Authorization") is None
    assert header(second, "Proxy-Authorization") is None and header(second, "Authorization") == "Basic YTpi"
    assert header(second, "Host") == "pictures.example" and secure.names == ["pictures.example"]


def test_a_handshake_without_an_end_is_given_up(server: Server) -> None:
    server.answer = lambda head: b""
    listener = socket.create_server(("127.0.0.1", 0))
    start = time.perf_counter()
    with listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        assert "no complete answer within 0.4 s" in failure(url, timeout=0.4)
    assert time.perf_counter() - start < 2


def test_where_python_has_no_certificates_a_package_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    none = ssl.get_default_verify_paths()._replace(cafile=None, capath=None)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: none)
    truststore = pytest.importorskip("truststore")
    monkeypatch.setitem(sys.modules, "certifi", None)
    context = web._system_tls()
    assert isinstance(context, truststore.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    monkeypatch.undo()
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: none)
    pytest.importorskip("certifi")
    assert len(web._system_tls().get_ca_certs()) > 50


def test_a_download_loads_no_package() -> None:
    code = "import sys, mmtool.download; print(*sorted({'requests', 'urllib3', 'httpx', 'httpx2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
