"""Runs on the workers of a Dask cluster, started here or found at an address.

Dask keeps the queue and notices lost workers. Where workers see the results folder, a run is executed directly in it
and resumes from its checkpoints on another worker; otherwise its inputs are sent to the worker and its folder is sent
back. A restarted scheduler receives the unfinished runs again.
"""

import contextlib
import dataclasses
import glob
import io
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
import zipfile
from asyncio import CancelledError
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import Client, Event, Future, KilledWorker, LocalCluster, Worker, get_client, get_worker
from distributed.client import FutureCancelledError
from distributed.comm import get_address_host
from distributed.core import Status

from dfqlib import places
from dfqlib.errors import UserError
from dfqlib.files import KEEP, write_text
from dfqlib.runner import kernels
from dfqlib.runner.execute import LocalExecutor, Outcome, Watcher, make_way, put_in_place
from dfqlib.runner.identity import code_identity, torch_version
from dfqlib.runner.plan import PlannedRun

ANSWER = 10  # seconds in which a scheduler must answer the first time
PATIENCE = 600  # seconds to wait for one that is being restarted
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # Dask sets them to 1
MAX_UPLOAD_BYTES = 2**30  # of inputs that may travel to a worker


@dataclasses.dataclass(frozen=True)
class WorkerTask:
    """What a worker needs to execute a run."""

    run: PlannedRun
    notebook: str  # its file's text: a worker may have no copy
    results: Path
    shared: bool  # whether workers see the results folder
    force: bool
    resume: bool  # whether a worker has begun it in this batch
    topic: str  # of the batch: its events, and the flag that stops it
    number: int  # of the run in these events
    hosts: dict[str, int]  # how many runs at once
    variables: dict[str, str]  # of the batch's environment, in place of the worker's
    checkpoint_every: int  # seconds


class Cluster(contextlib.AbstractContextManager):
    """``workers`` processes started here, or those of the scheduler at ``address``; a context manager.

    A run takes one GPU where workers offer them as a Dask resource. ``jobs`` runs are in the queue at once; by default
    twice as many as can execute, so that no worker is idle. ``empty`` says that no worker was connected yet. Raises
    UserError if the scheduler does not answer.
    """

    def __init__(
        self, address: str = "", workers: int = 1, jobs: int | None = None, checkpoint_every: int = 60
    ) -> None:
        options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.ERROR}
        self._local = None if address else LocalCluster(n_workers=workers, **options)
        self.address = self._local.scheduler_address if self._local else address
        try:
            Client(self.address, timeout=ANSWER, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise UserError(
                f"scheduler={address!r} does not answer ({error}); `dask scheduler` starts one, at tcp://HOST:8786."
            ) from None
        self._client = Client(self.address, timeout=PATIENCE, set_as_default=False)
        self._checkpoint_every = checkpoint_every  # seconds
        self._topic = f"dfqlib-{uuid.uuid4().hex}"
        self._watchers: list[Watcher] = []  # by a run's number
        self._waiting: dict[int, Future] = {}  # runs that no worker has started
        self._begun: set[int] = set()
        self._shared: bool | None = None
        self._lock = threading.Lock()
        self._stopping = False
        room = sum(self._hosts().values())
        self.empty = not room
        self.places = max(1, room)
        self.jobs = jobs or max(8, 2 * self.places)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # or a lost scheduler prints a traceback
        with contextlib.suppress(Exception):
            self._client.close()
        if self._local:
            self._local.close()

    def prepare(self, runs: list[PlannedRun]) -> None:
        """Nothing to do: workers start their kernels."""

    def stop(self) -> None:
        """Stop the runs of this batch on the workers, and cancel those that have not started."""
        self._stopping = True
        if self._client.status == "connecting":  # calls would wait for the scheduler
            return
        with contextlib.suppress(Exception):
            Event(self._topic, client=self._client).set()
            self._client.cancel(list(self._waiting.values()))

    def execute(self, run: PlannedRun, results: Path, force: bool, watcher: Watcher) -> Outcome:
        """Have a worker execute the run; again, if the scheduler loses it."""
        with self._lock:
            number = len(self._watchers)
            self._watchers.append(watcher)
        while not self._stopping:
            if self._client.status == "connecting":  # as above, and an interrupt must end this loop
                time.sleep(0.5)
                continue
            try:
                outcome, archive = self._send(number, run, results, force).result()
            except KilledWorker as error:
                line = f"{error.allowed_failures + 1} workers died while executing it, perhaps because memory ran out"
                return Outcome(run, "failed", line)
            except UserError as error:
                return Outcome(run, "failed", str(error))
            except (FutureCancelledError, CancelledError, OSError) as error:
                if getattr(error, "errno", None):  # of a file here, not of a connection
                    return Outcome(run, "failed", str(error))
                if self._client.status == "closed":
                    return Outcome(run, "failed", f"the scheduler at {self.address} was lost ({error})")
                time.sleep(0.5)
                continue
            if archive:
                fetch(outcome, archive, results)
            if outcome.state not in ("stopped", "skipped") or self._stopping:
                return outcome  # otherwise its worker was closed, and another one resumes
        return Outcome(run, "stopped", "interrupted")

    def _send(self, number: int, run: PlannedRun, results: Path, force: bool) -> Future:
        self._client.subscribe_topic(self._topic, self._report)  # a new scheduler does not know it any more
        with self._lock:
            if self._shared is None:
                self._shared = self._is_shared(results)
        data_root = os.fspath(places.data_root() or "") if self._shared else ""  # else what is read of it is sent
        variables = {"DFQ_DATA": data_root, KEEP: os.environ.get(KEEP, "0")}
        notebook = run.paper.notebook.read_text(encoding="utf-8")
        batch = self._topic, number, self._hosts(), variables, self._checkpoint_every
        task = WorkerTask(run, notebook, results, self._shared, force, number in self._begun, *batch)
        inputs = b"" if self._shared else self._client.scatter(pack(inputs_of(run)), hash=False)
        resources = {"GPU": 1} if any("GPU" in worker["resources"] for worker in self._workers()) else {}
        key = f"{run.paper.key}-{run.id}-{uuid.uuid4().hex[:8]}"
        future = self._client.submit(work, task, inputs, key=key, pure=False, resources=resources)
        self._waiting[number] = future
        return future

    def _is_shared(self, results: Path) -> bool:
        """Whether a worker sees this results folder; an interrupt cancels the question as it does runs that wait."""
        with tempfile.NamedTemporaryFile(prefix=".seen-", dir=results) as probe:
            self._waiting[-1] = self._client.submit(os.path.isfile, probe.name, pure=False)
            return self._waiting[-1].result()

    def _report(self, event: tuple[float, dict[str, Any]]) -> None:
        """Pass a worker's event on to the watcher of its run."""
        number, watcher = event[1]["number"], self._watchers[event[1]["number"]]
        if "cells" in event[1]:
            self._waiting.pop(number, None)
            self._begun.add(number)
            watcher.on_start(event[1]["cells"], Path(event[1]["file"]))
        else:
            watcher.on_cell()

    def _workers(self) -> list[dict[str, Any]]:
        return list(self._client.scheduler_info(n_workers=-1)["workers"].values())

    def _hosts(self) -> dict[str, int]:
        """How many runs each host has room for."""
        hosts: Counter[str] = Counter()
        for worker in self._workers():
            hosts[worker["host"]] += int(worker["resources"].get("GPU", worker["nthreads"]))
        return dict(hosts)


def work(task: WorkerTask, inputs: bytes) -> tuple[Outcome, bytes]:
    """Execute a run on this worker; its folder comes with the outcome where the results folder is not shared.

    Raises UserError for what keeps it from starting.
    """
    worker = get_worker()
    own = Path(worker.local_directory)
    results = task.results if task.shared else own / "results"
    executor = LocalExecutor(sharers(worker, task.hosts), task.checkpoint_every)
    executor.variables |= dict.fromkeys(THREADS, str(executor.threads)) | task.variables

    def report(**event: Any) -> None:
        worker.log_event(task.topic, {"number": task.number} | event)

    watcher = Watcher(lambda cells, file: report(cells=cells, file=os.fspath(file)), report)
    flag, over = Event(task.topic, client=get_client()), threading.Event()

    def stop_with_the_batch() -> None:
        while not over.wait(1):
            # A worker closes without its scheduler, and the run is executed elsewhere.
            if worker.status not in (Status.running, Status.paused) or flag.is_set():
                executor.stop()

    threading.Thread(target=stop_with_the_batch, daemon=True).start()
    try:
        run = at_home(task.run, task.notebook, own / "notebooks" / task.run.id)
        with unpacked(inputs, own) as folder:
            executor.locations = {path.name: os.fspath(path) for path in folder.iterdir()}
            outcome = executor.execute(run, results, task.force, watcher, task.resume)
        if task.shared:
            return outcome, b""
        final = run.folder(results)
        made = (final, final.with_name(f"{final.name}.unfinished"))
        message = outcome.message.replace(os.fspath(results), os.fspath(task.results))
        archive = pack({folder.name: folder for folder in made if folder.is_dir()})
        return dataclasses.replace(outcome, message=message), archive
    except OSError as error:  # of this worker's disk; the client would take an OSError for a lost connection
        raise UserError(f"worker {worker.address}: {error}") from None
    finally:
        over.set()


def sharers(worker: Worker, hosts: dict[str, int]) -> int:
    """How many runs at once share the cores that this worker may use.

    Those of all workers on its host (``hosts``), or only its own where a job queue reserved cores for it.
    """
    own = int(worker.state.total_resources.get("GPU", worker.state.nthreads))
    confined = kernels.cores() < (os.cpu_count() or 1)
    return own if confined else hosts.get(get_address_host(worker.address), own)


def at_home(run: PlannedRun, notebook: str, folder: Path) -> PlannedRun:
    """The run with its notebook on this machine: written into ``folder`` if its own path does not exist here.

    Raises UserError if the version of the kit or of torch here differs.
    """
    path = run.paper.notebook
    if not path.is_file():
        path = folder / path.name
        write_text(path, notebook)
    for what, here in (("code", code_identity(path)), ("torch", torch_version())):
        if here != run.depends[what]:
            kit = "the kit" if what == "code" else what
            raise UserError(f"worker {get_worker().address} has another version of {kit}; install the same one there.")
    return dataclasses.replace(run, paper=dataclasses.replace(run.paper, notebook=path))


def inputs_of(run: PlannedRun) -> dict[str, Path]:
    """The files and folders that a run reads and the package does not hold, by parameter; UserError for too much."""
    parameters = run.parameters
    named = {name: places.expand(parameters[name]) for name in places.PATH_PARAMETERS if parameters.get(name)}
    inputs = {name: path for name, path in named.items() if path.is_file()}
    weights = places.weights_file(parameters.get("model", ""), parameters.get("weights", ""))
    if weights and weights.parent != places.ASSETS and run.paper.methods:
        inputs["weights"] = weights
    if folder := places.data_folder(parameters.get("dataset", ""), parameters):
        inputs["data_folder"] = folder
        if sum(file.stat().st_size for file in below(folder) if file.is_file()) > MAX_UPLOAD_BYTES:
            raise UserError(
                f"the images in {str(folder)!r} are too many to send to workers; put them, and the results, into a "
                "folder that all of them see."
            )
    return inputs


def below(path: Path) -> list[Path]:
    """What is in a folder and in those inside of it, behind links too; nothing for a file."""
    return [path / each for each in sorted(glob.glob("**", root_dir=path, recursive=True, include_hidden=True))]


def pack(paths: dict[str, Path]) -> bytes:
    """Files and folders as one zip archive, under the names given."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", strict_timestamps=False) as archive:
        for name, path in paths.items():
            for part in (path, *below(path)):
                archive.write(part, name / part.relative_to(path))
    return stream.getvalue()


@contextlib.contextmanager
def unpacked(archive: bytes, parent: Path) -> Iterator[Path]:
    """A temporary folder in ``parent`` with the content of an archive of :func:`pack`; b"" is one without content."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=parent) as folder:
        if archive:
            zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
        yield Path(folder)


def fetch(outcome: Outcome, archive: bytes, results: Path) -> None:
    """Move the folders that a worker sent to their place in ``results``."""
    parent = outcome.run.folder(results).parent
    with unpacked(archive, parent) as arrived:
        for folder in arrived.iterdir():
            make_way(parent / folder.name)
            put_in_place(folder, parent / folder.name)
    if outcome.state == "done":
        shutil.rmtree(parent / f"{outcome.run.id}.unfinished", ignore_errors=True)
