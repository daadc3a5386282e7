"""Settings whose type, default and limits are declared once, in one line, for notebooks, ``--set`` and profiles.

Nothing here imports torch, so that planning takes no time.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError, check_choice


def setting(default: Any, low: Any = None, high: Any = None, choices: tuple = (), least: int = 0) -> Any:
    """A field of :class:`Settings`: its default, and the range or the choices that are allowed.

    In a list these hold for each of its values, of which there must be ``least``.
    """
    metadata = {"low": low, "high": high, "choices": choices, "least": least}
    if isinstance(default, list | dict):
        return field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of dataclasses that check their values when made: UserError names the value and what is allowed."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = _check(each.name, getattr(self, each.name), self.kinds()[each.name], each)
            object.__setattr__(self, each.name, value)

    @classmethod
    @functools.cache
    def kinds(cls) -> dict[str, Any]:
        """The type of each setting."""
        return typing.get_type_hints(cls)

    @classmethod
    def of(cls, values: Mapping[str, Any] | Settings) -> Self:
        """These settings from ``values`` that may hold others too; defaults for those that are not there."""
        values = vars(values) if isinstance(values, Settings) else values
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    @classmethod
    def parse(cls, name: str, text: str) -> Any:
        """The value of the setting ``name`` from ``text``, as typed on a command line."""
        kind, value = cls.kinds()[name], typing.cast(Any, text)
        listed = typing.get_origin(kind) is list
        if kind is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif kind is not str:
            try:
                value = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                value = text.split(",") if listed else text
        if listed and not isinstance(value, list | tuple):
            value = [value]
        return _check(name, value, kind, cls.__dataclass_fields__[name])

    def values(self) -> dict[str, Any]:
        """All settings by name, bit widths as text: what JSON knows."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Settings):
        return value.values()
    return str(value) if isinstance(value, BitWidths) else value


def _check(name: str, value: Any, kind: Any, declared: Field) -> Any:
    """``value`` if it is of its kind and allowed; bit widths are parsed. Otherwise a :class:`UserError`."""
    rules = declared.metadata
    if typing.get_origin(kind) is list:
        listed = isinstance(value, list | tuple)
        if listed and len(value) >= rules.get("least", 0):
            return [_check(name, each, typing.get_args(kind)[0], declared) for each in value]
        example, wrong = _plain(declared.default_factory()), "empty" if listed else "not a list"  # type: ignore
        raise UserError(f"{name}={value!r} is {wrong}; allowed: a list such as {example!r}.")
    if kind is BitWidths:
        return BitWidths.parse(value, name)
    if kind in (int, float):
        return _check_number(name, value, kind, rules.get("low"), rules.get("high"))
    if isinstance(value, kind):
        return check_choice(name, value, rules["choices"]) if rules.get("choices") else value
    if issubclass(kind, Settings):  # within other settings, written as a dictionary
        try:
            return kind(**value)
        except TypeError:
            raise UserError(f"{name}={value!r} is not supported; allowed: {kind().values()} or the like.") from None
        except UserError as error:
            raise UserError(f"{name}={value!r}: {error}") from None
    allowed = {bool: "True or False", str: "text in quotes"}.get(kind, kind.__name__)
    raise UserError(f"{name}={value!r} is of another type; allowed: {allowed}.")


def _check_number(name: str, value: Any, kind: type, low: Any, high: Any) -> int | float:
    what = "a whole number" if kind is int else "a number"
    allowed = what if low is None else f"{what} from {low:,} to {high:,}"
    try:
        number = operator.index(value) if kind is int else float(value) if isinstance(value, int | float) else None
    except (TypeError, OverflowError):
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name}={value!r} is not {what}; allowed: {allowed}.")
    if not math.isfinite(number) or (low is not None and not low <= number <= high):
        raise UserError(f"{name}={value!r} is out of range; allowed: {allowed}.")
    return number if kind is int else value
