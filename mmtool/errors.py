"""Errors that the user can fix; ``cli.main`` makes two lines on stderr of them. Other exceptions are bugs."""

from __future__ import annotations

from typing import Any


class MMToolError(Exception):
    """Say what is wrong (option and value, then what was expected) and one thing to do about it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # where nobody catches it, in a script or a notebook

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all attributes: an exception by itself only keeps its positional arguments."""
        return _restore, (type(self), vars(self))


def _restore(cls: type[MMToolError], attributes: dict[str, Any]) -> MMToolError:
    error = cls.__new__(cls, attributes["message"])
    error.__dict__.update(attributes)
    return error


class MediaError(MMToolError):
    """A picture or a sound that cannot be opened."""


class DataError(MMToolError):
    """A dataset row that cannot be used; ``line`` counts from 1 and is None where no line is known."""

    def __init__(self, message: str, hint: str | None = None, line: int | None = None) -> None:
        super().__init__(message, hint)
        self.line = line


class CheckpointError(MMToolError):
    """Weights, configuration or tokenizer files of a model folder that do not fit."""


class TooLongError(MMToolError):
    """A conversation of ``length`` positions where ``limit`` are allowed."""

    def __init__(self, message: str, hint: str | None = None, *, length: int, limit: int) -> None:
        super().__init__(message, hint)
        self.length = length
        self.limit = limit
