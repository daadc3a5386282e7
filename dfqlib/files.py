"""Write files atomically: a reader sees the old content or the new, never part of either."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.json"  # in a run's folder: its rows, parameters and provenance
METRICS_FORMAT = 2  # raised when an older kit could misread it; files without one have format 1
# Environment variables of a notebook in a batch.
CHECKPOINTS = "DFQ_CHECKPOINTS"  # the folder of its checkpoints
CHECKPOINT_SECONDS = "DFQ_CHECKPOINT_SECONDS"  # between two of them
KEEP = "DFQ_KEEP"  # megabytes of students, generators and images that a run may keep


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_between(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the lines ``<!-- name -->`` and ``<!-- /name -->`` of a file that has them."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = path.read_text(encoding="utf-8").partition(first)
    if found and last in rest:
        write_text(path, before + first + text + last + rest.partition(last)[2])


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
