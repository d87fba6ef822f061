"""Messages go to stderr, plainly; stdout stays free for answers."""

import pytest

from mmtool import log


@pytest.fixture(autouse=True)
def quiet_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")


def test_messages_are_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.setup("info")
    logger = log.get_logger("mmtool.somewhere")
    logger.info("loading %s", "tiny")
    logger.warning("slow")
    logger.debug("hidden")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "mmtool: loading tiny\nmmtool: warning: slow\n")


@pytest.mark.parametrize(("level", "shown"), [("error", 1), ("warning", 2), ("info", 3), ("debug", 4)])
def test_the_level_chooses(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(level)
    for name in log.LEVELS:
        getattr(log.get_logger("part"), name)("message")
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is none of error, warning, info, debug"):
        log.setup("loud")


def test_seconds_are_recorded_and_shown_at_debug(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("debug")
    with log.timed("test of timed"):
        pass
    with log.timed("test of timed"):
        pass
    assert 0 <= log.timings()["test of timed"] < 1
    assert capsys.readouterr().err.count("mmtool: debug: test of timed: 0.000 s") == 2


def test_an_exception_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    try:
        raise ZeroDivisionError("zero")
    except ZeroDivisionError:
        log.get_logger().exception("it failed")
    err = capsys.readouterr().err
    assert err.startswith("mmtool: error: it failed\nTraceback")
    assert err.endswith("ZeroDivisionError: zero\n")
