"""The command itself, as a process of its own: start, clients of the examples, SIGTERM under load, exit codes."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import peft
import pytest
import torch

from mmtool.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serve"
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}
KEYS = {"authorization": "Bearer fm9g"}


@dataclass
class Process:
    """A server that runs in a process of its own."""

    process: subprocess.Popen
    url: str = ""
    said: list[str] = field(default_factory=list)

    def wait_until_it_serves(self) -> None:
        for line in self.process.stderr:
            self.said.append(line)
            found = re.search(r"serving at (http://\S+)/v1", line)
            if found:
                self.url = found[1]
                threading.Thread(target=self._read_on, daemon=True).start()
                return
        pytest.fail("".join(self.said))

    def _read_on(self) -> None:
        self.said += self.process.stderr


def start(*options: str, **environment: str) -> Process:
    command = [sys.executable, "-m", "mmtool", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | environment, cwd=ROOT)
    return Process(process)


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mmtool", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=60)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A LoRA adapter that makes the embedded model say something else."""
    folder = tmp_path_factory.mktemp("adapter")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=".*vision.*")
        adapted = peft.get_peft_model(copy.deepcopy(tiny.network), config)
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.3)
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(adapter: Path) -> Iterator[Process]:
    options = ["--api_key", "fm9g", "--served_model_name", "9g", "tiny", "--max_num_seqs", "4"]
    started = start(*options, "--lora_modules", f"other={adapter}")
    started.wait_until_it_serves()
    yield started
    if started.process.poll() is None:
        started.process.terminate()
    started.process.wait(20)
    started.process.stderr.close()


def client(script: str, url: str, text: str | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / script)]
    environment = ENVIRONMENT | {"BASE_URL": f"{url}/v1"}
    ran = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_client_for_one_question(served):
    assert client("stream_once.py", served.url) == "Hello! I am tiny. Show me a picture.\n"


def test_the_client_that_chats(served):
    said = client("stream_chat.py", served.url, "Hello\nWhat is 2 + 3?\n")
    assert "9G: Hello! I am tiny. Show me a picture." in said
    assert said.count("9G: ") == 2


def test_the_client_with_a_picture(served):
    first, second = client("picture.py", served.url).splitlines()
    assert "There are 3 shapes. (73 prompt tokens" in first
    known = int(re.search(r"(\d+) of them known", second)[1])
    assert known >= 73


def test_the_client_that_wants_json(served):
    assert set(eval(client("json_answer.py", served.url))) == {"sum"}


def test_an_adapter_is_chosen_as_a_model(served):
    with httpx2.Client(base_url=served.url, headers=KEYS, timeout=30) as http:
        listed = http.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [("9g", None), ("tiny", None), ("other", "9g")]

        def ask(model):
            body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
            answer = http.post("/v1/chat/completions", json=body).json()
            assert answer["model"] == model
            return answer["choices"][0]["message"]["content"]

        with ThreadPoolExecutor() as pool:
            texts = list(pool.map(ask, ["9g", "other", "9g", "other"]))
        assert texts[0] == texts[2] == "Hello! I am tiny. Show me a picture."[: len(texts[0])]
        assert texts[1] == texts[3] != texts[0]


def test_the_server_says_what_it_has(served):
    said = "".join(served.said)
    assert re.search(r"KV memory: \d+\.\d MB, for 4 conversations of 2048 positions", said)
    assert "9g, tiny, other: 4 answers at once, 2048 positions each; 16 more may wait" in said


def test_a_port_that_is_taken_is_an_error(served):
    port = served.url.rpartition(":")[2]
    done = run("--port", port)
    assert done.returncode == 2
    assert f"error: --port {port}: cannot listen at 127.0.0.1:{port} (address already in use)" in done.stderr
    assert "hint:" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "203.0.113.5"], "--host 203.0.113.5: not an address of this machine"),
        (["--host", "not a host"], "--host not a host"),
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--api_key_file", "/nowhere"], "--api_key_file /nowhere"),
        (["--api_key", "a b"], "--api_key: a key"),
        (["--max_num_seqs", "0"], "--max_num_seqs 0 is out of range"),
        (["--max_queue", "-1"], "--max_queue -1 is out of range"),
        (["--port", "0", "--max_model_len", "9999999"], "--max_model_len 9999999: this model takes 2 to 2048"),
        (["--allowed_local_media_path", "/nowhere"], "--allowed_local_media_path /nowhere"),
        (["--allowed_media_schemes", "ftp"], "--allowed_media_schemes ftp"),
        (["--allow_private_media"], "--allow_private_media true needs --allowed_media_domains"),
        (["--lora_modules", "a"], "--lora_modules a is not NAME=FOLDER"),
        (["--lora_modules", "a=/nowhere"], "--lora_modules a=/nowhere: no such folder"),
        (["--lora_modules", "a=/b", "a=/c"], "--lora_modules has a twice"),
        (["--cors_origins", "https://chat.example.com/"], "--cors_origins https://chat.example.com/: not an origin"),
        (["--port", "0", "--ckpt_dir", "/nowhere"], "--ckpt_dir /nowhere"),
        (["--shutdown_timeout", "-1"], "--shutdown_timeout -1 is out of range"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_before_the_weights_load(options, said, capsys, monkeypatch):
    monkeypatch.setattr("mmtool.serve.main.open_engine", lambda *args, **kwargs: pytest.fail("loaded"))
    if "--max_model_len" in options:
        monkeypatch.undo()
    assert main(["serve", *options]) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_cannot_be_called_as_the_model(adapter, capsys, monkeypatch):
    monkeypatch.setattr("mmtool.serve.main.open_engine", lambda *args, **kwargs: pytest.fail("loaded"))
    assert main(["serve", "--port", "0", "--lora_modules", f"tiny={adapter}"]) == 2
    assert "tiny is the name of the model" in capsys.readouterr().err


def test_everything_that_was_begun_before_sigterm_ends_and_nothing_new_begins(adapter):
    options = ["--ckpt_dir", str(adapter), "--merge_lora", "true", "--max_num_seqs", "4", "--shutdown_timeout", "60"]
    served = start(*options, MMTOOL_API_KEY="fm9g other")
    served.wait_until_it_serves()
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 150, "ignore_eos": True}
    expected = httpx2.post(f"{served.url}/v1/chat/completions", json=body, headers=KEYS, timeout=60).json()
    expected = expected["choices"][0]["message"]["content"]
    assert not expected.startswith("Hello! I am tiny."), "it is the fine-tuned model that answers"
    started, texts = threading.Semaphore(0), []

    def ask(stream: bool) -> None:
        with httpx2.stream(
            "POST", f"{served.url}/v1/chat/completions", json={**body, "stream": stream}, headers=KEYS, timeout=60
        ) as response:
            if not stream:
                started.release()
                texts.append(json.loads(response.read())["choices"][0]["message"]["content"])
                return
            said = []
            for line in response.iter_lines():
                said.append(line)
                if len(said) == 3:
                    started.release()
            assert said[-2] == "data: [DONE]"
            chunks = [json.loads(line[6:]) for line in said if line.startswith("data: {")]
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            texts.append("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))

    asking = [threading.Thread(target=ask, args=(True,)) for _ in range(8)]  # four run, four wait
    for thread in asking:
        thread.start()
    for _ in range(4):
        assert started.acquire(timeout=60)
    time.sleep(0.2)  # the four that wait have arrived
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while httpx2.get(f"{served.url}/health", timeout=10).status_code != 503:
        assert time.monotonic() < deadline
    assert httpx2.get(f"{served.url}/v1/models", headers=KEYS, timeout=10).status_code == 503
    for thread in asking:
        thread.join(60)
    assert texts == [expected] * 8
    assert served.process.wait(30) == 0
    served.process.stderr.close()


def test_a_second_signal_does_not_wait(served):
    host, port = served.url.removeprefix("http://").split(":")
    data = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1900, "ignore_eos": True})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer fm9g\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall((head + data).encode())
        deadline = time.monotonic() + 10
        while "mmtool_requests_running 1" not in httpx2.get(f"{served.url}/metrics", headers=KEYS).text:
            assert time.monotonic() < deadline
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(20) == 0


def test_a_missing_package_is_said_with_its_install_line(monkeypatch, capsys):
    monkeypatch.setattr("mmtool.serve.launch.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install 'mmtool[serve]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("mmtool.serve.main.find_spec", lambda name: None)
    monkeypatch.setattr("mmtool.serve.main.open_engine", lambda *args, **kwargs: pytest.fail("loaded"))
    assert main(["serve", "--port", "0", "--web_ui", "true"]) == 2
    assert "pip install 'mmtool[ui]'" in capsys.readouterr().err


def test_an_adapter_cannot_have_the_name_of_the_model(adapter, capsys):
    assert main(["serve", "--port", "0", "--served_model_name", "a", "--lora_modules", f"a={adapter}"]) == 2
    assert "a is the name of the model" in capsys.readouterr().err
