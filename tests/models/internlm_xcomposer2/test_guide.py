"""The script of the guide for InternLM-XComposer2: a picture's address in the question, the answer, and as a stream."""

import contextlib
import functools
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

GUIDE = """
import torch
from mmtool.llm import (
    get_model_tokenizer, get_template, inference, ModelType, get_default_template_type, inference_stream
)
from mmtool.utils import seed_everything

model_type = ModelType.MODEL_TYPE
template_type = get_default_template_type(model_type)
print(f'template_type: {template_type}')
model, tokenizer = get_model_tokenizer(
    model_type, torch.float32, model_kwargs={'device_map': 'auto'}, model_id_or_path=FOLDER
)
model.generation_config.max_new_tokens = 8
template = get_template(template_type, tokenizer)
seed_everything(42)

query = f'<img>{URL}</img>距离各城市多远？'
response, history = inference(model, template, query)
print(f'query: {query}')
print(f'response: {response}')

query = '距离最远的城市是哪？'
gen = inference_stream(model, template, query, history)
print_idx = 0
print(f'query: {query}\\nresponse: ', end='')
for response, history in gen:
    delta = response[print_idx:]
    print(delta, end='', flush=True)
    print_idx = len(response)
print()
print(f'history: {history}')
"""


@pytest.fixture
def served(hd: Any) -> Iterator[Callable[[str], str]]:
    """``served("square.png")`` is the address of a picture of the set."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(hd.root / "media"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield lambda name: f"http://127.0.0.1:{server.server_port}/{name}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("family", "model_type"),
    [
        ("internlm-xcomposer2", "internlm_xcomposer2_7b_chat"),
        ("internlm-xcomposer2/variant_4khd", "internlm_xcomposer2_4khd_7b_chat"),
    ],
)
def test_the_script_of_the_guide_runs(
    family: str, model_type: str, xcomposer: Any, served: Callable[[str], str]
) -> None:
    url, folder = served("square.png"), xcomposer(family).checkpoint
    out, names = io.StringIO(), {"URL": url, "FOLDER": folder}
    with contextlib.redirect_stdout(out):
        exec(GUIDE.replace("MODEL_TYPE", model_type), names)
    first, second = names["history"]
    assert first[0] == f"<img>{url}</img>距离各城市多远？"
    assert second == ["距离最远的城市是哪？", names["response"]]
    assert out.getvalue().endswith(f"response: {second[1]}\nhistory: {names['history']}\n")
