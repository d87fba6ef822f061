"""SmolVLM, whose processor asks for a package that nothing else here needs."""

import importlib.util

import pytest

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.errors import MMToolError
from mmtool.loader import load_processor, open_folder

INSTALLED = importlib.util.find_spec("num2words") is not None


@pytest.mark.skipif(INSTALLED, reason="num2words is installed")
def test_without_the_package_the_error_says_what_to_install(checkpoint):
    spec, folder = open_folder(None, checkpoint("smolvlm"))
    with pytest.raises(MMToolError, match="num2words") as error:
        load_processor(spec, folder)
    assert error.value.hint == "pip install 'mmtool[smolvlm]'"


@pytest.mark.skipif(not INSTALLED, reason="needs num2words")
def test_prompts_and_answers_are_those_of_transformers(opened, conversations):
    known = opened("smolvlm")
    for name, messages in conversations(known).items():
        native = known.native(messages)
        encoded = known.template.encode(messages)
        assert encoded["input_ids"] == native["input_ids"][0].tolist(), name
        engine = create_engine(known.model, known.processor)
        answer = engine.answer(request_from(known.template, messages, Sampling(max_new_tokens=6)))
        assert answer.token_ids == known.generated(messages, 6), name
