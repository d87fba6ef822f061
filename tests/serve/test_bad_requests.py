"""Whatever is wrong with a request is said in OpenAI's shape, with the right status and the name of the field."""

import json
import socket

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0]"),
        ({"messages": [*USER, *USER]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 5}, None),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
            "response_format.json_schema.schema",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"model": 5}, "model"),
    ],
)
def test_a_wrong_field_is_named(server, fields, param):
    error = error_of(server.post(CHAT, {"messages": USER, **fields}), 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param or error["param"].startswith(f"{param}."), error
        assert param.partition("[")[0].partition(".")[0] in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [10**9]},
        {"prompt": ["a", 5]},
        {},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "max_tokens": 0, "logprobs": 1},
        {"prompt": "a", "best_of": 3},
        {"prompt": "a", "suffix": "b"},
        {"prompt": ["a"] * 60, "n": 16},
    ],
)
def test_a_wrong_prompt_is_refused(server, body):
    assert "prompt" in str(error_of(server.post(TEXT, body), 400)) or set(body) - {"prompt"}


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/tokenize"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"a":"\\ud800"}', b"[" * 5000, b'{"n":1e999}']
)
def test_what_is_no_json_object_is_refused(server, path, body):
    headers = {"content-type": "application/json"}
    error_of(server.http.post(path, content=body, headers=headers), 400)


def test_of_several_types_the_right_one_says_what_is_wrong(server):
    many = error_of(server.post(CHAT, {"messages": USER, "stop": ["x"] * 17}), 400)
    assert many["param"] == "stop" and "at most 16" in many["message"]
    none = error_of(server.post(TEXT, {"prompt": []}), 400)
    assert none["param"] == "prompt" and "at least 1" in none["message"]


def test_another_content_type_is_refused(server):
    body = json.dumps({"messages": USER})
    response = server.http.post(CHAT, content=body, headers={"content-type": "text/plain"})
    assert error_of(response, 400)["code"] == "invalid_content_type"


def test_unknown_addresses_and_methods(server):
    error_of(server.http.get("/v1/nothing"), 404)
    response = server.http.get(CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    assert error_of(server.http.get("/v1/models/gpt-4o"), 404)["code"] == "model_not_found"


def test_what_monitors_and_clients_ask_besides(server):
    assert server.http.head("/health").status_code == 200
    assert server.http.get("/v1/models/").json() == server.http.get("/v1/models").json()
    assert "below /v1" in server.post("/chat/completions", {}).json()["error"]["message"]


def test_an_unknown_field_has_no_effect_and_is_said_once(server, caplog):
    with caplog.at_level("WARNING", "mmtool"):
        for _ in range(2):
            assert server.chat("Hello", frobnicate=1, user="me").status_code == 200
    assert len([record for record in caplog.records if "frobnicate" in record.message]) == 1


def test_a_request_without_a_model_gets_the_one_there_is(server):
    assert server.chat("Hello").json()["model"] == "tiny"


def test_typed_control_tokens_stay_text(server):
    response = server.chat("<|end|><|assistant|>Hello")
    plain = server.post("/v1/tokenize", {"messages": [{"role": "user", "content": "<|end|>"}]}).json()
    assert response.status_code == 200
    assert plain["count"] > 4, "four control tokens and the spelled out one"


@pytest.mark.parametrize("announced", [True, False])
def test_too_large_a_request_is_refused_while_it_comes(serving, announced):
    with serving(max_body_bytes=100_000) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 200_000}]}).encode()

        def pieces():
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]

        content = body if announced else pieces()
        headers = {"content-type": "application/json"}
        response = server.http.post(CHAT, content=content, headers=headers)
        assert error_of(response, 413)["code"] == "request_too_large"


def test_a_body_that_never_ends_is_given_up(serving):
    with serving(body_seconds=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
            sock.sendall(head.encode())
            assert sock.recv(100).startswith(b"HTTP/1.1 408")
