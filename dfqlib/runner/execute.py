"""Execute one planned notebook on this machine, into a folder of its own that appears complete or not at all.

A run computes in a hidden folder beside the final one, ``.<run id>.<owner>.<random>.partial``, which a rename moves to
its place. A run that fails or is interrupted leaves ``<run id>.unfinished`` with the partly executed notebook,
``error.txt`` and the kernel's log. Its checkpoints, in ``.<run id>.checkpoints``, stay until the run is complete, so
that a second attempt resumes from them. A run with a broken metrics.json is repeated; the old folder is kept as
``<run id>.broken``. A lock keeps other processes from executing the same run at the same time.
"""

import contextlib
import datetime
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
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil
from filelock import FileLock, Timeout

from dfqlib.errors import first_line
from dfqlib.files import CHECKPOINT_SECONDS, CHECKPOINTS, write_json, write_text
from dfqlib.progress import FILE_VARIABLE
from dfqlib.runner import kernels
from dfqlib.runner.identity import imports_of
from dfqlib.runner.plan import PlannedRun
from dfqlib.runner.run_folder import LEFTOVER_SUFFIXES, METRICS, NOTEBOOK, NOTEBOOK_PAGE, complete
from dfqlib.speed.switches import OFF_VARIABLE

PROGRESS = "progress.json"
FORMATTING = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
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
    """What a batch wants to know of one run, and what the run asks it.

    ``on_start`` is called with the number of its code cells and its progress file, ``on_cell`` after each cell.
    ``obstacle`` gives a reason not to start it any more, or "". ``place`` holds the run's place among those that
    compute: the executor leaves it early, the batch at the latest when it knows how the run ended.
    """

    on_start: Callable[[int, Path], None]
    on_cell: Callable[[], None]
    obstacle: Callable[[], str] = str
    place: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class Skipped(Exception):
    """A run that was prepared and is not to start any more; the message is the reason."""


class KernelFailure(Exception):
    """A notebook that did not run to its end: the reason in one line, and the details for error.txt."""


@dataclass
class LocalExecutor:
    """Executes up to ``places`` notebooks at once on this machine, each with its share of the cores.

    It accepts one run more, so that the next kernel starts, and a page is written, while ``places`` notebooks compute.
    Fine-tunings write a checkpoint every ``checkpoint_every`` seconds. ``variables`` are added to the environment of
    every kernel; ``locations`` are parameters that name a file or folder of this machine.
    """

    places: int
    checkpoint_every: int = 60
    variables: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    stopping: bool = False
    forks: bool = False
    kernels: WeakSet = field(default_factory=WeakSet)  # processes

    def __post_init__(self) -> None:
        kernels.provide_home()
        self.jobs = self.places + 1
        self.free = threading.Semaphore(self.places)

    @functools.cached_property
    def threads(self) -> int:
        """Threads of a run: the same whether or not others run beside it, since they change a result's last digits."""
        return max(1, kernels.cores() // self.places)

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
        self.free.release(self.jobs)  # a run that waits for a place learns that it is not to start

    def execute(self, run: PlannedRun, results: Path, force: bool, watcher: Watcher, resume: bool = False) -> Outcome:
        """Execute one notebook into its folder in ``results``; with ``force`` also if that is complete.

        With ``force`` it begins anew, unless it is to ``resume`` what a lost worker has begun.
        """
        final = run.folder(results)
        final.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(final):
            if self.stopping:
                return Outcome(run, "stopped", "interrupted before it started")
            if complete(final) and not force:  # by another process, meanwhile
                return Outcome(run, "found", str(final))
            if force and not resume:
                shutil.rmtree(checkpoints_of(final), ignore_errors=True)
            for orphan in final.parent.glob(f".{final.name}.{HOST}-*.partial"):  # of a process that was killed
                if not psutil.pid_exists(int(orphan.name.split(".")[-3].rpartition("-")[2])):
                    shutil.rmtree(orphan, ignore_errors=True)
            return self._execute(run, final, watcher)

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

    def _execute(self, run: PlannedRun, final: Path, watcher: Watcher) -> Outcome:
        unfinished, checkpoints = final.with_name(f"{final.name}.unfinished"), checkpoints_of(final)
        partial = partial_folder(final)
        try:
            remark = self._run_notebook(run, partial, checkpoints, watcher)
            make_way(final)
            put_in_place(partial, final)
        except Skipped as reason:
            shutil.rmtree(partial, ignore_errors=True)
            return Outcome(run, "skipped", str(reason))
        except (KernelFailure, OSError) as error:
            line, details = error.args if isinstance(error, KernelFailure) else (str(error), "")
            if self.stopping:
                line, details = "interrupted", ""
            # On a full disk the message may find no room; the partial output is kept all the same.
            with contextlib.suppress(OSError):
                write_text(partial / "error.txt", details or f"{line}\n")
            (partial / PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            partial.rename(unfinished)
            message = f"{line.rstrip('.')}. Partial output: {unfinished}"
            return Outcome(run, "stopped" if self.stopping else "failed", message)
        for leftover in (unfinished, checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)
        return Outcome(run, "done", f"{final}{remark}")

    def _run_notebook(self, run: PlannedRun, partial: Path, checkpoints: Path, watcher: Watcher) -> str:
        """Execute the notebook into ``partial``, add the run to its metrics.json, and write the notebook as a page too.

        Returns why there is no page, "" if there is one.
        Raises KernelFailure if it does not reach its end or writes no metrics.json, Skipped if it is not to start.
        """
        load_papermill()
        import papermill
        from nbclient.exceptions import DeadKernelError

        progress_file, log, metrics = partial / PROGRESS, partial / "kernel.log", partial / METRICS
        log.touch()
        shutil.copyfile(run.paper.notebook, partial / NOTEBOOK)  # a full disk fails here, not as a kernel that dies
        variables = kernels.environment(self.threads) | self.variables
        variables |= {FILE_VARIABLE: os.fspath(progress_file), CHECKPOINTS: os.fspath(checkpoints)}
        variables |= {CHECKPOINT_SECONDS: str(self.checkpoint_every), OFF_VARIABLE: run.depends.get("without", "")}
        nodes: list[Any] = []  # the notebook's, once its kernel runs
        code_cells: list[int] = []  # their places in it, once it has a place
        # In the batch's order: the longest runs come first. A run without a place has its kernel started meanwhile.
        if early := self.free.acquire(blocking=False):
            watcher.place.callback(self.free.release)

        def cell_starts(cell: Any, cell_index: int) -> None:
            if cell_index:
                return
            if not early:
                from dfqlib.runner.notebook_page import exporter

                exporter()  # which takes a second the first time: now, since this run has to wait
                watcher.place.enter_context(self.free)
            if reason := watcher.obstacle():
                raise Skipped(reason)
            cell.metadata.papermill["start_time"] = datetime.datetime.now(datetime.UTC).isoformat()
            code_cells.extend(index for index, each in enumerate(nodes[0].cells) if each.cell_type == "code")
            watcher.on_start(len(code_cells), progress_file)

        def cell_ends(cell_index: int, execute_reply: dict[str, Any], **_: Any) -> None:
            watcher.on_cell()
            if cell_index == code_cells[-1] and execute_reply["content"]["status"] == "ok":
                watcher.place.close()

        try:
            with tempfile.TemporaryDirectory(prefix="dfqlib-", ignore_cleanup_errors=True) as sockets:
                kernel = run.paper.notebook.parent, variables, log, Path(sockets), self.forks, self.kernels
                notebook = papermill.execute_notebook(
                    literal(run.paper.notebook),
                    literal(partial / NOTEBOOK),
                    parameters=run.parameters | self.locations | {"out": os.fspath(partial)},
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    request_save_on_cell_execute=False,  # twice for each cell, it takes longer than many of them
                    kernel_manager_class=kernels.kernel_manager(*kernel),
                    shutdown_kernel="immediate",
                    on_notebook_start=lambda notebook: nodes.append(notebook),
                    on_cell_start=cell_starts,
                    on_cell_executed=cell_ends,
                )
        except Skipped:
            raise
        except papermill.PapermillExecutionError as error:
            # The kit's own refusals are sentences; other errors need their type to be understood.
            sentence = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise KernelFailure(sentence.splitlines()[0], FORMATTING.sub("", str(error))) from None
        except Exception as error:
            if self.stopping and not code_cells:
                raise Skipped(watcher.obstacle()) from error
            for notebook in nodes:  # as far as it came
                papermill.iorw.write_ipynb(notebook, os.fspath(partial / NOTEBOOK))
            dead = isinstance(error, DeadKernelError)
            line = "the kernel died, perhaps because memory ran out" if dead else f"{type(error).__name__}: {error}"
            raise KernelFailure(line, f"{line}\n{log.read_text(errors='replace')[-4000:]}") from error
        if not metrics.is_file():
            sentence = f"{run.paper.notebook.name} ended without writing {METRICS}"
            raise KernelFailure(sentence, "The notebook did not call Run.save().\n")
        seconds = round(sum(cell.metadata.papermill["duration"] for cell in notebook.cells), 1)
        about = {"id": run.id, "identity": run.identity, "depends": run.depends, "seconds": seconds}
        write_json(metrics, json.loads(metrics.read_text(encoding="utf-8")) | {"run": about})
        for leftover in (progress_file, log):
            leftover.unlink(missing_ok=True)
        try:
            from dfqlib.runner.notebook_page import as_page  # once the notebook has run, which need not wait for it

            write_text(partial / NOTEBOOK_PAGE, as_page(partial / NOTEBOOK))
        except Exception as error:  # what is measured is complete without it
            return f"; without {NOTEBOOK_PAGE} ({type(error).__name__}: {first_line(error)})"
        return ""


@functools.cache
def load_papermill() -> None:
    """Import what executes notebooks, which --list and a finished batch need not wait for."""
    # jsonschema, which checks notebooks, imports this URL parser if it is installed; that takes a second or two.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill  # noqa: F401

    logging.getLogger("papermill").setLevel(logging.ERROR)


def lacks_locks(error: Exception) -> bool:
    """Whether locking a file failed because its file system has no locks."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in NO_LOCKS


def literal(path: Path) -> str:
    """A path for papermill, which formats paths with the parameters, so that braces stay as they are."""
    return os.fspath(path).replace("{", "{{").replace("}", "}}")


def checkpoints_of(final: Path) -> Path:
    """Where the checkpoints of the run with the folder ``final`` are until it is complete."""
    return final.with_name(f".{final.name}.checkpoints")


def partial_folder(final: Path) -> Path:
    """A new hidden folder beside ``final``, with this process in its name."""
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.{OWNER}.", suffix=".partial", dir=final.parent))
    folder.chmod(0o755)
    return folder


def make_way(final: Path) -> None:
    """Keep a folder whose metrics.json is broken as ``<run id>.broken``: its notebook has the numbers too."""
    if final.is_dir() and final.suffix not in LEFTOVER_SUFFIXES and not complete(final):
        with contextlib.suppress(FileNotFoundError):  # another runner was first
            put_in_place(final, final.with_name(f"{final.name}.broken"))


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a folder to its place, over an older one there; readers see the old folder or the new one."""
    while True:
        try:
            partial.rename(final)
            return
        except OSError:
            if not final.exists():
                raise
            # A folder cannot replace a filled one in one step. If another runner is here too, one of the two wins.
            older = partial_folder(final)
            with contextlib.suppress(FileNotFoundError):
                final.rename(older)
            shutil.rmtree(older, ignore_errors=True)
