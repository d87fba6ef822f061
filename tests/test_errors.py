"""Errors carry a message, a hint and, where they have one, a place."""

import pickle
import traceback

import pytest

from mmtool.errors import CheckpointError, DataError, MediaError, MMToolError, TooLongError


@pytest.mark.parametrize("cls", [MMToolError, MediaError, DataError, CheckpointError])
def test_an_error_is_its_message_and_a_hint(cls: type[MMToolError]) -> None:
    error = cls("it is broken", "Mend it.")
    assert (str(error), error.message, error.hint) == ("it is broken", "it is broken", "Mend it.")
    assert cls("no hint").hint is None
    shown = "".join(traceback.format_exception(error))
    assert shown.endswith("it is broken\nhint: Mend it.\n")  # what a script or a notebook shows
    assert isinstance(error, MMToolError)


def test_special_errors_say_where() -> None:
    assert DataError("bad row", line=7).line == 7
    error = TooLongError("too long", length=9, limit=8)
    assert (error.length, error.limit, error.hint) == (9, 8, None)


@pytest.mark.parametrize(
    "error", [MMToolError("a", "b"), DataError("a", "b", line=3), TooLongError("a", "b", length=2, limit=1)]
)
def test_errors_cross_process_borders(error: MMToolError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), vars(again)) == (type(error), vars(error))
