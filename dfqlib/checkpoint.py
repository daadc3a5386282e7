"""Checkpoints from which a stopped computation continues."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from dfqlib.errors import UserError
from dfqlib.files import atomic_path
from dfqlib.scores import Score

torch.serialization.add_safe_globals([Score])  # the one class in checkpoints, which load with ``weights_only=True``


def save_checkpoint(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state``, with the ``settings`` it was computed with, atomically; it loads with ``weights_only=True``.

    Raises OSError, naming the cause, if it cannot be written; an existing file is then unchanged.
    """
    # Through memory: Python reports a full disk as such, torch as an unexpected position.
    content = io.BytesIO()
    torch.save({"settings": settings, "state": state}, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: Path, settings: dict[str, Any], anew: bool = False) -> dict[str, Any] | None:
    """The state in ``path``, on the CPU, or None if there is no such file yet.

    Raises ``UserError`` if it was computed with other settings, or cannot be read; with ``anew`` an unreadable file
    counts as none, with a warning.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        made_by, state = content["settings"], content["state"]
    except Exception as error:
        broken = f"checkpoint={str(path)!r} cannot be read ({type(error).__name__})"
        if anew:
            warnings.warn(f"{broken}: the computation begins anew.", stacklevel=2)
            return None
        raise UserError(f"{broken}; remove it.") from None
    if differing := [key for key in settings if made_by.get(key) != settings[key]]:
        changes = ", ".join(f"{key}={settings[key]!r} (it has {made_by.get(key)!r})" for key in differing)
        raise UserError(f"checkpoint={str(path)!r} was made with other settings: {changes}; name another file.")
    return state
