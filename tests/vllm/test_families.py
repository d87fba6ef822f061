"""Every family gives the same greedy token ids on vLLM as on the pt engine."""

from pathlib import Path

import pytest

from mmtool.engine.base import Sampling, request_from

EXAMPLES = Path(__file__).parents[2] / "examples" / "pictures"
TEXTS = ("Hello, how are you?", "What is the capital of France, and of Germany?")
PICTURES = (
    [["square.png", "What is it?"]],
    [["wide.png", "First."], ["tall.png", "And this?"]],
    [["square.png", "Describe it once more, please."]],
    [["large.png", "A large one."]],
)
SOUNDS = (
    [["short.wav", "What do you hear?"]],
    [["long.wav", "One."], ["short.wav", "Two."]],
    [["square.png", "short.wav", "Picture and sound."]],
)
TILED = ("internlm-xcomposer2/variant_4khd", "internlm-xcomposer2_5")
FAMILIES = [
    "tiny",
    "yi-vl",
    "megrez-3b-omni",
    "megrez-3b-instruct",
    "fm9g/gqa",
    "fm9g/mha",
    "fm9g/mla",
    "fm9g4b-v",
    "internlm-xcomposer2",
    "internlm-xcomposer2/variant_4khd",
    "internlm-xcomposer2_5",
]


def prompts(pair):
    if pair.name in TILED:  # tiles of the released size, however small the network is
        return [[TEXTS[0]], *PICTURES[:2]]
    asked = [[text] for text in TEXTS]
    if "image" in pair.template.modalities:
        asked += PICTURES
    if "audio" in pair.template.modalities:
        asked += SOUNDS
    return asked


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_equal_those_of_the_pt_engine(name, open_pair, start_vllm, deltas):
    pair = open_pair(name)
    requests = [pair.request(*turns, logprobs=2) for turns in prompts(pair)]
    expected = deltas(pair.pt, requests)
    engine = start_vllm(pair)
    found = deltas(engine, requests)
    for request, one, other in zip(requests, expected, found, strict=True):
        assert tokens(one) == tokens(other)
        assert text(one) == text(other)
        assert one[-1].finish_reason == other[-1].finish_reason == "length"
        assert other[-1].usage.prompt_tokens == len(request.input_ids)
        for ours, theirs in zip(logprobs(one), logprobs(other), strict=True):
            assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-4)
            assert [index for index, _ in theirs.top] == [index for index, _ in ours.top]
    # Once more from behind: what vLLM has kept of prompts and media changes nothing.
    again = deltas(engine, requests[::-1])[::-1]
    assert [tokens(one) for one in again] == [tokens(one) for one in expected]


def test_the_embedded_model_sees_what_is_in_a_picture(open_pair, start_vllm):
    pair = open_pair("tiny")
    content = [{"type": "image", "image": str(EXAMPLES / "circle.png")}, {"type": "text", "text": "What colour is it?"}]
    request = request_from(pair.template, [{"role": "user", "content": content}], Sampling(max_new_tokens=40))
    found, expected = start_vllm(pair).answer(request), pair.pt.answer(request)
    assert (found.text, found.finish_reason) == (expected.text, "stop")
    assert "red" in found.text.lower()


def tokens(deltas):
    return [token_id for delta in deltas for token_id in delta.token_ids]


def text(deltas):
    return "".join(delta.text for delta in deltas)


def logprobs(deltas):
    return [entry for delta in deltas for entry in delta.logprobs]
