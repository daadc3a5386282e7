"""Where weights, data and the package's own files are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
ASSETS = PACKAGE / "data" / "assets"


def weights_file(model: str, weights: str = "") -> Path | None:
    """The weights file on this machine, found as :func:`dfqlib.models.load_teacher` finds it; None if there is none."""
    root = os.environ.get("DFQ_DATA", "")
    own = (
        [Path(root).expanduser() / "teachers" / f"{model}{suffix}" for suffix in (".safetensors", ".pth")]
        if root
        else []
    )
    places = [Path(weights)] if weights else [ASSETS / f"{model}.safetensors", *own]
    return next((place for place in places if place.is_file()), None)


def data_folder(dataset: str, parameters: dict[str, Any]) -> Path | None:
    """The folder that the data set will be read from: the one given, or ``$DFQ_DATA/<dataset>``; None: embedded."""
    if parameters.get("data_folder"):
        return Path(parameters["data_folder"])
    root = os.environ.get("DFQ_DATA", "")
    place = Path(root).expanduser() / dataset
    return place if root and dataset and place.is_dir() else None
