"""What an iteration of each method costs, against the step as published: ``python -m benchmarks.steps``.

Writes ``steps.csv`` and ``steps.png``, and the table into README.md by :mod:`benchmarks.readme`. Needs Linux, for the
peak memory and the context switches.
"""

import argparse
import datetime
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks import readme
from benchmarks.cases import CASES, Case, make_case
from benchmarks.measure import alternate, operations, peaks_in_new_processes
from dfqlib.device import code_version, describe_hardware, pick_device, seed_everything
from dfqlib.models.teacher import load_teacher
from dfqlib.models.zoo import MODELS
from dfqlib.plotting import COLOURS, style
from dfqlib.speed import precision

RESULTS = Path(__file__).parent / "results"
PASSES = 3  # through the table, at most, until no row was measured on a busy machine


def measure(case: Case, name: str, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of an iteration of both sides, and of the floor: the kit's operations at the matrices' rate.

    The kit computes in the precision ``name``, the published step in float32. NaN if the machine was busy.
    """
    step = case.published().step

    def published() -> None:
        precision.use("float32")  # parts of it are the kit's
        step()
        precision.use(name)

    precision.use(name)
    times = alternate(case.ours, device, rounds, published)
    (ours, theirs), rate, work = times.medians(), times.rate(), operations(case)
    return {
        "published_s": theirs,
        "ours_s": ours,
        "times_faster": theirs / ours,
        "quiet_rounds": len(times.quiet()),
        "slowest_product": max(times.products) / min(times.products),
        **dict(zip(("share_of_time", "switches_per_s"), times.own_time(), strict=True)),
        "gflop": work / 1e9,
        "matrix_gflops": rate / 1e9,
        "floor_s": work / rate,
        "share_of_floor": work / rate / ours,
    }


def provenance(device: torch.device, model: str) -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "model": model,
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": code_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }


def plot(table: pd.DataFrame) -> Figure:
    """Bars of both sides and the floor, as shares of the published step, with the seconds beside them."""
    style()
    precisions = list(dict.fromkeys(table.precision))
    figure, axes = plt.subplots(figsize=(8, 0.6 + (0.3 + 0.26 * len(precisions)) * table.method.nunique()))
    named = {"as published": COLOURS[5]} | dict(zip(precisions, (COLOURS[0], COLOURS[2]), strict=False))
    height, titles = 0.9 / len(named), []
    for place, (_, rows) in enumerate(table.groupby("method", sort=False)):
        first = rows.iloc[0]
        titles.append(f"{first.title} (batch {first.batch})")
        bars = {"as published": (first.published_s, 1)}
        bars |= {row.precision: (row.ours_s, row.times_faster) for row in rows.itertuples()}
        for offset, (name, (seconds, faster)) in enumerate(bars.items()):
            if math.isfinite(seconds):
                length, where = 100 / faster, place + height * offset
                axes.barh(where, length, 0.9 * height, color=named[name])
                axes.text(length + 1, where, f"{seconds:.2g} s", va="center", fontsize="small")
        ends = place - height / 2, place + 1.5 * height  # over the published step and float32, whose floor it is
        axes.vlines(100 * first.floor_s / first.published_s, *ends, color=COLOURS[1], linewidth=3)
    axes.set_yticks([place + 0.3 for place in range(len(titles))], titles)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="time of an iteration, % of the step as published")
    named["floor: its multiply-adds as one float32 product"] = COLOURS[1]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    figure.legend(handles, named, loc="outside upper center", ncols=len(named))
    axes.grid(False, axis="y")
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--methods", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES)
    )
    parser.add_argument("--batch", type=int, help="images per iteration, for all methods (default: as published)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of four iterations of each side on a quiet machine (default: 3)"
    )
    known = ("float32", "bfloat16")
    parser.add_argument("--precisions", nargs="+", choices=known, help="default: float32, and what auto is here")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--model", default="resnet20_cifar10", choices=MODELS, metavar="NAME", help="the teacher")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for steps.csv and steps.png")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = pick_device(arguments.device)
    seed_everything(0)
    teacher = load_teacher(arguments.model, device=device)
    precisions = arguments.precisions or dict.fromkeys(("float32", precision.resolve("auto", device)))
    rows: list[dict[str, Any]] = [
        {"method": method, "precision": name, "times_faster": math.nan}
        for method in arguments.methods
        for name in precisions
    ]
    for _ in range(PASSES):
        for row in rows:
            if math.isnan(row["times_faster"]):
                case = make_case(row["method"], teacher, arguments.batch)
                row |= {"title": case.title, "batch": case.batch}
                row |= measure(case, row["precision"], arguments.rounds, device)
                told = readme.ratio(row["times_faster"], "times faster")
                print(f"{case.title}, {row['precision']}: {row['ours_s']:.3g} s here, {told}", flush=True)
    sides = dict.fromkeys((row["method"], side) for row in rows for side in ("published", row["precision"]))
    peaks = dict(zip(sides, peaks_in_new_processes(list(sides), arguments.batch, arguments.model, device), strict=True))
    for row in rows:
        row["published_mb"], row["ours_mb"] = (
            peaks[row["method"], side] / 1e6 for side in ("published", row["precision"])
        )
    table = pd.DataFrame([row | provenance(device, arguments.model) for row in rows])
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "steps.csv", index=False, float_format="%.5g")
    plot(table).savefig(arguments.out / "steps.png")
    print(f"\n{readme.of_steps(table)}")
    if arguments.out.resolve() == RESULTS:
        readme.show_steps(table)


if __name__ == "__main__":
    main()
