"""Wrong input, reported in one sentence before any work starts."""

import difflib
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Input a user can correct; the message names the parameter, its value and what is allowed."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback, which does not help to correct the input."""
        return [f"{type(self).__name__}: {self}"]


class Diverged(RuntimeError):
    """A loss that is no longer finite; the message names the loss, the term that broke and the iteration."""


def check_choice(parameter: str, value: T, allowed: Iterable[T]) -> T:
    """``value`` if it is among ``allowed``; otherwise a :class:`UserError` that lists them, or of many the nearest."""
    allowed = list(allowed)
    if value in allowed:
        return value
    typed, names = str(value), [str(each) for each in allowed]
    begun = [name for name in names if typed and name.startswith(typed)]
    near = begun or difflib.get_close_matches(typed, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    told = ", ".join(names)
    if len(names) > 50:
        nearest = begun or difflib.get_close_matches(typed, names, n=5) or names
        told = ", ".join(nearest[:5]) + f" and others, {len(names)} in all"
    raise UserError(f"{parameter}={value!r} is unknown{hint}; allowed: {told}.")


def check_range(parameter: str, value: float, low: float, high: float) -> float:
    """``value`` if ``low <= value <= high``; otherwise a :class:`UserError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{parameter}={value!r} is out of range; allowed: a number from {low} to {high}.")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to quote; its type's name if it has none."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
