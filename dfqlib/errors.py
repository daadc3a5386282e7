"""Wrong input, told in one sentence before any work starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Input a user can correct; the message names the parameter, its value and what is allowed."""


class Diverged(RuntimeError):
    """A loss that is no longer finite; the message names whose, which of its terms and the iteration."""


def check_choice(parameter: str, value: T, allowed: Iterable[T]) -> T:
    """``value`` if it is among ``allowed``; otherwise a :class:`UserError` that lists them, nearest first."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"{parameter}={value!r} is unknown{hint}; allowed: {', '.join(str(a) for a in allowed)}.")


def check_range(parameter: str, value: float, low: float, high: float) -> float:
    """``value`` if ``low <= value <= high``; otherwise a :class:`UserError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{parameter}={value!r} is out of range; allowed: a number from {low} to {high}.")
    return value
