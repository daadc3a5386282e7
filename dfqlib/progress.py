"""Progress of long loops: a bar for an interactive user, or the file named by ``DFQ_PROGRESS_FILE``.

``run_all.py`` sets it for every kernel, so that executed notebooks hold no bars and one screen shows all notebooks.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

# tqdm's own lock is shared between processes, and a kernel that ends would leave it behind.
tqdm.set_lock(threading.RLock())
T = TypeVar("T")
FILE_VARIABLE = "DFQ_PROGRESS_FILE"
SECONDS_BETWEEN_WRITES = 0.2
_loops: list[dict[str, Any]] = []  # the loops that run now, outermost first
_last_write = 0.0


def track(iterable: Iterable[T], label: str) -> Iterator[T]:
    """Yield from ``iterable`` and show how far it is, under ``label``; loops may be nested.

    Draws one bar in a terminal or a notebook, nothing on a pipe; with ``DFQ_PROGRESS_FILE`` set, :func:`read` finds
    there what this process does.
    """
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        screen = _screen()
        yield from tqdm(iterable, desc=label, leave=False, file=screen, disable=screen is None)
        return
    loop = {"label": label, "done": 0, "total": len(iterable) if hasattr(iterable, "__len__") else None}
    _loops.append(loop)
    try:
        _write(Path(file))
        for item in iterable:
            yield item
            loop["done"] += 1
            _write(Path(file))
    finally:
        # By identity: a loop left by `break` ends when it is collected, perhaps after a later one began.
        _loops[:] = [other for other in _loops if other is not loop]


def read(file: str | Path) -> list[dict[str, Any]]:
    """The running loops, outermost first, as ``{"label", "done", "total"}``; none if nothing was written yet."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def _write(file: Path) -> None:
    """Replace ``file`` at most five times a second; a full disk or a removed folder must not stop the work."""
    global _last_write
    if time.monotonic() - _last_write < SECONDS_BETWEEN_WRITES:
        return
    _last_write = time.monotonic()
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(_loops), encoding="utf-8")
        os.replace(temporary, file)


def _screen() -> TextIO | None:
    """The stream for bars: a terminal's stderr, or a notebook's stdout, since notebooks show stderr in red."""
    if sys.stderr.isatty():
        return sys.stderr
    return sys.stdout if type(sys.stdout).__module__.startswith("ipykernel") else None
