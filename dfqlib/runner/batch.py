"""Bring planned runs to their end: some at once, what is there already left alone, a failure kept to itself.

Where a run is executed is an :class:`Executor`'s business: this machine's (``execution.Machine``) or a cluster's
(``cluster.Cluster``).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from dfqlib.errors import UserError
from dfqlib.runner.execute import Outcome, Turn
from dfqlib.runner.plan import PlannedRun
from dfqlib.runner.run_folder import complete
from dfqlib.runner.screen import Screen


class Executor(Protocol):
    """Something that takes ``jobs`` runs at once and executes ``places`` of them at the same time."""

    jobs: int
    places: int

    def prepare(self, runs: list[PlannedRun]) -> None:
        """Called once, in the main thread, with the runs that will be executed."""

    def execute(self, run: PlannedRun, results: Path, force: bool, turn: Turn) -> Outcome:
        """Execute a run into its folder in ``results``; may be called from several threads."""

    def stop(self) -> None:
        """End what is running and begin nothing more; may be called again and again."""


def check_folder(results: Path) -> None:
    """Raise UserError unless files can be written into ``results``, which is made if it is not there."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UserError(f"results={str(results)!r} cannot be written ({error.strerror or error}).") from None


class Batch:
    """Runs on their way into ``results``.

    After a failure the runs of the same notebook that have not begun are skipped, as they would fail likewise, unless
    ``keep_going``; other notebooks go on. An interrupt (Ctrl-C) stops the running notebooks and skips the rest.
    """

    def __init__(
        self, results: Path, screen: Screen, executor: Executor, force: bool = False, keep_going: bool = False
    ) -> None:
        self.results, self.screen, self.executor = results, screen, executor
        self.force, self.keep_going = force, keep_going
        self.broken: set[str] = set()  # papers
        self.stopping = False

    def execute(
        self, runs: list[PlannedRun], seconds: Callable[[PlannedRun], float], at_last: Callable[[], object]
    ) -> list[Outcome]:
        """Run what is missing (with ``force``, everything) and say how each run ended.

        Those of most ``seconds`` come first: otherwise they end alone, with cores that have nothing left to do.
        ``at_last`` is called by a thread that finds no more runs, while the last of them go on.
        """
        if missing := [run for run in runs if not self.there(run)]:
            self.executor.prepare(missing)
        with ThreadPoolExecutor(self.executor.jobs) as pool:
            order = sorted(range(len(runs)), key=lambda index: -seconds(runs[index]))
            futures: dict[int, Future] = {}
            turn = None
            for index in order:
                report = functools.partial(self.screen.start, index), functools.partial(self.screen.cell, index)
                turn = Turn(*report, functools.partial(self.obstacle, runs[index]), before=turn)
                futures[index] = pool.submit(self.finish, index, runs[index], turn)
            pool.submit(at_last)
            try:
                wait(futures.values())
            except KeyboardInterrupt:
                self.stop(futures.values())
        return [futures[index].result() for index in range(len(runs))]

    def there(self, run: PlannedRun) -> bool:
        """Whether the run need not be made again."""
        return not self.force and complete(run.folder(self.results))

    def stop(self, futures: Collection[Future]) -> None:
        """Stop until every run has ended."""
        self.stopping = True
        while wait(futures, timeout=0.2).not_done:
            self.executor.stop()

    def finish(self, index: int, run: PlannedRun, turn: Turn) -> Outcome:
        """Take one run to its end, or say why not."""
        with turn:
            if self.there(run):
                outcome = Outcome(run, "found", str(run.folder(self.results)))
            elif why := self.obstacle(run):
                outcome = Outcome(run, "skipped", why)
            else:
                try:
                    outcome = self.executor.execute(run, self.results, self.force, turn)
                except OSError as error:  # a full disk may have no room for the run's folder either
                    outcome = Outcome(run, "failed", str(error))
            if outcome.state == "failed":
                self.broken.add(run.paper.key)  # before the run's place is free for another one of this notebook
        self.screen.end(index, outcome.state, outcome.message)
        return outcome

    def obstacle(self, run: PlannedRun) -> str:
        """Why a run should not begin any more, or nothing."""
        if self.stopping:
            return "after the interrupt"
        if run.paper.key in self.broken and not self.keep_going:
            return f"after another run of {run.paper.notebook.name} failed (--keep-going runs it)"
        return ""
