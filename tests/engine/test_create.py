import subprocess
import sys

import pytest

from mmtool.engine.base import Request, Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.engine.pt import PtEngine
from mmtool.errors import MMToolError


@pytest.mark.parametrize("backend", ["AUTO", "pt"])
def test_backend(small, backend):
    engine = create_engine(small.model, small.tokenizer, backend, max_batch_size=3, max_model_len=100)
    assert isinstance(engine, PtEngine)
    assert (engine.max_batch_size, engine.max_model_len) == (3, 100)


def test_unknown_backend_is_an_error(small):
    with pytest.raises(MMToolError, match="vllm"):
        create_engine(small.model, small.tokenizer, "vllm")


def test_request_takes_what_the_template_says():
    class Template:
        stop_words, stop_token_ids, strip_answer = ("###",), (2,), False
        skip_special_tokens, penalize_prompt, hidden_token_ids = False, False, (7,)

        def encode(self, messages):
            return {"input_ids": [len(messages)], "media": []}

    sampling = Sampling(stop=("END", "###"))
    found = request_from(Template(), [{}, {}], sampling, id="x")
    assert isinstance(found, Request)
    assert (found.input_ids, found.media, found.sampling, found.id) == ([2], [], sampling, "x")
    assert (found.stop_words, found.stop_token_ids, found.strip) == (("###", "END"), (2,), False)
    assert (found.skip_special_tokens, found.penalize_prompt) == (False, False)
    assert found.hidden_token_ids == (7,)


def test_requests_can_be_made_without_torch():
    code = "import sys, mmtool.engine.base, mmtool.engine.create; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
