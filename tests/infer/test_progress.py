import sys

import pytest

from mmtool.infer import progress
from mmtool.infer.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by ``clock.now += seconds``."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def lines(monkeypatch):
    told = []
    monkeypatch.setattr(progress.logger, "info", lambda text, *values: told.append(text % values))
    return told


def test_a_log_file_gets_a_line_every_few_seconds_with_rate_and_time_left(clock, lines):
    with Progress(total=100, done=20) as shown:
        for _ in range(8):
            clock.now += 1
            shown.advance(2, 30)
    assert lines == ["30 of 100 rows, 2 rows/s, 30 tokens/s, 0:00:35 left"]
    assert shown.summary(3) == "16 rows (3 failed) in 8.0 s, 2 rows/s, 30 tokens/s"


def test_one_row_and_a_fast_run_are_said_in_plain_words(clock):
    with Progress(total=1) as shown:
        clock.now += 0.5
        shown.advance(1, 6)
    assert shown.summary(0) == "1 row (0 failed) in 0.5 s, 2 rows/s, 12 tokens/s"
    with Progress(total=5000) as shown:
        clock.now += 0.25
        shown.advance(5000, 0)
    assert shown.summary(5000) == "5000 rows (5000 failed) in 0.2 s, 20000 rows/s, 0 tokens/s"


def test_a_total_that_is_not_known_is_not_made_up(clock, lines):
    with Progress(total=None) as shown:
        clock.now += 10
        shown.advance(5, 5)
    assert lines == ["5 rows, 0.5 rows/s, 0 tokens/s"]


def test_lines_of_a_long_run_become_rare(clock, lines):
    with Progress(total=None) as shown:
        for _ in range(36000):
            clock.now += 1
            shown.advance(1, 1)
    assert 36000 / 60 <= len(lines) <= 36000 / 60 + 60


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress(total=10, done=2) as shown:
        shown.advance(3, 4)
        shown._show()
    assert "5/10" in capsys.readouterr().err
