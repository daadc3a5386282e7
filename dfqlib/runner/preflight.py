"""Whether a run can start here: its images and its teacher's weights are present, readable and fit each other."""

from __future__ import annotations

import functools
from itertools import islice
from typing import Any

from dfqlib import places
from dfqlib.errors import UserError
from dfqlib.runner import plan

#: Of a folder with more files than this (ImageNet), only the layout, the classes and one image are checked.
READ_AHEAD = 20_000


def missing(dataset: str, model: str, parameters: dict[str, Any] | None = None) -> str:
    """What is not on this machine and cannot be downloaded, as one clause; empty if nothing. Reads no file."""
    parameters = parameters or {}
    if dataset and not places.data_folder(dataset, parameters) and not any(places.ASSETS.glob(f"{dataset}-2k.*")):
        return f"needs the test images of {dataset} (in $DFQ_DATA/{dataset}, or --set data_folder=FOLDER)"
    if model == "resnet34_cifar100" and not places.weights_file(model, parameters.get("weights", "")):
        return f"needs weights of {model} (notebooks/00_teachers.ipynb trains them; --set weights=FILE)"
    return ""


def downloads(model: str) -> bool:
    """Whether the teacher's weights are its library's own, fetched at first use."""
    return bool(model) and model != "resnet34_cifar100" and places.weights_file(model) is None


def obstacle(run: plan.PlannedRun) -> str:
    """Why a run cannot start, as one sentence; empty if it can. May download a teacher."""
    parameters = run.parameters
    # A notebook that quantizes nothing trains teachers, so it needs none.
    dataset, model = parameters.get("dataset", ""), parameters.get("model", "") if run.paper.methods else ""
    reason = missing(dataset, model, parameters)
    if reason:
        return f"{run.name}: {reason}."
    try:
        folder, weights = places.data_folder(dataset, parameters), parameters.get("weights", "")
        if folder:
            _read_images(dataset, str(folder))
        if model and (
            weights or places.weights_file(model) is None or places.weights_file(model).parent != places.ASSETS
        ):
            _read_teacher(model, weights)
    except UserError as error:
        return str(error)
    return ""


@functools.cache
def _read_images(dataset: str, folder: str) -> None:
    from dfqlib.data.image_sets import check_folder, load_test  # here, since they import torch

    few = len(list(islice(plan.Path(folder).rglob("*"), READ_AHEAD))) < READ_AHEAD
    (load_test if few else check_folder)(dataset, folder)


@functools.cache
def _read_teacher(model: str, weights: str) -> None:
    from dfqlib.models.teacher import load_teacher

    load_teacher(model, weights or None)
