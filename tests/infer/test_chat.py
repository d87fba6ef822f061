"""The chat in this process, its lines from a pipe; what a terminal adds is in test_terminal.py."""

import dataclasses
import functools
import http.server
import io
import json
import sys
import threading
from pathlib import Path

import PIL.Image
import pytest

from mmtool.infer.chat import RULE, Chat, find_command, media_source, run_chat
from mmtool.infer.terminal import Terminal, accept_any_text


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """Chat in lines of text or bytes; returns what stdout and stderr say."""

    def run(*lines, model=model, **options):
        type_lines(monkeypatch, *lines)
        run_chat(model, Terminal(), **options)
        return capsys.readouterr()

    return run


@pytest.fixture
def converse(talk):
    """Chat in lines; returns the answers, and what stderr says."""

    def run(*lines, **options):
        out, err = talk(*lines, **options)
        *answers, rest = ("\n" + out).split(f"\n{RULE}\n")
        assert rest.strip() == ""
        return [answer.removeprefix("\n") for answer in answers], err

    return run


def type_lines(monkeypatch, *lines):
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    accept_any_text()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a picture.png"
    PIL.Image.new("RGB", (60, 40), "red").save(path)
    return str(path)


def answers_of(model, *messages):
    """What the engine says to the questions, one conversation, as the chat should ask it."""
    asked, answers = [], []
    for content in messages:
        asked.append({"role": "user", "content": content})
        answers.append(model.engine.answer(model.request(asked)).text)
        asked.append({"role": "assistant", "content": answers[-1]})
    return answers


def image(path):
    return {"type": "image", "image": path}


def text(text):
    return {"type": "text", "text": text}


def test_a_script_gets_its_answers_and_nothing_else_on_stdout(converse, model, picture):
    answers, err = converse("how many shapes?", picture, "and now?", "", "quit", "never asked")
    assert answers == answers_of(model, [image(picture), text("how many shapes?")], "and now?")
    assert "<<<" not in err


def test_without_streaming_the_answer_is_the_same(converse, picture):
    lines = ("how many shapes?", picture, "and now?", "")
    assert converse(*lines, stream=False) == converse(*lines)


def test_the_second_turn_runs_no_tower_and_computes_the_first_no_more(converse, model, picture):
    prompt = len(model.request([{"role": "user", "content": [image(picture), text("how many shapes?")]}]).input_ids)
    converse("how many shapes?", picture)
    before = dataclasses.replace(model.engine.stats)
    converse("how many shapes?", picture, "and now?", "")
    assert model.engine.stats.vision_runs == before.vision_runs
    assert (
        model.engine.stats.cached_tokens - before.cached_tokens >= 2 * prompt - 1
    )  # the last position gives the answer


@pytest.fixture
def server(picture):
    """A picture's URL, and the list of what was asked of the server."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(Path(picture).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a%20picture.png", asked
        server.shutdown()


def test_a_picture_from_a_url_is_fetched_once(converse, picture, server):
    url, asked = server
    assert converse("one", url, "two", "", "three", "")[0] == converse("one", picture, "two", "", "three", "")[0]
    assert len(asked) == 1


def test_models_with_inline_media_find_them_in_the_text(converse, model, picture):
    inline = dataclasses.replace(model, spec=dataclasses.replace(model.spec, media_style="inline"))
    asked = f"what is <img>{picture}</img>?", "<img>missing.png</img> and?", "and now?"
    answers, err = converse(*asked, model=inline)
    assert answers == answers_of(model, [text("what is "), image(picture), text("?")], "and now?")
    (error,) = err.splitlines()
    assert error.startswith("error: cannot open image 'missing.png'")
    assert converse(f"<img>{picture}", model=inline)[1] == "(<img> lacks its other half, so it is text to the model)\n"


def test_models_of_text_are_not_asked_for_pictures(converse, model):
    plain = dataclasses.replace(model, spec=dataclasses.replace(model.spec, media_style="none"))
    answers, err = converse("one", "<img>x</img>", model=plain)
    assert answers == answers_of(model, "one", "<img>x</img>")
    assert err == "(yi-vl-6b-chat does not look for media in the text: the tags are text to it)\n"


def test_a_picture_is_opened_once_and_may_be_gone_in_the_next_turn(converse, model, picture, monkeypatch, capsys):
    expected, _ = converse("one", picture, "two", "")
    type_lines(monkeypatch, "one", picture, "two", "")
    chat = Chat(model, Terminal())
    chat.take_turn()
    Path(picture).unlink()
    chat.take_turn()
    assert [message.text for message in chat.turns[1::2]] == expected
    capsys.readouterr()


@pytest.mark.parametrize(
    "bad", ["missing.png", "http://127.0.0.1:9/dead.png", "https://", "data:image/png;base64,AAAA", "\0"]
)
def test_a_bad_picture_costs_one_line_and_is_asked_for_again(converse, model, picture, bad):
    answers, err = converse("one", "", "two", bad, picture, "three", "")
    assert answers == answers_of(model, "one", [image(picture), text("two")], "three")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: cannot open image")


def test_a_broken_picture_may_be_left_out(converse, model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    answers, err = converse("one", str(broken), "")
    assert answers == answers_of(model, "one")
    assert "broken.png" in err


def test_input_that_ends_at_the_picture_means_none(converse, model):
    assert converse("one")[0] == answers_of(model, "one")


def test_input_that_ends_after_a_bad_picture_drops_the_question(converse):
    answers, err = converse("one", "missing.png")
    assert answers == []
    assert "missing.png" in err


def test_a_command_in_place_of_a_picture_is_obeyed(converse, model):
    assert converse("one", "quit", "two", "")[0] == []
    assert converse("one", "", "two", "clear", "one", "")[0] == answers_of(model, "one") * 2


def test_clear_forgets_the_conversation_but_not_the_features(converse, model, picture):
    expected, _ = converse("one", picture)
    runs = model.engine.stats.vision_runs
    answers, _ = converse("one", picture, "clear", "one", picture, "CLEAR", "one", picture)
    assert answers == expected * 3
    assert model.engine.stats.vision_runs == runs


def test_reset_system_takes_the_next_line_and_starts_anew(converse, model):
    default = answers_of(model, "one")
    with_system = [
        model.engine.answer(
            model.request([{"role": "system", "content": "Be a pirate."}, {"role": "user", "content": "one"}])
        ).text
    ]
    answers, _ = converse("two", "", "reset-system", "Be a pirate.", "one", "", "reset-system", "", "one", "")
    assert answers[1:] == with_system + default
    assert converse("one", "", system="Be a pirate.")[0] == with_system
    assert converse("reset-system", " ", "one", "", system="Be a pirate.")[0] == default


def test_an_empty_system_text_on_the_command_line_means_none(converse, model):
    nothing = [{"role": "system", "content": ""}, {"role": "user", "content": "one"}]
    assert converse("one", "", system="")[0] == [model.engine.answer(model.request(nothing)).text]


def test_multi_line_questions_end_with_a_hash(converse, model):
    lines = ("multi-line", "first", "  second", "", "third#", "", "single-line", "one", "")
    assert converse(*lines)[0] == answers_of(model, "first\n  second\n\nthird", "one")
    assert converse("multi-line", "first", "#", "", "single-line#", "one", "")[0] == answers_of(model, "first", "one")
    assert converse("multi-line", "first", "second")[0] == answers_of(model, "first\nsecond")


def test_blank_lines_are_no_questions(converse):
    assert converse("", "   ", "\t")[0] == []


def test_bytes_that_are_no_utf8_do_not_end_the_chat(converse):
    answers, _ = converse(b"\xff\xfe what", b"\xc3", b"", b"\x00\x1b[A", b"")
    assert len(answers) == 2


def test_retry_and_undo_go_back_one_turn(converse, model):
    one, two = answers_of(model, "one", "two")
    assert converse("one", "", "/retry", "two", "")[0] == [one, one, two]
    assert converse("one", "", "three", "", "/undo", "two", "")[0][2] == two
    assert "no question yet" in converse("/retry")[1]
    assert "no question yet" in converse("/undo")[1]


def test_a_saved_conversation_is_a_row_of_messages(converse, picture, tmp_path, monkeypatch):
    path = tmp_path / "my chats.jsonl"
    answers, _ = converse("reset-system", "Be brief.", "one 中", picture, f"/save {path}", "two", "", f"/save '{path}'")
    first, second = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(picture), text("one 中")]},
        {"role": "assistant", "content": answers[0]},
    ]
    assert second["messages"][:3] == first["messages"]
    assert len(second["messages"]) == 5
    monkeypatch.chdir(tmp_path)  # a name in this folder is another one in the folder of the file
    (tmp_path / "sub").mkdir()
    converse("one", Path(picture).name, "/save sub/chats.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "sub" / "chats.jsonl").read_text("utf-8").splitlines()]
    assert row["messages"][0]["content"][0] == image(picture)
    assert "error: cannot write" in converse("one", "", f"/save {tmp_path}")[1]


def test_a_conversation_that_is_too_long_is_told_with_its_counts(converse, model):
    limit = len(model.request([{"role": "user", "content": "one"}]).input_ids) + 20
    model = dataclasses.replace(model, template=limited(model.template, limit))
    answers, err = converse("one", "", "long " * 50, "", "one", "", "clear", "one", "", model=model)
    assert answers == answers_of(model, "one") * 2
    assert str(limit) in err
    assert "clear" in err


def limited(template, max_length):
    return type(template)(template.processor, max_length=max_length)


@pytest.mark.parametrize("word", ["--help", "help", "-h", "/help"])
def test_help_lists_every_command(talk, word):
    out, _ = talk(word)
    for command in (
        "clear",
        "reset-system",
        "multi-line",
        "single-line",
        "quit",
        "exit",
        "/retry",
        "/undo",
        "/save",
        "Ctrl-C",
    ):
        assert command in out


def test_unknown_slash_commands_are_not_sent_to_the_model(converse):
    answers, err = converse("/rety")
    assert answers == []
    assert "unknown command /rety" in err


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("clear", ("clear", "")),
        ("  Clear ", ("clear", "")),
        ("/clear", ("clear", "")),
        ("single-line#", ("single-line", "")),
        ("/save my file.jsonl", ("/save", "my file.jsonl")),
        ("--help", ("--help", "")),
        ("retry", None),
        ("clear the table", None),
        ("exit the building", None),
        ("", None),
    ],
)
def test_commands_are_whole_lines(line, command):
    assert find_command(line) == command


def test_media_may_be_typed_pasted_or_dragged(tmp_path):
    path = tmp_path / "it's a [red] picture.png"
    path.touch()
    quoted = str(path).replace("'", "'\\''")
    escaped = str(path).replace(" ", "\\ ").replace("'", "\\'").replace("[", "\\[").replace("]", "\\]")
    for line in (
        f"{path}",
        f"  {path} \r",
        f'"{path}"',
        f"'{quoted}' ",
        f"'{path}'",
        escaped + " ",
        f"<img>{path}</img>",
    ):
        assert media_source(line) == str(path), line
    assert media_source("") == media_source("  ") == media_source("''") == ""
    assert media_source("https://host/a b.png?x='y'") == "https://host/a b.png?x='y'"
    assert media_source("C:\\pictures\\a.png") == "C:\\pictures\\a.png"
    assert media_source("'") == "'"
