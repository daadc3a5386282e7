"""Tests that run side by side share the cores, as do the processes that they start."""

import os
import random

import numpy as np
import pytest
import torch
from browser import launched
from stub_kit import write_kit

from dfqlib import places
from dfqlib.runner.kernels import cores

# Only in a worker: what the process that starts the workers sets, they inherit. torch has read its variable by now.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(workers))))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """No test, and no fixture of one, sees random numbers that depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")  # while it is open, an event loop runs, which papermill would not bear
def browser():
    yield from launched()


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """A folder with two working notebooks; the teacher counts as present, so that nothing is loaded or downloaded."""
    monkeypatch.setenv("DFQ_PROFILES", str(write_kit(tmp_path / "kit")))
    monkeypatch.delenv("DFQ_DATA", raising=False)
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in (
        "resnet20_cifar10.safetensors",
        "resnet20_cifar100.safetensors",
        "cifar10-2k.webp",
        "cifar100-2k.webp",
    ):
        (assets / name).write_bytes(name.encode())
    for names in places.ASSETS.glob("*-classes.txt"):
        (assets / names.name).write_bytes(names.read_bytes())
    monkeypatch.setattr(places, "ASSETS", assets)
    return tmp_path / "kit"
