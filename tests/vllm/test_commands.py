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


def run(*options, **environment):
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, env=environment, timeout=300)


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


def test_two_processes_share_the_model():
    expected = run("infer", *QUESTION)
    options = ["--infer_backend", "vllm", "--tensor_parallel_size", "2", "--max_model_len", "512", *EAGER]
    one_core_each = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    found = run("infer", *QUESTION, *options, **one_core_each)
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout


OWN_SERVER = """
import sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, picture, ids = sys.argv[1], Image.open(sys.argv[2]), [int(token_id) for token_id in sys.argv[3:]]
    llm = LLM(model=folder, enforce_eager=True, dtype="float32", max_num_seqs=2)
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    print("ids", *llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)
"""


def test_vllm_alone_knows_the_folders(open_pair, tmp_path):
    pair = open_pair("yi-vl")
    request = pair.request(["square.png", "What is it?"])
    (item,) = request.media
    ids = [*request.input_ids[: item.start], pair.processor.image_token_id]
    ids += request.input_ids[item.start + item.length :]
    script = tmp_path / "own.py"
    script.write_text(OWN_SERVER, encoding="utf-8")
    command = [sys.executable, str(script), str(pair.folder), str(pair.media / "square.png"), *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ids "))
    assert tuple(map(int, line.split()[1:])) == pair.pt.answer(request).token_ids
