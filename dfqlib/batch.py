"""Run planned notebooks, one after the other, each into a folder of its own that appears whole or not at all.

While a run goes on it lives in a hidden folder beside its place, ``.<run id>.<random>.partial``; when it is complete,
one rename puts it there. A run that fails or is interrupted is left as ``<run id>.unfinished`` with its partly executed
notebook, ``error.txt`` and the kernel's own log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from dfqlib.errors import UserError
from dfqlib.files import write_json, write_text
from dfqlib.plan import METRICS, NOTEBOOK, PACKAGE, PlannedRun, complete, notebook_cells
from dfqlib.progress import FILE_VARIABLE
from dfqlib.screen import Screen

FORMATTING = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback


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


def execute(
    runs: list[PlannedRun], results: Path, screen: Screen, *, force: bool = False, keep_going: bool = False
) -> list[Outcome]:
    """Run what is missing in ``results`` (with ``force``, everything) and say how each run ended.

    After a failure the other runs of the same notebook are skipped, as they would fail likewise, unless
    ``keep_going``; other notebooks go on. An interrupt (Ctrl-C) stops the running notebook and skips the rest.
    """
    outcomes: list[Outcome] = []
    broken: set[str] = set()
    stopped = False
    for index, run in enumerate(runs):
        if not force and complete(run.folder(results)):
            outcome = Outcome(run, "found", str(run.folder(results)))
        elif stopped:
            outcome = Outcome(run, "skipped", "after the interrupt")
        elif run.paper.key in broken and not keep_going:
            outcome = Outcome(
                run, "skipped", f"after another run of {run.paper.notebook.name} failed (--keep-going runs it)"
            )
        else:
            outcome = execute_one(run, results, screen, index)
            stopped = outcome.state == "stopped"
            if outcome.state == "failed":
                broken.add(run.paper.key)
        screen.end(index, outcome.state, outcome.message)
        outcomes.append(outcome)
    return outcomes


def execute_one(run: PlannedRun, results: Path, screen: Screen, index: int) -> Outcome:
    """Execute one notebook into its folder below ``results``."""
    final = run.folder(results)
    unfinished = final.with_name(f"{final.name}.unfinished")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    partial.chmod(0o755)
    began = time.monotonic()
    progress_file = partial / "progress.json"
    cells = len(notebook_cells(run.paper.notebook)) + 1  # papermill adds one with the parameters
    screen.start(index, cells, progress_file)
    try:
        run_notebook(run, partial, progress_file, on_cell=lambda: screen.cell(index))
        seconds = time.monotonic() - began
        stamp(run, partial, seconds)
        put_in_place(partial, final)
    except (KernelFailure, OSError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        line = "interrupted" if interrupted else str(error)
        # On a full disk the message may find no room; what is there is kept all the same.
        with contextlib.suppress(OSError):
            write_text(partial / "error.txt", getattr(error, "details", line + "\n"))
        progress_file.unlink(missing_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        partial.rename(unfinished)
        message = f"{line}; what it did is in {unfinished}"
        return Outcome(run, "stopped" if interrupted else "failed", message, time.monotonic() - began)
    shutil.rmtree(unfinished, ignore_errors=True)
    return Outcome(run, "done", str(final), seconds)


def run_notebook(run: PlannedRun, partial: Path, progress_file: Path, on_cell: Any) -> None:
    """Execute the notebook with its parameters into ``partial``; KernelFailure if it does not reach its end."""
    import papermill  # here, since it takes a second that --list and a finished batch need not wait for
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    with open(partial / "kernel.log", "wb") as log:
        try:
            papermill.execute_notebook(
                run.paper.notebook,
                partial / NOTEBOOK,
                parameters=run.parameters | {"out": os.fspath(partial)},
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=run.paper.notebook.parent,
                kernel_manager_class=this_python(progress_file, log),
                shutdown_kernel="immediate",
                on_cell_executed=lambda **_: on_cell(),
            )
        except papermill.PapermillExecutionError as error:
            # The kit's own refusals are sentences; other errors need their type to be understood.
            sentence = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
            raise KernelFailure(sentence.splitlines()[0], FORMATTING.sub("", str(error))) from None
        except Exception as error:
            log.flush()
            tail = (partial / "kernel.log").read_text(errors="replace")[-4000:]
            dead = isinstance(error, DeadKernelError)
            line = "the kernel died, perhaps for want of memory" if dead else f"{type(error).__name__}: {error}"
            raise KernelFailure(line, f"{line}\n{tail}") from error


def this_python(progress_file: Path, log: BinaryIO) -> type[AsyncKernelManager]:
    """A kernel manager that starts this very interpreter, whatever kernels the machine has.

    The kernel reports its loops to ``progress_file``; what native code prints goes to ``log``, not over the screen.
    """

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

        async def start_kernel(self, **options: Any) -> None:
            path = os.pathsep.join(filter(None, [os.fspath(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
            env = os.environ | {FILE_VARIABLE: os.fspath(progress_file), "PYTHONPATH": path}
            await self._async_start_kernel(**options, env=env, stdout=log, stderr=log)

    return ThisPython


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
            older = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
            try:
                final.rename(older)
            except FileNotFoundError:
                pass
            finally:
                shutil.rmtree(older, ignore_errors=True)
