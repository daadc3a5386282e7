"""What a finished run looks like on disk, and how long such runs took."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dfqlib.files import METRICS
from dfqlib.runner.plan import PlannedRun

NOTEBOOK = "notebook.ipynb"
NOTEBOOK_PAGE = "notebook.html"
#: Ends of the names of folders that hold what is left of a run, not its results.
LEFTOVER_SUFFIXES = (".unfinished", ".broken")


def complete(folder: Path) -> bool:
    """Whether a folder holds a finished run: one without a notebook, or with a broken metrics.json, is none."""
    return (folder / NOTEBOOK).is_file() and read_metrics(folder) is not None


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder measured; None if metrics.json is not there, or not whole."""
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and "run" in metrics else None


def broken_files(results: Path) -> Iterable[str]:
    """A sentence for each file of a results folder that was cut off in the middle: its name, and what becomes of it."""
    for path in sorted(results.glob(f"*/*/[!.]*/{METRICS}")):
        if path.parent.suffix not in LEFTOVER_SUFFIXES and read_metrics(path.parent) is None:
            yield (
                f"{path} is broken: its run counts as not finished; a call that asks for it runs it again and keeps "
                f"this folder as {path.parent.name}.broken."
            )
    for path in sorted([*results.glob("results.csv"), *results.glob("*/results.csv")]):
        if not path.read_bytes().endswith(b"\n"):
            yield f"{path} is broken: its whole lines are kept, and a copy of it as {path.name}.broken."


def expected_seconds(runs: Iterable[PlannedRun], results: Path) -> dict[str, float | None]:
    """How long each run will take, by its identity: what the latest ones of its kind in ``results`` took.

    A kind is a paper, profile, data set and model. Where none is recorded it is the profile table's guess, which is for
    quick; None for other profiles.
    """
    kinds: dict[tuple[Path, str], float | None] = {}
    expected = {}
    for run in runs:
        folder = run.folder(results)
        kind = folder.parent, run.id.rsplit("-", 2)[0]
        if kind not in kinds:
            guess = 60 * run.paper.minutes if run.profile == "quick" else None
            kinds[kind] = _recorded(*kind) or guess
        expected[run.identity] = kinds[kind]
    return expected


def _recorded(folder: Path, kind: str, latest: int = 3) -> float | None:
    """Median seconds of the latest complete runs in ``folder`` whose ids begin with ``kind``."""
    files = [file for file in folder.glob(f"{kind}-*/{METRICS}") if file.parent.suffix not in LEFTOVER_SUFFIXES]
    newest = sorted(files, key=lambda file: file.stat().st_mtime)[-latest:]
    read = [metrics for file in newest if (metrics := read_metrics(file.parent))]
    seconds = [metrics["run"]["seconds"] for metrics in read]
    return statistics.median(seconds) if seconds else None


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until the last of some runs ends, ``jobs`` at once, the longest first."""
    ends = [0.0] * jobs
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)
