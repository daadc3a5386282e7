"""What the batch is doing: one screen in a terminal, plain lines on a pipe."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dfqlib import progress

SECONDS_BETWEEN_LINES = 30
STYLES = {
    "waits": "dim",
    "runs": "bold",
    "done": "green",
    "found": "green",
    "failed": "red",
    "stopped": "yellow",
    "skipped": "yellow",
}
#: What is shown first where not every run has a line.
RANKS = ("runs", "failed", "stopped", "waits", "done", "skipped", "found")


@dataclass
class Line:
    """One run on the screen; ``cell`` of ``cells`` notebook cells are finished, ``file`` tells its inner loops."""

    name: str
    state: str = "waits"
    note: str = ""
    cell: int = 0
    cells: int = 1
    file: Path | None = None
    started: float = 0.0
    seconds: float = 0.0

    def fraction(self) -> float:
        """Finished share of the cells; the loops of the running cell count as their share of it."""
        inner, weight = 0.0, 1.0
        for loop in self.loops():
            if loop["total"]:
                inner += weight * loop["done"] / loop["total"]
                weight /= loop["total"]
        return min(1.0, (self.cell + inner) / self.cells)

    def loops(self) -> list[dict]:
        """The loops that run in the notebook now, outermost first."""
        return progress.read(self.file) if self.file and self.state == "runs" else []

    def activity(self) -> str:
        """What the run does now, or why it has no result."""
        if self.state != "runs":
            return "" if self.state in ("done", "found") else self.note
        loops = (f"{loop['label']} {loop['done']}/{loop['total'] or '?'}" for loop in self.loops())
        return ", ".join([f"cell {min(self.cell + 1, self.cells)}/{self.cells}", *loops])

    def elapsed(self) -> str:
        """Minutes and seconds since the run started, or that it took."""
        seconds = time.monotonic() - self.started if self.state == "runs" else self.seconds
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds else ""


class Screen:
    """Shows the lines while the batch runs; a context manager.

    In a terminal they are drawn again four times a second, in place, as many as it has room for. On a pipe a line is
    printed when a run starts, every half minute while it goes on, and when it ends.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console = console
        self.lines = [Line(name) for name in names]
        self._live = (
            Live(get_renderable=self._picture, console=console, refresh_per_second=4) if console.is_terminal else None
        )
        self._stop = threading.Event()

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        else:
            threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        if self._live:
            self._live.stop()

    def start(self, index: int, cells: int, file: Path) -> None:
        """Run ``index`` starts: its notebook has ``cells`` code cells and writes its loops to ``file``."""
        line = self.lines[index]
        line.state, line.cells, line.file, line.started = "runs", max(cells, 1), file, time.monotonic()
        line.cell = 0  # a run lost with its worker starts again
        self._print(index, "starts")

    def cell(self, index: int) -> None:
        """One more cell of run ``index`` is finished, and with it its loops."""
        line = self.lines[index]
        line.cell += 1
        if line.file:
            line.file.unlink(missing_ok=True)

    def end(self, index: int, state: str, note: str) -> None:
        """Run ``index`` ended as ``state``, one of STYLES; ``note`` says more."""
        line = self.lines[index]
        line.seconds = time.monotonic() - line.started if line.started else 0.0
        line.state, line.note = state, note
        self._print(index, f"{state} {line.elapsed()} {note}".replace("  ", " "))

    def _print(self, index: int, text: str) -> None:
        if not self._live:
            line = f"[{index + 1}/{len(self.lines)}] {self.lines[index].name}: {text}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tell(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LINES):
            for index, line in enumerate(self.lines):
                if line.state == "runs":
                    self._print(index, f"{line.activity()} {line.elapsed()}")

    def _picture(self) -> Group:
        room = max(1, self.console.height - 2)  # lines: one for the sums, one for the cursor
        if len(self.lines) <= room:
            return Group(self._table(self.lines))
        numbers = sorted(range(len(self.lines)), key=lambda index: RANKS.index(self.lines[index].state))
        counts = Counter(line.state for line in self.lines)
        summary = ", ".join(f"{state} {counts[state]}" for state in RANKS if counts[state])
        return Group(self._table([self.lines[index] for index in sorted(numbers[:room])]), Text(summary, "dim"))

    def _table(self, lines: list[Line]) -> Table:
        table = Table.grid(padding=(0, 1))
        for line in lines:
            style = STYLES[line.state]
            full = line.state in ("done", "found")
            bar = ProgressBar(total=1.0, completed=1.0 if full else line.fraction(), width=16)
            shown = bar if line.state != "waits" else ""
            table.add_row(Text(line.state, style), Text(line.name), shown, line.elapsed(), Text(line.activity(), "dim"))
        return table
