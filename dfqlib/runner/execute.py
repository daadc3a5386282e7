"""Execute one planned notebook on this machine, into a folder of its own that appears complete or not at all.

While a run computes, its files are in a hidden folder beside the final one, ``.<run id>.<owner>.<random>.partial``; a
single rename moves it to its place. A run that fails or is interrupted leaves ``<run id>.unfinished`` with the partly
executed notebook, ``error.txt`` and the kernel's log. Its checkpoints, in ``.<run id>.checkpoints``, stay until the run
is complete, so that a second attempt resumes from them. A run with a broken metrics.json is repeated; the old folder is
kept as ``<run id>.broken``. A lock keeps other processes from executing the same run at the same time; the system
releases it when the process ends, however that happens.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
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

#: jsonschema, which checks notebooks, imports this URL parser if it is installed; that takes a second or two.
URL_PARSER = "rfc3987_syntax"
FORMATTING = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback
HOST = platform.node().replace(".", "-")
OWNER = f"{HOST}-{os.getpid()}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``done`` now, ``found`` complete, ``failed``, ``stopped`` by the user, or ``skipped``."""

    run: PlannedRun
    state: str
    message: str = ""


@dataclass(frozen=True)
class Watcher:
    """Callbacks of one run: at its start, with the number of its code cells and its progress file, and per cell."""

    on_start: Callable[[int, Path], None]
    on_cell: Callable[[], None]


class KernelFailure(Exception):
    """A notebook that did not run to its end, in one line; ``details`` goes to error.txt."""

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


@dataclass
class LocalExecutor:
    """Executes up to ``jobs`` notebooks at once on this machine, each with its share of the cores.

    Fine-tunings write a checkpoint every ``checkpoint_every`` seconds. ``variables`` are added to the environment of
    every kernel; ``locations`` are parameters that name a file or folder of this machine.
    """

    jobs: int
    checkpoint_every: int = 60
    variables: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    stopping: bool = False
    forks: bool = False
    kernels: WeakSet = field(default_factory=WeakSet)  # processes

    def __post_init__(self) -> None:
        kernels.provide_home()

    @property
    def places(self) -> int:
        """All jobs compute; none waits in a queue."""
        return self.jobs

    @functools.cached_property
    def threads(self) -> int:
        """Threads of a run: the same whether or not others run beside it, since they change a result's last digits."""
        return max(1, kernels.cores() // self.jobs)

    def prepare(self, runs: list[PlannedRun]) -> None:
        """Make kernels for ``runs`` quick to start; to be called in the main thread."""
        modules = set().union(*(imports_of(notebook) for notebook in {run.paper.notebook for run in runs}))
        self.forks = kernels.warm_up(modules, self.threads)
        # A notebook computes while another's page is written, and would wait 5 ms for that at each message.
        sys.setswitchinterval(0.0005)

    def stop(self) -> None:
        """Kill the running kernels and start no others. To be repeated: one may be about to start."""
        self.stopping = True
        for kernel in list(self.kernels):
            kernel.kill()

    def execute(self, run: PlannedRun, results: Path, force: bool, watcher: Watcher) -> Outcome:
        """Execute one notebook into its folder in ``results``; with ``force`` also if that is complete."""
        final = run.folder(results)
        final.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(final):
            if self.stopping:
                return Outcome(run, "stopped", "interrupted before it started")
            if complete(final) and not force:  # by another process, meanwhile
                return Outcome(run, "found", str(final))
            return self._execute(run, final, force, watcher)

    @contextlib.contextmanager
    def _lock(self, final: Path) -> Iterator[None]:
        """Hold the lock on a run's folder; without it where there are no locks, or once the batch is stopped."""
        lock = FileLock(final.with_name(f".{final.name}.lock"))
        while not self.stopping:
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                continue
            except (OSError, NotImplementedError) as error:
                if not lacks_locks(error):
                    raise
            break
        try:
            yield
        finally:
            if complete(final):  # nobody needs to wait any more
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _execute(self, run: PlannedRun, final: Path, force: bool, watcher: Watcher) -> Outcome:
        unfinished, checkpoints = final.with_name(f"{final.name}.unfinished"), checkpoints_of(final)
        if force:
            shutil.rmtree(checkpoints, ignore_errors=True)
        remove_orphans(final)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.{OWNER}.", suffix=".partial", dir=final.parent))
        partial.chmod(0o755)
        progress_file = partial / "progress.json"
        variables = {
            FILE_VARIABLE: os.fspath(progress_file),
            CHECKPOINTS: os.fspath(checkpoints),
            CHECKPOINT_SECONDS: str(self.checkpoint_every),
            OFF_VARIABLE: run.depends.get("without", ""),
        }
        began = time.monotonic()
        watcher.on_start(len(notebook_cells(run.paper.notebook)) + 1, progress_file)  # papermill adds the parameters
        try:
            self._run_notebook(run, partial, variables, watcher.on_cell)
            stamp(run, partial, time.monotonic() - began)
            set_aside(final)
            put_in_place(partial, final)
        except (KernelFailure, OSError) as error:
            line = "interrupted" if self.stopping else str(error)
            details = line + "\n" if self.stopping else getattr(error, "details", line + "\n")
            # On a full disk the message may find no room; the partial output is kept all the same.
            with contextlib.suppress(OSError):
                write_text(partial / "error.txt", details)
            progress_file.unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            partial.rename(unfinished)
            message = f"{line.rstrip('.')}. Partial output: {unfinished}"
            return Outcome(run, "stopped" if self.stopping else "failed", message)
        for leftover in (unfinished, checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)
        return Outcome(run, "done", str(final))

    def _run_notebook(
        self, run: PlannedRun, partial: Path, variables: dict[str, str], on_cell: Callable[[], None]
    ) -> None:
        """Execute the notebook with its parameters into ``partial``, and write it as a page too.

        Raises KernelFailure if it does not reach its end.
        """
        # Imported here, since --list and a finished batch need not wait the seconds that these take.
        sys.modules.setdefault(URL_PARSER, None)
        import papermill
        from nbclient.exceptions import DeadKernelError

        logging.getLogger("papermill").setLevel(logging.ERROR)
        log = partial / "kernel.log"
        log.touch()
        started: list[Any] = []  # the notebook's node, once its kernel runs
        try:
            with tempfile.TemporaryDirectory(prefix="dfqlib-", ignore_cleanup_errors=True) as sockets:
                environment = kernels.environment(self.threads) | variables | self.variables
                kernel = run.paper.notebook.parent, environment, log, Path(sockets), self.forks, self.kernels
                papermill.execute_notebook(
                    literal(run.paper.notebook),
                    literal(partial / NOTEBOOK),
                    parameters=run.parameters | self.locations | {"out": os.fspath(partial)},
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    request_save_on_cell_execute=False,  # twice for each cell, it takes longer than many of them
                    kernel_manager_class=kernels.kernel_manager(*kernel),
                    shutdown_kernel="immediate",
                    on_notebook_start=lambda notebook: started.append(notebook),
                    on_cell_executed=lambda **_: on_cell(),
                )
            from dfqlib.runner.notebook_page import as_page

            write_text(partial / NOTEBOOK_PAGE, as_page(partial / NOTEBOOK))
        except papermill.PapermillExecutionError as error:
            # The kit's own refusals are sentences; other errors need their type to be understood.
            sentence = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise KernelFailure(sentence.splitlines()[0], FORMATTING.sub("", str(error))) from None
        except Exception as error:
            for notebook in started:  # as far as it came
                papermill.iorw.write_ipynb(notebook, os.fspath(partial / NOTEBOOK))
            tail = log.read_text(errors="replace")[-4000:]
            dead = isinstance(error, DeadKernelError)
            line = "the kernel died, perhaps because memory ran out" if dead else f"{type(error).__name__}: {error}"
            raise KernelFailure(line, f"{line}\n{tail}") from error


def lacks_locks(error: Exception) -> bool:
    """Whether locking a file failed because its file system has no locks."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in (
        errno.ENOLCK,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
    )


def literal(path: Path) -> str:
    """A path for papermill, which formats paths with the parameters, so that braces stay as they are."""
    return os.fspath(path).replace("{", "{{").replace("}", "}}")


def checkpoints_of(final: Path) -> Path:
    """Where the checkpoints of the run with the folder ``final`` are until it is complete."""
    return final.with_name(f".{final.name}.checkpoints")


def set_aside(final: Path) -> None:
    """Keep the folder of a run with a broken metrics.json under another name: its notebook has the numbers too."""
    if final.is_dir() and not complete(final):
        older = final.with_name(f"{final.name}.broken")
        shutil.rmtree(older, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another runner was first
            final.rename(older)


def remove_orphans(final: Path) -> None:
    """Remove the partial folders of the run at ``final`` whose process on this machine was killed."""
    for partial in final.parent.glob(f".{final.name}.{HOST}-*.partial"):
        process = int(partial.name.split(".")[-3].rpartition("-")[2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:
            pass  # it is alive, and another user's


def stamp(run: PlannedRun, partial: Path, seconds: float) -> None:
    """Add to metrics.json what the runner knows: the run's identity, what it depends on, and its seconds in all."""
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
