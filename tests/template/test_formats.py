"""Chat formats as data: what pieces they make, also in the styles of families that control tokens mark."""

from __future__ import annotations

import pytest

from mmtool.messages import Image, Message, Text
from mmtool.template.formats import ChatFormat, Piece

CHATML = ChatFormat(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    answer=("", "<|im_end|>"),
    between="\n",
    media_in_place=True,
    control=("<|im_start|>", "<|im_end|>"),
)
MARKS = ChatFormat(start="<s>", user=("<用户>", ""), assistant="<AI>", answer=("", "</s>"), media_end="\n")

CONVERSATION = [
    Message("user", (Text("a "), Image("x.png"), Text("b"))),
    Message("assistant", (Text("c"),)),
    Message("user", (Text("d"),)),
    Message("assistant", (Text("e"),), train=False),
    Message("user", (Text("f"),)),
]


def written(pieces: list[Piece]) -> str:
    return "".join("<IMG>" if piece.media else piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("chat_format", "system", "expected"),
    [
        (
            CHATML,
            "s",
            "<|im_start|>system\ns<|im_end|>\n"
            "<|im_start|>user\na <IMG>b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\ne<|im_end|>\n"
            "<|im_start|>user\nf<|im_end|>\n<|im_start|>assistant\n",
        ),
        (MARKS, "", "<s><用户><IMG>\na b<AI>c</s><用户>d<AI>e</s><用户>f<AI>"),
    ],
)
def test_a_format_writes_around_the_turns(chat_format: ChatFormat, system: str, expected: str) -> None:
    assert written(list(chat_format.pieces(CONVERSATION, system))) == expected


@pytest.mark.parametrize("chat_format", [CHATML, MARKS])
def test_answers_with_their_marks_are_learned_and_only_typed_text_is_no_control(chat_format: ChatFormat) -> None:
    pieces = [piece for piece in chat_format.pieces(CONVERSATION[:4], "s") if piece.text or piece.media]
    assert written([piece for piece in pieces if piece.train]) == "c" + chat_format.answer[1]
    assert "".join(piece.text for piece in pieces if not piece.control) == "sa bcde"


def test_what_stands_between_rounds_is_not_learned_and_does_not_end_a_sample() -> None:
    pieces = [piece for piece in CHATML.pieces(CONVERSATION[:4], "") if piece.text]
    assert pieces[-1] == Piece("<|im_end|>", control=True, answer=True)
    assert Piece("\n", control=True) in pieces
