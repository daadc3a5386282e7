"""Device, memory layout and seeds of a run, and the description of hardware and code in every result."""

import contextlib
import functools
import platform
import random
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dfqlib import __version__
from dfqlib.errors import UserError, check_choice
from dfqlib.places import PACKAGE
from dfqlib.speed.switches import uses

ImagesOrNetwork = TypeVar("ImagesOrNetwork", Tensor, nn.Module)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` takes CUDA, else Apple MPS, else the CPU; UserError for the name of a device that is not available."""
    if isinstance(device, torch.device):
        return device
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, numbered, index = device.partition(":")
    if kind == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    check_choice("device", kind, ["auto", *present])
    if not present[kind]:
        raise UserError(f"device={device!r} is not available to this torch ({torch.__version__}); use device='auto'.")
    if numbered and not (index.isdecimal() and int(index) < (torch.cuda.device_count() if kind == "cuda" else 1)):
        raise UserError(f"device={device!r} names no device of this machine; use device='auto'.")
    return torch.device(device)


def channels_last(x: ImagesOrNetwork) -> ImagesOrNetwork:
    """Images (B, C, H, W), or a network, in the memory layout in which convolutions are fastest.

    On a CPU that is about 1.5 times as fast. Apple's backend gains nothing: there, ``x`` is returned unchanged.
    """
    tensors = [x] if isinstance(x, Tensor) else [*x.parameters()]
    volumes = any(tensor.dim() > 4 for tensor in tensors)  # have another such layout
    if not uses("channels_last") or volumes or not tensors or tensors[0].device.type == "mps":
        return x
    layout = {"memory_format": torch.channels_last}
    return x.contiguous(**layout) if isinstance(x, Tensor) else x.to(**layout)


def fused(parameters: Iterable[Tensor]) -> bool:
    """Whether an optimizer of ``parameters`` can take its step in one kernel."""
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
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:(.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return " ".join(model[1].split()) if model else platform.processor() or platform.machine()


def code_version() -> str:
    """The git commit of the package's checkout, with ``+changes`` if its code differs; without git, the version."""
    if (PACKAGE.parent / ".git").exists():
        git = functools.partial(subprocess.check_output, cwd=PACKAGE.parent, text=True, stderr=subprocess.DEVNULL)
        code = ["dfqlib", "notebooks/*.ipynb", "run_all.py"]  # not results, which runs write
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = git(["git", "rev-parse", "--short=12", "HEAD"]).strip()
            changes = git(["git", "status", "--porcelain", "--untracked-files=no", "--", *code]).strip()
            return commit + ("+changes" if changes else "")
    return __version__
