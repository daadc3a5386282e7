"""Seconds, memory and multiply-adds of an iteration."""

import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it in their first step, where it would count as that step's memory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import Case, make_case
from dfqlib.models.teacher import load_teacher

SIDES = ("published", "ours")
ROUND, SETTLING = 4, 2  # iterations of one side before the other's, and the first of them, which do not count
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def now(device: torch.device) -> float:
    """Seconds on a clock, once ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    began = now(device)
    function()
    return now(device) - began


class Alternating:
    """The tick of the kit's loop: after each :data:`ROUND` of its iterations it calls some other functions as often.

    So a machine that is busy for a while slows all alike. The first two calls of a round do not count: they find caches
    as the others left them, and in the first of all students only observe.
    """

    def __init__(self, device: torch.device, *others: Callable[[], object]) -> None:
        self.device, self.others = device, others
        self.iterations = 0
        self.began = 0.0
        self.ours: list[float] = []
        self.theirs: list[list[float]] = [[] for _ in others]

    def __call__(self) -> None:
        self.end()
        if self.iterations % ROUND == 0:
            for function, spent in zip(self.others, self.theirs, strict=True):
                spent += [seconds(function, self.device) for _ in range(ROUND)][SETTLING:]
        self.iterations += 1
        self.began = now(self.device)

    def end(self) -> None:
        """The kit's iteration is over, if there was one that counts."""
        if self.iterations and (self.iterations - 1) % ROUND >= SETTLING:
            self.ours.append(now(self.device) - self.began)

    def medians(self) -> list[float]:
        """Median seconds of an iteration of the kit's and of each of the others."""
        return [statistics.median(spent) for spent in (self.ours, *self.theirs)]


def multiplication(device: torch.device) -> tuple[Callable[[], object], float]:
    """A product of two float32 matrices, and its floating-point operations: it shows what the machine can do.

    It may use TensorFloat-32 where convolutions may.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)
    return lambda: a @ b, 2.0 * size**3


class Operations(TorchDispatchMode):
    """Counts floating-point operations of convolutions and matrix products; a multiply-add is two.

    As torch's FlopCounterMode, whose hooks on modules do not bear the gradient of an image that SaFT asks for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.count += count(*args, **(kwargs or {}), out_val=result)
        return result


def operations(case: Case) -> int:
    """Floating-point operations of one iteration of the kit's loop, forward and backward."""
    before: list[int] = []
    with Operations() as operations:
        case.ours(2, lambda: before.append(operations.count))
    return operations.count - before[-1]


def peak_bytes(case: Case, side: str, device: torch.device) -> int:
    """The most memory that two iterations of one side take, beyond what there was before the first one."""
    if device.type == "cuda":
        start, peak = _reset_cuda, lambda: torch.cuda.max_memory_allocated(device)
    else:
        start, peak = reset_process, lambda: kilobytes("VmHWM") * 1024
    marks: list[int] = []

    def tick() -> None:
        if not marks:
            marks.append(start(device))

    if side == "ours":
        case.ours(2, tick)
    else:
        published = case.published()
        tick()
        published.step()
        published.step()
    return peak() - marks[0]


def _reset_cuda(device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def reset_process(device: torch.device) -> int:
    RESET.write_text("5", encoding="ascii")  # the peak so far becomes what there is now
    return kilobytes("VmRSS") * 1024


def kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))[1])


def peaks_in_new_processes(names: Sequence[str], batch: int | None, model: str, device: str) -> Iterator[list[int]]:
    """For each case :func:`peak_bytes` of the two :data:`SIDES`, each in a process of its own (on Linux only)."""
    # The fork server has imported everything and computed nothing, so its children start at once, and all alike.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "dfqlib.plotting"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for name in names:
            yield list(pool.map(_peak, *zip(*((name, side, batch, model, device) for side in SIDES), strict=True)))


def _peak(name: str, side: str, batch: int | None, model: str, device: str) -> int:
    return peak_bytes(make_case(name, load_teacher(model, device=device), batch), side, torch.device(device))
