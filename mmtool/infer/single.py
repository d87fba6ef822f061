"""One question from the command line: the answer goes to stdout, or one line of JSON about it."""

from __future__ import annotations

import json
import sys
import time

from mmtool import log
from mmtool.engine.base import Answer
from mmtool.errors import MMToolError
from mmtool.groups.infer import InputArgs
from mmtool.infer.answer import Model, note_on_tags, stream_answer
from mmtool.infer.terminal import write_answer
from mmtool.messages import Audio, Image, Message, Text, split_inline_media
from mmtool.spec import ModelSpec

logger = log.get_logger(__name__)


def read_question(given: InputArgs, spec: ModelSpec, system: str | None = None) -> list[Message]:
    """Return ``--query`` with its media as a conversation; the query ``-`` is read from stdin.

    Media stand in front of the question; those of an ``inline`` model may be in its text instead.

    Raises:
        MMToolError: for media that the model does not take.
    """
    for option, sources, modality in (("images", given.images, "image"), ("audios", given.audios, "audio")):
        if sources and modality not in spec.modalities:
            takes = " and ".join(("text", *spec.modalities))
            raise MMToolError(f"--{option}: {spec.model_type} takes {takes} only", f"Leave --{option} out.")
    query = sys.stdin.read().rstrip("\n") if given.query == "-" else given.query
    note = note_on_tags(query, spec)
    if note:
        logger.warning("--query: %s", note)
    text = split_inline_media(query) if spec.media_style == "inline" else (Text(query),)
    media = (*map(Image, given.images), *map(Audio, given.audios))
    if media and len(text) > 1:
        raise MMToolError("--images or --audios given beside tags in --query", "Use either the tags or the options.")
    system_messages = [] if system is None else [Message("system", (Text(system),))]
    return [*system_messages, Message("user", (*media, *text))]


def answer_question(model: Model, messages: list[Message], *, as_json: bool = False, stream: bool = True) -> None:
    """Print the next answer of ``messages``: piece by piece, at once, or as one line of JSON about it."""
    with log.timed("encode"):
        request = model.request(messages)
    streamed = stream and not as_json
    answer = stream_answer(model.engine, request, write_answer if streamed else _drop_piece)
    if as_json:
        print(json.dumps(report(model, messages, answer), ensure_ascii=False))
    else:
        write_answer("\n" if streamed else answer.text + "\n")
    _log_times(answer)


def report(model: Model, messages: list[Message], answer: Answer) -> dict[str, object]:
    """Return what ``--json true`` prints."""
    media = messages[-1].media
    return {
        "model_type": model.spec.model_type,
        "response": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "images": [str(part.source) for part in media if isinstance(part, Image)],
        "audios": [str(part.source) for part in media if isinstance(part, Audio)],
        "timings": {name: round(seconds, 4) for name, seconds in times(answer).items()},
    }


def times(answer: Answer) -> dict[str, float]:
    """Return where the time of this process went, in seconds by step, in order."""
    usage = answer.usage
    decode = usage.seconds - usage.time_to_first_token
    total = time.perf_counter() - log.STARTED
    return log.timings() | {"first_token": usage.time_to_first_token, "decode": decode, "total": total}


def _log_times(answer: Answer) -> None:
    split = times(answer)
    rate = (answer.usage.completion_tokens - 1) / split["decode"] if split["decode"] > 0 else 0.0
    steps = ", ".join(f"{name} {seconds:.3f}" for name, seconds in split.items())
    logger.debug("seconds: %s; %d tokens, %.0f tokens/s", steps, answer.usage.completion_tokens, rate)


def _drop_piece(text: str) -> None:
    """Wait for the whole answer."""
