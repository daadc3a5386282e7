"""What a finished run looks like on disk, and how long such runs took."""

import contextlib
import csv
import heapq
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError
from dfqlib.files import METRICS, METRICS_FORMAT
from dfqlib.papers import profiles
from dfqlib.places import PACKAGE, TORCHVISION_FOLDERS

#: What iterations cost, where the kit is run from its repository.
COSTS = [PACKAGE.parent / "benchmarks" / "results" / name for name in ("growth.csv", "steps.csv")]
NOTEBOOK = "notebook.ipynb"
NOTEBOOK_PAGE = "notebook.html"
#: Ends of the names of folders that hold what is left of a run, not its results.
LEFTOVER_SUFFIXES = (".unfinished", ".broken")


def complete(folder: Path) -> bool:
    """Whether a folder holds a finished run, with its notebook and an intact metrics.json."""
    return (folder / NOTEBOOK).is_file() and read_metrics(folder) is not None


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder measured; None if that is missing or broken, UserError if a newer kit wrote it."""
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(metrics, dict) or "run" not in metrics:
        return None
    if metrics.get("format", 1) > METRICS_FORMAT:
        known = f"this one reads formats up to {METRICS_FORMAT}"
        raise UserError(f"{folder / METRICS} has format {metrics['format']}, of a newer dfqlib; {known}: update it.")
    return metrics


def finished(folder: Path, kind: str = "") -> list[tuple[Path, dict[str, Any]]]:
    """Folder and metrics of each finished run in ``folder``, by name; ``kind`` is how their ids begin.

    Of a committed run only the metrics are there.
    """
    folders = [each for each in sorted(folder.glob(f"{kind}[!.]*")) if each.suffix not in LEFTOVER_SUFFIXES]
    return [(each, metrics) for each in folders if (metrics := read_metrics(each))]


def broken_files(results: Path) -> Iterable[str]:
    """A sentence for each truncated file of a results folder: its name, and what becomes of it."""
    for path in sorted(results.glob(f"*/*/[!.]*/{METRICS}")):
        if path.parent.suffix not in LEFTOVER_SUFFIXES and read_metrics(path.parent) is None:
            kept = f"a call that asks for it repeats it and keeps this folder as {path.parent.name}.broken"
            yield f"{path} is broken: its run counts as not finished; {kept}."


def expected_seconds(results: Path, profile: str, paper: str, dataset: str, model: str) -> float | None:
    """Seconds that a run of a kind will take: the median of the latest three in ``results``.

    Without one, the profile table's guess, which is for quick and images of 32 x 32, or else :func:`tuning_seconds`;
    None where nothing is known.
    """
    prefix = "".join(f"{part.replace('/', '_')}-" for part in (dataset, model) if part)
    runs = finished(results / profile / paper, prefix)
    runs.sort(key=lambda run: (run[0] / METRICS).stat().st_mtime)
    if runs:
        return statistics.median(metrics["run"]["seconds"] for _, metrics in runs[-3:])
    timed = profile == "quick" and dataset in ("", *TORCHVISION_FOLDERS)
    return 60 * profiles.paper(paper).minutes if timed else tuning_seconds(profile, paper, dataset, model)


def tuning_seconds(profile: str, paper: str, dataset: str, model: str) -> float | None:
    """Seconds of a schedule's iterations for one bit width, by what an image of one costs; None if not measured.

    ``benchmarks.steps`` and ``benchmarks.growth`` measure it, on the machine that their tables name.
    """
    seen, each = profiles.images_seen(profiles.paper(paper).values(profile, dataset, model)), None
    kind = paper, model.partition("_cifar")[0]
    for path in COSTS:
        with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):  # the last one counts
                if row["ours_s"] and (row["method"], row["model"].partition("_cifar")[0]) == kind:
                    each = float(row["ours_s"]) / float(row["batch"])
    return seen * each if seen and each else None


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until the last of some runs ends, ``jobs`` at once, the longest first."""
    ends = [0.0] * jobs
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)
