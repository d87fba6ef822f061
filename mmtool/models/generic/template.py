"""Prompts of any model: its own chat template writes them, its own processor expands the media."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.media import load_audio, load_image
from mmtool.messages import Audio, Image, Message, Text, to_messages
from mmtool.models.common.merge import same_shape
from mmtool.models.generic.chat import ChatWriter, kind_of
from mmtool.models.generic.tools import check_no_control, check_tool_turns, find_call_format
from mmtool.template.base import MediaInput, Segment, Template, content_key
from mmtool.template.formats import ChatFormat, Piece

# Inputs of a processor that stand for the text or its tokens; everything else belongs to the media.
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_TOKEN_FIELDS = ("token_type_ids", "mm_token_type_ids")
_KEYWORDS = {"image": "images", "audio": "audio"}
_PARTS = {"image": "image_processor", "audio": "feature_extractor"}
_SAMPLING_RATE = 16_000
_PROBES = ((48, 32), (32, 96))  # width and height of pictures that show whether a processor treats two otherwise
_TEMPLATE_HINT = "Put the release's chat_template.jinja into the folder."


@dataclass(frozen=True)
class ExpandedMedia(MediaInput):
    """A medium with the text that the processor writes for it; tokens of its own begin and end the part ``core``."""

    text: str = ""
    core: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Stretch:
    """A piece of the prompt on its way to tokens."""

    piece: Piece
    text: str
    media: ExpandedMedia | None = None


class AutoTemplate(Template):
    """The chat template and the processor of a model, as they are.

    Token ids are those of ``processor.apply_chat_template``, with two exceptions: a control token that somebody typed
    stays text, and text is tokenised apart on both sides of where an answer starts and of where it ends, because
    training and inference must see the same ids.

    Without a chat template (a base model), a conversation is one text to continue; training learns the answer behind
    it. More than that is an error.
    """

    template_type = "auto"
    prepares_alone = True  # the processor tokenises what it writes for a medium
    chat_format = ChatFormat(user=("", ""), assistant="", answer=("", ""))

    def __init__(self, processor: Any, *, system: str | None = None, **settings: Any) -> None:
        """Find out how the chat template wants to be asked."""
        super().__init__(processor, system="", **settings)
        self.default_text = system  # None is what the template writes by itself
        self.modalities = tuple(
            kind
            for kind in ("image", "audio")
            if hasattr(processor, _PARTS[kind]) and getattr(processor, f"{kind}_token", None) is not None
        )
        self._places = {kind: getattr(processor, f"{kind}_token") for kind in self.modalities}
        self._added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._special = special | set(self.tokenizer.all_special_tokens) | set(self._places.values())
        self._joint: dict[tuple[str, ...], list[ExpandedMedia]] = {}
        self._depends: dict[str, bool] = {}  # by kind: whether a medium is prepared otherwise beside another
        self._writer: ChatWriter | None = None
        stop_ids = [self.tokenizer.eos_token_id, *getattr(self.tokenizer, "generation_stop_ids", ())]
        if self._chat_template is not None:
            ends = [token for token in self.tokenizer.convert_ids_to_tokens(stop_ids) if token is not None]
            self._writer = ChatWriter(self._render_template, self._places, self._special, ends)
            stop_ids += [
                self._added[token] for token in self._special if token in self._added and self._ends_with(token)
            ]
        self._stop_ids = tuple(dict.fromkeys(stop_ids))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, the generation config's, and what the chat template ends it with."""
        return self._stop_ids

    def _ends_with(self, token: str) -> bool:
        return bool(token) and self._writer.end.endswith(token)

    # -- the chat template -------------------------------------------------------------------------------------------

    @property
    def _chat_template(self) -> str | None:
        own = getattr(self.processor, "chat_template", None)  # a TextProcessor has none
        return own if own is not None else self.tokenizer.chat_template

    def _render_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        own = getattr(self.processor, "chat_template", None)
        owner = self.processor if own is not None else self.tokenizer
        more = {"tools": tools} if tools else {}
        return owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **more)

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> AutoTemplate:
        """Return a template whose prompts tell of ``tools``; see ``Template.with_tools``."""
        if self._writer is None:
            raise MMToolError("this model has no chat template, so it knows no tools", _TEMPLATE_HINT)
        check_no_control([dict(tool) for tool in tools], self._special, "tools")
        changed = copy.copy(self)
        changed.call_format = find_call_format(
            self._render_template, self._writer.end, self._special, self._writer.user_as_parts
        )
        given = [dict(tool) for tool in tools]
        changed._writer = self._writer.with_render(partial(self._render_template, tools=given))
        return changed

    def check(self, messages: Sequence[Message], train: bool) -> None:
        """Raise MMToolError for a conversation that the template cannot express; see ``Template.check``."""
        if self.call_format is None:
            super().check(messages, train)
            return
        for index, message in enumerate(messages):
            calls = [[call.name, dict(call.arguments)] for call in message.tool_calls]
            check_no_control(calls, self._special, f"messages[{index}].tool_calls")
        check_tool_turns(messages, train)
        for index, message in enumerate(messages):
            if message.media and message.role != "user":
                raise MMToolError(f"messages[{index}]: media stand in user messages only")
            if message.media:
                super().check([message], False)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces of text and media; see ``Template.render``."""
        messages = to_messages(messages)
        if train and [message.role for message in messages] == ["assistant"]:
            return super().render(messages, train)
        self.check(messages, train)
        if self.default_text is not None and messages[0].role != "system":
            messages = [Message("system", (Text(self.default_text),)), *messages]
        if self._writer is None:
            return self._plain_pieces(messages)
        pieces = self._writer.pieces(messages, train)
        last = messages[-1]
        if train and last.train and not self._writer.end:  # or the model would never learn to stop
            pieces.append(Piece(self.tokenizer.eos_token, control=True, answer=True, train=True))
        return pieces

    def _plain_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        if messages[0].role == "system" and not messages[0].text:
            messages = messages[1:]
        if messages[0].role == "system" or len(messages) > 2:
            raise MMToolError(
                "this model has no chat template, so it takes one text to continue: no system text, no earlier rounds",
                _TEMPLATE_HINT,
            )
        parts = messages[0].parts
        pieces = [Piece(part.text) if isinstance(part, Text) else Piece(media=part) for part in parts]
        for answer in messages[1:]:
            learned = answer.train
            pieces += [
                Piece(answer.text, answer=True, train=learned),
                Piece(self.tokenizer.eos_token, control=True, answer=True, train=learned),
            ]
        return pieces

    def _control_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token) if token else None
        if index is None or self.tokenizer.convert_ids_to_tokens(index) != token:
            raise MMToolError(
                f"the tokenizer has no end token (eos_token is {token!r})",
                "Take tokenizer_config.json from the release.",
            )
        return index

    # -- tokens ------------------------------------------------------------------------------------------------------

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt before any truncation.

        The prompt is tokenised in one go, as the processor does it, but for the borders of answers and for places
        where a control token would come of what somebody typed: there the text is cut, so that none does.
        """
        stretches = self._stretches(self.render(messages, train))
        text = "".join(stretch.text for stretch in stretches)
        segments = [Segment((Piece(token, control=True),), [index]) for token, index in self._prefix(text)]
        run: list[Stretch] = []
        for stretch in stretches:
            if run and _kind_of_run(stretch) != _kind_of_run(run[0]):
                segments += self._run_segments(run, first=len(segments) == 0)
                run = []
            if stretch.text:
                run.append(stretch)
        return segments + (self._run_segments(run, first=len(segments) == 0) if run else [])

    def _stretches(self, pieces: Sequence[Piece]) -> list[Stretch]:
        media = self._expanded([piece.media for piece in pieces if piece.media is not None])
        stretches = []
        for piece in pieces:
            if piece.media is None:
                self._check_text(piece.text)
                stretches.append(Stretch(piece, piece.text))
            else:
                item = next(media)
                lead, tail = item.text[: item.core[0]], item.text[item.core[1] :]
                stretches.append(Stretch(replace(piece, text=lead, media=None, control=True), lead))
                stretches.append(Stretch(replace(piece, control=True), item.text[slice(*item.core)], item))
                stretches.append(Stretch(replace(piece, text=tail, media=None, control=True), tail))
        return stretches

    def _prefix(self, text: str) -> list[tuple[str, int]]:
        """Return the tokens that the processor puts in front of a prompt whose template does not write them."""
        bos = self.tokenizer.bos_token
        if self._writer is not None and (not self.modalities or (bos is not None and text.startswith(bos))):
            return []
        plain, full = (self.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
        at = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
        return [(self.tokenizer.convert_ids_to_tokens(index), index) for index in full[:at]]

    def _run_segments(self, run: Sequence[Stretch], first: bool) -> list[Segment]:
        """Tokenise stretches that are all of an answer or all not; media are found again by their tokens."""
        ids = self._run_ids(run, first)
        segments: list[Segment] = []
        pieces: list[Piece] = []
        position = 0
        for stretch in run:
            if stretch.media is None:
                pieces.append(stretch.piece)
                continue
            at = _find(ids, stretch.media.ids, position)
            if at is None:
                raise MMToolError(
                    f"the tokenizer does not keep the {stretch.media.kind} tokens {stretch.text[:80]!r} together",
                    "The processor and the tokenizer in the folder do not belong together.",
                )
            segments += [Segment(tuple(pieces), ids[position:at])] if pieces else []
            position = at + stretch.media.length
            segments.append(Segment((stretch.piece,), ids[at:position], stretch.media))
            pieces = []
        return segments + ([Segment(tuple(pieces), ids[position:])] if pieces else [])

    def _run_ids(self, run: Sequence[Stretch], first: bool) -> list[int]:
        text = "".join(stretch.text for stretch in run)
        cuts = self._cuts(run, text)
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._ids(text[start:end], first=first and start == 0)
        meant = Counter(token for token in self._found_in_control(run))
        wanted = Counter({self._added[token]: count for token, count in meant.items()})
        special = {self._added[token] for token in self._special if token in self._added}
        typed = [index for index, count in Counter(ids).items() if index in special and count > wanted[index]]
        if typed:
            token = self.tokenizer.convert_ids_to_tokens(typed[0])
            raise MMToolError(f"the tokenizer makes the control token {token!r} of something in the text", "Reword it.")
        return ids

    def _ids(self, text: str, first: bool) -> list[int]:
        """Tokenise a part of a text; SentencePiece puts a space in front of a first part only."""
        if not first:
            newline = self.tokenizer.encode("\n", add_special_tokens=False)
            ids = self.tokenizer.encode("\n" + text, add_special_tokens=False)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _cuts(self, run: Sequence[Stretch], text: str) -> list[int]:
        """Return where to cut ``text`` so that no control token comes of anything but what the template wrote."""
        written = re.compile("|".join(map(re.escape, self._added)) or "(?!)")
        used = {token for stretch in run if stretch.piece.control for token in written.findall(stretch.text)}
        in_answers = self._special  # others may be what the model writes itself, like <think>
        elsewhere = self._special | {token for token in used if not token.isspace()}
        spans = _control_spans(run)
        cuts = set()
        for token in elsewhere:
            at = text.find(token)
            while at >= 0:
                end = at + len(token)
                meant = any(start <= at and end <= stop for start, stop in spans)
                if not meant and (token in in_answers or not run[0].piece.answer):
                    if len(token) == 1:
                        raise MMToolError(
                            f"the text has the control token {token!r} in it, which cannot be taken apart"
                        )
                    cuts.add(at + 1)
                at = text.find(token, at + 1)
        return sorted(cuts)

    def _found_in_control(self, run: Sequence[Stretch]) -> Iterator[str]:
        """Return the special tokens that the template and the processor wrote."""
        longest_first = sorted((token for token in self._special if token in self._added), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        text = "".join(stretch.text for stretch in run)
        for start, stop in _control_spans(run):
            yield from pattern.findall(text[start:stop])

    def _check_text(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MMToolError(
                f"the text has a character that UTF-8 cannot write: {error.object[error.start : error.end]!a}",
                "It usually comes from a file or a terminal that is not in UTF-8.",
            ) from None

    # -- media -------------------------------------------------------------------------------------------------------

    def media_input(self, part: Image | Audio) -> ExpandedMedia:
        """Open a medium and let the processor prepare it alone; ``start`` is 0 until it has a place."""
        return self._process([self._open(part)], kind_of(part))[0]

    def _open(self, part: Image | Audio) -> Any:
        kind = kind_of(part)
        if kind not in self.modalities:
            raise MMToolError(f"this model takes {' and '.join(('text', *self.modalities))}, not {kind}")
        if isinstance(part, Audio):
            rate = getattr(self.processor.feature_extractor, "sampling_rate", _SAMPLING_RATE)
            return load_audio(part.source, self.media_limits, sampling_rate=rate)
        return PIL.ImageOps.exif_transpose(load_image(part.source, self.media_limits)).convert("RGB")

    def _expanded(self, parts: Sequence[Image | Audio]) -> Iterator[ExpandedMedia]:
        """Give the media of a conversation as the processor prepares them together."""
        items = [self.prepare(part) for part in parts]
        for kind in self.modalities:
            places = [index for index, item in enumerate(items) if item.kind == kind]
            if len(places) < 2 or not self._depends_on_others(kind):
                continue
            key = tuple(items[index].key for index in places)
            if key not in self._joint:
                self._joint.clear()  # the conversation that goes on is the one to keep
                self._joint[key] = self._process([self._open(parts[index]) for index in places], kind)
            for index, item in zip(places, self._joint[key], strict=True):
                items[index] = item
        return iter(items)

    def _depends_on_others(self, kind: str) -> bool:
        """Whether the processor prepares a medium otherwise when there is another, as LLaVA-OneVision does."""
        if kind not in self._depends:
            self._depends[kind] = False
            if kind == "image":
                pictures = [PIL.Image.new("RGB", size, "gray") for size in _PROBES]
                together = self._process(pictures, kind)
                alone = [self._process([picture], kind)[0] for picture in pictures]
                self._depends[kind] = [item.ids for item in together] != [item.ids for item in alone]
        return self._depends[kind]

    def _process(self, opened: Sequence[Any], kind: str) -> list[ExpandedMedia]:
        """Run the processor over the places of some media, and share its results out among them."""
        # Nested, as apply_chat_template hands pictures over: it tells one conversation from several.
        keywords: dict[str, Any] = {_KEYWORDS[kind]: [list(opened)] if kind == "image" else list(opened)}
        if kind == "audio":
            keywords["sampling_rate"] = getattr(self.processor.feature_extractor, "sampling_rate", _SAMPLING_RATE)
        place = self._places[kind]
        recorder = _Recorder(self.tokenizer)
        processor = copy.copy(self.processor)
        processor.tokenizer = recorder  # it shows the text with the media expanded
        border = "\ue0f2"
        try:
            outputs = processor(
                text=[border + border.join([place] * len(opened)) + border],
                return_tensors="pt",
                add_special_tokens=False,
                **keywords,
            )
        except (ValueError, TypeError) as error:
            raise MMToolError(f"the processor refuses the {kind}: {error}") from error
        texts = recorder.text.split(border)[1:-1]
        assert len(texts) == len(opened), "the processor keeps what stands between media"
        inputs = {name: _as_tensor(value, name) for name, value in outputs.items() if name not in _TEXT_INPUTS}
        per_item, shared = _shared_out(inputs, len(opened))
        fields = {name: outputs[name][0].tolist() for name in _TOKEN_FIELDS if name in outputs}
        items, position, all_ids = [], 0, outputs["input_ids"][0].tolist()
        for text, own in zip(texts, per_item, strict=True):
            core = self._core(text)
            ids = self.tokenizer.encode(text[slice(*core)], add_special_tokens=False)
            at = _find(all_ids, ids, position)
            kinds = (
                {name: tuple(values[at : at + len(ids)]) for name, values in fields.items()} if at is not None else {}
            )
            position = position if at is None else at + len(ids)
            feature = Counter(ids).most_common(1)[0][0]
            items.append(
                ExpandedMedia(
                    kind,
                    0,
                    len(ids),
                    own,
                    content_key(own),
                    ids=tuple(ids),
                    feature_index=tuple(index for index, token in enumerate(ids) if token == feature),
                    token_fields={name: values for name, values in kinds.items() if any(values)},
                    shared=shared,
                    text=text,
                    core=core,
                )
            )
        return items

    def _core(self, text: str) -> tuple[int, int]:
        """Return the part of an expansion from its first added token to its last: it tokenises alone as in a prompt."""
        pattern = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))))
        matches = [match for match in pattern.finditer(text) if not match[0].isspace()]
        if not matches:
            raise MMToolError(f"the processor writes {text[:80]!r} for a medium, without a token of its own")
        return matches[0].start(), matches[-1].end()

    def media_tensors(self, rows: Sequence[Sequence[MediaInput]]) -> dict[str, Tensor]:
        """Return the tensors of the media of several conversations by name, padded with zeros where shapes differ."""
        gathered: dict[str, list[Tensor]] = {}
        for media in rows:
            seen: set[str] = set()
            for item in media:
                for name, tensor in item.inputs.items():
                    if name not in item.shared or name not in seen:
                        gathered.setdefault(name, []).append(tensor)
                        seen.add(name)
        return {name: torch.cat(same_shape(tensors)) for name, tensors in gathered.items()}

    # -- batches -----------------------------------------------------------------------------------------------------

    def encode(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> dict[str, Any]:
        """Encode a conversation; see ``Template.encode``.

        What the model wants to know of each position beside the id (``mm_token_type_ids``) is there as well.
        """
        encoded = super().encode(messages, train)
        return encoded | token_fields(encoded["media"], len(encoded["input_ids"]))

    def collate(
        self, batch: Sequence[Mapping[str, Any]], padding_side: Literal["left", "right"] | None = None
    ) -> dict[str, Tensor]:
        """Pad encoded conversations to one length and stack them; see ``Template.collate``."""
        collated = super().collate(batch, padding_side)
        names = sorted({name for row in batch for item in row["media"] for name in item.token_fields})
        for name in names:
            values = torch.zeros_like(collated["input_ids"])
            for target, mask, row in zip(values, collated["attention_mask"].bool(), batch, strict=True):
                target[mask] = torch.tensor(row.get(name, [0] * len(row["input_ids"])), dtype=torch.long)
            collated[name] = values
        if names:
            del collated["position_ids"]  # the model makes its own of them, along several axes
        return collated


class _Recorder:
    """A tokenizer that keeps the text it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self._tokenizer(text, *args, **kwargs)


def token_fields(media: Sequence[MediaInput], length: int) -> dict[str, list[int]]:
    """Return what models want to know of each of ``length`` positions beside the ids, by name."""
    fields: dict[str, list[int]] = {}
    for item in media:
        for name, values in item.token_fields.items():
            fields.setdefault(name, [0] * length)[item.start : item.start + item.length] = values
    return fields


def _control_spans(run: Sequence[Stretch]) -> list[tuple[int, int]]:
    """Return where in the joined text the template or the processor wrote, neighbours joined."""
    spans: list[tuple[int, int]] = []
    start = 0
    for stretch in run:
        end = start + len(stretch.text)
        if stretch.piece.control and end > start:
            joined = bool(spans) and spans[-1][1] == start
            spans = [*spans[:-1], (spans[-1][0], end)] if joined else [*spans, (start, end)]
        start = end
    return spans


def _kind_of_run(stretch: Stretch) -> tuple[bool, bool]:
    return stretch.piece.answer, stretch.piece.train


def _find(ids: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    wanted = list(wanted)
    last = len(ids) - len(wanted)
    return next(
        (at for at in range(start, last + 1) if ids[at] == wanted[0] and ids[at : at + len(wanted)] == wanted), None
    )


def _as_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value):
        value = torch.cat(same_shape(list(value)))
    if not isinstance(value, Tensor):
        raise MMToolError(f"the processor of this model gives {name} as a {type(value).__name__}, not as a tensor")
    return value


def _shared_out(inputs: Mapping[str, Tensor], count: int) -> tuple[list[dict[str, Tensor]], frozenset[str]]:
    """Share the tensors of ``count`` media out among them; return the names of those that belong to all."""
    if count == 1:
        return [dict(inputs)], frozenset()
    per_item: list[dict[str, Tensor]] = [{} for _ in range(count)]
    shared = set()
    for name, tensor in inputs.items():
        if len(tensor) != count:
            shared.add(name)
        for index, own in enumerate(per_item):
            own[name] = tensor if name in shared else tensor[index : index + 1]
    return per_item, frozenset(shared)
