"""Run planned notebooks, some at once, each into a folder of its own that appears whole or not at all.

While a run goes on it lives in a hidden folder beside its place, ``.<run id>.<owner>.<random>.partial``; when it is
complete, one rename puts it there. A run that fails or is interrupted is left as ``<run id>.unfinished`` with its
partly executed notebook, ``error.txt`` and the kernel's own log. Its checkpoints, in ``.<run id>.checkpoints``, stay
until the run is complete: begun again, it goes on from them. A run whose metrics.json is broken is made again; what was
there stays as ``<run id>.broken``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

from dfqlib import kernels
from dfqlib.errors import UserError
from dfqlib.files import CHECKPOINT_SECONDS, CHECKPOINTS, write_json, write_text
from dfqlib.plan import METRICS, NOTEBOOK, NOTEBOOK_PAGE, PlannedRun, complete, imports_of, notebook_cells
from dfqlib.progress import FILE_VARIABLE
from dfqlib.screen import Screen

FORMATTING = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback


MACHINE = platform.node().replace(".", "-")
OWNER = f"{MACHINE}-{os.getpid()}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``done`` now, ``found`` complete, ``failed``, ``stopped`` by the user, or ``skipped``."""

    run: PlannedRun
    state: str
    message: str = ""
    seconds: float = 0.0


class KernelFailure(Exception):
    """A notebook that did not run to its end, in one line; ``details`` is what error.txt keeps."""

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


def check_folder(results: Path) -> None:
    """Raise UserError unless files can be written into ``results``, which is made if it is not there."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UserError(f"results={str(results)!r} cannot be written ({error.strerror or error}).") from None


class Batch:
    """Runs on their way into ``results``: up to ``jobs`` at once, each with its share of the cores.

    After a failure the runs of the same notebook that have not begun are skipped, as they would fail likewise, unless
    ``keep_going``; other notebooks go on. An interrupt (Ctrl-C) stops the running notebooks and skips the rest.
    """

    def __init__(
        self,
        results: Path,
        screen: Screen,
        jobs: int,
        force: bool = False,
        keep_going: bool = False,
        checkpoint_every: int = 60,
    ) -> None:
        self.results, self.screen, self.jobs = results, screen, jobs
        # The same for one run as for many, so that what runs beside a run does not change its last digits.
        self.threads = max(1, kernels.cores() // jobs)
        self.force, self.keep_going = force, keep_going
        self.checkpoint_every = checkpoint_every  # seconds
        self.broken: set[str] = set()  # papers
        self.stopping = False
        self.kernels: WeakSet = WeakSet()  # processes

    def execute(self, runs: list[PlannedRun]) -> list[Outcome]:
        """Run what is missing (with ``force``, everything) and say how each run ended."""
        if missing := {run.paper.notebook for run in runs if not self.there(run)}:
            kernels.warm_up(set().union(*map(imports_of, missing)), self.threads)
        with ThreadPoolExecutor(self.jobs) as pool:
            # The longest first: otherwise they end alone, with cores that have nothing left to do.
            order = sorted(range(len(runs)), key=lambda index: -runs[index].paper.minutes)
            futures = {index: pool.submit(self.finish, index, runs[index]) for index in order}
            try:
                wait(futures.values())
            except KeyboardInterrupt:
                self.stop(futures.values())
        return [futures[index].result() for index in range(len(runs))]

    def there(self, run: PlannedRun) -> bool:
        """Whether the run need not be made again."""
        return not self.force and complete(run.folder(self.results))

    def stop(self, futures: Collection[Future]) -> None:
        """Kill the kernels until every run has ended; one may be about to start another."""
        self.stopping = True
        while wait(futures, timeout=0.2).not_done:
            for kernel in list(self.kernels):
                kernel.kill()

    def finish(self, index: int, run: PlannedRun) -> Outcome:
        """Take one run to its end, or say why not."""
        if self.there(run):
            outcome = Outcome(run, "found", str(run.folder(self.results)))
        elif self.stopping:
            outcome = Outcome(run, "skipped", "after the interrupt")
        elif run.paper.key in self.broken and not self.keep_going:
            outcome = Outcome(
                run, "skipped", f"after another run of {run.paper.notebook.name} failed (--keep-going runs it)"
            )
        else:
            try:
                outcome = self.execute_one(index, run)
            except OSError as error:  # a full disk may have no room for the run's folder either
                outcome = Outcome(run, "failed", str(error))
            if outcome.state == "failed":
                self.broken.add(run.paper.key)
        self.screen.end(index, outcome.state, outcome.message)
        return outcome

    def execute_one(self, index: int, run: PlannedRun) -> Outcome:
        """Execute one notebook into its folder."""
        final = run.folder(self.results)
        unfinished = final.with_name(f"{final.name}.unfinished")
        checkpoints = final.with_name(f".{final.name}.checkpoints")
        if self.force:
            shutil.rmtree(checkpoints, ignore_errors=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(final)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.{OWNER}.", suffix=".partial", dir=final.parent))
        partial.chmod(0o755)
        set_aside(final)
        began = time.monotonic()
        progress_file = partial / "progress.json"
        cells = len(notebook_cells(run.paper.notebook)) + 1  # papermill adds one with the parameters
        self.screen.start(index, cells, progress_file)
        try:
            self.run_notebook(index, run, partial, progress_file, checkpoints)
            seconds = time.monotonic() - began
            stamp(run, partial, seconds)
            put_in_place(partial, final)
        except (KernelFailure, OSError) as error:
            line = "interrupted" if self.stopping else str(error)
            details = line + "\n" if self.stopping else getattr(error, "details", line + "\n")
            # On a full disk the message may find no room; what is there is kept all the same.
            with contextlib.suppress(OSError):
                write_text(partial / "error.txt", details)
            progress_file.unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            partial.rename(unfinished)
            message = f"{line}; what it did is in {unfinished}"
            return Outcome(run, "stopped" if self.stopping else "failed", message, time.monotonic() - began)
        for leftover in (unfinished, checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)
        return Outcome(run, "done", str(final), seconds)

    def run_notebook(self, index: int, run: PlannedRun, partial: Path, progress_file: Path, checkpoints: Path) -> None:
        """Execute the notebook with its parameters into ``partial``, and write it as a page too.

        Raises KernelFailure if it does not reach its end.
        """
        # Here, since they take seconds that --list and a finished batch need not wait for.
        import papermill
        from nbclient.exceptions import DeadKernelError
        from nbconvert import HTMLExporter

        logging.getLogger("papermill").setLevel(logging.ERROR)
        log = partial / "kernel.log"
        log.touch()
        variables = {FILE_VARIABLE: os.fspath(progress_file), CHECKPOINTS: os.fspath(checkpoints)}
        variables[CHECKPOINT_SECONDS] = str(self.checkpoint_every)
        manager = kernels.kernel_manager(run.paper.notebook.parent, variables, log, self.threads, self.kernels)
        try:
            papermill.execute_notebook(
                run.paper.notebook,
                partial / NOTEBOOK,
                parameters=run.parameters | {"out": os.fspath(partial)},
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=manager,
                shutdown_kernel="immediate",
                on_cell_executed=lambda **_: self.screen.cell(index),
            )
            write_text(partial / NOTEBOOK_PAGE, HTMLExporter().from_filename(os.fspath(partial / NOTEBOOK))[0])
        except papermill.PapermillExecutionError as error:
            # The kit's own refusals are sentences; other errors need their type to be understood.
            sentence = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise KernelFailure(sentence.splitlines()[0], FORMATTING.sub("", str(error))) from None
        except Exception as error:
            tail = log.read_text(errors="replace")[-4000:]
            dead = isinstance(error, DeadKernelError)
            line = "the kernel died, perhaps for want of memory" if dead else f"{type(error).__name__}: {error}"
            raise KernelFailure(line, f"{line}\n{tail}") from error


def set_aside(final: Path) -> None:
    """Move a run whose metrics.json is broken out of the way of its second try: its notebook holds its numbers too."""
    if final.is_dir() and not complete(final):
        older = final.with_name(f"{final.name}.broken")
        shutil.rmtree(older, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another runner was first
            final.rename(older)


def remove_orphans(final: Path) -> None:
    """Remove what is left of runs for the place ``final`` whose process on this machine was killed."""
    for partial in final.parent.glob(f".{final.name}.{MACHINE}-*.partial"):
        process = int(partial.name.split(".")[-3].rpartition("-")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:
            pass  # it lives, and is somebody else's


def stamp(run: PlannedRun, partial: Path, seconds: float) -> None:
    """Add to metrics.json what the runner knows: the run's identity and what it is made of, and its seconds in all."""
    path = partial / METRICS
    if not path.is_file():
        raise KernelFailure(
            f"{run.paper.notebook.name} ended without writing {METRICS}", "The notebook did not call Run.save().\n"
        )
    metrics = json.loads(path.read_text(encoding="utf-8"))
    metrics["run"] = {"id": run.id, "identity": run.identity, "depends": run.depends, "seconds": round(seconds, 1)}
    write_json(path, metrics)
    for leftover in ("progress.json", "kernel.log"):
        (partial / leftover).unlink(missing_ok=True)


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a complete run to its place, over an older one there; readers see the old run or the new one."""
    while True:
        try:
            partial.rename(final)
            return
        except OSError:
            if not final.exists():
                raise
            # A folder cannot replace a filled one in one step. If another runner is here too, one of the two wins.
            older = Path(tempfile.mkdtemp(prefix=f".{final.name}.{OWNER}.", suffix=".partial", dir=final.parent))
            try:
                final.rename(older)
            except FileNotFoundError:
                pass
            finally:
                shutil.rmtree(older, ignore_errors=True)
