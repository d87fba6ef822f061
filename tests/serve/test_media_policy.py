"""What a request may make the server open: nothing of its machine, nothing of its network, nothing too large."""

import base64
import http.server
import io
import socket
import struct
import threading
import zlib
from dataclasses import replace

import PIL.Image
import pytest

from mmtool.download import _Download
from mmtool.serve.settings import SERVER_MEDIA

CHAT = "/v1/chat/completions"
QUESTION = {"type": "text", "text": "How many shapes are there?"}


def ask(server, *urls, kind="image_url", **fields):
    parts = [{"type": kind, kind: {"url": url}} for url in urls]
    return server.post(CHAT, {"messages": [{"role": "user", "content": [*parts, QUESTION]}], **fields})


def refused(response, place="messages[0].content[0].image_url"):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == place and place in error["message"]
    return error["message"]


@pytest.fixture(scope="module")
def web(request):
    """A web server of this machine, and the addresses that were asked for."""
    asked = []
    picture = (request.config.rootpath / "examples" / "pictures" / "shapes.png").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.headers["Host"], self.path))
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:].replace("PORT", str(self.server.server_port)))
                self.end_headers()
            elif self.path == "/slow.png":
                self.send_response(200)
                self.end_headers()
                try:
                    for byte in picture:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        stopped.wait(0.2)
                except OSError:
                    pass
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(picture if self.path.endswith(".png") else b"x" * 3_000_000)

        def log_message(self, *args):
            pass

    stopped = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked = asked
    yield server
    stopped.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def names(monkeypatch):
    """``names["evil.example"] = "127.0.0.1"``: what the local resolver says, and how often it was asked."""
    real, known = socket.getaddrinfo, {}
    known_asked = []

    def resolve(host, port, *args, **kwargs):
        if host not in known:
            return real(host, port, *args, **kwargs)  # of this machine: there is no other resolver
        known_asked.append(host)
        answer = known[host]
        addresses = [answer] if isinstance(answer, str) else answer
        return [entry for address in addresses for entry in real(address, port, *args, **kwargs)]

    def connect(download, sock, address):
        assert address[0] in ("127.0.0.1", "::1"), "a test must not leave this machine"
        return real_connect(download, sock, address)

    real_connect = _Download._connected
    monkeypatch.setattr(_Download, "_connected", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    known["asked"] = known_asked
    return known


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.8", "192.88.99.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "::ffff:0:127.0.0.1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::1", "2001:0:7f00:1::1"),
        ["93.184.216.34", "127.0.0.1"],
        ["127.0.0.1", "93.184.216.34"],
    ],
    ids=str,
)
def test_addresses_that_are_not_public_are_refused_after_the_name_is_looked_up(serving_http, names, address):
    names["evil.example"] = address
    message = refused(ask(serving_http, "http://evil.example/shapes.png"))
    assert "not a public address" in message
    assert names["asked"] == ["evil.example"], "looked up once"


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:{port}/a.png", "http://127.1:{port}/a.png", "http://2130706433:{port}/a.png"),
        *("http://0x7f000001:{port}/a.png", "http://0177.0.0.1:{port}/a.png", "http://localhost:{port}/a.png"),
        *("http://[::1]:{port}/a.png", "http://[::ffff:127.0.0.1]:{port}/a.png", "http://0:{port}/a.png"),
        *("http://user@127.0.0.1:{port}/a.png", "http://good.example@127.0.0.1:{port}/a.png"),
        *("http://127.0.0.1:{port}\\@good.example/a.png", "http://good.example:80@127.0.0.1:{port}/a.png"),
        *("http://127.0.0.1.:{port}/a.png", "http://①②⑦.⓪.⓪.①:{port}/a.png", "http://127。0。0。1:{port}/a.png"),
    ],
)
def test_no_spelling_of_this_machine_gets_through(serving_http, names, web, url):
    before = len(web.asked)
    refused(ask(serving_http, url.format(port=web.server_port)))
    assert len(web.asked) == before, "nothing was asked for"


def test_the_address_that_was_checked_is_the_one_that_is_asked(serving_http, names, web, monkeypatch):
    names["rebind.example"] = "93.184.216.34"
    connected = []

    def connect(download, sock, address):
        connected.append(address[0])
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(_Download, "_connected", connect)
    refused(ask(serving_http, f"http://rebind.example:{web.server_port}/shapes.png"))
    assert connected == ["93.184.216.34"] and names["asked"] == ["rebind.example"]


@pytest.fixture(scope="module")
def serving_http(run_module_server):
    with run_module_server(media=replace(SERVER_MEDIA, schemes=("http", "https"), timeout=3.0)) as server:
        yield server


@pytest.fixture(scope="module")
def serving_listed(run_module_server):
    """Fetches from the names *.good.example, wherever they are."""
    limits = replace(
        SERVER_MEDIA,
        schemes=("http",),
        domains=("*.good.example",),
        allow_private=True,
        timeout=1.5,
        max_bytes=1_000_000,
    )
    with run_module_server(media=limits) as server:
        yield server


def test_a_listed_host_may_be_asked(serving_listed, names, web):
    names["a.good.example"] = "127.0.0.1"
    answer = ask(serving_listed, f"http://a.good.example:{web.server_port}/shapes.png")
    assert answer.json()["choices"][0]["message"]["content"] == "There are 3 shapes."
    assert web.asked[-1][0].startswith("a.good.example:"), "the name stays in the Host header"


@pytest.mark.parametrize("host", ["good.example", "a.good.example.evil.example", "evilgood.example", "127.0.0.1"])
def test_another_host_is_not_asked(serving_listed, names, web, host):
    names[host] = "127.0.0.1"
    before = len(web.asked)
    assert "not one of the hosts" in refused(ask(serving_listed, f"http://{host}:{web.server_port}/shapes.png"))
    assert len(web.asked) == before


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://127.0.0.1:PORT/shapes.png", "not one of the hosts"),
        ("//127.0.0.1:PORT/shapes.png", "not one of the hosts"),
        ("file:///etc/passwd", "redirects to a file address"),
        ("https://a.good.example/shapes.png", "redirects to an https address"),
        ("gopher://a.good.example/", "redirects to a gopher address"),
        ("/to//to//to//to/shapes.png", "redirects more than 3 times"),
    ],
)
def test_every_redirect_is_checked_again(serving_listed, names, web, target, said):
    names["a.good.example"] = "127.0.0.1"
    message = refused(ask(serving_listed, f"http://a.good.example:{web.server_port}/to/{target}"))
    assert said in message


def test_three_redirects_are_followed(serving_listed, names, web):
    names["a.good.example"] = "127.0.0.1"
    answer = ask(serving_listed, f"http://a.good.example:{web.server_port}/to//to//to//shapes.png")
    assert answer.status_code == 200


def test_a_server_that_is_slow_on_purpose_is_given_up(serving_listed, names, web):
    names["a.good.example"] = "127.0.0.1"
    assert "within 1.5 s" in refused(ask(serving_listed, f"http://a.good.example:{web.server_port}/slow.png"))


def test_too_large_a_download_is_ended(serving_listed, names, web):
    names["a.good.example"] = "127.0.0.1"
    assert "larger than the limit" in refused(ask(serving_listed, f"http://a.good.example:{web.server_port}/big"))


def test_plain_http_needs_to_be_allowed(server):
    assert "Only https://" in refused(ask(server, "http://example.com/a.png"))


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "etc/passwd", "~/.ssh/id_rsa", ""),
        *("ftp://example.com/a.png", "javascript:alert(1)", "jar:file:///a!/b", "\\\\host\\share", "blob:x"),
    ],
)
def test_files_of_the_server_are_not_opened(server, url):
    refused(ask(server, url))


def test_only_files_below_the_folder_are_opened(run_module_server, tmp_path, data_uri):
    root = tmp_path / "media"
    root.mkdir()
    picture = base64.b64decode(data_uri("shapes").partition(",")[2])
    (root / "shapes.png").write_bytes(picture)
    (tmp_path / "secret.png").write_bytes(picture)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    limits = replace(SERVER_MEDIA, allow_local=True, local_root=root)
    with run_module_server(media=limits) as server:
        assert ask(server, f"file://{root}/shapes.png").status_code == 200
        for path in ("secret.png", "media/../secret.png", "media/link.png", "media", "media/absent.png"):
            assert "no such file in the folder" in refused(ask(server, f"file://{tmp_path}/{path}")) or path == "media"
        refused(ask(server, f"{root}/shapes.png"))
        refused(ask(server, f"file://other-host{root}/shapes.png"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("data:image/png;base64,%%%", "broken base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png", "no comma"),
        ("data:text/html,<b>x</b>", "not a picture"),
    ],
)
def test_a_broken_data_uri_is_named(server, uri, said):
    assert said in refused(ask(server, uri))


def test_a_picture_cut_short_is_named(server, data_uri):
    whole = data_uri("shapes")
    assert "broken picture" in refused(ask(server, whole[: len(whole) // 2 // 4 * 4 + 2]))


@pytest.mark.parametrize(("side", "said"), [(8_000, "8000 x 8000 pixels"), (30_000, "pixels, over the limit")])
def test_a_picture_of_too_many_pixels_is_not_decoded(server, side, said):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
    message = refused(ask(server, f"data:image/png;base64,{base64.b64encode(data).decode()}"))
    assert said in message


def test_the_place_of_a_wrong_picture_is_told(server, data_uri):
    response = ask(server, data_uri("shapes"), "data:image/png;base64,AAAA")
    refused(response, "messages[0].content[1].image_url")


def test_the_number_of_pictures_is_limited(run_module_server, data_uri):
    with run_module_server(max_media=2) as server:
        response = ask(server, *[data_uri("shapes")] * 3)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "too_many_media"


def test_sounds_are_refused_by_a_model_that_cannot_hear(server):
    sound = base64.b64encode(b"RIFF....WAVE").decode()
    content = [{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}]
    response = server.post(CHAT, {"messages": [{"role": "user", "content": content}]})
    assert response.json()["error"]["code"] == "unsupported_media"


def test_pictures_in_odd_modes_are_answered(server):
    for mode, kind in (("1", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGBA", "WEBP"), ("I;16", "PNG"), ("CMYK", "JPEG")):
        file = io.BytesIO()
        PIL.Image.new(mode, (40, 30)).save(file, kind)
        uri = f"data:image/x;base64,{base64.b64encode(file.getvalue()).decode()}"
        assert ask(server, uri, max_tokens=3).status_code == 200, (mode, kind)


def test_a_sent_picture_is_prepared_once(run_module_server, data_uri, monkeypatch):
    with run_module_server() as server:
        template = server.service.template
        opened = []
        prepare = template.media_input
        monkeypatch.setattr(template, "media_input", lambda part: opened.append(part) or prepare(part))
        for _ in range(2):
            assert ask(server, data_uri("shapes")).status_code == 200
        assert len(opened) == 1


def test_kept_pictures_are_bounded():
    import torch

    from mmtool.serve.media import PreparedMedia
    from mmtool.template.base import MediaInput

    kept = PreparedMedia(max_bytes=1000)
    for index in range(10):
        kept.put(bytes([index]), MediaInput("image", 0, 1, {"x": torch.zeros(100)}, str(index)))
    assert [index for index in range(10) if kept.get(bytes([index]))] == [8, 9]


def test_media_in_the_engine_are_counted_until_the_answer_ends(run_module_server, data_uri, idle):
    with run_module_server(max_media_bytes=100) as server:
        assert ask(server, data_uri("shapes")).status_code == 200
        idle(server)
        assert server.service.media.held_bytes == 0
        server.service.media.held_bytes = 101
        response = ask(server, data_uri("shapes"))
        assert response.status_code == 429 and response.headers["retry-after"]
