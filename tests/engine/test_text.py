"""Text that comes piece by piece must be the text that comes at once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtool.engine.text import WINDOW, Detokenizer, StopText


def streamed(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, detokenizer.flush()]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pieces_joined_are_the_decoding_of_all_ids(tokenizer, data):
    # Half of them byte tokens (305..560 there), so that broken and whole characters both come up.
    token = st.integers(0, 1087) | st.integers(305, 560)
    ids = data.draw(st.lists(token, max_size=3 * WINDOW))
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_text_that_goes_on_keeps_the_blank_between(tokenizer, data):
    token = st.integers(0, 1087) | st.integers(305, 560)
    before = data.draw(st.lists(token, min_size=1, max_size=3 * WINDOW))
    ids = data.draw(st.lists(token, min_size=1, max_size=3 * WINDOW))
    detokenizer = Detokenizer(tokenizer, before=before)
    text = "".join([*map(detokenizer.push, ids), detokenizer.flush()])
    whole, prompt = decoded(tokenizer, [*before, *ids]), decoded(tokenizer, before)
    if prompt.endswith("\ufffd"):  # the prompt ends inside a character: what follows begins anew
        assert text == decoded(tokenizer, ids)
    else:
        assert prompt + text == whole


@pytest.mark.parametrize("text", ["你好，世界 🙂👩‍👩‍👧 done", "a\n\n  b", "Ünïcödé ﷽ نص"])
def test_no_half_characters(tokenizer, text):
    pieces = streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_word_comes_with_its_token(tokenizer):
    ids = tokenizer.encode("the cat sat on the mat and then " * 10, add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert all(pieces[: len(ids)])
    assert pieces[-1] == ""


def test_special_tokens_give_no_text(tokenizer):
    word = tokenizer.encode(" cat", add_special_tokens=False)
    ids = [1, *word, 2, 9, *word, 2]
    assert "".join(streamed(tokenizer, ids)) == decoded(tokenizer, ids)


def test_a_decoder_that_drops_leading_blanks_keeps_those_inside():
    class Words:
        def decode(self, ids, **_):
            return "".join("" if token == 0 else f" w{token}" for token in ids).removeprefix(" ")

        def convert_ids_to_tokens(self, token_id):
            return f"▁w{token_id}"

    ids = [0] * 20 + [1, 0, 2] + [0] * 40 + [3, 4] * 30
    assert "".join(streamed(Words(), ids)) == Words().decode(ids)


def test_the_work_per_token_does_not_grow(tokenizer):
    class Counting:
        most = 0

        def decode(self, ids, **options):
            self.most = max(self.most, len(ids))
            return tokenizer.decode(ids, **options)

        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

    counting = Counting()
    streamed(counting, tokenizer.encode("the cat sat on the mat " * 50, add_special_tokens=False))
    assert counting.most <= WINDOW + 1


def shown(pieces, stop_words, strip):
    stop = StopText(stop_words, strip)
    out = []
    for piece in pieces:
        out.append(stop.push(piece))
        if stop.stopped:
            return out
    return [*out, stop.flush()]


def cut(text, stop_words, strip):
    ends = [text.find(word) for word in stop_words if word in text]
    text = text[: min(ends)] if ends else text
    return text.strip() if strip else text


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("#ab \n", max_size=4), max_size=12),
    st.sampled_from([(), ("###",), ("###", "ab"), ("aab", "b#"), ("\n\n",), (" a", "")]),
    st.booleans(),
)
def test_shown_text_is_the_whole_text_cut_and_stripped(pieces, stop_words, strip):
    words = tuple(word for word in stop_words if word)
    assert "".join(shown(pieces, stop_words, strip)) == cut("".join(pieces), words, strip)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", "#", "#", "b"], ["a", "", "", "##b", ""]),
        (["a ", "b", " \n"], ["a", " b", "", ""]),
        ([" ", " x"], ["", "x", ""]),
        (["cat.", "\n", "####"], ["cat.", "", ""]),
        (["one ###", " two"], ["one"]),
        (["x#", "##y"], ["x", ""]),
    ],
)
def test_what_could_become_a_stop_word_waits(pieces, expected):
    assert shown(pieces, ("###",), True) == expected


def test_golden_stop_cases(golden, tokenizer):
    rows = json.loads((golden("yi-vl") / "stop_cases.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        assert "".join(shown(streamed(tokenizer, row["ids"]), ("###",), True)) == row["recommended_output"], row
