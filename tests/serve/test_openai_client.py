"""The official client of OpenAI against a real server: what it sends is understood, what it gets is what it expects."""

import json

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk


def ask(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_an_answer_has_the_shape_of_the_client(server):
    answer = server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    assert type(answer) is ChatCompletion
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello! I am tiny. Show me a picture."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_answer_in_pieces(server):
    client = server.client()
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert all(type(chunk) is ChatCompletionChunk for chunk in chunks)
    roles = [chunk.choices[0].delta.role for chunk in chunks if chunk.choices]
    assert roles[0] == "assistant" and not any(roles[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello! I am tiny. Show me a picture."
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "stop" and not any(reasons[:-1])
    assert not chunks[-1].choices and chunks[-1].usage.prompt_tokens == 4
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_says_its_usage_only_when_asked(server):
    chunks = list(server.client().chat.completions.create(model="tiny", messages=ask("Hello"), stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_a_picture_is_seen(server, data_uri):
    answer = server.client().chat.completions.create(
        model="tiny", messages=ask("How many shapes are there?", data_uri("shapes"))
    )
    assert answer.choices[0].message.content == "There are 3 shapes."
    assert answer.usage.prompt_tokens > 64


def test_a_second_turn_computes_neither_the_picture_nor_the_first_turn_again(serving, data_uri):
    with serving() as server:
        client = server.client()
        messages = ask("How many shapes are there?", data_uri("shapes"))
        first = client.chat.completions.create(model="tiny", messages=messages)
        messages += [{"role": "assistant", "content": first.choices[0].message.content}]
        messages += [{"role": "user", "content": "Describe the picture."}]
        second = client.chat.completions.create(model="tiny", messages=messages)
        cached = second.usage.prompt_tokens_details.cached_tokens
        # Everything up to the end of the first answer, but its last token, which was sampled and never fed.
        assert cached >= first.usage.prompt_tokens + first.usage.completion_tokens - 2
        assert server.worker.snapshot().engine.vision_runs == 1


def test_several_answers_to_one_question(server):
    answer = server.client().chat.completions.create(
        model="tiny", messages=ask("Hello"), n=3, temperature=1.5, seed=1, max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.prompt_tokens == 4
    again = server.client().chat.completions.create(
        model="tiny", messages=ask("Hello"), n=3, temperature=1.5, seed=1, max_tokens=8
    )
    assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in answer.choices]


def test_several_answers_in_one_stream(server):
    stream = server.client().chat.completions.create(model="tiny", messages=ask("Hello"), n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello! I am tiny. Show me a picture."] * 2


def test_a_stop_text_is_cut_and_not_shown(server):
    answer = server.client().chat.completions.create(model="tiny", messages=ask("Hello"), stop=[" tiny."])
    assert answer.choices[0].message.content == "Hello! I am"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_length_can_be_limited(server, name):
    answer = server.client().chat.completions.create(model="tiny", messages=ask("Hello"), **{name: 3})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_a_length_beyond_the_context_is_cut_to_it(server):
    answer = server.client().chat.completions.create(model="tiny", messages=ask("Hello"), max_tokens=10_000_000)
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(server):
    answer = server.client().chat.completions.create(model="tiny", messages=ask("Hello"), logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"


def test_log_probabilities_of_a_stream_are_those_of_the_whole(server):
    fields = {"model": "tiny", "messages": ask("Hello"), "logprobs": True, "max_tokens": 6}
    whole = server.client().chat.completions.create(**fields)
    streamed = []
    for chunk in server.client().chat.completions.create(**fields, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    expected = whole.choices[0].logprobs.content
    assert [token.token for token in streamed] == [token.token for token in expected]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in expected], abs=1e-4)


def test_a_bias_bans_a_token(server):
    client = server.client()
    hello = server.post("/v1/tokenize", {"prompt": "Hello"}).json()["tokens"][0]
    answer = client.chat.completions.create(
        model="tiny", messages=ask("Hello"), logit_bias={str(hello): -100}, max_tokens=4
    )
    assert not answer.choices[0].message.content.startswith("Hello")


def test_an_answer_keeps_to_a_json_schema(server):
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}, "colour": {"enum": ["red", "blue"]}},
        "required": ["count", "colour"],
        "additionalProperties": False,
    }
    answer = server.client().chat.completions.create(
        model="tiny",
        messages=ask("Hello"),
        response_format={"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    read = json.loads(answer.choices[0].message.content)
    assert 0 <= read["count"] <= 9 and read["colour"] in ("red", "blue") and len(read) == 2


def test_sampled_answers_keep_to_a_schema_too(server):
    schema = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 6}, "minItems": 2, "maxItems": 2}
    answer = server.client().chat.completions.create(
        model="tiny",
        messages=ask("Hello"),
        n=4,
        temperature=2.0,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "dice", "schema": schema}},
    )
    for choice in answer.choices:
        assert all(1 <= number <= 6 for number in json.loads(choice.message.content))


def test_any_json_object(server):
    answer = server.client().chat.completions.create(
        model="tiny", messages=ask("Hello"), response_format={"type": "json_object"}, max_tokens=60
    )
    assert answer.choices[0].message.content.startswith("{")


def test_a_weak_model_does_not_fill_its_answer_with_blanks(server, data_uri):
    shape = {
        "type": "object",
        "properties": {"kind": {"enum": ["star", "circle"]}, "colour": {"type": "string", "maxLength": 8}},
        "required": ["kind", "colour"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {
            "shapes": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"$ref": "#/$defs/shape"}},
            "total": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["shapes", "total"],
        "additionalProperties": False,
        "$defs": {"shape": shape},
    }
    answer = server.client().chat.completions.create(
        model="tiny",
        messages=ask("Describe the picture.", data_uri("shapes")),
        response_format={"type": "json_schema", "json_schema": {"name": "picture", "schema": schema}},
        max_tokens=200,
    )
    found = json.loads(answer.choices[0].message.content)
    assert 2 <= len(found["shapes"]) <= 3 and 1 <= found["total"] <= 9
    assert all(item["kind"] in ("star", "circle") and len(item["colour"]) <= 8 for item in found["shapes"])
    assert "  " not in answer.choices[0].message.content


def test_models_are_listed(server):
    models = server.client().models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"


def test_a_text_is_continued(server):
    answer = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=3, echo=True)
    assert answer.object == "text_completion"
    assert answer.choices[0].text.startswith("Hello") and len(answer.choices[0].text) > 5
    assert answer.usage.completion_tokens == 3


def test_an_echoed_prompt_has_log_probabilities(server):
    client, prompt = server.client(), "There are three"
    ids = server.post("/v1/tokenize", {"prompt": prompt}).json()["tokens"]
    fields = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 2}
    choice = client.completions.create(**fields, max_tokens=2).choices[0]
    tokens = choice.logprobs.tokens
    assert len(tokens) == len(ids) + 2
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs[1:])
    lengths = map(len, tokens)
    ends = [offset + length for offset, length in zip(choice.logprobs.text_offset, lengths, strict=True)]
    assert choice.logprobs.text_offset == [0, *ends[:-1]]
    assert choice.text.endswith("".join(tokens[len(ids) :]))
    # The same tokens as an answer are as likely.
    begun = client.completions.create(**fields | {"prompt": ids[:-1]}, max_tokens=1).choices[0]
    expected = choice.logprobs.token_logprobs[1 : len(ids) - 1]
    assert begun.logprobs.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-3)
    stream = [chunk.choices[0] for chunk in client.completions.create(**fields, max_tokens=2, stream=True)]
    assert "".join(part.text for part in stream) == choice.text
    assert [token for part in stream if part.logprobs for token in part.logprobs.tokens] == tokens


def test_a_prompt_can_be_scored_without_an_answer(server):
    client = server.client()
    fields = {"model": "tiny", "prompt": ["There are three", "Hello"], "echo": True, "logprobs": 0, "temperature": 0}
    answer = client.completions.create(**fields, max_tokens=0)
    with_one = client.completions.create(**fields, max_tokens=1)
    assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == with_one.usage.prompt_tokens
    for choice, longer, prompt in zip(answer.choices, with_one.choices, fields["prompt"], strict=True):
        assert (choice.text, choice.finish_reason) == (prompt, "length")
        assert choice.logprobs.tokens == longer.logprobs.tokens[:-1]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(longer.logprobs.token_logprobs[1:-1])
    echoed = client.completions.create(**fields | {"logprobs": None}, max_tokens=0, stream=True)
    assert {part.choices[0].index: part.choices[0].text for part in echoed} == dict(enumerate(fields["prompt"]))


def test_the_blank_before_a_continued_text_is_kept(server):
    fields = {"model": "tiny", "prompt": "There are three", "max_tokens": 8, "logprobs": 0}
    choice = server.client().completions.create(**fields).choices[0]
    assert choice.text.startswith(" ")
    assert "".join(choice.logprobs.tokens) == choice.text
    lengths = map(len, choice.logprobs.tokens)
    ends = [offset + length for offset, length in zip(choice.logprobs.text_offset, lengths, strict=True)]
    assert ends == [*choice.logprobs.text_offset[1:], len(choice.text)]
    stream = server.client().completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_completions_take_several_prompts_and_token_ids(server):
    ids = server.post("/v1/tokenize", {"prompt": "Hello"}).json()["tokens"]
    answer = server.client().completions.create(model="tiny", prompt=[ids, ids], max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 1
    assert answer.usage.prompt_tokens == 2 * len(ids)
    assert answer.usage.completion_tokens == 16


def test_a_continued_text_can_be_streamed(server):
    whole = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=5).choices[0].text
    stream = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_completion_log_probabilities(server):
    answer = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2]
    assert logprobs.text_offset[0] == 0


def test_errors_are_those_of_the_client(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=ask("Hello"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=ask("Hello " * 3000))
    assert long.value.code == "context_length_exceeded"
    assert "2048" in str(long.value)
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="tiny", messages=ask("Hello"), tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.code == "tools_not_supported"


def test_every_answer_has_a_number(server):
    answer = server.client().chat.completions.with_raw_response.create(model="tiny", messages=ask("Hello"))
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.parse()._request_id == answer.headers["x-request-id"]
