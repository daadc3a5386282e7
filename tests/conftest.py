"""Tests that run side by side share the cores, as do the processes that they start."""

import os

from dfqlib.kernels import cores

os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))))
