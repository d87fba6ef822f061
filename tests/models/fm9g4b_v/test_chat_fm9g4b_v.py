"""The release's own calls, after ``import mmtool`` alone."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from mmtool.errors import MMToolError, TooLongError

GREEDY = {"sampling": True, "do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


def turns(case):
    """Return a golden conversation as the release's users write it."""
    return [
        {
            "role": message["role"],
            "content": [
                Image.open(part["image"]) if part["type"] == "image" else part["text"] for part in message["content"]
            ],
        }
        for message in case.conversations[0]
    ]


@pytest.mark.parametrize("name", ["two_images_one_turn", "multi_turn_new_image", "text_only"])
def test_chat_answers_as_the_original(cases, model, tokenizer, name):
    case = next(cases(name))
    assert model.chat(image=None, msgs=turns(case), tokenizer=tokenizer, **GREEDY) == case.expected["generated_text"]


@pytest.mark.parametrize("name", ["option_no_image_id", "option_no_slicing"])
def test_chat_has_the_options_of_the_original(cases, model, tokenizer, name):
    case = next(cases(name))
    found = model.chat(None, turns(case), tokenizer, **GREEDY, **case.expected["options"])
    assert found == case.expected["generated_text"]


def test_a_picture_beside_the_messages_a_system_text_json_a_batch_and_a_stream(cases, model, tokenizer):
    case = next(cases("system_one_image"))
    system, question = turns(case)
    image, text = question["content"]
    msgs = json.dumps([{"role": "user", "content": text}])
    wanted = case.expected["generated_text"]
    settings = {"system_prompt": system["content"][0], **GREEDY}
    assert model.chat(image, msgs, tokenizer, **settings) == wanted
    assert "".join(model.chat(image, msgs, tokenizer, stream=True, **settings)) == wanted
    assert model.chat(None, [[question], [question]], tokenizer, **settings) == [wanted, wanted]


def test_calls_that_cannot_be_answered_are_refused(model, tokenizer):
    question = {"role": "user", "content": "x"}
    with pytest.raises(MMToolError, match="the role is 'system'"):
        model.chat(None, [{"role": "system", "content": "x"}, question], tokenizer)
    with pytest.raises(MMToolError, match="sampling"):
        model.chat(None, [question], tokenizer, stream=True, sampling=False)
    with pytest.raises(MMToolError, match="several"):
        model.chat(Image.new("RGB", (9, 9)), [[question]], tokenizer)
    with pytest.raises(TooLongError):
        model.chat(None, [question], tokenizer, max_inp_length=5)


PROGRAM = """
import sys, torch, mmtool
from PIL import Image
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained(sys.argv[1], attn_implementation='sdpa', torch_dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
image = Image.new('RGB', (90, 90))
msgs = [{'role': 'user', 'content': [image, 'What is this?']}]
answer = model.eval().chat(image=None, msgs=msgs, tokenizer=tokenizer, max_new_tokens=4)
assert isinstance(answer, str) and model.dtype == torch.bfloat16
print(type(model).__name__, type(AutoModel.from_config(model.config)).__name__)
"""


def test_the_one_liner_of_the_release_runs_without_its_code(checkpoint):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["FM9GVForConditionalGeneration", "FM9GVAutoModel"]
