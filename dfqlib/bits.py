"""Bit widths of weights and activations."""

from __future__ import annotations

import re

from dfqlib.errors import UserError


def check_bits(parameter: str, value: int) -> int:
    """``value`` if it is a whole number of bits the quantizers support, 2 to 8; otherwise a :class:`UserError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise UserError(f"{parameter}={value!r} is not a supported bit width; allowed: whole numbers from 2 to 8.")
    return value


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a name such as ``"w4a8"``, each 2 to 8; otherwise a :class:`UserError`."""
    found = re.fullmatch(r"w([2-8])a([2-8])", bits.lower()) if isinstance(bits, str) else None
    if not found:
        raise UserError(f"bits={bits!r} is not supported; allowed: names such as 'w4a8', 2 to 8 bits each.")
    return int(found[1]), int(found[2])
