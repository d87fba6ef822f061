"""Which format a row has, rule by rule, and what a file may mix."""

import pytest

from mmtool.data.formats import FormatCheck, detect_format
from mmtool.errors import DataError, MMToolError


def said(*values: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict]:
    return [{"from": roles[index % 2], "value": value} for index, value in enumerate(values)]


def roles(*contents: object) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        # messages come first
        ({"messages": roles("a"), "conversations": said("<img>a</img>"), "query": "q"}, "messages"),
        ({"messages": said("a", "b")}, "messages"),
        ({"messages": None, "query": "q"}, "swift"),
        # conversations with role
        ({"conversations": roles({"text": "a"}, "b")}, "megrez"),
        ({"conversations": roles("a", {"text": "b"}), "image": "x.png"}, "megrez"),
        ({"conversations": roles("a", "b"), "image": "x.png"}, "minicpm"),
        ({"conversations": roles("a", "b"), "image": {"<image_00>": "x.png"}}, "minicpm"),
        ({"conversations": roles("a", "b")}, "messages"),
        ({"conversations": roles("<image>a", "b"), "images": ["x.png"]}, "messages"),
        ({"conversations": roles([{"type": "text", "text": "a"}])}, "messages"),
        # conversations with from
        ({"conversations": said("<img>x.png</img>", "<ImageHere>"), "images": ["y.png"]}, "swift-conversations"),
        ({"conversations": said("a", "b <audio>x.wav</audio>")}, "swift-conversations"),
        ({"conversations": said("<ImageHere>", "b"), "images": ["x.png"]}, "xcomposer"),
        ({"conversations": said("<image>", "b"), "images": ["x.png"], "image": "x.png"}, "sharegpt"),
        ({"conversations": said("<image>", "b"), "image": "x.png"}, "llava"),
        ({"conversations": said("<image>", "b", roles=("human", "bot")), "image": "x.png"}, "llava"),
        ({"conversations": said("a", "b"), "image": "x.png"}, "llava"),
        ({"conversations": said("<image_placeholder>", "b", roles=("user", "assistant")), "image": "x.png"}, "llava"),
        ({"conversations": said("a", "b", roles=("human", "bot")), "image": "x.png"}, "xcomposer"),
        ({"conversations": said("a", "b", roles=("user", "assistant")), "image": "x.png"}, "xcomposer"),
        ({"conversations": said("a", "b"), "image": ["x.png"]}, "xcomposer"),
        ({"conversations": said("<image>", "b"), "image": ["x.png"]}, "sharegpt"),
        ({"conversations": said("a", "b")}, "sharegpt"),
        ({"conversations": said("<image>", "b")}, "sharegpt"),
        ({"conversations": "[{'from': 'human', 'value': 'a'}]"}, "sharegpt"),
        # conversation
        ({"conversation": [{"human": "a", "assistant": "b"}]}, "sharegpt"),
        ({"conversation": roles("a", "b"), "image": "x.png"}, "minicpm"),
        ({"conversation": said("<image>", "b"), "image": "x.png"}, "llava"),
        # columns
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "b", "response": "c"}, "alpaca"),
        ({"instruction": "a", "input": "b"}, "alpaca"),
        ({"instruction": "a"}, "alpaca"),
        ({"instruction": "a", "response": "b"}, "swift"),
        ({"instruction": "a", "answer": "b"}, "swift"),
        ({"response": "a"}, "swift"),
        ({"response": "a", "input": "b", "output": "c"}, "swift"),
        ({"query": "a"}, "swift"),
        ({"question": "a", "answer": "b"}, "swift"),
        ({"prompt": "a", "output": "b"}, "swift"),
        ({"input": "a", "answer": "b"}, "swift"),
        ({"prompt": "a", "text": "b"}, "swift"),
        ({"prompt": "a", "chosen": "b"}, "yi"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "yi"),
        ({"input": "a", "output": "b"}, "fm9g"),
        ({"input": None, "output": "b", "id": 1}, "fm9g"),
        ({"input": "a", "output": "b", "images": ["x.png"]}, "swift"),
        ({"input": "a", "output": "b", "system": "s"}, "swift"),
        ({"text": "a"}, "text"),
        ({"text": "a", "meta": {"source": "b"}}, "text"),
    ],
)
def test_the_first_rule_that_fits_decides(row: dict, format: str) -> None:
    assert detect_format(row) == format


@pytest.mark.parametrize("row", [{}, {"id": 1, " query": "q"}, {"conversations": [{"a": 1}]}, {"conversations": 3}])
def test_an_unknown_row_is_an_error_with_its_keys(row: dict) -> None:
    with pytest.raises(DataError, match="cannot tell the format") as caught:
        detect_format(row)
    assert all(repr(key) in str(caught.value) for key in row)
    assert "--columns" in caught.value.hint
    assert "sharegpt" in caught.value.hint


def test_preference_data_is_named_and_not_called_unknown() -> None:
    with pytest.raises(DataError, match="rejected: is preference data"):
        detect_format({"chosen": [], "rejected": [{"role": "user"}]})


def formats_of(*rows: dict) -> list[str]:
    check = FormatCheck()
    return [check.format_of(row) for row in rows]


TEXT = {"conversations": said("Hi", "Hello")}
LLAVA = {"conversations": said("<image>", "ok"), "image": "a.png"}
LLAVA_NO_TAG = {"conversations": said("Hi", "ok"), "image": "a.png"}
XCOMPOSER = {"conversations": said("<ImageHere>", "ok"), "image": "a.png"}
MEGREZ = {"conversations": roles({"text": "Hi"}, "ok")}
ROLES = {"conversations": roles("Hi", "ok")}


@pytest.mark.parametrize(
    ("rows", "formats"),
    [
        ([{"query": "q", "response": "r"}, {"response": "r"}], ["swift", "swift"]),
        ([LLAVA, TEXT, LLAVA], ["llava", "llava", "llava"]),
        ([TEXT, LLAVA, TEXT], ["sharegpt", "llava", "llava"]),
        ([XCOMPOSER, LLAVA_NO_TAG], ["xcomposer", "xcomposer"]),
        ([LLAVA_NO_TAG, XCOMPOSER, TEXT], ["llava", "xcomposer", "xcomposer"]),
        ([MEGREZ, ROLES], ["megrez", "megrez"]),
        ([ROLES, MEGREZ], ["messages", "megrez"]),
    ],
)
def test_text_only_records_fit_the_formats_that_read_them_alike(rows: list[dict], formats: list[str]) -> None:
    assert formats_of(*rows) == formats


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "q"}, ROLES], "the record is in the format 'messages', but the file is in 'swift'"),
        ([TEXT, LLAVA, XCOMPOSER], "the record is in the format 'xcomposer', but the file is in 'llava'"),
        (
            [{"instruction": "a", "output": "b"}, {"query": "q", "response": "r"}],
            "'swift', but the file is in 'alpaca'",
        ),
        ([{"messages": roles("a")}, MEGREZ], "'megrez', but the file is in 'messages'"),
    ],
)
def test_a_record_in_another_format_is_an_error(rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        formats_of(*rows)


def test_a_record_in_another_format_does_not_change_the_format_of_the_file() -> None:
    check = FormatCheck()
    assert check.format_of({"query": "q"}) == "swift"
    with pytest.raises(DataError):
        check.format_of(ROLES)
    assert check.format_of({"query": "q"}) == "swift"


def test_a_named_format_is_not_questioned() -> None:
    assert FormatCheck("llava").format_of({"query": "q"}) == "llava"


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(MMToolError, match="unknown dataset format 'share-gpt'") as caught:
        FormatCheck("share-gpt")
    assert caught.value.hint == "Did you mean sharegpt?"
