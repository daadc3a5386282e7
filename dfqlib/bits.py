"""Bit widths of weights and activations."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dfqlib.errors import UserError

Width = int | None  # None leaves the values in float


@dataclass(frozen=True, order=True)
class BitWidths:
    """Bits of a network's weights and of its activations, 2 to 8 each; None leaves them in float.

    A mapping gives every layer its own width, by the names that :func:`dfqlib.quantizers.describe.describe` uses.
    Printed as in the papers, ``W4A4``. Raises UserError for other widths; NumPy's integers are accepted.
    """

    weight: Width | Mapping[str, Width]
    activation: Width | Mapping[str, Width]

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            object.__setattr__(self, name, _checked(f"{name} bits", getattr(self, name)))

    @classmethod
    def parse(cls, text: str | Self, parameter: str = "bits") -> Self:
        """The widths that ``text`` names, such as ``"W4A8"`` or ``"w4a8"``."""
        if isinstance(text, BitWidths):
            return text
        found = re.fullmatch(r"w([2-8])a([2-8])", text.lower()) if isinstance(text, str) else None
        if not found:
            raise UserError(f"{parameter}={text!r} is not supported; allowed: names such as 'W4A8', 2 to 8 bits each.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return bits_name(*(32 if width is None else width for width in (self.weight, self.activation)))


def bits_name(weight: float | Mapping, activation: float | Mapping) -> str:
    """``W4A4``; ``W4.2A8`` for a mean over layers, ``FP32`` for 32 and 32."""
    if weight == activation == 32:
        return "FP32"
    return "W{}A{}".format(*("mixed" if isinstance(w, Mapping) else f"{w:.3g}" for w in (weight, activation)))


def check_width(parameter: str, width: Any) -> int:
    """``width`` if it is a whole number of bits that the quantizers support; otherwise a :class:`UserError`."""
    try:
        if not isinstance(width, bool) and 2 <= operator.index(width) <= 8:
            return operator.index(width)
    except TypeError:
        pass
    raise UserError(f"{parameter}={width!r} is not a supported bit width; allowed: whole numbers from 2 to 8.")


def _checked(parameter: str, width: Any) -> Any:
    if isinstance(width, Mapping):
        return {name: _checked(f"{parameter}[{name!r}]", each) for name, each in width.items()}
    return None if width is None else check_width(parameter, width)
