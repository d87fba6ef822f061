"""The chat: reads questions and pictures, shows answers, keeps the conversation.

Every turn passes the whole conversation; the engine finds out by itself what it has computed before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from mmtool.engine.base import Answer
from mmtool.errors import MMToolError, TooLongError
from mmtool.infer.answer import Model, note_on_tags, stream_answer
from mmtool.infer.terminal import StopOnInterrupt, Terminal
from mmtool.media import looks_like_sound
from mmtool.messages import Audio, Image, Message, Part, Text, split_inline_media

PROMPT = "<<< "
MULTI_LINE_PROMPT = "<<<[M] "
SYSTEM_PROMPT = "<<<[S] "
MEDIA_PROMPT = "Input a media path or URL <<< "
RULE = "-" * 50

LONG_HINT = "clear starts a new conversation, /undo forgets the last turn"

HELP = """\
clear          start a new conversation; pictures seen before stay prepared
reset-system   start one with another system text, the next line; empty for the default
multi-line     read questions of several lines, the last one ending with #
single-line    read questions of one line again
/retry         answer the last question again
/undo          forget the last question and its answer
/save FILE     add the conversation to FILE, as one line of JSON
--help         show this list
quit, exit     leave, like Ctrl-D
Ctrl-C         stop the answer, or drop the line being typed"""

MEDIA_HELP = {
    "round": "After each question comes the place for a picture: a path, a URL, or nothing.",
    "several": "After each question comes the place for pictures and sounds: paths, URLs (blanks between), or nothing.",
    "inline": "Pictures stand in the text: <img>path or URL</img>.",
    "none": "",
}


def run_chat(model: Model, terminal: Terminal, *, system: str | None = None, stream: bool = True) -> None:
    """Chat until the input ends or the user leaves.

    Args:
        model: what answers.
        terminal: where lines come from and answers go.
        system: the system text to start with; None for the template's own.
        stream: show every piece of an answer at once.
    """
    chat = Chat(model, terminal, system=system, stream=stream)
    if terminal.typed:
        terminal.say(f"{model.spec.model_type}: --help lists the commands, quit leaves.")
    try:
        while chat.open:
            try:
                chat.take_turn()
            except KeyboardInterrupt:
                if not terminal.typed:
                    raise
                terminal.say("\n(quit or Ctrl-D leaves)")
    finally:
        terminal.close()


class Chat:
    """The state of one chat and what each line of input does to it."""

    def __init__(self, model: Model, terminal: Terminal, *, system: str | None = None, stream: bool = True) -> None:
        self.model = model
        self.terminal = terminal
        self.system = system
        self.stream = stream
        self.turns: list[Message] = []  # questions and answers in turn, without the system text
        self.multi_line = False
        self.open = True

    def take_turn(self) -> None:
        """Read one question (or command), its pictures, and answer it."""
        text = self._read_text(MULTI_LINE_PROMPT if self.multi_line else PROMPT)
        if text is None:
            self.open = False
        elif text.strip() and not self._obey(text):
            asked = self._read_media(text)
            if asked is not None:
                self._answer(asked, self.turns)

    # Reading

    def _read_text(self, prompt: str) -> str | None:
        """Read a line, or in multi-line mode everything up to a line that ends with ``#``; None at the end."""
        line = self.terminal.ask(prompt)
        if line is None or not self.multi_line or find_command(line):
            return line.strip() if line else line
        lines = []
        while line is not None and not line.rstrip().endswith("#"):
            lines.append(line)
            line = self.terminal.ask("")
        if line is not None:
            lines.append(line.rstrip()[:-1])
        return "\n".join(lines).strip("\n")

    def _read_media(self, text: str) -> Message | None:
        """Return the question with its media, which have been opened; None if it was dropped."""
        style = self.model.spec.media_style
        note = note_on_tags(text, self.model.spec)
        if note:
            self.terminal.say(f"({note})")
        if style == "round":
            media = self._ask_media()
            return None if media is None else Message("user", (*media, Text(text)))
        question = Message("user", split_inline_media(text) if style == "inline" else (Text(text),))
        try:
            for part in question.media:
                self.model.template.prepare(part)
        except MMToolError as error:
            self._report(error)
            return None
        return question

    def _ask_media(self) -> tuple[Part, ...] | None:
        """Ask until something opens or nothing is wanted; None to drop the question."""
        failed = False
        while True:
            line = self.terminal.ask(MEDIA_PROMPT)
            if line is None:
                self.open = False  # a script may end without an answer here; a typed Ctrl-D leaves
                return None if failed or self.terminal.typed else ()
            source = media_source(line)
            if not source:
                return ()
            if find_command(line) and not os.path.exists(source):
                self._obey(line)
                return None
            parts = media_parts(line) if self._takes_sounds else (Image(source),)
            try:
                for part in parts:
                    self.model.template.prepare(part)
            except MMToolError as error:
                self.terminal.say(f"error: {error.message}")  # the prompt that follows is the hint
                failed = True
            else:
                return parts

    @property
    def _takes_sounds(self) -> bool:
        return "audio" in self.model.spec.modalities

    # Answering

    def _answer(self, question: Message, earlier: Sequence[Message]) -> None:
        """Answer a question that follows ``earlier`` and keep both; on an error say so and keep all as it was."""
        try:
            # The context lasts until the turn is kept: what was shown is what the model will know it has said.
            with StopOnInterrupt() if self.terminal.typed else nullcontext() as stop:
                answer = self._generate([*self._system_messages(), *earlier, question], stop)
                if answer.text or answer.finish_reason:
                    self.turns = [*earlier, question, Message("assistant", (Text(answer.text),))]
        except TooLongError as error:
            hint = LONG_HINT if earlier else "ask a shorter question, or give a smaller picture"
            self._report(TooLongError(error.message, hint, length=error.length, limit=error.limit))
        except MMToolError as error:
            self._report(error)
        except Exception:  # a bug: show it, but do not take the conversation from the person at the keyboard
            if not self.terminal.typed:
                raise
            traceback.print_exc()

    def _generate(self, messages: Sequence[Message], stop: StopOnInterrupt | None) -> Answer:
        """Show the answer and return it; one that Ctrl-C stopped has the text that was shown."""
        request = self.model.request(messages)
        write = self.terminal.write if self.stream else lambda text: None
        answer = stream_answer(self.model.engine, request, write, lambda: stop is not None and stop.requested)
        self.terminal.write("\n" if self.stream else answer.text + "\n")
        if answer.finish_reason is None:
            self.terminal.say("(stopped)")
        elif answer.finish_reason == "length" and self.terminal.typed:
            self.terminal.say(f"(cut after {len(answer.token_ids)} tokens; --max_new_tokens sets the limit)")
        self.terminal.write(RULE + "\n")
        return answer

    def _system_messages(self) -> list[Message]:
        return [] if self.system is None else [Message("system", (Text(self.system),))]

    def _report(self, error: MMToolError) -> None:
        self.terminal.say(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""))

    # Commands

    def _obey(self, line: str) -> bool:
        """Run the command in ``line``; False if it holds none."""
        command = find_command(line)
        if command is not None:
            name, argument = command
            COMMANDS[name](self, argument)
        elif re.fullmatch(r"/[a-z-]+", line.strip()) and not os.path.exists(line.strip()):
            self.terminal.say(f"unknown command {line.strip()}; --help lists the commands")
        else:
            return False
        return True

    def leave(self, argument: str) -> None:
        """End the chat."""
        self.open = False

    def clear(self, argument: str) -> None:
        """Start a new conversation."""
        self.turns = []
        self.terminal.say("(new conversation)")

    def reset_system(self, argument: str) -> None:
        """Read a new system text and start a new conversation."""
        text = self._read_text(SYSTEM_PROMPT)
        if text is None:
            self.open = False
            return
        self.system = text.strip() or None
        self.turns = []
        self.terminal.say(f"(new conversation, {'new' if self.system else 'default'} system text)")

    def use_multi_line(self, argument: str) -> None:
        """Read questions up to a line that ends with ``#``."""
        self.multi_line = True
        self.terminal.say("(a line ending with # ends the question; single-line goes back)")

    def use_single_line(self, argument: str) -> None:
        """Read questions of one line."""
        self.multi_line = False

    def retry(self, argument: str) -> None:
        """Answer the last question again; its old answer stays where that fails."""
        if not self.turns:
            self.terminal.say("(no question yet)")
            return
        self._answer(self.turns[-2], self.turns[:-2])

    def undo(self, argument: str) -> None:
        """Forget the last question and its answer."""
        if not self.turns:
            self.terminal.say("(no question yet)")
            return
        del self.turns[-2:]
        self.terminal.say("(last question forgotten)")

    def save(self, argument: str) -> None:
        """Add the conversation to a file, in a form that ``--val_dataset`` and training read."""
        path = os.path.expanduser(media_source(argument))
        if not path or not self.turns:
            self.terminal.say("(no question yet)" if path else "error: /save needs a file name")
            return
        messages = [to_dict(message) for message in (*self._system_messages(), *self.turns)]
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        try:
            with open(path, "a", encoding="utf-8", errors="replace") as file:
                file.write(line + "\n")
        except OSError as error:
            self.terminal.say(f"error: cannot write {path}: {error.strerror}")
        else:
            self.terminal.say(f"(saved in {path})")

    def help(self, argument: str) -> None:
        """List the commands."""
        self.terminal.write(f"{HELP}\n")
        style = self.model.spec.media_style
        media_help = MEDIA_HELP["several" if style == "round" and self._takes_sounds else style]
        if media_help:
            self.terminal.write(f"{media_help}\n")


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "clear": Chat.clear,
    "reset-system": Chat.reset_system,
    "multi-line": Chat.use_multi_line,
    "single-line": Chat.use_single_line,
    "quit": Chat.leave,
    "exit": Chat.leave,
    "help": Chat.help,
    "--help": Chat.help,
    "-h": Chat.help,
    "/retry": Chat.retry,
    "/undo": Chat.undo,
    "/save": Chat.save,
}


def find_command(line: str) -> tuple[str, str] | None:
    """Return the name and the argument of the command that ``line`` is, if it is one.

    The words of the guides are also taken with a slash (``/clear``) and, as typed in multi-line mode, with a ``#``.
    """
    word, _, argument = line.strip().partition(" ")
    name = word.lower().removesuffix("#")
    if name.startswith("/") and name not in COMMANDS and not name.startswith("/-"):
        name = name[1:]
    if name not in COMMANDS or (argument and name != "/save"):
        return None
    return name, argument.strip()


def media_source(line: str) -> str:
    """Return the path or URL that was typed, pasted or dragged into a line; empty for none.

    Takes off quotes, ``<img>`` tags and the backslashes that some terminals put before blanks.
    """
    text = line.strip()
    tagged = re.fullmatch(r"<(img|audio)>(.+)</\1>", text)
    if tagged:
        text = tagged[2].strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = _unquote(text)
    if "\\" in text and not os.path.exists(text):
        plain = re.sub(r"\\(.)", r"\1", text)
        text = plain if os.path.exists(os.path.expanduser(plain)) else text
    return text


def media_parts(line: str) -> tuple[Part, ...]:
    """Return the pictures and sounds that a line names: one, if the whole line is a file, or several between blanks.

    What ends like a sound, or stands in ``<audio>`` tags, is one; all else is a picture.
    """
    tagged = [part for part in split_inline_media(line.strip()) if not isinstance(part, Text) or part.text.strip()]
    if any(not isinstance(part, Text) for part in tagged):
        return tuple(new for part in tagged for new in (media_parts(part.text) if isinstance(part, Text) else (part,)))
    whole = media_source(line)
    sources = [whole]
    if " " in whole and not os.path.exists(os.path.expanduser(whole)):
        try:
            sources = shlex.split(line)
        except ValueError:  # an odd quote: the line is taken as it is, and the error names it
            sources = [whole]
    return tuple(Audio(source) if looks_like_sound(source) else Image(source) for source in sources)


def _unquote(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError:  # an odd quote inside: the outer pair is all that is known
        words = []
    return words[0] if len(words) == 1 else text[1:-1]


def to_dict(message: Message) -> dict[str, object]:
    """Return the message as OpenAI-like JSON; files stand with their whole path, so that any folder can hold it."""
    if not message.media:
        return {"role": message.role, "content": message.text}
    return {"role": message.role, "content": [_part_to_dict(part) for part in message.parts]}


def _part_to_dict(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    kind = "image" if isinstance(part, Image) else "audio"
    return {"type": kind, kind: _anywhere(str(part.source))}


def _anywhere(source: str) -> str:
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else source
