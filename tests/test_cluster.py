"""Runs on a Dask cluster of real processes: workers and the scheduler may be lost, no run is lost or made twice."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import Client, LocalCluster
from stub_kit import ROOT, call, kill_family, run_folders, start, wait_for, write_kit

from dfqlib.errors import UserError
from dfqlib.files import KEEP
from dfqlib.runner import cluster, kernels, plan, preflight, run_folder


def free_port() -> int:
    """One that systems give to nobody who does not ask for it, as a scheduler comes back to its port."""
    while True:
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            return candidate.getsockname()[1]


class Processes:
    """A scheduler and its workers, as a user of a cluster starts them."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.folder = folder
        self.alive: list[subprocess.Popen] = []
        self.scheduler = self.start_scheduler()
        self.workers = [self.start_worker() for _ in range(2)]

    def start_scheduler(self) -> subprocess.Popen:
        return self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")

    def start_worker(self, threads: int = 1, *options: str) -> subprocess.Popen:
        folder = str(self.folder / f"worker{len(self.alive)}")
        settings = ["--nthreads", str(threads), "--no-dashboard", "--local-directory", folder]
        return self._start("worker", self.address, *settings, *options)

    def _start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(self.folder / f"dask{len(self.alive)}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.alive.append(process)
        return process

    def end(self) -> None:
        for process in self.alive:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def processes(kit, tmp_path):
    started = Processes(tmp_path)
    yield started
    started.end()


def diary(tmp_path: Path, seconds: float = 0.0) -> str:
    """A notebook's body that notes when it begins and ends."""
    return f"""
import time
def note(what):
    with open({str(tmp_path / "diary")!r}, "a") as file:
        file.write(what + "\\n")
note(f"begin {{seed}}")
time.sleep({seconds})
note(f"end {{seed}}")"""


def notes(tmp_path: Path) -> Counter[str]:
    file = tmp_path / "diary"
    return Counter(file.read_text().splitlines()) if file.exists() else Counter()


def test_workers_started_here_and_no_cluster_asked_for_when_nothing_is_missing(kit, tmp_path, capsys):
    assert call(tmp_path / "results", "--executor", "dask", "--workers", "2") == 0
    printed = capsys.readouterr().out
    assert "2 runs to make, 0 already there; 2 at once.\n0 of 2 runs ended, about 1 min left\n" in printed
    assert printed.count(": starts") == printed.count(": done") == 2
    assert len(run_folders(tmp_path / "results")) == 2
    assert call(tmp_path / "results", "--executor", "dask", "--scheduler", "nowhere") == 0
    assert capsys.readouterr().out.count(": found") == 2


def test_a_lost_worker_and_a_lost_scheduler_cost_no_run(kit, tmp_path, processes):
    write_kit(kit, zeroq=diary(tmp_path, seconds=1))
    seeds = [str(seed) for seed in range(12)]
    results = tmp_path / "results"
    options = ["--papers", "zeroq", "--executor", "dask", "--scheduler", processes.address, "--jobs", "12"]
    batch = start(results, *options, "--seeds", *seeds)
    try:
        wait_for(lambda: len(list(results.glob("quick/zeroq/[!.]*/metrics.json"))) >= 2, 300, batch)
        spared = "ipykernel_launcher"  # they have to notice by themselves
        kill_family(processes.workers[0], spared=spared)
        wait_for(lambda: len(list(results.glob("quick/zeroq/[!.]*/metrics.json"))) >= 5, 300, batch)
        kill_family(processes.scheduler, spared=spared)
        processes.start_scheduler()
        processes.start_worker()  # as a job queue does: workers end with their scheduler
        printed, errors = batch.communicate(timeout=600)
    finally:
        batch.kill()
    assert batch.returncode == 0, errors
    assert len(run_folders(results)) == 12 and not list(results.glob("quick/zeroq/.*"))
    assert all(notes(tmp_path)[f"end {seed}"] == 1 for seed in seeds)
    assert printed.count(": done") + printed.count(": found") == 12


def test_a_cluster_without_workers_is_told_and_can_be_left(kit, tmp_path):
    with LocalCluster(n_workers=0, dashboard_address=None) as empty:
        batch = start(tmp_path / "results", "--executor", "dask", "--scheduler", empty.scheduler_address)
        lines = [batch.stdout.readline() for _ in range(4)]
        time.sleep(1)  # it asks what workers see
        batch.send_signal(signal.SIGINT)
        printed, errors = batch.communicate(timeout=60)
        assert batch.returncode == 130 and printed.count(": stopped") == 2 and "Traceback" not in errors
    assert f"No worker is connected to {empty.scheduler_address} yet; runs start when one joins.\n" in lines


def test_a_gpu_takes_one_run_at_a_time(kit, tmp_path, processes):
    """Its worker has threads for two; workers without one take none."""
    processes.start_worker(2, "--resources", "GPU=1")
    with Client(processes.address) as client:
        client.wait_for_workers(3, timeout=300)
    write_kit(kit, zeroq=diary(tmp_path, seconds=0.5))
    options = ["--papers", "zeroq", "--executor", "dask", "--scheduler", processes.address]
    assert call(tmp_path / "results", *options, "--seeds", "0", "1", "2") == 0
    lines = (tmp_path / "diary").read_text().splitlines()
    assert sorted(lines[::2]) == ["begin 0", "begin 1", "begin 2"]
    assert [f"begin {line.removeprefix('end ')}" for line in lines[1::2]] == lines[::2]


def test_workers_need_no_home(kit, tmp_path, monkeypatch, request):
    """As in a container whose user has none; here there is a file where it should be, and none can be made."""
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(tmp_path / "file" / "home"))
        address = request.getfixturevalue("processes").address
    write_kit(kit, zeroq="import matplotlib.pyplot, os\nassert os.access(os.path.expanduser('~'), os.W_OK)")
    assert call(tmp_path / "results", "--papers", "zeroq", "--executor", "dask", "--scheduler", address) == 0


@pytest.mark.parametrize(("cores", "resources", "runs"), [(64, {}, 16), (8, {}, 2), (8, {"GPU": 1.0}, 1)])
def test_a_worker_with_cores_of_its_own_shares_them_with_nobody(monkeypatch, cores, resources, runs):
    """Job queues give their workers some of a host's cores; workers started by hand have all of them, together."""
    state = SimpleNamespace(nthreads=2, total_resources=resources)
    worker = SimpleNamespace(address="tcp://node7:4000", state=state)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(kernels, "cores", lambda: cores)
    assert cluster.sharers(worker, {"node7": 16}) == runs


@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupt_reaches_the_workers_and_need_not_wait_for_a_lost_scheduler(kit, tmp_path, processes, lost):
    write_kit(kit, zeroq=diary(tmp_path, seconds=600))
    options = ["--papers", "zeroq", "--executor", "dask", "--scheduler", processes.address]
    batch = start(tmp_path / "results", *options, "--seeds", "0", "1", "2")
    wait_for(lambda: notes(tmp_path).total() == 2, 300, batch)
    if lost:
        kill_family(processes.scheduler)
        time.sleep(5)  # the batch notices, and looks for it
    batch.send_signal(signal.SIGINT)
    printed, errors = batch.communicate(timeout=60)
    assert batch.returncode == 130 and "Traceback" not in errors
    assert printed.count(": stopped") == 3
    assert lost or len(run_folders(tmp_path / "results", ".unfinished")) == 2


def test_without_a_shared_folder_inputs_and_results_travel(kit, tmp_path, monkeypatch, request):
    with monkeypatch.context() as patch:  # of the workers, which is not the batch's
        patch.setenv("DFQ_DATA", str(tmp_path))
        address = request.getfixturevalue("processes").address
    monkeypatch.setenv(KEEP, "0")
    monkeypatch.setattr(cluster.Cluster, "_is_shared", lambda self, results: False)
    weights = tmp_path / "own.safetensors"
    weights.write_text("weights")
    body = f"assert open(weights).read() == 'weights' and weights != {str(weights)!r}"
    write_kit(kit, zeroq=f"{body}\nimport os\nassert (os.environ['{KEEP}'], os.environ['DFQ_DATA']) == ('7', '')")
    monkeypatch.setattr(preflight, "obstacle", lambda run, download: "")
    options = ["--papers", "zeroq", "--executor", "dask", "--scheduler", address, "--keep", "7"]
    options += ["--set", f"weights={weights}"]
    assert call(tmp_path / "results", *options, "--models", "resnet20_cifar10") == 0
    (folder,) = run_folders(tmp_path / "results")
    measured = tmp_path / "results" / "quick" / folder / "metrics.json"
    assert run_folder.complete(measured.parent)
    measured.write_text("{")
    assert call(tmp_path / "results", *options, "--models", "resnet20_cifar10") == 0
    assert run_folder.complete(measured.parent)
    assert measured.parent.with_name(f"{measured.parent.name}.broken").joinpath("metrics.json").read_text() == "{"
    shutil.rmtree(tmp_path / "results")
    write_kit(kit, zeroq="raise ValueError('broken')")
    assert call(tmp_path / "results", *options, "--models", "resnet20_cifar10") == 1
    (folder,) = run_folders(tmp_path / "results", ".unfinished")
    assert (tmp_path / "results" / "quick" / folder / "error.txt").is_file()


def test_a_worker_needs_no_copy_of_the_notebook_but_the_same_kit(kit, tmp_path, monkeypatch):
    """The kit installed as a package, as in a container's image, has none."""
    (run,) = plan.plan(plan.Selection(papers=["zeroq"]))
    path, folder = run.paper.notebook, tmp_path / "worker" / "notebooks"
    text = path.read_text()
    assert cluster.at_home(run, text, folder) == run and not folder.exists()
    path.rename(path.with_suffix(".away"))
    there = cluster.at_home(run, text, folder)
    assert there.paper.notebook.parent == folder and there.paper.notebook.read_text() == text
    assert (there.id, there.parameters) == (run.id, run.parameters)
    monkeypatch.setattr(cluster, "get_worker", lambda: SimpleNamespace(address="tcp://node7:4000"))
    with pytest.raises(UserError, match="node7:4000 has another version of the kit"):
        cluster.at_home(run, text.replace("1 + 1", "1 + 2"), folder)


def test_only_parameters_that_name_places_travel_and_not_too_many_images(kit, tmp_path, monkeypatch):
    (run,) = plan.plan(plan.Selection(papers=["zeroq"]))
    monkeypatch.chdir(tmp_path)
    for text in filter(None, (value for value in run.parameters.values() if isinstance(value, str))):
        Path(text).touch()
    assert cluster.inputs_of(run) == {}
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "one.png").write_bytes(b"12345")
    (images / "class").symlink_to(tmp_path / "elsewhere")
    (run,) = plan.plan(plan.Selection(papers=["zeroq"], settings={"data_folder": str(images)}))
    assert cluster.inputs_of(run) == {"data_folder": images}
    with cluster.unpacked(cluster.pack(cluster.inputs_of(run)), tmp_path) as there:
        assert (there / "data_folder" / "class" / "one.png").read_bytes() == b"12345"
    monkeypatch.setattr(cluster, "MAX_UPLOAD_BYTES", 4)
    with pytest.raises(UserError, match="too many to send"):
        cluster.inputs_of(run)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--executor", "slurm"], "executor='slurm' is unknown"),
        (["--workers", "2"], "--scheduler and --workers are for --executor dask"),
        (["--executor", "dask", "--workers", "0"], "workers=0 is out of range"),
        (["--executor", "dask", "--workers", "1", "--scheduler", "tcp://x:1"], "give one of them"),
        (["--executor", "dask", "--scheduler", "tcp://127.0.0.1:1"], "scheduler='tcp://127.0.0.1:1' does not answer"),
        (["--executor", "dask", "--scheduler", "nowhere"], "scheduler='nowhere' does not answer"),
    ],
)
def test_wrong_options_are_one_sentence(kit, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(cluster, "ANSWER", 1)
    assert call(tmp_path / "results", *arguments) == 2
    errors = capsys.readouterr().err
    assert sentence in errors and errors.count("\n") == 1
