"""Rows of the formats in docs/datasets.md -> ``Conversation``: which format a row has, and one reader for each.

Files are read in ``dataset.py``; the steps that readers share are in ``records.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtool.data.records import (
    MEDIA_KEYS,
    QUERY_KEYS,
    RESPONSE_KEYS,
    SYSTEM_KEYS,
    Conversation,
    Record,
    Turn,
    as_entries,
    as_text,
    check_order,
    check_supported,
    join_parts,
    parse_list,
    place_media,
)
from mmtool.data.references import MediaFolders, is_absent, is_reference
from mmtool.errors import DataError, MMToolError
from mmtool.messages import Audio, Image, Message, Text, split_inline_media, to_messages
from mmtool.utils import counted, did_you_mean

_INLINE_TAG = re.compile(r"<(img|audio|video)>(.+?)</\1>")
_LLAVA_TAG = re.compile(r"<image>|<image_placeholder>")
_XCOMPOSER_TAG = "<ImageHere>"
_NUMBERED_TAG = re.compile(r"(<image_\d+>)")
_FM9G_MARKS = ("<用户>", "<AI>")


# Detection. Each function returns the name of a format or None; the first answer counts.


def detect_format(row: Mapping[str, Any]) -> str:
    """Return the name of the format that ``row`` is written in.

    >>> detect_format({"messages": [{"role": "user", "content": "Hi"}]})
    'messages'

    Raises:
        DataError: where no format fits, or the row holds what no format supports (preference data, video, tools).
    """
    check_supported(row)
    for detect in (_detect_turns, _detect_columns):
        name = detect(row)
        if name is not None:
            return name
    raise DataError(
        f"cannot tell the format of a row with the keys {', '.join(map(repr, row)) or '(none)'}",
        f"Rename keys with --columns, or name the format with --dataset_format ({', '.join(FORMATS)}).",
    )


def _detect_turns(row: Mapping[str, Any]) -> str | None:
    if row.get("messages") is not None:
        return "messages"
    items = _items(row)
    if items is None:
        return None
    if any("role" in item for item in items):
        if any(isinstance(item.get("content"), Mapping) for item in items):
            return "megrez"
        return "minicpm" if row.get("image") is not None else "messages"
    if any("from" in item for item in items):
        return _detect_from_value(row, [item["value"] for item in items if isinstance(item.get("value"), str)], items)
    return "sharegpt" if row.get("conversation") is not None else None


def _detect_from_value(row: Mapping[str, Any], values: list[str], items: list[Mapping[str, Any]]) -> str:
    if any(_INLINE_TAG.search(value) for value in values):
        return "swift-conversations"
    if any(_XCOMPOSER_TAG in value for value in values):
        return "xcomposer"
    image = row.get("image")
    if image is None or row.get("images") is not None:
        return "sharegpt"
    if any(_LLAVA_TAG.search(value) for value in values):
        return "llava" if is_reference(image) else "sharegpt"
    llava_roles = all(item.get("from") in ("system", "human", "gpt") for item in items)
    return "llava" if is_reference(image) and llava_roles else "xcomposer"


def _detect_columns(row: Mapping[str, Any]) -> str | None:
    has_query = any(key in row for key in QUERY_KEYS)
    has_response = any(key in row for key in RESPONSE_KEYS)
    if "instruction" in row and ("output" in row or "input" in row or not has_response):
        return "alpaca"
    if "prompt" in row and "chosen" in row:
        return "yi"
    if "response" in row:
        return "swift"
    if has_query and not _is_plain_pair(row):
        return "swift"
    if "input" in row and "output" in row:
        return "fm9g"
    return "text" if "text" in row else None


def _is_plain_pair(row: Mapping[str, Any]) -> bool:
    """Tell whether ``input`` and ``output`` stand alone: media, history or a system text make them swift's aliases."""
    others = {*QUERY_KEYS, *RESPONSE_KEYS, *SYSTEM_KEYS, *sum(MEDIA_KEYS.values(), ()), "history"}
    return {"input", "output"} == {key for key in others if row.get(key) is not None or key in ("input", "output")}


def _items(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the objects under ``conversations`` or ``conversation``; None where the row has no such list."""
    value = next((row[key] for key in ("conversations", "conversation") if row.get(key) is not None), None)
    items = parse_list(value) if isinstance(value, str) else value
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else None


class FormatCheck:
    """The format of a file: its first record decides, every later one must fit.

    A text-only record that several formats read alike fits them all, so a LLaVA file may start with one.

    >>> check = FormatCheck()
    >>> check.format_of({"query": "Hi", "response": "Hello"})
    'swift'
    """

    def __init__(self, name: str | None = None) -> None:
        """Take ``name`` for the format of every record, without detection."""
        if name is not None and name not in FORMATS:
            raise MMToolError(
                f"unknown dataset format {name!r}", did_you_mean(name, FORMATS, f"Choose from {', '.join(FORMATS)}.")
            )
        self._forced = name
        self._fitting: list[str] = []  # formats that all records so far fit, the detected one first

    def format_of(self, row: Mapping[str, Any]) -> str:
        """Return the format to read ``row`` with.

        Raises:
            DataError: where the row fits no format, or not that of the file.
        """
        if self._forced is not None:
            return self._forced
        detected = detect_format(row)
        names = [detected, *_also_fits(row, detected)]
        fitting = [name for name in names if name in self._fitting or not self._fitting]
        if not fitting:
            raise DataError(
                f"the record is in the format {detected!r}, but the file is in {self._fitting[0]!r}",
                "Split the file, or name one format for all with --dataset_format.",
            )
        self._fitting = fitting
        return fitting[0]


def _also_fits(row: Mapping[str, Any], detected: str) -> tuple[str, ...]:
    """Return the other formats that read ``row`` to the same messages."""
    has_media = any(row.get(key) is not None for keys in MEDIA_KEYS.values() for key in keys)
    if detected == "sharegpt" and not has_media and any("from" in item for item in _items(row) or ()):
        return ("swift-conversations", "llava", "xcomposer")
    if detected == "messages" and not has_media and row.get("messages") is None:
        return ("megrez", "minicpm")
    values = [str(item.get("value")) for item in _items(row) or ()]
    if detected == "llava" and not any(_LLAVA_TAG.search(value) for value in values):
        return ("xcomposer",)
    return ()


# Readers, in the order of docs/datasets.md.


def _read_swift(record: Record) -> list[Message]:
    key, query = record.take(*QUERY_KEYS)
    for other in QUERY_KEYS:
        if other != key and record.row.get(other) not in (None, ""):
            record.warnings.append(f"{other!r} is not used, because the question is under {key!r}")
    query = as_text(query, key) if query is not None else ""
    return _place_rounds(record, _query_turns(record, query, record.answer(*RESPONSE_KEYS)))


def _query_turns(record: Record, query: str, answer: str | None) -> list[Turn]:
    """Return system, history, question and answer; without any question the answer is text for pre-training."""
    turns = []
    for question, reply in record.history():
        turns += [Turn("user", question, "history"), Turn("assistant", reply, "history")]
    has_media = any(any(column.entries) for column in record.media_columns())
    if query or turns or has_media:
        turns.append(Turn("user", query, "query"))
    elif answer is None:
        raise DataError("the row has no question and no answer")
    if answer is not None:
        turns.append(Turn("assistant", answer, "response"))
    return record.with_system(turns)


def _place_rounds(record: Record, turns: list[Turn]) -> list[Message]:
    """Put one picture in front of each question where the list has an entry per round; else as ``place_media``."""
    images = record.media(Image)
    questions = [turn for turn in turns if turn.role == "user"]
    by_round = images is not None and (record.media_style == "round" or None in images.entries)
    tagged = any("<image>" in turn.text for turn in questions)
    if not by_round or tagged or images is None or len(images.entries) != len(questions):
        return place_media(turns, record, prepend=True, queries_only=True)
    entries = iter(images.entries)
    messages = []
    for message in place_media(turns, record, prepend=True, queries_only=True, skip=Image):
        image = next(entries) if message.role == "user" else None
        messages.append(message if image is None else replace(message, parts=join_parts((image, *message.parts))))
    return messages


def _read_swift_conversations(record: Record) -> list[Message]:
    turns = record.turns()
    check_order(turns)
    messages = []
    for turn in turns:
        if any(match[1] == "video" for match in _INLINE_TAG.finditer(turn.text)):
            raise DataError(f"{turn.place}: video is not supported")
        parts = split_inline_media(turn.text)
        messages.append(turn.message(*(record.locate(part, turn.place) for part in parts)))
    for column in record.media_columns():
        if any(column.entries):
            raise DataError(f"{column.key}: given beside <img> or <audio> tags", "Use either the tags or the list.")
    return messages


def _read_messages(record: Record) -> list[Message]:
    turns = record.turns()
    check_order(turns)
    if not any(isinstance(turn.content, list) for turn in turns):
        return place_media(turns, record, prepend=True)
    for column in record.media_columns():
        if any(column.entries):
            raise DataError(f"{column.key}: given beside content in parts", "Put the media among the parts.")
    return [_read_parts(record, turn) if isinstance(turn.content, list) else turn.message(turn.text) for turn in turns]


def _read_parts(record: Record, turn: Turn) -> Message:
    places = [f"{turn.place}[{index}]" for index in range(len(turn.content))]
    content = [_open_mapping(record, part, place) for part, place in zip(turn.content, places, strict=True)]
    try:
        (message,) = to_messages([{"role": turn.role, "content": content}])
    except MMToolError as error:
        raise DataError(error.message.replace("messages[0].content", turn.place, 1), error.hint) from None
    return turn.message(*(record.locate(part, place) for part, place in zip(message.parts, places, strict=True)))


def _open_mapping(record: Record, part: Any, place: str) -> Any:
    """Return an image or audio part that is written as ``{path, bytes}`` as a medium, any other part as it is."""
    for key, kind in (("image", Image), ("audio", Audio)):
        if isinstance(part, Mapping) and part.get("type") == key and isinstance(part.get(key), Mapping):
            return kind(record.folders.resolve(part[key], f"{place}.{key}"))
    return part


def _read_sharegpt(record: Record) -> list[Message]:
    items = _items(record.row)
    turns = _read_pairs(record) if items and "from" not in items[0] and "role" not in items[0] else record.turns()
    check_order(turns)
    return place_media(turns, record, prepend=False)


def _read_pairs(record: Record) -> list[Turn]:
    """Read ``[{"human": .., "assistant": ..}, ..]``; the last answer may be missing."""
    key, _ = record.take("conversations", "conversation")
    items = _items(record.row) or []
    turns = []
    for index, item in enumerate(items):
        place = f"{key}[{index}]"
        for role, names in (("user", ("human", "user")), ("assistant", ("assistant", "gpt", "bot"))):
            name = next((name for name in names if item.get(name) is not None), None)
            if name is not None:
                turns.append(Turn(role, item[name], f"{place}.{name}"))
            elif role == "user" or index + 1 < len(items):
                raise DataError(f"{place}: has no {names[0]!r}", f"It has {', '.join(item) or 'no keys'}.")
    return record.with_system(turns)


def _read_alpaca(record: Record) -> list[Message]:
    texts = (record.text("instruction"), record.text("input"))
    turns = _query_turns(record, "\n".join(text for text in texts if text), record.answer("output", *RESPONSE_KEYS))
    return place_media(turns, record, prepend=False, queries_only=True)


def _read_megrez(record: Record) -> list[Message]:
    turns = record.turns()
    check_order(turns)
    return [_read_megrez_turn(record, turn) for turn in turns]


def _read_megrez_turn(record: Record, turn: Turn) -> Message:
    """Return one turn in the order that the model sees: images, audio, text."""
    if not isinstance(turn.content, Mapping):
        return turn.message(turn.text)
    media = []
    for key, kind in (("image", Image), ("audio", Audio)):
        entries, _ = as_entries(turn.content.get(key), f"{turn.place}.{key}")
        media += [medium for place, value in entries if (medium := record.open(kind, value, place)) is not None]
    if media and turn.role != "user":
        raise DataError(f"{turn.place}: media in a turn of the {turn.role}", "Move them to a turn of the user.")
    unknown = [key for key, value in turn.content.items() if key not in ("text", "image", "audio") and value]
    if unknown:
        raise DataError(f"{turn.place}.{unknown[0]}: unknown key", "A turn has text, image and audio.")
    text = turn.content.get("text")
    return turn.message(*media, "" if text is None else as_text(text, f"{turn.place}.text"))


def _read_xcomposer(record: Record) -> list[Message]:
    turns = [replace(turn, content=turn.text.strip()) for turn in record.turns(other_role="assistant")]
    check_order(turns)
    column = record.media(Image)
    images = list(column.without_gaps()) if column is not None else []
    num_tags = sum(turn.text.count(_XCOMPOSER_TAG) for turn in turns)
    if column is not None and column.single and images and not num_tags:
        return _put_first(turns, images[0])
    if num_tags != len(images):
        raise DataError(
            f"{column.key if column else 'image'}: {counted(num_tags, f'{_XCOMPOSER_TAG} tag')} in the text for "
            f"{counted(len(images), 'image')}",
            f"Write {_XCOMPOSER_TAG} once for each image.",
        )
    messages = []
    for turn in turns:
        pieces = re.split(f"({_XCOMPOSER_TAG})", turn.text)
        messages.append(turn.message(*(images.pop(0) if piece == _XCOMPOSER_TAG else piece for piece in pieces)))
    return messages


def _put_first(turns: Iterable[Turn], *items: Image | str) -> list[Message]:
    """Return the messages of text ``turns``, with ``items`` in front of the first question."""
    messages = []
    for turn in turns:
        front = items if turn.role == "user" else ()
        items = () if turn.role == "user" else items
        messages.append(turn.message(*front, turn.text))
    return messages


def _read_minicpm(record: Record) -> list[Message]:
    turns = record.turns()
    check_order(turns)
    if turns[0].role != "user":
        raise DataError(f"{turns[0].place}: this format starts with the user and has no system text")
    key, value = record.take("image")
    if isinstance(value, Mapping) and list(value) == ["<image>"]:
        key, value = "image['<image>']", value["<image>"]
    if isinstance(value, Mapping) and not is_reference(value):
        return _place_numbered(record, turns, value)
    if is_absent(value):
        return place_media(turns, record, prepend=False)
    image = Image(record.folders.resolve(value, key))
    if "<image>" not in turns[0].text:
        return _put_first(turns, image, "\n")
    pieces = re.split("(<image>)", turns[0].text)
    first = turns[0].message(*(image if piece == "<image>" else piece for piece in pieces))
    return [first, *(turn.message(turn.text) for turn in turns[1:])]


def _place_numbered(record: Record, turns: list[Turn], paths: Mapping[str, Any]) -> list[Message]:
    """Put images at their ``<image_00>`` tags; as in the reference, text and tags end up on lines of their own."""
    wrong = [tag for tag in paths if not _NUMBERED_TAG.fullmatch(tag)]
    if wrong:
        raise DataError(f"image: the key {wrong[0]!r} is no tag", "Write <image_00>, <image_01>, ...")
    images = {tag: Image(record.folders.resolve(path, f"image[{tag!r}]")) for tag, path in paths.items()}
    messages, seen = [], []
    for turn in turns:
        pieces = _NUMBERED_TAG.split(turn.text)
        tags = pieces[1::2]
        unknown = [tag for tag in tags if tag not in images]
        if unknown:
            raise DataError(f"{turn.place}: {unknown[0]} is not among the images", f"There are {', '.join(images)}.")
        lines = [item for piece in pieces for item in ("\n", images.get(piece, piece))][1:]
        messages.append(turn.message(*lines))
        seen += tags
    unused = [tag for tag in images if tag not in seen]
    if unused:
        raise DataError(f"image: {unused[0]} is not in the text", f"Write {unused[0]} where the picture belongs.")
    if list(dict.fromkeys(seen)) != list(images):
        record.warnings.append("the text names the images in another order than the row; the order of the text counts")
    return messages


def _read_fm9g(record: Record) -> Conversation:
    query = record.text("input")
    return _text_pair(query, record.answer("output"), raw=any(mark in (query or "") for mark in _FM9G_MARKS))


def _read_yi(record: Record) -> Conversation:
    prompt = record.text("prompt")
    return _text_pair(prompt, record.text("chosen"), raw=bool(prompt))


def _read_text(record: Record) -> Conversation:
    return _text_pair(None, record.text("text"))


def _text_pair(query: str | None, answer: str | None, raw: bool = False) -> Conversation:
    """Return question and answer; an answer alone is text for pre-training."""
    messages = [Message("user", (Text(query),))] if query else []
    if answer is not None:
        messages.append(Message("assistant", (Text(answer),)))
    if not messages:
        raise DataError("the row has no question and no answer")
    return Conversation(tuple(messages), raw=raw)


def _read_llava(record: Record) -> list[Message]:
    turns = record.turns()
    if len(turns) > 1 and turns[0].role == "assistant":
        turns = turns[1:]
    check_order(turns)
    column = record.media(Image)
    images = column.without_gaps() if column is not None else ()
    if column is None:
        return place_media(turns, record, prepend=False)
    tagged = [turn for turn in turns if _LLAVA_TAG.search(turn.text)]
    if len(images) > 1 or len(tagged) > len(images):
        raise DataError(
            f"{column.key}: {counted(len(images), 'image')} and tags in {counted(len(tagged), 'turn')}",
            "This format has one image per sample, and its tag in one turn at most.",
        )
    if images and not tagged:
        return _put_first(turns, images[0], "\n")
    return [_put_tag_first(turn, images[0]) if turn in tagged else turn.message(turn.text) for turn in turns]


def _put_tag_first(turn: Turn, image: Image) -> Message:
    text = _LLAVA_TAG.sub("", turn.text).strip()
    return turn.message(image, f"\n{text}" if text else "")


FORMATS: Mapping[str, Callable[[Record], list[Message] | Conversation]] = {
    "swift": _read_swift,
    "swift-conversations": _read_swift_conversations,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "megrez": _read_megrez,
    "xcomposer": _read_xcomposer,
    "minicpm": _read_minicpm,
    "fm9g": _read_fm9g,
    "yi": _read_yi,
    "llava": _read_llava,
    "text": _read_text,
}
"""Readers by the name of their format, the names of ``--dataset_format``."""


def row_to_messages(
    row: Mapping[str, Any],
    format: str,
    *,
    base_dir: str | Path,
    media_root: str | Path | None = None,
    media_style: str = "round",
) -> Conversation:
    """Read one row of a known format.

    >>> row_to_messages({"query": "Hi", "response": "Hello", "id": 3}, "swift", base_dir=".").extra
    {'id': 3}

    Args:
        row: a JSON object.
        format: a name in ``FORMATS``.
        base_dir: the folder of the data file; relative media paths start here.
        media_root: where relative media paths are looked for first.
        media_style: ``round`` gives every round its own entry of a swift row's ``images`` where the numbers agree.

    Raises:
        DataError: naming the field; also for a local media file that does not exist.
    """
    check_supported(row)
    folders = MediaFolders(Path(base_dir), Path(media_root) if media_root is not None else None)
    record = Record(row, folders, media_style)
    found = FORMATS[format](record)
    conversation = found if isinstance(found, Conversation) else Conversation(tuple(found))
    return replace(conversation, extra=record.extra(), warnings=tuple(record.warnings))


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return ``row`` with keys renamed, as ``--columns`` asks.

    >>> rename_columns({"caption": "A cup.", "id": 1}, {"caption": "response"})
    {'response': 'A cup.', 'id': 1}

    Raises:
        DataError: where two keys with a value get the same name.
    """
    renamed: dict[str, Any] = {}
    for key, value in row.items():
        name = columns.get(key, key)
        if renamed.get(name) is not None and value is not None:
            raise DataError(f"--columns: two values for {name!r}", "Choose another name, or rename that key too.")
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed
