"""Token ids to text while they come: whole characters only, cut at stop words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
WINDOW = 8  # tokens decoded again with each new one before the window moves on


class Detokenizer:
    """Turns ids into text piece by piece; the pieces joined are the decoding of all ids at once.

    Decoders look at neighbours (leading blanks, characters of several byte tokens), so new ids are decoded together
    with some before them, and the text of those is cut off. Special tokens give no text, unless asked for, and
    hidden ones are as if they were not there. ``before`` are ids of a text that goes on: without them, the blank
    between it and what follows would get lost.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_special_tokens: bool = True,
        hidden_token_ids: tuple[int, ...] = (),
        before: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.hidden_token_ids = hidden_token_ids
        self.ids: list[int] = []  # the window: ids decoded before, then those held back
        self.shown = 0  # ids of the window whose text is out
        self.shown_text = ""
        context = [index for index in before[-WINDOW:] if index not in hidden_token_ids]
        text = self._decode(context) if context else ""
        if not text.endswith("\ufffd"):  # half a character has no text that could be cut off again
            self.ids, self.shown, self.shown_text = context, len(context), text

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is certain now."""
        if token_id in self.hidden_token_ids:
            return ""
        self.ids.append(token_id)
        if self._is_byte(token_id):
            return ""
        text = self._decode(self.ids)
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """Return what was held back."""
        return self._show(self._decode(self.ids))

    def _show(self, text: str) -> str:
        new = text[len(self.shown_text) :]
        start = self.shown  # the next window starts with the ids that came last
        self.shown, self.shown_text = len(self.ids), text
        if len(self.ids) > WINDOW and start < len(self.ids):
            tail = self._decode(self.ids[start:])
            if tail.strip():  # a window must begin with visible text, or its own leading blank would get lost
                self.ids = self.ids[start:]
                self.shown, self.shown_text = len(self.ids), tail
        return new

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _is_byte(self, token_id: int) -> bool:
        """Whether more bytes may follow: a run of them is decoded as a whole."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        return piece is not None and piece.startswith("<0x") and BYTE_PIECE.fullmatch(piece) is not None


class StopText:
    """Passes text on up to the first stop word, holding back whatever could still become one.

    With ``strip``, whitespace at both ends of the whole text is dropped, so it is held back until more follows.
    """

    def __init__(self, stop_words: tuple[str, ...], strip: bool) -> None:
        self.stop_words = tuple(word for word in stop_words if word)
        self.strip = strip
        self.stopped = False
        self._held = ""
        self._empty = True  # nothing was passed on yet

    def push(self, text: str) -> str:
        """Take text and return what can be shown; after a stop word ``stopped`` is true and nothing comes any more."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self.stop_words) if at >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.flush()
        return self._pass(self._certain())

    def let_through(self, text: str) -> str:
        """Take text in which stop words do not count, and return what can be shown."""
        self._held += text
        return self.flush()

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        return self._pass(len(self._held.rstrip()) if self.strip else len(self._held))

    def _certain(self) -> int:
        """Return how many held characters cannot be part of a stop word or of the whitespace at the end."""
        end = len(self._held)
        for word in self.stop_words:
            for length in range(min(len(word) - 1, len(self._held)), 0, -1):
                if self._held.endswith(word[:length]):
                    end = min(end, len(self._held) - length)
                    break
        return len(self._held[:end].rstrip()) if self.strip else end

    def _pass(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        if self.strip and self._empty:
            text = text.lstrip()
        self._empty = self._empty and not text
        return text
