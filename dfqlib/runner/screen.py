"""What the batch is doing, and how long it will go on: a live screen in a terminal, plain lines on a pipe."""

import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text
from rich.theme import Theme

from dfqlib import progress
from dfqlib.runner.run_folder import makespan

SECONDS_BETWEEN_LINES = 30
#: Styles of the states, in the order in which runs are shown where there is no room for all of them.
STATES = {"runs": "bold", "failed": "red", "stopped": "yellow", "waits": "dim"}
STATES |= {"done": "green", "skipped": "yellow", "found": "green"}


class Row(NamedTuple):
    """A run on the screen: its name, its kind, and the seconds that runs of this kind take, None where unknown."""

    name: str
    kind: Hashable = None
    seconds: float | None = None


class Screen(Progress):
    """Shows one line per run and one for all of them while the batch runs, ``places`` at once; a context manager.

    A terminal is redrawn four times a second, with as many runs as it has room for. On a pipe a line is printed when a
    run starts and ends, and every half minute one for all runs and one for each that computes.
    """

    def __init__(self, console: Console, rows: Iterable[Row], places: int = 1) -> None:
        state, bar = TextColumn("[{task.fields[state]}]{task.fields[state]}"), BarColumn(16, pulse_style="bar.back")
        name, note = (TextColumn("{task." + text + "}", markup=False) for text in ("description", "fields[note]"))
        columns = state, name, bar, TimeElapsedColumn(), note
        self._places, self._over = places, threading.Event()
        self._terminal = console  # rich draws once before its own is set
        super().__init__(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal)
        console.push_theme(Theme(STATES))
        for row in rows:
            self.add_task(row.name, start=False, total=1.0, state="waits", note="", **row._asdict())

    def start(self) -> None:
        super().start()
        if self.disable:
            self.say(self._overall())
            threading.Thread(target=self._print_running, daemon=True).start()

    def stop(self) -> None:
        self._over.set()
        super().stop()

    def run_starts(self, index: int, cells: int, file: Path) -> None:
        """Run ``index`` starts, perhaps again: its notebook has ``cells`` code cells, its loops report to ``file``."""
        started = {"state": "runs", "note": "", "cell": 0, "cells": cells, "file": file}
        self.reset(index, **self.tasks[index].fields | started)
        self._print(self.tasks[index], "starts")

    def cell_ends(self, index: int) -> None:
        """One more cell of run ``index`` is finished, and with it its loops."""
        fields = self.tasks[index].fields
        fields["cell"] += 1
        fields["file"].unlink(missing_ok=True)

    def run_ends(self, index: int, state: str, note: str) -> None:
        """Run ``index`` ended as ``state``, one of STATES; ``note`` says more."""
        task, finished = self.tasks[index], state in ("done", "found")
        elapsed = f"{_elapsed(task)} " if task.started else ""
        self.stop_task(index)
        if state == "done":  # tells more than what was expected
            for other in self.tasks:
                if other.fields["kind"] == task.fields["kind"]:
                    other.fields["seconds"] = task.elapsed
        self.update(index, completed=1.0 if finished else None, state=state, note="" if finished else note)
        self._print(task, f"{state} {elapsed}{note}")

    def say(self, sentence: str) -> None:
        """Print a line as it is: brackets in a path are no markup."""
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        """A line for all runs, with their states if not all are shown, and those that a terminal has room for."""
        self._look()
        room = max(1, self._terminal.height - 2)  # without the line for all runs and one for the cursor
        important = sorted(self.tasks, key=lambda task: list(STATES).index(task.fields["state"]))[:room]
        counts = Counter(task.fields["state"] for task in self.tasks if len(self.tasks) > room)
        states = ", ".join(f"{state} {counts[state]}" for state in STATES if counts[state])
        yield Text("; ".join(filter(None, (self._overall(), states))), "bold")
        yield self.make_tasks_table(sorted(important, key=lambda task: task.id))

    def _overall(self) -> str:
        """How many runs have ended, and how long the others will take."""
        going = [task for task in self.tasks if task.fields["state"] in ("runs", "waits")]
        known = [task for task in going if task.fields["seconds"] is not None]
        left = [max(0.0, task.fields["seconds"] - (task.elapsed or 0.0)) for task in known]
        text = f"{len(self.tasks) - len(going)} of {len(self.tasks)} runs ended"
        if known:
            text += f", about {max(1, round(makespan(left, self._places) / 60))} min left"
        unknown = len(going) - len(known)
        return text + (f", {unknown} {'more ' if known else ''}not timed before" if unknown else "")

    def _print(self, task: Task, text: str) -> None:
        if self.disable:
            self.say(f"[{task.id + 1}/{len(self.tasks)}] {task.description}: {text}")

    def _print_running(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LINES):
            self.say(self._overall())
            for task in self._look():
                self._print(task, f"{task.fields['note']} {_elapsed(task)}")

    def _look(self) -> list[Task]:
        """The running notebooks, after a look at their cells and at the loops of each current cell, as its share."""
        running = [task for task in self.tasks if task.fields["state"] == "runs"]
        for task in running:
            cell, cells, loops = task.fields["cell"], task.fields["cells"], progress.read(task.fields["file"])
            inner, weight = 0.0, 1.0
            for loop in loops:
                if loop["total"]:
                    inner += weight * loop["done"] / loop["total"]
                    weight /= loop["total"]
            task.completed = min(1.0, (cell + inner) / cells)
            current = (f"{loop['label']} {loop['done']}/{loop['total'] or '?'}" for loop in loops)
            task.fields["note"] = ", ".join([f"cell {min(cell + 1, cells)}/{cells}", *current])
        return running


def _elapsed(task: Task) -> str:
    return str(timedelta(seconds=int(task.elapsed)))
