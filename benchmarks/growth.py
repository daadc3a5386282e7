"""How the seconds of a GDFQ iteration grow with batch, bit widths and depth: ``python -m benchmarks.growth``.

Writes ``growth.csv`` and ``growth.png``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from pytorchcv.models import resnet_cifar
from torch import nn

from benchmarks.cases import WIDTHS, make_gdfq
from benchmarks.measure import ROUND, Alternating
from benchmarks.steps import RESULTS, provenance
from dfqlib.device import pick_device, seed_everything
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import CIFAR_MEAN, CIFAR_STD
from dfqlib.plotting import COLOURS, style

LABELS = {"batch": "images per batch", "widths": "bit widths", "depth": "layers of the ResNet"}


def points(batches: list[int], batch: int) -> Iterator[tuple[str, int, int, int, int]]:
    """What grows, how far, and with it batch, number of bit widths and depth; one grows at a time."""
    yield from (("batch", each, each, 1, 20) for each in batches)
    yield from (("widths", widths, batch, widths, 20) for widths in (1, 2, 4))
    yield from (("depth", depth, batch, 1, depth) for depth in (20, 56))


def seconds_per_iteration(batch: int, widths: int, depth: int, rounds: int, device: torch.device) -> float:
    """Median seconds of the kit's GDFQ iteration on a CIFAR ResNet with random weights."""
    network = getattr(resnet_cifar, f"resnet{depth}_cifar10")()
    # Without statistics of some images the signal of a deep network with random weights grows until it overflows.
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(64, 3, 32, 32))
    teacher = Teacher.from_module(network, 10, CIFAR_MEAN, CIFAR_STD, device=device)
    times = Alternating(device)
    make_gdfq(teacher, batch, WIDTHS[:widths]).ours(ROUND * rounds, times)
    times.end()
    return times.medians()[0]


def plot(table: pd.DataFrame) -> Figure:
    """Seconds against what grows, beside a straight line through the origin and the first point."""
    style()
    figure, panels = plt.subplots(1, len(LABELS), figsize=(8, 2.8))
    for axes, (what, label) in zip(panels, LABELS.items(), strict=True):
        part = table[table.grows == what]
        first, last = part.iloc[0], part.iloc[-1]
        ends = [0, last.value], [0, first.seconds * last.value / first.value]
        axes.plot(*ends, color=COLOURS[5], marker="", linestyle="--", label="in proportion to the first")
        axes.plot(part.value, part.seconds, color=COLOURS[0], label="measured")
        axes.set(xlabel=label, xticks=[0, *part.value], xlim=(0, None), ylim=(0, None))
    panels[0].set_ylabel("seconds per iteration")
    panels[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[25, 50, 100, 200], help="images per batch")
    parser.add_argument("--batch", type=int, default=50, help="batch while bit widths and depth grow (default: 50)")
    parser.add_argument("--rounds", type=int, default=2, help="of four iterations (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for growth.csv and growth.png")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    seed_everything(0)
    rows = []
    for what, value, batch, widths, depth in points(arguments.batches, arguments.batch):
        seconds = seconds_per_iteration(batch, widths, depth, arguments.rounds, device)
        row = {"grows": what, "value": value, "batch": batch, "widths": widths, "depth": depth, "seconds": seconds}
        rows.append(row | provenance(device, f"resnet{depth}_cifar10"))
        print(f"{LABELS[what]}: {value}: {seconds:.3g} s", flush=True)
    table = pd.DataFrame(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "growth.csv", index=False, float_format="%.5g")
    plot(table).savefig(arguments.out / "growth.png")


if __name__ == "__main__":
    main()
