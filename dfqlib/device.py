"""Where and how a run computes: device, memory layout, seeds, and the description that every result carries."""

from __future__ import annotations

import os
import platform
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dfqlib.errors import UserError, check_choice
from dfqlib.speed.switches import uses

ImagesOrNetwork = TypeVar("ImagesOrNetwork", Tensor, nn.Module)


def pick_device(device: str = "auto") -> torch.device:
    """``"auto"`` takes CUDA, else Apple MPS, else the CPU; a named device is checked to be there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = device.partition(":")
    if kind == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    check_choice("device", kind, ["auto", *present])
    if not present[kind]:
        raise UserError(f"device={device!r} is not available to this torch ({torch.__version__}); use device='auto'.")
    if index and not (index.isdigit() and int(index) < (torch.cuda.device_count() if kind == "cuda" else 1)):
        raise UserError(f"device={device!r} names no device of this machine; use device='auto'.")
    return torch.device(device)


def channels_last(x: ImagesOrNetwork) -> ImagesOrNetwork:
    """Images (B, C, H, W), or a network's weights, in the order in which convolutions take them fastest.

    On a CPU they run about 1.5 times faster so. Apple's backend gains nothing: there, ``x`` stays as it is.
    """
    tensor = x if isinstance(x, Tensor) else next(x.parameters(), None)
    if not uses("channels_last") or tensor is None or tensor.device.type == "mps":
        return x
    if isinstance(x, Tensor):
        return x.contiguous(memory_format=torch.channels_last)
    return x.to(memory_format=torch.channels_last)


def fused(parameters: Iterable[Tensor]) -> bool:
    """Whether an optimizer of these parameters takes its step in one kernel."""
    return uses("fused_optimizers") and all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe_hardware(device: torch.device) -> str:
    """One line: the accelerator's name, or the processor's name and the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def processor_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def code_version() -> str:
    """The git commit of the checkout the package runs from, with ``+changes`` if it is not clean; else the version."""
    from dfqlib import __version__

    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return __version__
    git = ["git", "-C", os.fspath(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        # Results are what a run writes: they do not make the code another one.
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "dfqlib", "notebooks/*.ipynb", "run_all.py"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
