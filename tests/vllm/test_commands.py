"""`mmtool infer` and `mmtool serve` with `--infer_backend vllm`."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mmtool"]
QUESTION = ["--query", "What colour is the circle?", "--images", str(ROOT / "examples" / "pictures" / "circle.png")]
EAGER = ["--vllm_args", '{"enforce_eager": true}']
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}


def run(*options):
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def test_infer_answers_as_with_the_pt_engine():
    expected = run("infer", *QUESTION)
    found = run("infer", *QUESTION, "--infer_backend", "vllm", "--max_model_len", "512", *EAGER)
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout
    assert "red" in found.stdout.lower()


def test_serve_answers_and_stops():
    options = ["--port", "0", "--infer_backend", "vllm", "--max_model_len", "512", "--max_num_seqs", "4", *EAGER]
    with subprocess.Popen([*COMMAND, "serve", *options], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if "serving at " in line:
                    break
            else:
                pytest.fail("".join(lines))
            url = line.partition("serving at ")[2].split()[0]
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
            with post(f"{url}/chat/completions", body) as reply:
                found = json.load(reply)
            assert found["choices"][0]["message"]["content"]
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
            with post(f"{url}/chat/completions", {**body, "response_format": form}) as reply:
                assert json.loads(json.load(reply)["choices"][0]["message"]["content"]) in ("yes", "no")
        finally:
            server.terminate()
            started = time.monotonic()
            server.stderr.read()
            server.wait(60)
    assert server.returncode == 0
    assert time.monotonic() - started < 30


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def test_options_of_other_engines_are_refused():
    done = run("infer", "--query", "x", "--infer_backend", "vllm", "--attn_impl", "eager")
    assert done.returncode == 2
    assert "--attn_impl is not for --infer_backend vllm" in done.stderr
