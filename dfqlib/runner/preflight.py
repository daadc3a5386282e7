"""Whether a run can start here: its images and its teacher's weights are present, readable and fit each other."""

import functools
from pathlib import Path
from typing import Any

from dfqlib import places
from dfqlib.errors import UserError
from dfqlib.runner.plan import PlannedRun

#: Of a folder with more images than this (ImageNet), only the layout, the classes and one image are checked.
READ_AHEAD = 20_000
#: Models of the published rows whose weights nobody published.
UNPUBLISHED = ("resnet34_cifar100",)


def missing(dataset: str, model: str, parameters: dict[str, Any] | None = None) -> str:
    """What is not on this machine and cannot be downloaded, as one clause; empty if nothing. Reads no file."""
    parameters = parameters or {}
    if dataset and not places.data_folder(dataset, parameters) and not any(places.ASSETS.glob(f"{dataset}-2k.*")):
        return f"needs the test images of {dataset} (in $DFQ_DATA/{dataset}, or --set data_folder=FOLDER)"
    if model in UNPUBLISHED and not places.weights_file(model, parameters.get("weights", "")):
        return f"needs weights of {model} (notebooks/00_teachers.ipynb trains them; --set weights=FILE)"
    return ""


def downloads(model: str) -> bool:
    """Whether the teacher's weights are its library's own, fetched at first use."""
    return bool(model) and model not in UNPUBLISHED and places.weights_file(model) is None


def obstacle(run: PlannedRun, download: bool = True) -> str:
    """Why a run cannot start, as one sentence; empty if it can. May ``download`` a teacher, else supposes it."""
    parameters, dataset = run.parameters, run.parameters.get("dataset", "")
    # A notebook that quantizes nothing trains teachers, so it needs none.
    model = parameters.get("model", "") if run.paper.methods else ""
    if reason := missing(dataset, model, parameters):
        return f"{reason}."
    try:
        if folder := places.data_folder(dataset, parameters):
            _read_images(dataset, folder, model)
        weights = places.weights_file(model, parameters.get("weights", ""))
        if model and (weights != places.ASSETS / f"{model}.safetensors" if weights else download):
            _read_teacher(model, weights)
    except UserError as error:
        return str(error)
    return ""


@functools.cache
def _read_images(dataset: str, folder: Path, model: str) -> None:
    from dfqlib.data.image_sets import check_folder, load_test  # here, since they import torch
    from dfqlib.models.zoo import entry_of

    if len(places.image_files(folder)) >= READ_AHEAD:
        return check_folder(dataset, folder)
    size: Any = entry_of(model).input_size if model else None  # to which the notebook crops them; one number
    load_test(dataset, folder, size=size)


@functools.cache
def _read_teacher(model: str, weights: Path | None) -> None:
    from dfqlib.models.teacher import load_teacher

    load_teacher(model, weights)
