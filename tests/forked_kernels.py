"""A pytest plugin for nbval: kernels are forked from one process that imported what notebooks need, as in a batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbval.kernel
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from dfqlib.papers import profiles
from dfqlib.runner import identity, kernels


class ForkingManager(KernelManager):
    """Starts this very interpreter, as ``--nbval-current-env`` does, but forked."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[*kernels.LAUNCHER, "-f", "{connection_file}"], language="python")

    def start_kernel(self, **options: Any) -> None:
        self.provisioner = kernels.Forked(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        options |= {"stdout": options["stderr"], "env": kernels.environment(1)}
        self.sockets = tempfile.TemporaryDirectory(prefix="dfqlib-")  # which goes with the manager
        kernels.use_sockets(self, Path(self.sockets.name))
        super().start_kernel(**options)


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that is forked, where processes can be."""
    modules = set().union(*(identity.imports_of(paper.notebook) for paper in profiles.load()[1].values()))
    if kernels.warm_up(modules, threads=1):
        nbval.kernel.KernelManager = ForkingManager
