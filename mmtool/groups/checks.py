"""What the checks of option values share."""

import math
from collections.abc import Callable

from mmtool.errors import MMToolError


def require(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise ``MMToolError`` where the ``value`` of option ``name`` is not ``valid``; the hint says what is expected."""
    if not valid:
        shown = f"{value:g}" if isinstance(value, float) else value
        raise MMToolError(f"--{name} {shown} is out of range", f"Give --{name} {expected}.")


def unset_or(value: float | None, valid: Callable[[float], bool]) -> bool:
    """Whether ``value`` is None, or finite and ``valid``."""
    return value is None or (math.isfinite(value) and valid(value))
