"""Execute one planned notebook on this machine, into a folder of its own that appears whole or not at all.

While a run goes on it lives in a hidden folder beside its place, ``.<run id>.<owner>.<random>.partial``; when it is
complete, one rename puts it there. A run that fails or is interrupted is left as ``<run id>.unfinished`` with its
partly executed notebook, ``error.txt`` and the kernel's own log. Its checkpoints, in ``.<run id>.checkpoints``, stay
until the run is complete: begun again, it goes on from them. A run whose metrics.json is broken is made again; what was
there stays as ``<run id>.broken``. A lock keeps other processes from making the same run at
the same time; it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from filelock import FileLock, Timeout

from dfqlib.files import CHECKPOINT_SECONDS, CHECKPOINTS, write_json, write_text
from dfqlib.papers.notebook_source import notebook_cells
from dfqlib.progress import FILE_VARIABLE
from dfqlib.runner import kernels
from dfqlib.runner.identity import imports_of
from dfqlib.runner.plan import PlannedRun
from dfqlib.runner.run_folder import METRICS, NOTEBOOK, NOTEBOOK_PAGE, complete
from dfqlib.speed.switches import OFF_VARIABLE

if TYPE_CHECKING:
    from nbformat import NotebookNode
#: jsonschema, which checks notebooks, imports this if it is there, and that takes a second or two for a parser of URLs.
ADDRESSES = "rfc3987_syntax"
FORMATTING = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback
MACHINE = platform.node().replace(".", "-")
OWNER = f"{MACHINE}-{os.getpid()}"
OnStart = Callable[[int, Path], None]  # the number of the notebook's cells, and the file its loops are told in
OnCell = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``done`` now, ``found`` complete, ``failed``, ``stopped`` by the user, or ``skipped``."""

    run: PlannedRun
    state: str
    message: str = ""


class KernelFailure(Exception):
    """A notebook that did not run to its end, in one line; ``details`` is what error.txt keeps."""

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


class NotBegun(Exception):
    """A run that was prepared and should not begin any more, for the reason given."""


class Turn:
    """A run's turn to compute: whom to tell of its start and its cells, and what it holds meanwhile.

    It begins after the turn ``before`` it, unless that is passed, and asks ``why_not`` for a reason not to begin. As a
    context manager it lets go of what it holds: after the last cell, or if that is not reached or fails, at the exit.
    """

    def __init__(
        self, on_start: OnStart, on_cell: OnCell, why_not: Callable[[], str] = str, before: Turn | None = None
    ) -> None:
        self.on_start, self.on_cell, self.why_not = on_start, on_cell, why_not
        self.passed = threading.Event()
        self._before = before.passed if before else None
        self._held = contextlib.ExitStack()
        self._cells = 0  # still to do
        self._began = self._ended = 0.0

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.passed.set()
        self._held.close()

    def begin(self, place: AbstractContextManager, cells: int, progress_file: Path) -> None:
        """Wait for ``place`` and hold it; NotBegun if by then there is a reason not to begin."""
        if self._before:
            self._before.wait()
        self._held.enter_context(place)
        self.passed.set()
        if why := self.why_not():
            raise NotBegun(why)
        self.on_start(cells, progress_file)
        self._cells, self._began = cells, time.monotonic()

    def cell_ends(self, execute_reply: dict[str, Any], **_: Any) -> None:
        """What nbclient calls after each code cell."""
        self.on_cell()
        self._cells -= 1
        self._ended = time.monotonic()
        if not self._cells and execute_reply["content"]["status"] == "ok":
            self._held.close()

    @property
    def begun(self) -> bool:
        """Whether the notebook's first cell was reached."""
        return self._began > 0

    @property
    def seconds(self) -> float:
        """How long a notebook computed that reached its end."""
        return self._ended - self._began


class LocalExecutor:
    """This machine with up to ``jobs`` runs computing at once, each of which gets its share of the cores.

    It takes one more, so that kernels are started, and results written, while ``jobs`` notebooks compute. Fine-tunings
    write a checkpoint every ``checkpoint_every`` seconds. ``variables`` are added to the environment of every kernel;
    ``locations`` are parameters that say where something is on this machine.
    """

    def __init__(self, jobs: int, checkpoint_every: int = 60) -> None:
        self.jobs, self.places = jobs + 1, jobs
        self.free = threading.Semaphore(jobs)
        self.variables = {CHECKPOINT_SECONDS: str(checkpoint_every)}
        self.locations: dict[str, str] = {}
        self.stopping = self.forks = False
        self.kernels: WeakSet = WeakSet()  # processes

    @functools.cached_property
    def threads(self) -> int:
        """Of a run: as many for one as beside others, since last digits change with them."""
        return max(1, kernels.cores() // self.places)

    def prepare(self, runs: list[PlannedRun]) -> None:
        """Make kernels for ``runs`` quick to start; to be called in the main thread."""
        modules = set().union(*(imports_of(notebook) for notebook in {run.paper.notebook for run in runs}))
        self.forks = kernels.warm_up(modules, self.threads)
        # A notebook begins while another's page is written, and would wait 5 ms for that at each of its first steps.
        sys.setswitchinterval(0.0005)

    def stop(self) -> None:
        """Kill the running kernels and start no others. To be repeated: one may be about to start."""
        self.stopping = True
        for kernel in list(self.kernels):
            kernel.kill()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of the places; who has to wait for it uses the time to make the first page quick."""
        if not self.free.acquire(blocking=False):
            from dfqlib.runner import notebook_page

            notebook_page.warm_up()
            self.free.acquire()
        try:
            yield
        finally:
            self.free.release()

    def execute(self, run: PlannedRun, results: Path, force: bool, turn: Turn) -> Outcome:
        """Execute one notebook into its folder in ``results``; with ``force`` also if that is there."""
        final = run.folder(results)
        final.parent.mkdir(parents=True, exist_ok=True)
        with self.alone(final, turn) as locked:
            if not locked:
                return Outcome(run, "stopped", "interrupted while another process made it")
            if complete(final) and not force:  # by another process, meanwhile
                return Outcome(run, "found", str(final))
            return self._execute(run, final, force, turn)

    @contextlib.contextmanager
    def alone(self, final: Path, turn: Turn) -> Iterator[bool]:
        """Hold the lock on a run's folder; False if the batch is stopped before another process gives it free."""
        lock = FileLock(final.with_name(f".{final.name}.lock"))
        while not self.stopping:
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                turn.passed.set()  # other runs need not wait for another process
                continue
            break
        try:
            yield lock.is_locked
        finally:
            if lock.is_locked and complete(final):  # from here on nobody has to wait
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _execute(self, run: PlannedRun, final: Path, force: bool, turn: Turn) -> Outcome:
        unfinished = final.with_name(f"{final.name}.unfinished")
        checkpoints = final.with_name(f".{final.name}.checkpoints")
        if force:
            shutil.rmtree(checkpoints, ignore_errors=True)
        remove_orphans(final)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.{OWNER}.", suffix=".partial", dir=final.parent))
        partial.chmod(0o755)
        progress_file = partial / "progress.json"
        try:
            self._run_notebook(run, partial, progress_file, checkpoints, turn)
            stamp(run, partial, turn.seconds)
            set_aside(final)
            put_in_place(partial, final)
        except NotBegun as why:
            shutil.rmtree(partial, ignore_errors=True)
            return Outcome(run, "skipped", str(why))
        except (KernelFailure, OSError) as error:
            line = "interrupted" if self.stopping else str(error)
            details = line + "\n" if self.stopping else getattr(error, "details", line + "\n")
            # On a full disk the message may find no room; what is there is kept all the same.
            with contextlib.suppress(OSError):
                write_text(partial / "error.txt", details)
            progress_file.unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            partial.rename(unfinished)
            message = f"{line.rstrip('.')}. What it did is in {unfinished}"
            return Outcome(run, "stopped" if self.stopping else "failed", message)
        for leftover in (unfinished, checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)
        return Outcome(run, "done", str(final))

    def _run_notebook(self, run: PlannedRun, partial: Path, progress_file: Path, checkpoints: Path, turn: Turn) -> None:
        """Execute the notebook with its parameters into ``partial``, and write it as a page too.

        Raises KernelFailure if it does not reach its end, NotBegun if it should not begin.
        """
        # Here, since they take seconds that --list and a finished batch need not wait for.
        sys.modules.setdefault(ADDRESSES, None)
        import papermill
        from nbclient.exceptions import DeadKernelError

        logging.getLogger("papermill").setLevel(logging.ERROR)
        log = partial / "kernel.log"
        log.touch()
        variables = {FILE_VARIABLE: os.fspath(progress_file), CHECKPOINTS: os.fspath(checkpoints)} | self.variables
        variables[OFF_VARIABLE] = run.depends.get("without", "")
        folder = run.paper.notebook.parent
        cells = len(notebook_cells(run.paper.notebook)) + 1  # papermill adds one with the parameters
        begun: list[NotebookNode] = []
        begin = functools.partial(turn.begin, self.place(), cells, progress_file)
        own = folder, variables, log, self.threads, self.forks, self.kernels
        try:
            with tempfile.TemporaryDirectory(prefix="dfqlib-", ignore_cleanup_errors=True) as sockets:
                papermill.execute_notebook(
                    run.paper.notebook,
                    partial / NOTEBOOK,
                    parameters=run.parameters | self.locations | {"out": os.fspath(partial)},
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    request_save_on_cell_execute=False,  # twice for each cell, it takes longer than many of them
                    on_notebook_start=lambda notebook: begun.append(notebook),
                    kernel_manager_class=kernels.kernel_manager(Path(sockets), *own),
                    shutdown_kernel="immediate",
                    on_cell_start=lambda cell_index, **_: None if cell_index else begin(),  # now the kernel is ready
                    on_cell_executed=turn.cell_ends,
                )
            from dfqlib.runner import notebook_page

            write_text(partial / NOTEBOOK_PAGE, notebook_page.as_page(partial / NOTEBOOK))
        except NotBegun:
            raise
        except papermill.PapermillExecutionError as error:
            # The kit's own refusals are sentences; other errors need their type to be understood.
            sentence = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise KernelFailure(sentence.splitlines()[0], FORMATTING.sub("", str(error))) from None
        except Exception as error:
            if self.stopping and not turn.begun:
                raise NotBegun("after the interrupt") from error
            for notebook in begun:  # as far as it came
                papermill.iorw.write_ipynb(notebook, os.fspath(partial / NOTEBOOK))
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
