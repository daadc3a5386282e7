"""What a finished run looks like on disk, and how long such runs took."""

import functools
import heapq
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError
from dfqlib.files import METRICS, METRICS_FORMAT
from dfqlib.runner.plan import PlannedRun

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


def expected_seconds(runs: Iterable[PlannedRun], results: Path) -> dict[str, float | None]:
    """Seconds that each run will take, by its identity: those of the latest of its kind in ``results``.

    A kind is a paper, profile, data set and model. Without a recorded one, the profile table's guess for quick, else
    None.
    """
    recorded, expected = functools.cache(_recorded), {}
    for run in runs:
        guess = 60 * run.paper.minutes if run.profile == "quick" else None
        expected[run.identity] = recorded(run.folder(results).parent, run.id.rsplit("-", 2)[0]) or guess
    return expected


def _recorded(folder: Path, kind: str, latest: int = 3) -> float | None:
    """Median seconds of the latest finished runs in ``folder`` whose ids begin with ``kind``."""
    runs = sorted(finished(folder, f"{kind}-"), key=lambda run: (run[0] / METRICS).stat().st_mtime)
    return statistics.median(metrics["run"]["seconds"] for _, metrics in runs[-latest:]) if runs else None


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until the last of some runs ends, ``jobs`` at once, the longest first."""
    ends = [0.0] * jobs
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)
