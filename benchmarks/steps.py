"""What the kit's shortcuts save, each against the plain way in the same run: ``python benchmarks/steps.py``.

Both are called in turn. Prints a Markdown table of their median milliseconds and the ratio, which varies less between
machines than the times do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from dfqlib.finetune import finetune
from dfqlib.gdfq import Schedule, make_stream, make_student
from dfqlib.generators import UpsampleConv2d
from dfqlib.models import load_teacher
from dfqlib.quantizer import fake_quantize
from dfqlib.runtime import code_version, describe_hardware, seed_everything
from dfqlib.statistics import batch_mean_var

WIDTHS = ("w3a3", "w4a4", "w5a5", "w8a8")
SCHEDULE = replace(Schedule(), iterations=3, observe_iterations=1, train_from=1, generator_iterations=3, batch=32)


def compare(plain: Callable[[], object], ours: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, called in turn so that a busy machine slows both alike; the first pair warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for function, spent in zip((plain, ours), seconds, strict=True):
            began = time.perf_counter()
            function()
            spent.append(time.perf_counter() - began)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def upsampling() -> tuple[Callable[[], object], Callable[[], object]]:
    """The generator's second upsampling convolution, 128 to 64 channels at 32 x 32, forward and backward."""
    conv = UpsampleConv2d(128, 64).to(memory_format=torch.channels_last)
    x = torch.randn(32, 128, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()

    def plain() -> None:
        F.conv2d(F.interpolate(x, scale_factor=2.0), conv.weight, conv.bias, padding=1).sum().backward()

    return plain, lambda: conv(x).sum().backward()


def rounding() -> tuple[Callable[[], object], Callable[[], object]]:
    """Fake quantization of one activation of ResNet-20's first stage, 32 images, against torch's own kernel."""
    x, low, high = torch.rand(32, 16, 32, 32) * 6, torch.tensor(0.0), torch.tensor(6.0)
    return lambda: torch.fake_quantize_per_tensor_affine(x, 6 / 15, 0, 0, 15), lambda: fake_quantize(x, low, high, 4)


def statistics_of_a_batch() -> tuple[Callable[[], object], Callable[[], object]]:
    """Mean and variance of one batch-norm input, with the gradient, against torch.var_mean."""
    x = torch.randn(32, 16, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()

    def plain() -> None:
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        (mean.square().sum() + variance.sum()).backward()

    def ours() -> None:
        mean, variance = batch_mean_var(x)
        (mean.square().sum() + variance.sum()).backward()

    return plain, ours


def table_of_widths() -> tuple[Callable[[], object], Callable[[], object]]:
    """Three GDFQ iterations of 32 images for four bit widths: a generator for each, against one for all."""
    teacher = load_teacher("resnet20_cifar10")

    def run(widths: tuple[str, ...]) -> None:
        students = {name: make_student(teacher, name, SCHEDULE) for name in widths}
        finetune(make_stream(teacher, SCHEDULE), students, SCHEDULE.iterations, 1, 1)

    return lambda: [run((width,)) for width in WIDTHS], lambda: run(WIDTHS)


def main() -> None:
    seed_everything(0)
    print(f"{describe_hardware(torch.device('cpu'))}, torch {torch.__version__}, commit {code_version()}\n")
    print("| what | plain, ms | here, ms | times faster |\n| --- | ---: | ---: | ---: |")
    for make, repeats in ((upsampling, 15), (rounding, 51), (statistics_of_a_batch, 31), (table_of_widths, 3)):
        plain, ours = compare(*make(), repeats)
        name = (make.__doc__ or "").rstrip(".")
        print(f"| {name} | {1000 * plain:.1f} | {1000 * ours:.1f} | {plain / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
