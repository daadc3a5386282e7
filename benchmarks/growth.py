"""How the seconds of an iteration grow with batch, bit widths, depth and pixels: ``python -m benchmarks.growth``.

GDFQ on CIFAR's ResNets; GDFQ and ZeroQ on two networks for 224 pixels, with their memory. Random weights. Writes
``growth.csv`` and ``growth.png``. Needs Linux, for the peak memory.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from pytorchcv.models import resnet_cifar
from torch import nn

from benchmarks import readme
from benchmarks.cases import WIDTHS, make_gdfq, make_zeroq
from benchmarks.measure import alternate, peak_bytes
from benchmarks.steps import RESULTS, provenance
from dfqlib.device import pick_device, seed_everything
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import CIFAR_MEAN, CIFAR_STD, build
from dfqlib.plotting import COLOURS, style
from dfqlib.speed import precision

MODELS_224 = ["resnet18", "mobilenetv2_w1"]
LARGE = {"gdfq": (make_gdfq, 16), "zeroq": (make_zeroq, 32)}  # how a case is made, and the published batch
LABELS = {"batch": "images per batch", "widths": "bit widths", "depth": "layers of the ResNet"}


def points(batches: list[int], batch: int) -> Iterator[tuple[str, int, int, int, int]]:
    """What grows, how far, and with it batch, number of bit widths and depth; one grows at a time."""
    yield from (("batch", each, each, 1, 20) for each in batches)
    yield from (("widths", widths, batch, widths, 20) for widths in (1, 2, 4))
    yield from (("depth", depth, batch, 1, depth) for depth in (20, 56))


def random_teacher(network: nn.Module, classes: int, size: int, device: torch.device) -> Teacher:
    """A teacher with random weights and the statistics of noise.

    Without statistics of some images the signal of a deep network with random weights grows until it overflows.
    """
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(64 if size < 64 else 8, 3, size, size))
    return Teacher.from_module(network, classes, CIFAR_MEAN, CIFAR_STD, input_size=size, device=device)


def seconds_per_iteration(batch: int, widths: int, depth: int, rounds: int, device: torch.device) -> float:
    """Median seconds of the kit's GDFQ iteration on a CIFAR ResNet with random weights."""
    teacher = random_teacher(getattr(resnet_cifar, f"resnet{depth}_cifar10")(), 10, 32, device)
    return alternate(make_gdfq(teacher, batch, WIDTHS[:widths]).ours, device, rounds).medians()[0]


def of_large_images(method: str, model: str, name: str, device: torch.device) -> dict[str, float]:
    """Seconds of an iteration in the precision ``name`` and its peak memory, in this process."""
    precision.use(name)
    teacher, (make, batch) = random_teacher(build(model), 1000, 224, device), LARGE[method]
    case = make(teacher, batch)
    megabytes = peak_bytes(case, name, device) / 1e6
    return {"batch": batch, "ours_s": alternate(case.ours, device, 1).medians()[0], "ours_mb": megabytes}


def plot(table: pd.DataFrame) -> Figure:
    """Seconds against what grows, beside a straight line through the origin and the first point."""
    style()
    figure, panels = plt.subplots(1, len(LABELS), figsize=(8, 2.8))
    for axes, (what, label) in zip(panels, LABELS.items(), strict=True):
        part = table[table.grows == what]
        first, last = part.iloc[0], part.iloc[-1]
        ends = [0, last.value], [0, first.ours_s * last.value / first.value]
        axes.plot(*ends, color=COLOURS[5], marker="", linestyle="--", label="in proportion to the first")
        axes.plot(part.value, part.ours_s, color=COLOURS[0], label="measured")
        axes.set(xlabel=label, xticks=[0, *part.value], xlim=(0, None), ylim=(0, None))
    panels[0].set_ylabel("seconds per iteration")
    panels[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[25, 50, 100, 200], help="images per batch")
    parser.add_argument("--batch", type=int, default=50, help="batch while bit widths and depth grow (default: 50)")
    parser.add_argument("--models", nargs="*", default=MODELS_224, help="for 224 pixels (default: both)")
    parser.add_argument("--rounds", type=int, default=2, help="of four iterations on a quiet machine (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for growth.csv and growth.png")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    seed_everything(0)
    precisions, rows = dict.fromkeys(("float32", precision.resolve("auto", device))), []
    for what, value, batch, widths, depth in points(arguments.batches, arguments.batch):
        seconds = seconds_per_iteration(batch, widths, depth, arguments.rounds, device)
        row = {"method": "gdfq", "grows": what, "value": value, "batch": batch, "widths": widths, "depth": depth}
        rows.append(row | {"precision": "float32", "ours_s": seconds} | provenance(device, f"resnet{depth}_cifar10"))
        print(f"{LABELS[what]}: {value}: {seconds:.3g} s", flush=True)
    for model, method, name in itertools.product(arguments.models, LARGE, precisions):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a process has one peak
            found = pool.submit(of_large_images, method, model, name, device).result()
        row = {"method": method, "grows": "pixels", "value": 224, "widths": 1, "precision": name}
        rows.append(row | found | provenance(device, model))
        print(f"{method} on {model}, {name}: {found['ours_s']:.3g} s, {found['ours_mb']:.0f} MB", flush=True)
    table = pd.DataFrame(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "growth.csv", index=False, float_format="%.5g")
    plot(table).savefig(arguments.out / "growth.png")
    if arguments.out.resolve() == RESULTS:
        readme.show_growth(table)


if __name__ == "__main__":
    main()
