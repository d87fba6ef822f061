"""Messages from OpenAI-like dicts, from text with tags, and from swift 2.x calls."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtool.errors import MMToolError
from mmtool.messages import (
    Audio,
    Image,
    Message,
    Text,
    check_turns,
    conversation,
    split_inline_media,
    to_messages,
)


def user(content: object) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_string_content_becomes_one_text_part() -> None:
    assert to_messages(user("Hi")) == [Message("user", (Text("Hi"),))]
    assert to_messages(user("")) == [Message("user", (Text(""),))]


def test_message_objects_pass_through() -> None:
    message = Message("user", (Text("Hi"),))
    assert to_messages([message])[0] is message


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "text", "text": "a"}, Text("a")),
        ({"type": "image", "image": "a b.png"}, Image("a b.png")),
        ({"type": "image", "image": Path("a.png")}, Image(Path("a.png"))),
        ({"type": "image", "image": b"GIF"}, Image(b"GIF")),
        ({"type": "image", "image": bytearray(b"GIF")}, Image(b"GIF")),
        ({"type": "image", "image": {"bytes": b"GIF", "path": "x"}}, Image(b"GIF")),
        ({"type": "image", "image": {"bytes": None, "path": "x"}}, Image("x")),
        ({"type": "image_url", "image_url": {"url": "http://h/a.png", "detail": "low"}}, Image("http://h/a.png")),
        ({"type": "image_url", "image_url": "data:image/png;base64,AA=="}, Image("data:image/png;base64,AA==")),
        ({"type": "audio", "audio": "q.wav"}, Audio("q.wav")),
        ({"type": "audio_url", "audio_url": {"url": "http://h/q.wav"}}, Audio("http://h/q.wav")),
        ({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}, Audio(b"RIFF")),
        (Image("x.png"), Image("x.png")),
    ],
)
def test_parts_are_read(part: object, expected: object) -> None:
    assert to_messages(user([part]))[0].parts == (expected,)


def test_pil_images_are_kept_as_they_are() -> None:
    picture = PIL.Image.new("RGB", (2, 2))
    (message,) = to_messages(user([{"type": "image", "image": picture}, {"type": "text", "text": "?"}]))
    assert message.parts[0].source is picture
    assert message.text == "?"
    assert message.media == (message.parts[0],)


def test_loss_false_keeps_an_answer_out_of_training() -> None:
    answer = {"role": "assistant", "content": "A"}
    flags = [to_messages([answer | extra])[0].train for extra in ({}, {"loss": False}, {"loss": True}, {"loss": None})]
    assert flags == [True, False, True, True]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("Hello", "messages: expected a list of messages, got a string"),
        ({"role": "user", "content": "a"}, "messages: expected a list of messages, got an object"),
        (None, "messages: expected a list of messages, got null"),
        ([], "messages: the list is empty"),
        (["Hello"], "messages[0]: expected an object with role and content, got a string"),
        ([{"content": "a"}], "messages[0].role: is missing"),
        ([*user("a"), {"role": "bot", "content": "b"}], "messages[1].role: unknown role 'bot'"),
        ([{"role": ["user"], "content": "b"}], "messages[0].role: unknown role ['user']"),
        ([{"role": "user"}], "messages[0].content: is missing"),
        (user(None), "messages[0].content: is null"),
        (user(3), "messages[0].content: expected a string or a list of parts, got int"),
        (user([]), "messages[0].content: the list is empty"),
        (user(["a"]), "messages[0].content[0]: expected an object with a type, got a string"),
        (user([{"text": "a"}]), "messages[0].content[0].type: is missing"),
        (user([{"type": "video", "video": "a"}]), "messages[0].content[0].type: unknown type 'video'"),
        (user([{"type": ["text"], "text": "a"}]), "messages[0].content[0].type: unknown type ['text']"),
        (user([{"type": "text"}]), "messages[0].content[0].text: is missing"),
        (user([{"type": "text", "text": 1}]), "messages[0].content[0].text: expected a string, got int"),
        (user([{"type": "image", "image_url": "a"}]), "messages[0].content[0].image: is missing"),
        (user([{"type": "image", "image": ""}]), "messages[0].content[0].image: is empty"),
        (user([{"type": "image", "image": 5}]), "messages[0].content[0].image: expected a path, a URL"),
        (
            user([{"type": "image_url", "image_url": {}}]),
            "messages[0].content[0].image_url.url: expected a URL, got null",
        ),
        (user([{"type": "image_url", "image_url": {"url": ""}}]), "messages[0].content[0].image_url.url: is empty"),
        (user([{"type": "input_audio", "input_audio": "A"}]), "messages[0].content[0].input_audio: expected an object"),
        (user([{"type": "input_audio", "input_audio": {"data": "A*"}}]), "content[0].input_audio.data: is not base64"),
        ([{"role": "assistant", "content": "a", "loss": "no"}], "messages[0].loss: expected true or false, got 'no'"),
    ],
)
def test_errors_name_the_message_and_the_field(data: object, place: str) -> None:
    with pytest.raises(MMToolError) as caught:
        to_messages(data)
    assert place in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", (Text(""),)),
        ("plain", (Text("plain"),)),
        ("<img>a b.png</img>", (Image("a b.png"),)),
        (
            "<img>http://h/a.png</img>and <img>c.png</img>?",
            (Image("http://h/a.png"), Text("and "), Image("c.png"), Text("?")),
        ),
        ("x<audio>q.wav</audio>", (Text("x"), Audio("q.wav"))),
        ("<img></img>", (Text("<img></img>"),)),
        ("<img></img> <img>a.png</img>", (Text("<img></img> "), Image("a.png"))),
        ("<img>a\nb</img>", (Text("<img>a\nb</img>"),)),
        ("<img>a\n<img>b</img>", (Text("<img>a\n"), Image("b"))),
        ("<img>a", (Text("<img>a"),)),
        ("<img>a</audio>", (Text("<img>a</audio>"),)),
        ("<video>a.mp4</video>", (Text("<video>a.mp4</video>"),)),
    ],
)
def test_inline_tags_become_parts_at_their_place(text: str, parts: tuple) -> None:
    assert split_inline_media(text) == parts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["<img>", "</img>", "a", " ", "\n", "<audio>", "</audio>"]), max_size=12))
def test_splitting_inline_tags_loses_nothing(pieces: list[str]) -> None:
    text = "".join(pieces)
    names = {Image: "img", Audio: "audio"}
    joined = ""
    for part in split_inline_media(text):
        joined += part.text if isinstance(part, Text) else f"<{names[type(part)]}>{part.source}</{names[type(part)]}>"
    assert joined == text


def test_a_call_becomes_messages() -> None:
    messages = conversation("And now?", [["What?", "A cup."], ("Colour?", "Blue.")], system="Be brief.")
    assert [(message.role, message.text) for message in messages] == [
        ("system", "Be brief."),
        ("user", "What?"),
        ("assistant", "A cup."),
        ("user", "Colour?"),
        ("assistant", "Blue."),
        ("user", "And now?"),
    ]


def test_no_system_text_and_an_empty_one_differ() -> None:
    assert [message.role for message in conversation("q")] == ["user"]
    assert conversation("q", system="")[0] == Message("system", (Text(""),))


@pytest.mark.parametrize(
    ("images", "pictures"),
    [
        (["a", None, "c"], [["a"], [], ["c"]]),
        (["a", "", "c"], [["a"], [], ["c"]]),
        (["a"], [["a"], [], []]),
        (["a", "b"], [["a"], ["b"], []]),
        ("a", [["a"], [], []]),
        ((), [[], [], []]),
        (None, [[], [], []]),
    ],
)
def test_one_picture_per_round_goes_to_the_front(images: object, pictures: list) -> None:
    messages = conversation("q3", [["q1", "a1"], ["q2", "a2"]], images=images)
    rounds = [message for message in messages if message.role == "user"]
    assert [[part.source for part in message.media] for message in rounds] == pictures
    assert [message.parts[-1] for message in rounds] == [Text("q1"), Text("q2"), Text("q3")]


def test_more_pictures_than_rounds_is_an_error_with_both_numbers() -> None:
    with pytest.raises(MMToolError, match="images: 3 entries for 2 rounds"):
        conversation("q", [["a", "b"]], images=["1", "2", "3"])


def test_tags_stay_text_for_models_with_one_picture_per_round() -> None:
    assert conversation("<img>a</img>")[0].parts == (Text("<img>a</img>"),)


def test_tags_are_media_for_inline_models_in_query_and_history() -> None:
    messages = conversation("b <img>2</img>", [["<img>1</img>a", "c"]], media_style="inline")
    assert messages[0].parts == (Image("1"), Text("a"))
    assert messages[2].parts == (Text("b "), Image("2"))


def test_listed_pictures_of_inline_models_go_before_the_first_question() -> None:
    messages = conversation("b", [["a", "c"]], images=["1", None, "2"], media_style="inline")
    assert messages[0].parts == (Image("1"), Image("2"), Text("a"))
    with pytest.raises(MMToolError, match="beside <img> tags"):
        conversation("<img>x</img>", images=["1"], media_style="inline")


def test_text_models_refuse_pictures() -> None:
    assert len(conversation("q", images=[None, ""], media_style="none")) == 1
    with pytest.raises(MMToolError, match="takes text only"):
        conversation("q", images=["a"], media_style="none")


@pytest.mark.parametrize("history", [[["q"]], [["q", None]], ["qa"], "qa", [["q", "a", "b"]], {"q": "a"}])
def test_a_broken_history_is_an_error(history: object) -> None:
    with pytest.raises(MMToolError, match="history"):
        conversation("q", history)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(MMToolError, match="query: expected a string, got null"):
        conversation(None)
    with pytest.raises(MMToolError, match="system: expected a string"):
        conversation("q", system=1)
    with pytest.raises(MMToolError, match="images: expected a list, got int"):
        conversation("q", images=3)
    with pytest.raises(TypeError, match="are Text, Image and Audio objects, not 'Hi'"):
        Message("user", "Hi")
    with pytest.raises(MMToolError, match=r"images\[1\]: expected a path"):
        conversation("q", [["a", "b"]], images=["1", 2])


def turns(*roles: str) -> list[Message]:
    return [Message(role, (Text("x"),)) for role in roles]


def test_turns_alternate_and_end_where_they_should() -> None:
    check_turns(turns("user"))
    check_turns(turns("system", "user", "assistant", "user"))
    check_turns(turns("user", "assistant"), train=True)


@pytest.mark.parametrize(
    ("roles", "train", "problem"),
    [
        (("assistant", "user"), False, r"messages\[0\].role: expected user, got assistant"),
        (("user", "user"), False, r"messages\[1\].role: expected assistant, got user"),
        (("user", "assistant", "system", "user"), False, r"messages\[2\].role: expected user, got system"),
        (("system",), False, r"messages\[0\].role: the last message is the system's"),
        (("user", "assistant"), False, "the last message is the assistant's, not the user's"),
        (("user",), True, "the last message is the user's, not the assistant's"),
    ],
)
def test_wrong_turns_are_errors(roles: tuple, train: bool, problem: str) -> None:
    with pytest.raises(MMToolError, match=problem):
        check_turns(turns(*roles), train)
