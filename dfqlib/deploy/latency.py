"""How long an image takes: in float, fake-quantized, in whole numbers here, and as a file in ONNX Runtime."""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dfqlib.deploy.export import run_onnx
from dfqlib.device import channels_last
from dfqlib.speed.low_bits import in_low_bits
from dfqlib.speed.scale_weights import scale_weights


def milliseconds(runs: list[Callable[[Tensor], object]], images: Tensor, rounds: int) -> list[float]:
    """Median milliseconds of each of ``runs``; they take turns, so that a busy machine slows all alike."""
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, times in zip(runs, spent, strict=True):
            run(images)  # the caches are the other's
            began = time.perf_counter()
            run(images)
            times.append(1000 * (time.perf_counter() - began))
    return [statistics.median(times[1:]) for times in spent]


def in_torch(student: nn.Module) -> dict[str, nn.Module]:
    """``student``, on the CPU and not finalised, in the ways that torch can compute it here, by name."""
    fake = scale_weights(student)
    ways = {"fake-quantized": fake, "in int8 here": in_low_bits(fake)}
    if ways["in int8 here"] is fake:  # a processor without such units
        del ways["in int8 here"]
    return ways


@torch.inference_mode()
def latency(
    network: nn.Module, student: nn.Module, path: str | Path, images: Tensor, rounds: int = 5
) -> dict[str, float]:
    """Milliseconds for each of ``images`` (N, C, H, W), by name, on one thread of the CPU.

    Of ``network`` in float, of its ``student`` by :func:`in_torch`, and of the student's ONNX file at ``path``.
    """
    ways: dict[str, Callable[[Tensor], Tensor]] = {"float": copy.deepcopy(network).cpu(), **in_torch(student)}
    ways["ONNX Runtime"] = run_onnx(path, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        spent = milliseconds(list(ways.values()), channels_last(images.cpu()), rounds)
    finally:
        torch.set_num_threads(threads)
    return {name: each / len(images) for name, each in zip(ways, spent, strict=True)}
