"""Execute planned runs: several at once, finished ones skipped, a failure limited to its own notebook."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dfqlib.errors import UserError
from dfqlib.runner.execute import LocalExecutor, Outcome, Watcher, checkpoints_of, lacks_locks
from dfqlib.runner.plan import PlannedRun
from dfqlib.runner.run_folder import complete
from dfqlib.runner.screen import Screen

if TYPE_CHECKING:  # its import takes seconds
    from dfqlib.runner.cluster import Cluster


def check_folder(results: Path) -> str:
    """Create ``results`` if necessary; a warning if its file system has no locks, else "".

    Raises UserError if the folder cannot be written.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=results) as probe, FileLock(Path(probe, "lock")):
            return ""
    except (OSError, NotImplementedError) as error:
        if lacks_locks(error):
            return f"results={str(results)!r} is on a file system without locks: start no other call on it meanwhile."
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"results={str(results)!r} cannot be written ({reason}).") from None


@dataclass
class Batch:
    """The runs of one call of ``run_all.py``, with ``results`` as their destination.

    ``executor`` decides where: on this machine or on a cluster. It accepts ``jobs`` runs at once, of which it executes
    ``places`` at the same time and queues the others. After a failure the waiting runs of the same notebook are
    skipped, since they would probably fail too, unless ``keep_going``; other notebooks continue. An interrupt (Ctrl-C)
    stops the running notebooks and skips the rest.
    """

    results: Path
    screen: Screen
    executor: "LocalExecutor | Cluster"
    force: bool = False
    keep_going: bool = False
    broken: set[str] = field(default_factory=set)  # papers
    stopping: bool = False

    def execute(
        self, runs: list[PlannedRun], seconds: list[float | None], at_last: Callable[[], object]
    ) -> list[Outcome]:
        """Execute the outstanding runs (with ``force``, all of them) and return the outcome of each.

        Runs with the most expected ``seconds`` start first, so that no long run is left over for a single core; those
        of unknown length, None, start last.
        ``at_last`` is called by a thread that finds no more runs, while the last runs are still computing.
        """
        if missing := [run for run in runs if not self.there(run)]:
            self.executor.prepare(missing)
        with ThreadPoolExecutor(self.executor.jobs) as pool:
            order = sorted(range(len(runs)), key=lambda index: -(seconds[index] or 0))
            futures = {index: pool.submit(self.finish, index, runs[index]) for index in order}
            pool.submit(at_last)
            try:
                wait(futures.values())
            except KeyboardInterrupt:
                self.stopping = True
                while wait(futures.values(), timeout=0.2).not_done:
                    self.executor.stop()
        outcomes = [futures[index].result() for index in range(len(runs))]
        if self.stopping:
            finished = sum(outcome.state in ("done", "found") for outcome in outcomes)
            begun = sum(checkpoints_of(run.folder(self.results)).is_dir() for run in runs)
            kept = f"finished runs kept: {finished}; runs with a checkpoint to resume from: {begun}"
            self.screen.say(f"Interrupted: {kept}. The same command continues.")
        return outcomes

    def there(self, run: PlannedRun) -> bool:
        """Whether the run is finished and need not be repeated."""
        return not self.force and complete(run.folder(self.results))

    def finish(self, index: int, run: PlannedRun) -> Outcome:
        """Execute one run, or return the reason why it was not executed."""
        report = partial(self.screen.run_starts, index), partial(self.screen.cell_ends, index)
        watcher = Watcher(*report, partial(self.obstacle, run))
        with watcher.place:
            if self.there(run):
                outcome = Outcome(run, "found", str(run.folder(self.results)))
            elif reason := self.obstacle(run):
                outcome = Outcome(run, "skipped", reason)
            else:
                try:
                    outcome = self.executor.execute(run, self.results, self.force, watcher)
                except OSError as error:  # a full disk may have no room for the run's folder either
                    outcome = Outcome(run, "failed", str(error))
            if outcome.state == "failed":  # known before another run of this notebook takes the place
                self.broken.add(run.paper.key)
        self.screen.run_ends(index, outcome.state, outcome.message)
        return outcome

    def obstacle(self, run: PlannedRun) -> str:
        """Why a run is not to start any more; "" if it is."""
        if self.stopping:
            return "after the interrupt"
        if run.paper.key in self.broken and not self.keep_going:
            return f"after a run of {run.paper.notebook.name} failed (--keep-going runs it)"
        return ""
