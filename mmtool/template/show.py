"""What a model really sees, for people to read: text as it is, media as spans, learned and control parts in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtool.errors import TooLongError
from mmtool.messages import Message

if TYPE_CHECKING:
    from rich.text import Text

    from mmtool.template.base import Segment, Template

CONTROL = "dim"
MEDIA = "bold cyan"
TRAINED = "green"
NOTE = "italic"
# Marks that also show without colour.
TRAIN_OPEN, TRAIN_CLOSE = "«", "»"
BETWEEN_TOKENS = "|"
# Other control characters would reach the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show_prompt(
    template: Template, messages: Sequence[Message | Mapping[str, Any]], train: bool = False, tokens: bool = False
) -> Text:
    """Return one line of numbers and then the prompt (with ``train``: the sample).

    Text of the chat format is dim, what is learned is green and stands between « and »; a medium is written
    ``[image 1: 64 positions]``. What ``max_length`` cuts away is left out.

    Args:
        template: the template of the model.
        messages: as for ``Template.encode``.
        train: whether the conversation ends with an answer to learn.
        tokens: put a bar between tokens and write each as the tokenizer names it.
    """
    from rich.text import Text  # 40 ms, and only for those who look

    segments = template.segments(messages, train)
    note, cut = "", 0
    try:
        cut = template.first_kept(segments)
        note = f"; the first {cut} were cut off" if cut else ""
    except TooLongError as error:
        note = f"; too long: {error.length} of at most {error.limit}"
    out = Text()
    out.append(f"{_numbers(segments, cut, train)}{note}\n", style=NOTE)
    start, counts, trained = 0, dict.fromkeys(template.modalities, 0), False
    for segment in segments:
        end = start + len(segment.ids)
        if segment.media is not None:
            counts[segment.media.kind] = counts.get(segment.media.kind, 0) + 1
        if end > cut:
            learned = train and segment.train
            if learned != trained:
                out.append(TRAIN_OPEN if learned else TRAIN_CLOSE, style=TRAINED)
                trained = learned
            _append(out, template, segment, counts, max(cut - start, 0), learned, tokens)
        start = end
    if trained:
        out.append(TRAIN_CLOSE, style=TRAINED)
    return out


def _numbers(segments: Sequence[Segment], cut: int, train: bool) -> str:
    start, kept, media, learned = 0, 0, {}, 0
    for segment in segments:
        left = max(min(start + len(segment.ids) - cut, len(segment.ids)), 0)
        kept += left
        learned += left if segment.train else 0
        if segment.media is not None and left:
            kind = segment.media.kind
            number, positions = media.get(kind, (0, 0))
            media[kind] = (number + 1, positions + left)
        start += len(segment.ids)
    words = [f"{kept} positions"]
    for kind, (number, positions) in media.items():
        words.append(f"{positions} of {number} {kind}{'' if number == 1 else 's'}")
    if train:
        words.append(f"{learned} learned ({TRAIN_OPEN}green{TRAIN_CLOSE})")
    return f"{'sample' if train else 'prompt'}: {', '.join(words)}"


def _append(
    out: Text, template: Template, segment: Segment, counts: dict[str, int], skip: int, learned: bool, tokens: bool
) -> None:
    colour = f" {TRAINED}" if learned else ""
    if segment.media is not None:
        kind = segment.media.kind
        out.append(f"[{kind} {counts[kind]}: {segment.media.length} positions]", style=MEDIA)
    elif tokens:
        for token in template.tokenizer.convert_ids_to_tokens(segment.ids[skip:]):
            newline = "\n" if token in ("\n", "<0x0A>") else ""
            out.append(f"{token!r}"[1:-1] + BETWEEN_TOKENS + newline, style=colour.strip())
    elif skip:
        text = template.tokenizer.decode(segment.ids[skip:])
        out.append("..." + text.translate(_VISIBLE), style=colour.strip())
    else:
        for piece in segment.pieces:
            out.append(piece.text.translate(_VISIBLE), style=f"{CONTROL if piece.control else ''}{colour}".strip())
