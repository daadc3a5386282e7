"""What the batch is doing: a live screen in a terminal, plain lines on a pipe."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text
from rich.theme import Theme

from dfqlib import progress

SECONDS_BETWEEN_LINES = 30
#: Styles of the states, in the order in which runs are shown where there is no room for all of them.
STATES = {"runs": "bold", "failed": "red", "stopped": "yellow", "waits": "dim"}
STATES |= {"done": "green", "skipped": "yellow", "found": "green"}


class Screen(Progress):
    """Shows one line per run while the batch runs; a context manager.

    A terminal is redrawn four times a second, with as many runs as it has room for. On a pipe a line is printed when a
    run starts, every half minute while it computes, and when it ends.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        state, bar = TextColumn("[{task.fields[state]}]{task.fields[state]}"), BarColumn(16, pulse_style="bar.back")
        name, note = (TextColumn("{task." + text + "}", markup=False) for text in ("description", "fields[note]"))
        columns = state, name, bar, TimeElapsedColumn(), note
        self._terminal = console  # rich draws once before its own is set
        super().__init__(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal)
        console.push_theme(Theme(STATES))
        for text in names:
            self.add_task(text, start=False, total=1.0, state="waits", note="")

    def start(self) -> None:
        super().start()
        if self.disable:
            threading.Thread(target=self._print_running, daemon=True).start()

    def run_starts(self, index: int, cells: int, file: Path) -> None:
        """Run ``index`` starts, perhaps again: its notebook has ``cells`` code cells, its loops report to ``file``."""
        self.reset(index, state="runs", note="", cell=0, cells=cells, file=file)
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
        self.update(index, completed=1.0 if finished else None, state=state, note="" if finished else note)
        self._print(task, f"{state} {elapsed}{note}")

    def say(self, sentence: str) -> None:
        """Print a line as it is: brackets in a path are no markup."""
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The lines that a terminal has room for, and a summary of the states if these are not all."""
        self._look()
        room = max(1, self._terminal.height - 2)  # without one line for the summary and one for the cursor
        important = sorted(self.tasks, key=lambda task: list(STATES).index(task.fields["state"]))[:room]
        yield self.make_tasks_table(sorted(important, key=lambda task: task.id))
        if len(self.tasks) > room:
            counts = Counter(task.fields["state"] for task in self.tasks)
            yield Text(", ".join(f"{state} {counts[state]}" for state in STATES if counts[state]), "dim")

    def _print(self, task: Task, text: str) -> None:
        if self.disable:
            self.say(f"[{task.id + 1}/{len(self.tasks)}] {task.description}: {text}")

    def _print_running(self) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_LINES)
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
