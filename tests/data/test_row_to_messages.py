"""Every format: its examples, and the rules that its page states."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtool.data.formats import FORMATS, Conversation, detect_format, rename_columns, row_to_messages
from mmtool.errors import DataError
from mmtool.messages import Audio, Image, Text

IMAGES = Path("/nowhere")


def read(row: dict | str, folder: Path = IMAGES, format: str | None = None, **options: Any) -> Conversation:
    row = json.loads(row) if isinstance(row, str) else row
    return row_to_messages(row, format or detect_format(row), base_dir=folder, **options)


def told(conversation: Conversation, folder: Path = IMAGES) -> list[list[str]]:
    """Messages as [role, part, part, ..]; media as @name or #name, relative to the folder."""

    def tell(part: Text | Image | Audio) -> str:
        if isinstance(part, Text):
            return part.text
        source = part.source
        name = source.relative_to(folder).as_posix() if isinstance(source, Path) else repr(source)
        return ("@" if isinstance(part, Image) else "#") + name

    return [[message.role, *map(tell, message.parts)] for message in conversation.messages]


def error_of(row: dict | str, folder: Path = IMAGES, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(row, folder, **options)
    return str(caught.value)


EXAMPLES = [
    (
        '{"query": "What is on the table?", "response": "Two cups.", "images": ["a.png"]}',
        "swift",
        [["user", "@a.png", "What is on the table?"], ["assistant", "Two cups."]],
    ),
    (
        '{"query": "And now?", "response": "A spoon.", "history": [["What is it?", "A cup."], ["Colour?", "Blue."]], "images": ["a.png", "b.png", "c.png"]}',  # noqa: E501
        "swift",
        [
            ["user", "@a.png", "What is it?"],
            ["assistant", "A cup."],
            ["user", "@b.png", "Colour?"],
            ["assistant", "Blue."],
            ["user", "@c.png", "And now?"],
            ["assistant", "A spoon."],
        ],
    ),
    (
        '{"system": "Be brief.", "query": "<image>Compare with <image>", "response": "Darker.", "images": ["a.png", "b.png"]}',  # noqa: E501
        "swift",
        [["system", "Be brief."], ["user", "@a.png", "Compare with ", "@b.png"], ["assistant", "Darker."]],
    ),
    (
        '{"response": "Plain text for continued pre-training."}',
        "swift",
        [["assistant", "Plain text for continued pre-training."]],
    ),
    (
        """{"conversations": [
  {"from": "user", "value": "<img>pics/a.png</img><img>https://host/b.png</img>Which is older?"},
  {"from": "assistant", "value": "The first."},
  {"from": "user", "value": "And <img>pics/c.png</img>?"},
  {"from": "assistant", "value": "Newer."}]}""",
        "swift-conversations",
        [
            ["user", "@pics/a.png", "@'https://host/b.png'", "Which is older?"],
            ["assistant", "The first."],
            ["user", "And ", "@pics/c.png", "?"],
            ["assistant", "Newer."],
        ],
    ),
    (
        '{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}], "images": ["a.png"]}',  # noqa: E501
        "messages",
        [["system", "Be kind."], ["user", "@a.png", "What is it?"], ["assistant", "A cat."]],
    ),
    (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "image", "image": "b.png"}, {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}, {"role": "assistant", "content": "Done."}]}',  # noqa: E501
        "messages",
        [
            ["user", "Look: ", "@'data:image/png;base64,AAAA'", "@b.png", r"#b'\x00\x00\x00'"],
            ["assistant", "Done."],
        ],
    ),
    (
        '{"system": "Be brief.", "conversations": [{"from": "human", "value": "<image>Name it."}, {"from": "gpt", "value": "Cup."}], "images": ["a.png"]}',  # noqa: E501
        "sharegpt",
        [["system", "Be brief."], ["user", "@a.png", "Name it."], ["assistant", "Cup."]],
    ),
    (
        '{"system": "Be brief.", "conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Bye", "assistant": "See you"}]}',  # noqa: E501
        "sharegpt",
        [
            ["system", "Be brief."],
            ["user", "Hi"],
            ["assistant", "Hello"],
            ["user", "Bye"],
            ["assistant", "See you"],
        ],
    ),
    (
        '{"instruction": "Translate.", "input": "cat", "output": "chat", "system": "You translate.", "history": [["Hi", "Hello"]]}',  # noqa: E501
        "alpaca",
        [
            ["system", "You translate."],
            ["user", "Hi"],
            ["assistant", "Hello"],
            ["user", "Translate.\ncat"],
            ["assistant", "chat"],
        ],
    ),
    (
        '{"conversations": [{"role": "user", "content": {"text": "What is it?", "image": "images/a.jpg", "audio": "audios/q.wav"}}, {"role": "assistant", "content": {"text": "A cup."}}]}',  # noqa: E501
        "megrez",
        [["user", "@images/a.jpg", "#audios/q.wav", "What is it?"], ["assistant", "A cup."]],
    ),
    (
        """{"id": 0, "image": ["a.png", "b.png"], "conversations": [
  {"from": "human", "value": "Image1: <ImageHere>; Image2: <ImageHere>. Compare them."},
  {"from": "bot", "value": "B is darker."}]}""",
        "xcomposer",
        [
            ["user", "Image1: ", "@a.png", "; Image2: ", "@b.png", ". Compare them."],
            ["assistant", "B is darker."],
        ],
    ),
    (
        '{"id": "0", "image": "a.jpg", "conversations": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "A cup."}]}',  # noqa: E501
        "minicpm",
        [["user", "@a.jpg", "\nWhat is it?"], ["assistant", "A cup."]],
    ),
    (
        '{"id": "1", "image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}, "conversations": [{"role": "user", "content": "Compare <image_00> and <image_01>."}, {"role": "assistant", "content": "B is darker."}]}',  # noqa: E501
        "minicpm",
        [["user", "Compare \n", "@a.jpg", "\n and \n", "@b.jpg", "\n."], ["assistant", "B is darker."]],
    ),
    (
        '{"input": "<用户>Name a river.<AI>", "output": "The Yangtze."}',
        "fm9g",
        [["user", "<用户>Name a river.<AI>"], ["assistant", "The Yangtze."]],
    ),
    (
        '{"input": "", "output": "Running text for pre-training."}',
        "fm9g",
        [["assistant", "Running text for pre-training."]],
    ),
    (
        '{"prompt": "Human: ... Assistant:", "chosen": "..."}',
        "yi",
        [["user", "Human: ... Assistant:"], ["assistant", "..."]],
    ),
    (
        '{"id": "x1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cup."}, {"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "Blue."}]}',  # noqa: E501
        "llava",
        [
            ["user", "@a.jpg", "\nWhat is it?"],
            ["assistant", "A cup."],
            ["user", "Colour?"],
            ["assistant", "Blue."],
        ],
    ),
    ('{"text": "Running text."}', "text", [["assistant", "Running text."]]),
]


@pytest.mark.parametrize(("row", "format", "expected"), EXAMPLES)
def test_each_example_is_detected_and_read(folder: Path, row: str, format: str, expected: list) -> None:
    assert detect_format(json.loads(row)) == format
    conversation = read(row, folder)
    assert told(conversation, folder) == expected
    assert conversation.label == expected[-1][1]
    assert told(Conversation(tuple(conversation.prompt())), folder) == expected[:-1]
    assert not conversation.warnings


# swift query/response


def rounds(**columns: Any) -> dict:
    return {"query": "3", "response": "c", "history": [["1", "a"], ["2", "b"]], **columns}


def fronts(conversation: Conversation, folder: Path) -> list[list[str]]:
    """What stands in front of the question, per round."""
    return [message[1:-1] for message in told(conversation, folder) if message[0] == "user"]


@pytest.mark.parametrize(
    ("images", "style", "expected"),
    [
        (["a.png", "b.png", "c.png"], "round", [["@a.png"], ["@b.png"], ["@c.png"]]),
        (["a.png", "b.png", "c.png"], "inline", [["@a.png", "@b.png", "@c.png"], [], []]),
        (["a.png", None, ""], "round", [["@a.png"], [], []]),
        ([None, "b.png", None], "inline", [[], ["@b.png"], []]),  # a gap only means something in rounds
        ([None, None, "c.png"], "round", [[], [], ["@c.png"]]),
        (["a.png"], "round", [["@a.png"], [], []]),
        (["a.png", "b.png"], "round", [["@a.png", "@b.png"], [], []]),
        ("a.png", "round", [["@a.png"], [], []]),
        (None, "round", [[], [], []]),
        ([], "round", [[], [], []]),
        ([None], "round", [[], [], []]),
    ],
)
def test_swift_images_go_to_their_rounds_or_to_the_front(folder: Path, images: Any, style: str, expected: list) -> None:
    assert fronts(read(rounds(images=images), folder, media_style=style), folder) == expected


def test_swift_tags_switch_rounds_off(folder: Path) -> None:
    row = {"query": "<image>2", "response": "b", "history": [["1 <image>", "a"]], "images": ["a.png", "b.png"]}
    assert told(read(row, folder), folder) == [
        ["user", "1 ", "@a.png"],
        ["assistant", "a"],
        ["user", "@b.png", "2"],
        ["assistant", "b"],
    ]


def test_swift_images_without_a_tag_are_prepended_and_come_first(folder: Path) -> None:
    row = {"query": "See <image>", "response": "b", "images": ["a.png", "b.png"]}
    assert told(read(row, folder), folder)[0] == ["user", "@a.png", "See ", "@b.png"]


def test_swift_tags_in_answers_are_text(folder: Path) -> None:
    row = {"query": "Which tag?", "response": "Write <image>.", "images": ["a.png"]}
    assert told(read(row, folder), folder) == [["user", "@a.png", "Which tag?"], ["assistant", "Write <image>."]]


def test_swift_audio_and_images_mix(folder: Path) -> None:
    row = {"query": "Hear <audio>", "response": "b", "audios": "audios/q.wav", "image": "a.png"}
    assert told(read(row, folder), folder)[0] == ["user", "@a.png", "Hear ", "#audios/q.wav"]


@pytest.mark.parametrize(
    "history",
    ["[['1', 'a'], ['2', 'b']]", '[["1", "a"], ["2", "b"]]', [["1", "a"], ["2", "b"]], [("1", "a"), ("2", "b")]],
)
def test_history_may_be_a_string(history: Any) -> None:
    expected = [["user", "1"], ["assistant", "a"], ["user", "2"], ["assistant", "b"], ["user", "3"], ["assistant", "c"]]
    assert told(read(rounds(history=history))) == expected


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_history_may_be_absent(history: Any) -> None:
    assert told(read(rounds(history=history))) == [["user", "3"], ["assistant", "c"]]


def test_history_strings_run_no_code() -> None:
    assert error_of(rounds(history="[__import__('os').getcwd()]")).startswith("history: expected a list")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([["1"]], "history[0]: expected [query, response]"),
        ([["1", "a"], "2b"], "history[1]: expected [query, response]"),
        ([["1", None]], "history[0][1]: expected text, got None"),
        ({"1": "a"}, "history: expected a list"),
    ],
)
def test_bad_history_is_named(history: Any, message: str) -> None:
    assert message in error_of(rounds(history=history))


@pytest.mark.parametrize("query", ["query", "prompt", "input", "instruction", "question", "problem"])
@pytest.mark.parametrize(
    "response",
    ["response", "answer", "targets", "target", "answer_key", "answers", "solution", "text", "completion", "content"],
)
def test_swift_aliases(query: str, response: str) -> None:
    assert told(read({query: "q", response: "r", "system_prompt": "s"})) == [
        ["system", "s"],
        ["user", "q"],
        ["assistant", "r"],
    ]


def test_swift_takes_the_first_of_several_answers_and_numbers_as_text() -> None:
    assert read({"question": "2 + 2?", "answers": [4, 5]}).label == "4"
    assert read({"question": "?", "answers": []}).label is None


def test_a_row_with_a_question_only_has_no_label(folder: Path) -> None:
    conversation = read({"query": "What?", "images": ["a.png"], "response": None}, folder)
    assert conversation.label is None
    assert conversation.prompt() == list(conversation.messages)


def test_a_picture_with_an_answer_only_is_a_question_without_words(folder: Path) -> None:
    assert told(read({"images": ["a.png"], "response": "A cup."}, folder), folder) == [
        ["user", "@a.png"],
        ["assistant", "A cup."],
    ]


def test_a_gap_without_a_question_is_no_picture() -> None:
    assert told(read({"images": [None], "response": "Text."})) == [["assistant", "Text."]]


def test_other_keys_stay_in_extra() -> None:
    row = {"id": 3, "query": "q", "response": "r", "solution": "s", "history": None}
    assert read(row).extra == {"id": 3, "solution": "s"}


def test_a_second_question_key_is_a_warning() -> None:
    assert read({"query": "q", "question": "q2", "response": "r"}).warnings == (
        "'question' is not used, because the question is under 'query'",
    )


def test_a_tag_without_its_key_stays_text_with_a_warning() -> None:
    conversation = read({"query": "In HTML, <audio> plays", "response": "r"})
    assert told(conversation)[0] == ["user", "In HTML, <audio> plays"]
    assert conversation.warnings == ("<audio> stays text, because the row has no 'audios'",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "<image>?", "images": []}, "images: 1 <image> tag in the text for 0 entries"),
        ({"query": "<image>?", "images": None}, "images: 1 <image> tag in the text for 0 entries"),
        ({"query": "<image><image>", "image": "a.png"}, "image: 2 <image> tags in the text for 1 entry"),
        ({"query": "q", "images": ["a.png"], "image": "b.png"}, "image: given beside 'images'"),
        ({"query": "q", "images": ["a.png", None]}, "images[1]: is empty"),
        ({"query": "q", "images": [7]}, "images[0]: expected a path, a URL"),
        ({"query": "q", "images": 7}, "images: expected a path, a URL"),
        ({"query": ["q"]}, "query: expected text, got ['q']"),
        ({"query": True}, "query: expected text, got True"),
        ({"query": "", "response": None}, "the row has no question and no answer"),
        ({"query": "q", "response": {"a": 1}}, "response: expected text"),
    ],
)
def test_swift_errors_name_the_field(folder: Path, row: dict, message: str) -> None:
    assert message in error_of(row, folder)


# conversations with <img> tags


def inline(*values: str, **columns: Any) -> dict:
    roles = ("user", "assistant") * len(values)
    return {
        "conversations": [{"from": role, "value": value} for role, value in zip(roles, values, strict=False)],
        **columns,
    }


def test_inline_tags_anywhere_in_any_turn(folder: Path) -> None:
    row = inline("<img>a.png</img>", "Like <img>b.png</img> and <audio>audios/q.wav</audio>.")
    assert told(read(row, folder), folder) == [
        ["user", "@a.png"],
        ["assistant", "Like ", "@b.png", " and ", "#audios/q.wav", "."],
    ]


def test_empty_inline_tags_stay_text(folder: Path) -> None:
    row = inline("<img></img> is empty, <img>a.png</img> is not", "ok")
    assert told(read(row, folder), folder)[0] == ["user", "<img></img> is empty, ", "@a.png", " is not"]


def test_inline_tags_do_not_span_lines(folder: Path) -> None:
    conversation = read(inline("<img>a\n.png</img>", "ok"), folder, format="swift-conversations")
    assert told(conversation)[0] == ["user", "<img>a\n.png</img>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (inline("<img>no.png</img>", "ok"), "conversations[0].value: no such file 'no.png'"),
        (inline("<img>a.png</img>", "ok", images=["b.png"]), "images: given beside <img> or <audio> tags"),
        (inline("<video>a.mp4</video>", "ok"), "conversations[0].value: video is not supported"),
    ],
)
def test_inline_errors(folder: Path, row: dict, message: str) -> None:
    assert message in error_of(row, folder)


# messages


def chat(*contents: Any, **columns: Any) -> dict:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)], **columns}


def test_messages_tags_take_media_in_order(folder: Path) -> None:
    row = chat(
        "A <image>, B", "ok <image>", "C <audio>", "ok", images=["a.png", "b.png", "c.png"], audio="audios/q.wav"
    )
    assert told(read(row, folder), folder) == [
        ["user", "@a.png", "A ", "@b.png", ", B"],
        ["assistant", "ok ", "@c.png"],
        ["user", "C ", "#audios/q.wav"],
        ["assistant", "ok"],
    ]


def test_the_list_form_is_the_escape_for_a_literal_tag(folder: Path) -> None:
    row = chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is <image>?"}], "A tag.")
    assert told(read(row, folder), folder)[0] == ["user", "@a.png", "What is <image>?"]


def test_messages_take_arrow_media(folder: Path) -> None:
    parts = [
        {"type": "image", "image": {"path": "a.png", "bytes": None}},
        {"type": "image", "image": {"bytes": "AAAA"}},
    ]
    assert told(read(chat(parts), folder), folder) == [["user", "@a.png", r"@b'\x00\x00\x00'"]]
    row = chat("Look", "ok", images=[{"path": "gone.png", "bytes": b"xy"}])
    assert told(read(row, folder), folder)[0] == ["user", "@b'xy'", "Look"]


def test_messages_loss_switches_supervision() -> None:
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a", "loss": False}]}
    assert [message.train for message in read(row).messages] == [True, False]
    row["messages"][1]["loss"] = 0
    assert [message.train for message in read(row).messages] == [True, False]


def test_messages_may_use_from_and_value() -> None:
    row = {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert told(read(row)) == [["user", "Hi"], ["assistant", "Hello"]]


def test_a_system_message_beats_the_system_column() -> None:
    row = {"system": "no", "messages": [{"role": "system", "content": "yes"}, {"role": "user", "content": "Hi"}]}
    assert read(row).system == "yes"


def test_null_as_the_last_answer_is_no_answer() -> None:
    assert read(chat("Hi", None)).label is None


def test_a_lone_assistant_message_is_text_to_learn() -> None:
    conversation = read({"messages": [{"role": "assistant", "content": "Text."}]})
    assert (conversation.prompt(), conversation.label) == ([], "Text.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("<image>", "ok", images=["a.png"] * 0), "images: 1 <image> tag in the text for 0 entries"),
        (chat([{"type": "text", "text": "Hi"}], "ok", images=["a.png"]), "images: given beside content in parts"),
        (chat([{"type": "video", "video": "a.mp4"}], "ok"), "messages[0].content[0].type: unknown type 'video'"),
        (chat("Hi", "ok", [{"type": "image", "image": "no.png"}]), "messages[2].content[0]: no such file 'no.png'"),
        (chat("Hi", "ok", [{"type": "image"}]), "messages[2].content[0].image: is missing"),
        (chat([]), "messages[0].content: the list is empty"),
        (chat(None, "ok"), "messages[0].content: is null"),
        (chat("Hi", None, "Hi"), "messages[1].content: is null"),
        (chat({"text": "Hi"}), "messages[0].content: expected text"),
        ({"messages": []}, "messages: the list is empty"),
        ({"messages": "Hi"}, "messages: expected a list"),
        ({"messages": ["Hi"]}, "messages[0]: expected an object, got 'Hi'"),
        ({"messages": [{"role": "user"}]}, "messages[0]: has no content"),
        ({"messages": [{"content": "Hi"}]}, "messages[0]: has no role"),
        ({"messages": [{"role": "judge", "content": "Hi"}]}, "messages[0].role: unknown role 'judge'"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0]: tool calls (agent data) are not supported"),
        ({"messages": [{"role": "system", "content": "Hi"}]}, "the row has no question and no answer"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "tool_calls": [1], "content": None},
                ]
            },
            "messages[1]: tool calls (agent data) are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]},
            "messages[1].content: expected a turn of the assistant, got user",
        ),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": "no"}]},
            "messages[1].loss: expected true or false",
        ),
    ],
)
def test_messages_errors(folder: Path, row: dict, message: str) -> None:
    assert message in error_of(row, folder)


# ShareGPT and Alpaca


def test_sharegpt_wants_as_many_tags_as_media(folder: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ok"}], "images": ["a.png"]}
    assert error_of(row, folder) == "images: 0 <image> tags in the text for 1 entry"


def test_sharegpt_pairs_may_end_with_a_question() -> None:
    conversation = read({"conversation": [{"human": "1", "assistant": "a"}, {"human": "2"}]})
    assert told(conversation) == [["user", "1"], ["assistant", "a"], ["user", "2"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversation": [{"human": "1"}, {"human": "2"}]}, "conversation[0]: has no 'assistant'"),
        ({"conversation": [{"assistant": "1"}]}, "conversation[0]: has no 'human'"),
        ({"conversation": []}, "conversation: the list is empty"),
        (
            {"conversations": [{"from": "gpt", "value": "1"}, {"from": "human", "value": "2"}]},
            "conversations[0].value: expected a turn of the user, got assistant",
        ),
        ({"conversations": [{"from": "observation", "value": "1"}]}, "conversations[0]: tool calls"),
    ],
)
def test_sharegpt_errors(row: dict, message: str) -> None:
    assert message in error_of(row)


@pytest.mark.parametrize(
    ("instruction", "input", "query"), [("a", "b", "a\nb"), ("a", "", "a"), ("a", None, "a"), ("", "b", "b")]
)
def test_alpaca_joins_what_is_there(instruction: str, input: str | None, query: str) -> None:
    row = {"instruction": instruction, "input": input, "output": "c"}
    assert told(read(row)) == [["user", query], ["assistant", "c"]]


def test_alpaca_media_need_tags(folder: Path) -> None:
    row = {"instruction": "What is <image>?", "output": "A cup.", "images": ["a.png"]}
    assert told(read(row, folder), folder)[0] == ["user", "What is ", "@a.png", "?"]
    assert "0 <image> tags" in error_of(row | {"instruction": "What?"}, folder)


# Megrez


def megrez(**content: Any) -> dict:
    return {"conversations": [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"audio": "audios/q.wav", "text": "t", "image": ["a.png", "a.png"]},
            ["@a.png", "@a.png", "#audios/q.wav", "t"],
        ),
        ({"audio": None, "text": "t", "image": None}, ["t"]),
        ({"audio": "audios/q.wav"}, ["#audios/q.wav"]),
        ({}, [""]),
    ],
)
def test_megrez_order_is_images_audio_text(folder: Path, content: dict, expected: list) -> None:
    assert told(read(megrez(**content), folder), folder)[0] == ["user", *expected]


def test_megrez_may_start_with_a_system_message() -> None:
    row = megrez(text="Hi")
    row["conversations"].insert(0, {"role": "system", "content": "Be brief."})
    assert told(read(row))[0] == ["system", "Be brief."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (megrez(image="no.png"), "conversations[0].content.image: no such file 'no.png'"),
        (megrez(text="Hi", video="a.mp4"), "conversations[0].content.video: unknown key"),
        (megrez(text=["Hi"]), "conversations[0].content.text: expected text"),
        (megrez(text="Hi") | {"images": ["a.png"]}, "images: this format has no place for it"),
        (
            {"conversations": [{"role": "user", "content": "1"}, {"role": "assistant", "content": {"image": "a.png"}}]},
            "conversations[1].content: media in a turn of the assistant",
        ),
    ],
)
def test_megrez_errors(folder: Path, row: dict, message: str) -> None:
    assert message in error_of(row, folder)


# InternLM-XComposer


def xcomposer(*values: str, role: str = "bot", **columns: Any) -> dict:
    roles = ("human", role) * len(values)
    return {"conversations": [{"from": r, "value": v} for r, v in zip(roles, values, strict=False)], **columns}


def test_xcomposer_single_image_goes_first_and_values_are_stripped(folder: Path) -> None:
    assert told(read(xcomposer("  What? \n", " A cup. ", image="a.png"), folder), folder) == [
        ["user", "@a.png", "What?"],
        ["assistant", "A cup."],
    ]


def test_xcomposer_takes_any_other_role_for_the_assistant(folder: Path) -> None:
    row = xcomposer("<ImageHere>What?", "A cup.", role="InternLM", image="a.png")
    assert told(read(row, folder), folder)[1] == ["assistant", "A cup."]


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        ("<ImageHere>?", ["a.png", "b.png"], "image: 1 <ImageHere> tag in the text for 2 images"),
        ("<ImageHere><ImageHere>?", ["a.png"], "image: 2 <ImageHere> tags in the text for 1 image"),
        ("What?", ["a.png"], "image: 0 <ImageHere> tags in the text for 1 image"),
        ("<ImageHere>?", None, "image: 1 <ImageHere> tag in the text for 0 images"),
    ],
)
def test_xcomposer_counts_must_agree(folder: Path, text: str, image: Any, message: str) -> None:
    assert error_of(xcomposer(text, "ok", image=image), folder) == message


# MiniCPM-V and FM9G4B-V


def minicpm(image: Any, *contents: str) -> dict:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"conversations": turns, **({} if image is None else {"image": image})}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (minicpm("a.jpg", "What?", "ok"), [["@a.jpg", "\nWhat?"], ["ok"]]),
        (minicpm({"<image>": "a.jpg"}, "What?", "ok"), [["@a.jpg", "\nWhat?"], ["ok"]]),
        (minicpm({"path": "a.jpg"}, "What?", "ok"), [["@a.jpg", "\nWhat?"], ["ok"]]),
        (
            minicpm("a.jpg", "<image> <image>", "a <image>", "b <image>"),
            [["@a.jpg", " ", "@a.jpg"], ["a <image>"], ["b <image>"]],
        ),
        (minicpm({"<image_00>": "a.jpg"}, "<image_00>x", "y"), [["\n", "@a.jpg", "\nx"], ["y"]]),
        (minicpm({"<image_00>": "a.jpg"}, "x", "<image_00>"), [["x"], ["\n", "@a.jpg", "\n"]]),
        (minicpm({"<image_00>": "a.jpg"}, "<image_00><image_00>"), [["\n", "@a.jpg", "\n\n", "@a.jpg", "\n"]]),
        (minicpm("", "x", "y"), [["x"], ["y"]]),
    ],
)
def test_minicpm_places(folder: Path, row: dict, expected: list) -> None:
    conversation = read(row, folder)
    assert [message[1:] for message in told(conversation, folder)] == expected
    assert not conversation.warnings


def test_minicpm_text_order_counts_with_a_warning(folder: Path) -> None:
    conversation = read(minicpm({"<image_01>": "b.jpg", "<image_00>": "a.jpg"}, "<image_00><image_01>", "ok"), folder)
    assert [part.source.name for part in conversation.media] == ["a.jpg", "b.jpg"]
    assert "another order" in conversation.warnings[0]


def test_minicpm_records_may_be_text_only() -> None:
    assert told(read(minicpm(None, "Hi", "ok"), format="minicpm")) == [["user", "Hi"], ["assistant", "ok"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (minicpm({"<image_00>": "a.jpg"}, "<image_00><image_7>", "ok"), "<image_7> is not among the images"),
        (minicpm({"<image_00>": "a.jpg"}, "What?", "ok"), "image: <image_00> is not in the text"),
        (minicpm({"first": "a.jpg"}, "What?", "ok"), "image: the key 'first' is no tag"),
        (minicpm({"<image_00>": "no.jpg"}, "<image_00>", "ok"), "image['<image_00>']: no such file 'no.jpg'"),
        (minicpm(["a.jpg"], "What?", "ok"), "image: expected a path"),
        (
            {"image": "a.jpg", "conversations": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            "conversations[0].content: this format starts with the user",
        ),
    ],
)
def test_minicpm_errors(folder: Path, row: dict, message: str) -> None:
    assert message in error_of(row, folder)


# FM9G, Yi, text


@pytest.mark.parametrize(
    ("row", "raw"),
    [
        ({"input": "<用户>Hi<AI>", "output": "Hello"}, True),
        ({"input": "Hi", "output": "Hello"}, False),
        ({"input": "", "output": "Hello"}, False),
        ({"prompt": "Human: Hi Assistant:", "chosen": "Hello"}, True),
        ({"prompt": "", "chosen": "Hello"}, False),
    ],
)
def test_prompts_with_role_marks_are_raw(row: dict, raw: bool) -> None:
    assert read(row).raw is raw


def test_text_only_formats_refuse_media(folder: Path) -> None:
    row = {"input": "Hi", "output": "Hello", "images": ["a.png"]}
    assert error_of(row, folder, format="fm9g") == "images: this format has no place for it"
    assert told(read(row, folder), folder)[0] == ["user", "@a.png", "Hi"]  # detected as swift


# LLaVA


def llava(*values: str, **columns: Any) -> dict:
    roles = ("human", "gpt") * len(values)
    return {"conversations": [{"from": r, "value": v} for r, v in zip(roles, values, strict=False)], **columns}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" What <image>is it? ", ["@a.jpg", "\nWhat is it?"]),
        ("What?\n<image>", ["@a.jpg", "\nWhat?"]),
        ("<image_placeholder>\nWhat?", ["@a.jpg", "\nWhat?"]),
        ("<image>", ["@a.jpg"]),
        (" What? ", ["@a.jpg", "\n What? "]),
    ],
)
def test_llava_puts_the_image_in_front(folder: Path, text: str, expected: list) -> None:
    assert told(read(llava(text, "ok", image="a.jpg"), folder), folder)[0][1:] == expected


def test_llava_image_may_come_in_a_later_turn(folder: Path) -> None:
    conversation = read(llava("Hi", "Hello", "Now <image>", "ok", image="a.jpg"), folder)
    assert told(conversation, folder)[2] == ["user", "@a.jpg", "\nNow"]


def test_llava_drops_a_leading_answer(folder: Path) -> None:
    row = llava("What? <image>", "ok", image="a.jpg")
    row["conversations"].insert(0, {"from": "gpt", "value": "Welcome"})
    assert [message[0] for message in told(read(row, folder), folder)] == ["user", "assistant"]


def test_llava_records_without_image_are_text() -> None:
    assert told(read(llava(" Hi ", "ok"), format="llava")) == [["user", " Hi "], ["assistant", "ok"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("<image>", "ok", "<image>", "ok", image="a.jpg"), "image: 1 image and tags in 2 turns"),
        (llava("<image>", "ok", image=["a.jpg", "b.jpg"]), "image: 2 images and tags in 1 turn"),
        (llava("<image>", "ok", image=""), "image: 0 images and tags in 1 turn"),
        (llava("<image>", "ok", image="no.jpg"), "image: no such file 'no.jpg'"),
        (llava("<image>", image="a.jpg", audio="audios/q.wav"), "audio: this format has no place for it"),
    ],
)
def test_llava_errors(folder: Path, row: dict, message: str) -> None:
    assert message in error_of(row, folder, format="llava")


# all formats


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "response": "r", "rejected_response": "x"}, "rejected_response: is preference data"),
        ({"prompt": "q", "chosen": "r", "rejected": "x"}, "rejected: is preference data"),
        ({"query": "q", "response": "r", "videos": ["a.mp4"]}, "videos: video is not supported"),
        (chat("Hi", "ok", tools=[{"name": "f"}]), "tools: tool calls (agent data) are not supported"),
    ],
)
def test_unsupported_data_is_refused(row: dict, message: str) -> None:
    assert message in error_of(row)


def test_empty_columns_of_unsupported_data_do_no_harm() -> None:
    row = {"query": "q", "response": "r", "rejected_response": None, "videos": [], "tools": "[]"}
    assert read(row).label == "r"


def test_duplicates_are_two_images_and_line_ends_are_kept(folder: Path) -> None:
    conversation = read(chat("<image>\r\n<image>", " ok\r\n", images=["a.png", "a.png"]), folder)
    assert told(conversation, folder) == [["user", "@a.png", "\r\n", "@a.png"], ["assistant", " ok\r\n"]]


def test_columns_are_renamed() -> None:
    assert rename_columns({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"b": 1, "a": 2}
    assert rename_columns({"caption": "x", "response": None}, {"caption": "response"}) == {"response": "x"}
    assert rename_columns({"response": None, "caption": "x"}, {"caption": "response"}) == {"response": "x"}
    with pytest.raises(DataError, match="--columns: two values for 'response'"):
        rename_columns({"caption": "x", "response": "y"}, {"caption": "response"})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<" not in text)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns)
def test_every_way_to_write_a_chat_gives_the_same_messages(pairs: list[tuple[str, str]]) -> None:
    flat = [text for pair in pairs for text in pair]
    expected = [[role, text] for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    *history, (query, response) = pairs
    rows = {
        "messages": chat(*flat),
        "sharegpt": llava(*flat),
        "swift-conversations": inline(*flat),
        "llava": llava(*flat),
        "megrez": chat(*flat),
        "minicpm": minicpm(None, *flat),
    }
    for format, row in rows.items():
        assert told(read(row, format=format)) == expected
    pair_row = {"conversation": [{"human": query, "assistant": response} for query, response in pairs]}
    assert told(read(pair_row)) == expected
    if query:
        for written in (history, json.dumps(history), repr(history)):
            assert told(read({"query": query, "response": response, "history": written})) == expected


def inner_places(value: Any, place: tuple = ()) -> list[tuple]:
    """The places of all values inside ``value``, as tuples of keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*place, key), *inner_places(item, (*place, key)))]


def with_value(value: Any, place: tuple, new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = with_value(value[place[0]], place[1:], new)
    return copy


ODD_VALUES = [None, True, 0, -1.5, "", "x", "[", "[[1]]", [], [None], ["x"], [["x"]], {}, {"path": 1}, {"bytes": "?"}]
rows = st.sampled_from([json.loads(row) for row, _, _ in EXAMPLES])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows, st.sampled_from([None, *FORMATS]), st.sampled_from(ODD_VALUES), st.randoms(use_true_random=False))
def test_broken_rows_are_read_or_refused_with_a_data_error(
    row: dict, format: str | None, odd: Any, random: Any
) -> None:
    row = with_value(row, random.choice(inner_places(row)), odd)
    try:
        conversation = read(row, format=format)
    except DataError as error:
        assert str(error)
    else:
        assert [message.role for message in conversation.messages if message.role != "system"]
