"""Requests made at random from the server's own OpenAPI document, right ones and damaged ones: never a 500."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
TEXT = st.text(max_size=40) | st.sampled_from(["Hello", "<|end|>", "<|image|>", "\x00", "{}", "﷽" * 50, "\n\n"])
WORDS = st.sampled_from(["text", "image_url", "input_audio", "audio_url", "url", "data", "type", "json_schema", "auto"])
URLS = st.sampled_from(
    [
        "data:image/png;base64,iVBORw0KGgo=",
        "data:,",
        "data:image/png;base64," + "A" * 1000,
        "http://127.0.0.1:1/x.png",
        "https://[::1]:1/x.png",
        "https://localhost:1/x",
        "file:///etc/passwd",
        "https://",
        "https://[",
        "https://a b/",
        "https://\x00/",
    ]
)
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": URLS | TEXT})}),
    st.fixed_dictionaries({"type": st.just("input_audio"), "input_audio": st.fixed_dictionaries({"data": TEXT})}),
    st.dictionaries(WORDS, WORDS | ANYTHING, max_size=3),
    ANYTHING,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "assistant", "system", "tool", "developer"]) | ANYTHING},
        optional={
            "content": TEXT | st.lists(PARTS, max_size=3) | ANYTHING,
            "tool_calls": st.lists(ANYTHING, max_size=2),
            "tool_call_id": TEXT,
            "name": ANYTHING,
        },
    )
    | ANYTHING,
    max_size=4,
)
GOOD = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/tokenize": {"prompt": "Hello"},
}


def from_schema(schema):
    """Return a strategy for most of what a JSON schema allows, and some of what it does not."""
    if "anyOf" in schema:
        return st.one_of(*map(from_schema, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "integer":
        low, high = schema.get("minimum", -5), schema.get("maximum", schema.get("exclusiveMaximum", 40))
        return st.integers(low, min(high, max(low, 0) + 40))
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -3)), schema.get("maximum", 3)
        return st.floats(low, high, allow_nan=False)
    if kind == "string":
        return TEXT
    if kind == "array":
        return st.lists(from_schema(schema.get("items", {})), max_size=3)
    if kind == "object":
        values = (
            from_schema(schema["additionalProperties"])
            if schema.get("additionalProperties") not in (None, True)
            else ANYTHING
        )
        properties = {name: from_schema(inner) for name, inner in schema.get("properties", {}).items()}
        keys = TEXT | st.integers(0, 2000).map(str)
        return (
            st.fixed_dictionaries({}, optional=properties) if properties else st.dictionaries(keys, values, max_size=3)
        )
    return {"boolean": st.booleans(), "null": st.none()}.get(kind, ANYTHING)


@pytest.fixture(scope="module")
def schemas(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    return {path: paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"] for path in GOOD}


def check(server, path, content):
    response = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 413, 429), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["message"]
    elif not response.headers["content-type"].startswith("text/event-stream"):
        response.json()
    else:
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text


MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("path", GOOD)
def test_bodies_of_the_schema(server, schemas, path):
    properties = {
        name: MESSAGES if name == "messages" else from_schema(schema)
        for name, schema in schemas[path]["properties"].items()
        if name not in ("max_tokens", "model")
    }

    @MANY
    @given(st.fixed_dictionaries({}, optional=properties), st.booleans())
    def run(fields, whole):
        body = {**(GOOD[path] if whole else {}), "max_tokens": 2, **fields}
        check(server, path, json.dumps(body).encode())

    run()


@pytest.mark.parametrize("path", GOOD)
def test_good_bodies_with_one_field_of_the_schema(server, schemas, path):
    names = sorted(schemas[path]["properties"])

    @MANY
    @given(st.data())
    def run(data):
        name = data.draw(st.sampled_from(names))
        strategy = from_schema(schemas[path]["properties"][name])
        value = data.draw(MESSAGES if name == "messages" else strategy | ANYTHING)
        check(server, path, json.dumps({**GOOD[path], name: value}).encode())

    run()


@pytest.mark.parametrize("path", GOOD)
def test_bodies_that_are_damaged(server, path):
    good = json.dumps(GOOD[path]).encode()

    @MANY
    @given(st.integers(0, len(good)), st.binary(max_size=4), st.integers(0, 3))
    def run(at, inserted, removed):
        check(server, path, good[:at] + inserted + good[at + removed :])

    run()


def test_response_formats_and_tools(server):
    schema = st.recursive(
        st.fixed_dictionaries({"type": st.sampled_from(["object", "string", "integer", "array", "null", "wrong"])})
        | st.booleans()
        | ANYTHING,
        lambda inner: st.fixed_dictionaries(
            {},
            optional={
                "type": st.just("object"),
                "properties": st.dictionaries(st.text(max_size=5), inner, max_size=2),
                "items": inner,
                "anyOf": st.lists(inner, max_size=2),
                "pattern": st.text(max_size=10),
                "$ref": st.sampled_from(["#", "#/properties/a", "http://127.0.0.1:1/x", "file:///etc/passwd"]),
                "enum": st.lists(ANYTHING, max_size=2),
                "minimum": st.integers(),
            },
        ),
        max_leaves=5,
    )

    @MANY
    @given(schema, st.sampled_from([None, "auto", "required", "none", {"type": "function", "function": {"name": "f"}}]))
    def run(given_schema, choice):
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": given_schema}}
        body = {**GOOD["/v1/chat/completions"], "response_format": format_}
        check(server, "/v1/chat/completions", json.dumps(body).encode())
        tools = [{"type": "function", "function": {"name": "f", "parameters": given_schema}}]
        body = {**GOOD["/v1/chat/completions"], "tools": tools, "tool_choice": choice}
        check(server, "/v1/chat/completions", json.dumps(body).encode())

    run()


def test_the_server_is_well_after_all_of_that(server, idle):
    idle(server)
    assert server.http.get("/health").status_code == 200
    assert server.chat("Hello").json()["choices"][0]["message"]["content"] == "Hello! I am tiny. Show me a picture."
    text = server.http.get("/metrics").text
    assert 'status="500"' not in text
    assert all(math.isfinite(float(line.rsplit(" ", 1)[1])) for line in text.splitlines() if line[0] != "#")
