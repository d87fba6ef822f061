"""API keys: several, from options and files, compared as a whole, and asked for everywhere but at /health."""

import openai
import pytest

from mmtool.errors import MMToolError
from mmtool.serve.auth import Keys, read_keys


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/nothing"])
def test_without_a_key_only_health_answers(serving, path):
    with serving(api_keys=("one", "two")) as server:
        assert server.http.get("/health").status_code == 200
        response = server.http.get(path)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            assert server.http.get(path, headers=headers).status_code != 401


def test_the_client_raises_for_a_wrong_key(serving):
    with serving(api_keys=("one",)) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
        assert server.client(api_key="one").models.list().data[0].id == "tiny"


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "Bearer \udcff", "Bearer é"],
)
def test_what_is_no_key(given):
    assert not Keys(["one", "two"]).accepts(given)


def test_what_is_a_key():
    keys = Keys(["one", "two"])
    assert keys.accepts("Bearer one") and keys.accepts("bearer two")
    assert Keys([]).accepts(None)


def test_keys_come_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nfirst\n\n  second  \n", encoding="utf-8")
    assert read_keys(["zero"], str(path)) == ("zero", "first", "second")


@pytest.mark.parametrize("text", ["", "\n# only a comment\n"])
def test_a_file_without_keys_does_not_open_the_server(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MMToolError, match="no keys"):
        read_keys([], str(path))
    with pytest.raises(MMToolError, match="cannot read"):
        read_keys([], str(tmp_path / "absent"))


@pytest.mark.parametrize("value", ["", "  "])
def test_a_variable_without_keys_does_not_open_the_server(monkeypatch, value):
    monkeypatch.setenv("MMTOOL_API_KEY", value)
    with pytest.raises(MMToolError, match="MMTOOL_API_KEY is set, but has no keys"):
        read_keys([], None)
    assert read_keys(["a"], None) == ("a",)


@pytest.mark.parametrize("key", ["", "a b", "ä", "a\n"])
def test_a_key_that_no_header_can_hold_is_refused(key):
    with pytest.raises(MMToolError):
        read_keys([key], None)


def test_cors_is_off_unless_given(serving):
    headers = {"origin": "https://chat.example.com", "access-control-request-method": "POST"}
    with serving(api_keys=("one",)) as server:
        response = server.http.options("/v1/chat/completions", headers=headers)
        assert response.status_code in (401, 405)
        assert "access-control-allow-origin" not in response.headers
    with serving(api_keys=("one",), cors_origins=("https://chat.example.com",)) as server:
        asked = {**headers, "access-control-request-headers": "authorization,content-type,x-stainless-lang"}
        response = server.http.options("/v1/chat/completions", headers=asked)
        assert response.status_code == 200, "clients in a browser send headers of their own"
        assert response.headers["access-control-allow-origin"] == "https://chat.example.com"
        other = server.http.options("/v1/chat/completions", headers={**headers, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
