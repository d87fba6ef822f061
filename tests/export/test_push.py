"""Uploads, to a small server on the loopback device that speaks as much of a hub as an upload needs."""

import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtool.errors import MMToolError


class Hub:
    """What the server was told."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.address = ""


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            data = self.body()
            state.tokens.add(self.headers.get("Authorization"))
            if state.refuses:
                self.reply({"error": "no write access"}, 403)
            elif self.path == "/api/repos/create":
                state.created.append(json.loads(data))
                self.reply({"url": f"{state.address}/me/model", "id": "me/model", "name": "me/model"})
            elif self.path.startswith("/api/models/me/model/preupload/main"):
                modes = [
                    {"path": file["path"], "shouldIgnore": False}
                    | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                    for file in json.loads(data)["files"]
                ]
                self.reply({"files": modes})
            elif self.path == "/me/model.git/info/lfs/objects/batch":
                objects = [
                    {**each, "actions": {"upload": {"href": f"{state.address}/large/{each['oid']}"}}}
                    for each in json.loads(data)["objects"]
                ]
                self.reply({"transfer": "basic", "objects": objects})
            elif self.path.startswith("/api/models/me/model/commit/main"):
                for line in data.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "header":
                        state.messages.append(value["summary"])
                    elif entry["key"] == "file":
                        state.files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        state.files[value["path"]] = state.large[value["oid"]]
                self.reply({"commitOid": "1" * 40, "commitUrl": f"{state.address}/me/model/commit/1", "success": True})
            elif self.path == "/api/v1/models":  # ModelScope
                state.created.append(json.loads(data))
                self.reply({"Code": 200, "Success": True, "Data": {"Id": 1, "Name": "model"}})
            elif self.path == "/api/v1/repos/models/me/model/commit/master":
                for action in json.loads(data)["actions"]:
                    state.files[action["path"]] = base64.b64decode(action["content"])
                self.reply({"Code": 200, "Success": True, "Data": {"Files": []}})
            elif self.path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            else:
                self.reply({"error": self.path}, 404)

        def do_PUT(self) -> None:
            data = self.body()
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == oid
            state.large[oid] = data
            self.reply({})

        def do_GET(self) -> None:
            self.reply({"id": "me/model", "sha": "1" * 40, "siblings": []})

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


SCRIPT = Path(__file__).parents[2] / "examples" / "export" / "push.sh"


def run(hub: Hub, *words: object, home: Path, script: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the hub's tools read their settings once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), **more}
    environment["HF_HUB_DISABLE_XET"] = "1"  # the server takes large files as Git LFS does
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["sh", str(SCRIPT)] if script else [sys.executable, "-m", "mmtool", "export"]
    command += map(str, words)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_merged_model_is_uploaded_with_its_card(hub: Hub, train: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = train(None, "image", model_type="tiny")
    settings = {"CKPT": str(checkpoint), "REPOSITORY": "me/model"}
    words = ["--hub_token", "hf_secret", "--hub_private_repo", "true"]
    done = run(hub, *words, home=tmp_path / "home", script=True, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pushed: " in done.stderr
    assert hub.created[0]["name"] == "model"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    merged = checkpoint.with_name("checkpoint-2-merged")
    local = {str(path.relative_to(merged)): path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    assert "val_dataset.jsonl" in local
    assert hub.files == {name: data for name, data in local.items() if name != "val_dataset.jsonl"}
    _, head, page = hub.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["mmtool", "tiny"]
    for part in ("## Base", "## Data", "rows-image.jsonl", "| learning_rate | `0.01` |", "| lora_rank | `8` |"):
        assert part in page
    assert "![loss](images/loss.png)" in page
    assert hub.files["images/loss.png"][1:4] == b"PNG"


def test_an_adapter_is_uploaded_as_it_is_and_stays_as_it_is(
    hub: Hub, train: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = train(None, model_type="tiny", save_only_model="false")
    before = {path.name for path in checkpoint.iterdir()}
    done = run(
        hub, "--ckpt_dir", checkpoint, "--push_to_hub", "true", "--hub_model_id", "me/model", home=tmp_path / "home"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in checkpoint.iterdir()} == before
    assert set(hub.files) == {
        *("adapter_config.json", "adapter_model.safetensors", "sft_args.json", "README.md", "images/loss.png")
    }
    assert re.search(r"base_model_relation: adapter", hub.files["README.md"].decode())


def test_a_refused_upload_keeps_what_was_exported(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    words = ["--model_type", "tiny", "--dtype", "bf16", "--verify", "false", "--output_dir", tmp_path / "new"]
    done = run(hub, *words, "--push_to_hub", "true", "--hub_model_id", "me/model", home=tmp_path / "home")
    assert done.returncode == 2
    assert "error: --hub_model_id me/model: Hugging Face did not take the upload" in done.stderr
    assert (tmp_path / "new" / "config.json").is_file()


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is None, reason="modelscope is not installed")
def test_an_adapter_is_uploaded_to_modelscope(hub: Hub, adapter: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = adapter(None, target_modules=r".*language_model.*q_proj", r=1)
    (checkpoint / "adapter_model.safetensors").unlink()  # the server takes small files only
    words = ["--model_type", "tiny", "--ckpt_dir", checkpoint, "--push_to_hub", "true", "--hub_model_id", "me/model"]
    settings = {"MODELSCOPE_ENDPOINT": hub.address, "MODELSCOPE_CACHE": str(tmp_path / "cache")}
    done = run(hub, *words, "--push_hub", "ms", "--hub_token", "ms-1", home=tmp_path / "home", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.created[0]["Path"] == "me"
    assert {"adapter_config.json", "README.md"} <= set(hub.files)


def test_modelscope_without_its_package_is_refused_before_anything_is_written(
    export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    words = ["--model_type", "tiny", "--dtype", "bf16", "--output_dir", tmp_path / "new"]
    with pytest.raises(MMToolError, match="needs the package modelscope"):
        export(*words, "--push_to_hub", "true", "--hub_model_id", "me/model", "--hub", "ms")
    assert not (tmp_path / "new").exists()
