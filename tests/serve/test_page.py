"""What the chat page sends to the model for what it shows; the page itself is tested in a browser."""

import asyncio

import pytest

from mmtool.serve.errors import ApiError
from mmtool.serve.ui import NOT_ANSWERED, answer, conversation


@pytest.fixture
def picture(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    return path


def turn(role, content, **metadata):
    return {"role": role, "content": [content if isinstance(content, dict) else text(content)], "metadata": metadata}


def text(content):
    return {"type": "text", "text": content}


def file(path):
    return {"type": "file", "file": {"path": str(path)}}


URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}}


def test_files_and_text_of_a_turn_are_one_message(picture):
    history = [turn("user", file(picture)), turn("user", "What is it?"), turn("assistant", "A star.")]
    assert conversation({"text": "Sure?", "files": [str(picture)]}, history, "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [URL, text("What is it?")]},
        {"role": "assistant", "content": [text("A star.")]},
        {"role": "user", "content": [URL, text("Sure?")]},
    ]


def test_a_question_without_an_answer_goes_with_the_next_one():
    history = [turn("user", "Hello")]  # stopped before its first word
    assert conversation({"text": "Are you there?"}, history, " ") == [
        {"role": "user", "content": [text("Hello"), text("Are you there?")]}
    ]


def test_what_was_refused_is_not_asked_again(picture):
    gone = picture.with_name("gone.png")
    history = [turn("user", "Hello"), turn("assistant", "Hi."), turn("user", file(gone)), turn("user", "What is it?")]
    history += [turn("assistant", "It cannot be opened.", title=NOT_ANSWERED)]
    assert [message["role"] for message in conversation({"text": "Bye"}, history, "")] == ["user", "assistant", "user"]


def test_a_file_that_is_gone_is_said(picture):
    with pytest.raises(ApiError, match="no longer there"):
        conversation({"text": "What is it?", "files": [str(picture.with_name("gone.png"))]}, [], "")


def test_only_uploads_are_read(picture, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "b.png"
    other.write_bytes(b"abc")
    with pytest.raises(ApiError, match="was not uploaded"):
        conversation({"text": "What is it?", "files": [str(other)]}, [], "")


def answers(server, text, **fields):
    async def collect():
        return [piece async for piece in answer(server.service, {"text": text}, [], "", fields)]

    return asyncio.run_coroutine_threadsafe(collect(), server.server._loop).result(30)


def test_an_answer_grows(server):
    pieces = answers(server, "Hello")
    assert pieces[-1] == "Hello! I am tiny. Show me a picture."
    assert all(pieces[-1].startswith(piece) for piece in pieces)
    assert server.service.metrics.completion_tokens >= 14


def test_why_there_is_no_answer_is_a_turn_of_its_own(server, monkeypatch, caplog):
    (turn,) = answers(server, "Hello " * 3000)
    assert turn["metadata"] == {"title": NOT_ANSWERED} and turn["content"].startswith("The prompt has")
    monkeypatch.setattr("mmtool.serve.ui.conversation", lambda *args: 1 / 0)
    (turn,) = answers(server, "Hello")
    assert turn["metadata"] == {"title": NOT_ANSWERED} and "its log says why" in turn["content"]
    assert "ZeroDivisionError" in caplog.text
