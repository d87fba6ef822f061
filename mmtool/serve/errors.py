"""Errors as clients of OpenAI's interface know them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtool.errors import MediaError, MMToolError, TooLongError

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one or two sentences for a person.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return what is sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def too_busy(message: str, seconds: float) -> ApiError:
    """Return a 429 that says when to come back."""
    return ApiError(
        429, message, code="rate_limit_exceeded", headers={"Retry-After": str(max(1, round(min(seconds, 120.0))))}
    )


def stopping() -> ApiError:
    """Return a 503 for a server that is going away; another one may be there soon."""
    return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"})


def internal() -> ApiError:
    """Return a 500; what happened is in the log, not in the answer."""
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def from_user_error(error: MMToolError, param: str | None = None) -> ApiError:
    """Return the 400 for what a user can fix."""
    code = None
    if isinstance(error, TooLongError):
        code, param = "context_length_exceeded", param or "messages"
    elif isinstance(error, MediaError):
        code = "invalid_media"
    return bad_request(f"{error.message}. {error.hint}" if error.hint else error.message, param, code)
