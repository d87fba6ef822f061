"""Model type, id or path to a folder; the hub is a small server on the loopback device."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmtool.errors import CheckpointError, MMToolError
from mmtool.hub import resolve_folder, wanted_files
from mmtool.registry import get_model_spec

FILES = {
    "config.json": b'{"model_type": "llava"}',
    "tokenizer.model": b"pieces",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights again",
    "modeling_evil.py": b"raise SystemExit",
    "vit/clip/pytorch_model.bin": b"tower",
    "README.md": b"read me",
    "vit/clip/config [1].json": b"{}",
}
WANTED = {
    "config.json",
    "tokenizer.model",
    "model.safetensors",
    "vit/clip/pytorch_model.bin",
    "vit/clip/config [1].json",
}


# Local folders


def test_the_embedded_model_needs_no_path() -> None:
    folder = resolve_folder(get_model_spec("tiny"))
    assert folder.parts[-3:] == ("models", "tiny", "checkpoint")


@pytest.mark.parametrize("spec", [None, "tiny", "yi-vl-6b-chat"])
def test_an_existing_folder_is_taken_as_it_is(spec: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_folder(get_model_spec(spec) if spec else None, str(tmp_path)) == tmp_path
    assert resolve_folder(None, tmp_path) == tmp_path


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_folder(None, "~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "path", ["./missing", "/missing/folder", "~/missing", "missing", "a/b/c", "runs/last", "..", "own er/name", ""]
)
def test_a_missing_folder_is_not_looked_up(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(MMToolError, match=re.escape(f"--model_id_or_path {path}")) as caught:
        resolve_folder(None, path)
    assert "config.json" in str(caught.value.hint)


def test_what_is_no_model_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        resolve_folder(None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_folder(None, tmp_path)
    with pytest.raises(MMToolError, match="is a file, but a folder") as caught:
        resolve_folder(None, weights)
    assert caught.value.hint == f"Give its folder: --model_id_or_path {tmp_path}"


def test_no_model_at_all_is_an_error() -> None:
    with pytest.raises(MMToolError, match="no model was named"):
        resolve_folder(None)


# The hub


def test_code_and_second_copies_are_not_wanted() -> None:
    assert set(wanted_files(FILES)) == WANTED


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download uses."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        path = self.path.replace("%20", " ").replace("%5B", "[").replace("%5D", "]").partition("?")[0]
        entries = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in FILES.items()]
        if path.startswith("/api/models/gated/"):
            return self._answer(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        if not path.startswith(("/api/models/owner/name", "/owner/name/resolve/")):
            return self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            return self._answer(json.dumps(entries).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"_id": "1", "id": "owner/name", "sha": "a" * 40, "siblings": siblings}
            return self._answer(json.dumps(info).encode())
        content = FILES[path.removeprefix("/owner/name/resolve/" + "a" * 40 + "/")]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._answer(content, headers={"ETag": etag, "X-Repo-Commit": "a" * 40})

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.paths = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(model_id: str, home: Path, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Resolve in a process of its own: the hub's library reads its settings when it is imported."""
    code = (
        "import sys; from mmtool import log; from mmtool.errors import MMToolError\n"
        "from mmtool.hub import resolve_folder\n"
        "log.setup('info')\n"
        "try: print(resolve_folder(None, sys.argv[1]))\n"
        "except MMToolError as error: print(error.message, error.hint, sep='\\n')\n"
    )
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", code, model_id], capture_output=True, text=True, timeout=60, env=clean | settings | env
    )


def test_an_id_is_downloaded_once_and_then_found_offline(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    first = resolve("owner/name", tmp_path, endpoint)
    folder = Path(first.stdout.strip())
    assert folder.is_dir(), first.stdout + first.stderr
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: FILES[name] for name in WANTED}

    asked = len(hub.paths)  # type: ignore[attr-defined]
    again = resolve("owner/name", tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert again.stdout.strip() == str(folder)
    assert "HF_HUB_OFFLINE is set; using the copy in the cache" in again.stderr
    assert len(hub.paths) == asked, "offline means no request"  # type: ignore[attr-defined]

    down = resolve("owner/name", tmp_path, "http://127.0.0.1:9")
    assert down.stdout.strip() == str(folder)
    assert "using the copy in the cache" in down.stderr


@pytest.mark.parametrize(
    ("model_id", "env", "reason"),
    [
        ("owner/name", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("owner/missing", {}, "there is no such repository, or it is private"),
        ("gated/name", {}, "its owner grants access on request, and this account has none"),
    ],
)
def test_what_cannot_be_downloaded_is_one_clear_error(
    hub: ThreadingHTTPServer, tmp_path: Path, model_id: str, env: dict[str, str], reason: str
) -> None:
    done = resolve(model_id, tmp_path, f"http://127.0.0.1:{hub.server_port}", **env)
    assert done.stdout.splitlines() == [
        f"cannot get {model_id} from Hugging Face: {reason}",
        "Pass the folder of a local copy with --model_id_or_path FOLDER.",
    ]
    assert "Traceback" not in done.stderr


def test_without_network_the_answer_comes_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    done = resolve("owner/name", tmp_path, "http://127.0.0.1:9")
    assert "cannot get owner/name from Hugging Face: the hub cannot be reached" in done.stdout
    assert "--model_id_or_path FOLDER" in done.stdout
    assert time.monotonic() - start < 15, "no retries"


def test_model_scope_is_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MMToolError, match="--hub ms needs the package modelscope") as caught:
        resolve_folder(get_model_spec("yi-vl-6b-chat"), hub="ms")
    assert caught.value.hint == "Install it: pip install 'mmtool[hub]'"
