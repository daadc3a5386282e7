"""Freed memory that a loop takes again, instead of handing it back to the system after every layer.

glibc returns large blocks as soon as they are free, and the system clears each of their pages when they are taken
again: with images in hundreds that costs a tenth of an iteration on a CPU. Every iteration needs the same blocks.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from dfqlib.acceleration import uses

# Numbers of mallopt(3), and what glibc's own adaptation to large blocks ends at.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
HELD = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}
GIVEN_BACK = {TRIM_THRESHOLD: 64 * 2**20, MMAP_THRESHOLD: 32 * 2**20, MMAP_MAX: 65536}


@contextmanager
def held_memory() -> Iterator[None]:
    """Inside, or in a function decorated with it, freed memory stays with the process; afterwards it is given back.

    Without glibc (macOS, Windows, musl) nothing is changed.
    """
    if not uses("held_memory") or _glibc() is None:
        yield
        return
    hold()
    try:
        yield
    finally:
        give_back()


def hold() -> None:
    """Keep freed memory from now on."""
    _set(HELD)


def give_back() -> None:
    """Give freed memory back to the system, what is free now and what will be."""
    _set(GIVEN_BACK)
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    if (libc := _glibc()) is not None:
        for option, value in options.items():
            libc.mallopt(option, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
