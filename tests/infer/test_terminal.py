"""The chat as a person sees it: a process on a pseudo terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import PIL.Image
import pytest

from mmtool.infer.terminal import StopOnInterrupt, complete_path

RULE = "-" * 50
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """A terminal with a program on it, which gets its signals from the keyboard."""

    def __init__(self, words, env):
        self.shown = ""
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=inner, stdout=inner, stderr=inner, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inner)

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait_for(self, text, timeout=60.0):
        """Read until ``text`` is shown, or with "" anything but blanks; returns everything up to it."""
        end = time.monotonic() + timeout
        while text not in self.shown or not self.shown.strip():
            left = end - time.monotonic()
            ready = select.select([self.fd], [], [], max(left, 0))[0]
            assert ready, f"{text!r} was not shown, only {self.shown!r}"
            self.read()
        before, _, self.shown = self.shown.partition(text) if text else ("", "", self.shown)
        return before

    def interrupt(self, answer):
        """Press Ctrl-C until ``answer`` is shown: readline misses it in the moment in which it sets up a line."""
        for _ in range(20):
            self.type(CTRL_C)
            end = time.monotonic() + 2
            while answer not in self.shown and select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0]:
                self.read()
            if answer in self.shown:
                break
        self.wait_for(answer)

    def read(self):
        try:
            data = os.read(self.fd, 4096)
        except OSError:  # the program has ended
            data = b""
        assert data, f"the program ended; it said {self.shown!r}"
        self.shown = ESCAPES.sub("", self.shown + data.decode("utf-8", "replace"))

    def close(self):
        os.close(self.fd)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def chat(checkpoint, tmp_path):
    """Start a chat; all of them are closed at the end."""
    screens = []

    def start(*options, **env):
        words = [sys.executable, "-m", "mmtool", "infer", "--model_id_or_path", str(checkpoint), *options]
        state = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm"}
        screens.append(Screen(words, os.environ | state | env))
        return screens[-1]

    yield start
    for screen in screens:
        screen.close()


ECHO = """
from mmtool.infer.terminal import Terminal, accept_any_text

accept_any_text()
terminal = Terminal()
while (line := terminal.ask("> ")) is not None:
    terminal.write(f"[{line}]\\n")
terminal.close()
"""


@pytest.fixture
def echo(tmp_path):
    """Start a program that answers a line with the same line."""
    screens = []

    def start(before="", **env):
        words = [sys.executable, "-c", before + ECHO]
        screens.append(Screen(words, os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm"} | env))
        screens[-1].wait_for("> ")
        return screens[-1]

    yield start
    for screen in screens:
        screen.close()


CTRL_C, CTRL_D, UP, BACKSPACE, TAB = "\x03", "\x04", "\x1b[A", "\x7f", "\t"


def test_a_person_chats(chat, tmp_path):
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "a picture.png")
    screen = chat("--max_new_tokens", "1200")
    screen.wait_for("<<< ")

    # wide characters are one character to the backspace key, and a picture is asked for after every question
    screen.type("数什么" + BACKSPACE + "字?\r")
    screen.wait_for("Input a media path or URL <<< ")
    screen.type("missing.png\r")
    assert "error: cannot open image 'missing.png'" in screen.wait_for("Input a media path or URL <<< ")
    screen.type(f"{tmp_path}/a pi" + TAB)
    screen.wait_for("a picture.png")
    screen.type("\r")

    assert "(stopped)" not in screen.wait_for(RULE)
    screen.wait_for("<<< ")

    # Ctrl-C stops an answer (this one goes on for a thousand tokens), and the chat goes on
    screen.type("clear\r")
    screen.wait_for("(new conversation)")
    screen.wait_for("<<< ")
    screen.type("123\r")
    screen.wait_for("Input a media path or URL <<< ")
    screen.type("\r")
    screen.wait_for("\r\n")
    screen.wait_for("")  # the answer has begun
    screen.type(CTRL_C)
    assert "(stopped)" in screen.wait_for(RULE)
    screen.wait_for("<<< ")

    # Ctrl-C drops a line, and never ends the chat
    screen.type("half a quest")
    screen.wait_for("half a quest")
    screen.interrupt("(quit or Ctrl-D leaves)")
    screen.wait_for("<<< ")
    screen.interrupt("(quit or Ctrl-D leaves)")
    screen.wait_for("<<< ")

    # Ctrl-C at the picture drops the question
    screen.type("a question\r")
    screen.wait_for("Input a media path or URL <<< ")
    screen.interrupt("(quit or Ctrl-D leaves)")
    screen.wait_for("<<< ")

    screen.type("clear\r")
    screen.wait_for("(new conversation)")
    screen.wait_for("<<< ")
    screen.type(CTRL_D)
    assert screen.process.wait(timeout=20) == 0
    assert "数什字?" in (tmp_path / "state/mmtool/history").read_text("utf-8")


def test_typed_lines_come_back_in_the_next_chat(echo, tmp_path):
    screen = echo()
    screen.type("数 first\r")
    screen.wait_for("[数 first]")
    screen.wait_for("> ")
    screen.type(CTRL_D)
    assert screen.process.wait(timeout=20) == 0
    history = tmp_path / "state/mmtool/history"
    assert history.stat().st_mode & 0o077 == 0  # questions are nobody else's business

    screen = echo()
    screen.type(UP + "!\r")
    screen.wait_for("[数 first!]")


def test_pasted_lines_are_one_line(echo):
    screen = echo()
    screen.type("\x1b[200~How many\nshapes?\n\x1b[201~")  # as terminals mark a paste
    screen.wait_for("shapes?")
    screen.type(" Say.\r")
    shown = screen.wait_for("]")
    assert [line for line in shown.splitlines() if line][-3:] == ["[How many", "shapes?", " Say."]


def test_a_terminal_that_knows_no_codes_gets_none(echo):
    screen = echo(TERM="dumb")
    os.write(screen.fd, b"line\r")
    raw = b""
    while b"[line]" not in raw:
        raw += os.read(screen.fd, 4096)
    assert b"\x1b" not in raw


@pytest.mark.parametrize("place", ["/dev/null/no", "/proc"])
def test_a_history_that_cannot_be_kept_changes_nothing(echo, place):
    screen = echo(XDG_STATE_HOME=place)
    screen.type("line\r")
    screen.wait_for("[line]")
    screen.wait_for("> ")
    screen.type(CTRL_D)
    assert screen.process.wait(timeout=20) == 0


def test_a_python_without_readline_still_chats(echo):
    screen = echo(before="import sys; sys.modules['readline'] = None\n")
    screen.type("line 数\r")
    screen.wait_for("[line 数]")
    screen.wait_for("> ")
    screen.type(CTRL_D)
    assert screen.process.wait(timeout=20) == 0


@pytest.mark.parametrize("lang", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_any_locale_will_do(echo, lang):
    screen = echo(LANG=lang, LC_ALL=lang)
    os.write(screen.fd, b"\xff\xe6\x95\xb0\r")
    screen.wait_for("]")
    screen.wait_for("> ")
    screen.type(CTRL_D)
    assert screen.process.wait(timeout=20) == 0


def test_prompts_do_not_go_into_a_file(tmp_path):
    typed, inner = pty.openpty()
    with open(tmp_path / "answers", "wb") as answers:
        process = subprocess.Popen([sys.executable, "-c", ECHO], stdin=inner, stdout=answers, stderr=inner)
    os.close(inner)
    os.write(typed, b"one\n\x04")
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "answers").read_text() == "[one]\n"
    assert b"> " in os.read(typed, 1000)
    os.close(typed)


def test_names_of_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "a [1].png").touch()
    assert complete_path(f"{tmp_path}/my", 0) == f"{tmp_path}/my pictures/"
    assert complete_path(f"{tmp_path}/my", 1) is None
    assert complete_path("~/my pictures/a [", 0) == f"{tmp_path}/my pictures/a [1].png"
    assert complete_path(f"{tmp_path}/none", 0) is None


def test_the_first_ctrl_c_asks_and_the_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopOnInterrupt() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
