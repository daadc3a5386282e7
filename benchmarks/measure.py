"""Seconds, memory and multiply-adds of an iteration."""

import contextlib
import itertools
import math
import multiprocessing
import re
import resource
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
from dfqlib.speed import precision

ROUND, SETTLING = 4, 2  # iterations of one side before the other's, and the first of them, which do not count
PATIENCE = 4  # times as many rounds as are wanted, at most, until so many count
# What a busy machine is told by, see Alternating; an idle one has 30 to 70 switches a second.
SLOWER, SWITCHES, SHARE = 1.15, 100, 0.95
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


class Enough(Exception):
    """Ends the kit's loop: as many rounds count as are wanted."""


class Alternating:
    """The tick of the kit's loop: after each :data:`ROUND` of its iterations it calls some other functions as often.

    So a machine that is busy for a while slows all alike. The first two calls of a round do not count: they find caches
    as the others left them, and in the first of all students only observe. A product of matrices is timed before and
    after each round: a round counts only if neither took longer than :data:`SLOWER` times the fastest of all, if other
    processes took the cores at most :data:`SWITCHES` times a second, and if this thread ran :data:`SHARE` of the time.
    """

    def __init__(self, device: torch.device, wanted: int, *others: Callable[[], object]) -> None:
        self.device, self.wanted, self.others = device, wanted, others
        self.iterations = 0
        self.rounds: list[list[list[float]]] = []  # of each round, the seconds of the kit's iterations, then of others'
        self.products: list[float] = []
        self.marks: list[tuple[float, float, int]] = []  # between rounds: time, own time, involuntary context switches
        self.multiply, self.operations = multiplication(device)

    def __call__(self) -> None:
        self._end_iteration()
        if self.iterations % ROUND == 0:
            with torch.autocast(self.device.type, enabled=False):  # the kit's loop may be within a forward pass
                self._mark()
                if len(self.quiet()) == self.wanted:
                    raise Enough
                others = [[seconds(each, self.device) for _ in range(ROUND)][SETTLING:] for each in self.others]
            self.rounds.append([[], *others])
        self.iterations += 1
        self.began = now(self.device)

    def _end_iteration(self) -> None:
        """The kit's iteration is over, if there was one that counts."""
        if self.iterations and (self.iterations - 1) % ROUND >= SETTLING:
            self.rounds[-1][0].append(now(self.device) - self.began)

    def _mark(self) -> None:
        self.products.append(statistics.median(seconds(self.multiply, self.device) for _ in range(5)))
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self.marks.append((now(self.device), time.thread_time(), switches))

    def end(self) -> None:
        """The kit's last iteration is over."""
        self._end_iteration()
        self._mark()

    def quiet(self) -> list[list[list[float]]]:
        """The rounds that count."""
        found, slow = [], SLOWER * min(self.products)
        for index, spent in enumerate(self.rounds):
            share, switches = self.own_time(index, index + 1)
            if max(self.products[index : index + 2]) <= slow and share >= SHARE and switches <= SWITCHES:
                found.append(spent)
        return found

    def own_time(self, first: int = 0, last: int = -1) -> tuple[float, float]:
        """The share of the time that this thread ran between two marks, and involuntary context switches a second."""
        wall, own, switches = (
            after - before for before, after in zip(self.marks[first], self.marks[last], strict=True)
        )
        return own / wall, switches / wall

    def medians(self) -> list[float]:
        """Median seconds of an iteration of the kit's and of each of the others; NaN where too few rounds count."""
        quiet = self.quiet()
        if len(quiet) < self.wanted:
            return [math.nan] * (1 + len(self.others))
        return [statistics.median(itertools.chain(*spent)) for spent in zip(*quiet, strict=True)]

    def rate(self) -> float:
        """Floating-point operations a second of the product of matrices."""
        return self.operations / statistics.median(self.products)


def alternate(
    loop: Callable[[int, Callable[[], None]], object], device: torch.device, rounds: int, *others: Callable[[], object]
) -> Alternating:
    """Run ``loop(iterations, tick)`` beside ``others`` until ``rounds`` rounds count, or too many do not."""
    times = Alternating(device, rounds, *others)
    with contextlib.suppress(Enough):
        loop(ROUND * PATIENCE * rounds, times)
        times.end()
    return times


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
    """The most memory that two iterations take, beyond what there was before the first one.

    ``side`` is ``"published"``, or the precision of the kit's loop.
    """
    if device.type == "cuda":
        start, peak = _reset_cuda, lambda: torch.cuda.max_memory_allocated(device)
    else:
        start, peak = reset_process, lambda: kilobytes("VmHWM") * 1024
    marks: list[int] = []

    def tick() -> None:
        if not marks:
            marks.append(start(device))

    if side != "published":
        precision.use(side)
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


def peaks_in_new_processes(
    sides: Sequence[tuple[str, str]], batch: int | None, model: str, device: torch.device
) -> Iterator[int]:
    """For each case and side :func:`peak_bytes`, in a process of its own (on Linux only)."""
    # The fork server has imported everything and computed nothing, so its children start at once, and all alike.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "dfqlib.plotting"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield from pool.map(_peak, *zip(*((name, side, batch, model, device) for name, side in sides), strict=True))


def _peak(name: str, side: str, batch: int | None, model: str, device: str) -> int:
    return peak_bytes(make_case(name, load_teacher(model, device=device), batch), side, torch.device(device))
