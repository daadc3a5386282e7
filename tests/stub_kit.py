"""A table of two small notebooks that import nothing heavy, and run_all.py called on it, for tests of the runner."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import run_all
from dfqlib import places

ROOT = Path(run_all.__file__).resolve().parent

PARAMETERS = """\
profile = "quick"
dataset = "cifar10"
model = "resnet20_cifar10"
bits = ["w4a4", "w3a3"]
seed = 0
device = "auto"
out = ""
data_folder = ""
weights = ""
iterations = 10  # loop length
observe_iterations = 1
train_from = 1
lr = 0.1
cosine = True
"""

SAVE = """\
import json, pathlib
rows = [
    dict(method="{key}", scheme="{scheme}", dataset=dataset, data=dataset + "-2k", model=model, weight_bits=int(b[1]),
         activation_bits=int(b[3]), variant="", ranges="", seed=seed, top1=60.0 + seed, top1_best=61.0 + seed,
         fp32_top1=90.0, seconds=1.0)
    for b in bits
]
pathlib.Path(out, "curve.png").write_bytes(b"picture")
pathlib.Path(out, "metrics.json").write_text(json.dumps(dict(
    paper="{key}", profile=profile, schedule="reduced: iterations 10 (published 100)",
    parameters=dict(profile=profile, dataset=dataset, model=model, bits=bits, seed=seed, iterations=iterations),
    provenance=dict(commit="0123", hardware="a machine", finished="2026-01-01T00:00:00"),
    rows=rows, records={{}}, figures=["curve"])))
"""

TABLE = """\
[profiles.smoke]
about = "seconds"
datasets = ["cifar10"]
bits = ["w4a4"]
rehearsal = true

[profiles.quick]
about = "minutes"
datasets = ["cifar10"]

[profiles.paper]
about = "days"
"""

METHOD = """
[{key}]
notebook = "{key}.ipynb"
title = "{key}"
methods = ["{key}"]
scheme = "{scheme}"
smoke = {{ iterations = 2 }}
paper = {{ iterations = 100, imagenet = {{ iterations = 200 }}, resnet50 = {{ lr = 0.5 }} }}
"""


def write_notebook(path: Path, key: str, scheme: str, body: str) -> None:
    """A notebook with a parameters cell, ``body``, and a cell that writes metrics.json and a figure."""
    sources = [("parameters", PARAMETERS), ("", body), ("", SAVE.format(key=key, scheme=scheme))]
    common = {"cell_type": "code", "outputs": [], "execution_count": None}
    cells = [
        common | {"id": f"c{i}", "metadata": {"tags": [tag]} if tag else {}, "source": source}
        for i, (tag, source) in enumerate(sources)
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}))


def write_kit(folder: Path, zeroq: str = "1 + 1", gdfq: str = "1 + 1") -> Path:
    """The table and its notebooks in ``folder``; returns the table, for ``$DFQ_PROFILES``."""
    folder.mkdir(exist_ok=True)
    text = TABLE
    for key, scheme, body in (("zeroq", "ptq", zeroq), ("gdfq", "qat", gdfq)):
        write_notebook(folder / f"{key}.ipynb", key, scheme, body)
        text += METHOD.format(key=key, scheme=scheme)
    table = folder / "profiles.toml"
    table.write_text(text)
    return table


def call(results: Path, *arguments: str) -> int:
    """run_all.py in this process; its exit code."""
    return run_all.main(["--results", str(results), *arguments])


def run_folders(results: Path, suffix: str = "") -> list[str]:
    """Folders of quick runs, as ``paper/id``, whose names end with ``suffix``."""
    return sorted(f"{p.parent.name}/{p.name}" for p in results.glob(f"quick/*/*{suffix}") if p.name[0] != ".")


def start(results: Path, *arguments: str, background: bool = False) -> subprocess.Popen:
    """run_all.py as a process of its own, with the same assets as the test; in the background it ignores Ctrl-C."""
    code = (
        "import sys, pathlib, run_all; from dfqlib import places\n"
        f"places.ASSETS = pathlib.Path({str(places.ASSETS)!r})\n"
        f"sys.exit(run_all.main({['--results', str(results), *arguments]!r}))"
    )
    # Said either way: these tests may run in the background themselves.
    ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True, preexec_fn=ctrl_c)


def kill_family(process: subprocess.Popen, spared: str | None = None) -> None:
    """SIGKILL to it and all that it started, but those with ``spared`` in their command line."""
    first = psutil.Process(process.pid)
    for member in [first, *first.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # some may just have come to their end
            if spared is None or spared not in " ".join(member.cmdline()):
                member.kill()


def wait_for(condition: Callable[[], object], seconds: float = 60, process: subprocess.Popen | None = None) -> None:
    """Until it holds; where it does not, ``process`` is killed and the test fails with what that printed."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            if process:
                kill_family(process)
            raise AssertionError("\n".join(process.communicate()) if process else f"not within {seconds} s")
        time.sleep(0.05)
