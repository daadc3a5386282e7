"""What an iteration of each method costs, against the step as published: ``python -m benchmarks.steps``.

Prints a table, and writes it as ``steps.csv`` with all columns and as ``steps.png``. Needs Linux, for the peak memory.
"""

import argparse
import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.cases import CASES, Case, make_case
from benchmarks.measure import ROUND, Alternating, multiplication, operations, peaks_in_new_processes
from dfqlib.device import code_version, describe_hardware, pick_device, seed_everything
from dfqlib.models.teacher import load_teacher
from dfqlib.models.zoo import MODELS
from dfqlib.plotting import COLOURS, style

RESULTS = Path(__file__).parent / "results"


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of an iteration of both sides, and of the floor: the kit's operations at the matrices' rate."""
    multiply, count = multiplication(device)
    times = Alternating(device, case.published().step, multiply)
    case.ours(ROUND * rounds, times)
    times.end()
    ours, published, product = times.medians()
    rate, work = count / product, operations(case)
    return {
        "published_s": published,
        "ours_s": ours,
        "times_faster": published / ours,
        "published_images_per_s": case.batch / published,
        "ours_images_per_s": case.batch / ours,
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


def markdown(table: pd.DataFrame) -> str:
    """The main columns, to read."""
    columns = ("iteration", "batch", "published, s", "here, s", "times faster", "images/s", "floor, s", "floor / here")
    columns += ("published, MB", "here, MB")
    rows = [f"| {' | '.join(columns)} |", "| --- " + "| ---: " * 9 + "|"]
    for row in table.itertuples():
        seconds = f"{row.published_s:.3g} | {row.ours_s:.3g} | {row.times_faster:.1f} | {row.ours_images_per_s:.0f}"
        floor = f"{row.floor_s:.3g} | {100 * row.share_of_floor:.0f} %"
        rows.append(f"| {row.title} | {row.batch} | {seconds} | {floor} | {row.published_mb:.0f} | {row.ours_mb:.0f} |")
    return "\n".join(rows)


def plot(table: pd.DataFrame) -> Figure:
    """Bars of both sides and the floor, as shares of the published step, with the seconds beside them."""
    style()
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.62 * len(table)))
    for place, row in enumerate(table.itertuples()):
        for offset, (seconds, colour) in enumerate(((row.published_s, COLOURS[5]), (row.ours_s, COLOURS[0]))):
            length = 100 * seconds / row.published_s
            axes.barh(place + 0.36 * offset, length, 0.34, color=colour)
            axes.text(length + 1, place + 0.36 * offset, f"{seconds:.2g} s", va="center", fontsize="small")
        floor = 100 * row.floor_s / row.published_s
        axes.vlines(floor, place + 0.17, place + 0.55, color=COLOURS[1], linewidth=3)
    titles = [f"{row.title} (batch {row.batch})" for row in table.itertuples()]
    axes.set_yticks([place + 0.18 for place in range(len(table))], titles)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="time of an iteration, % of the step as published")
    named = {
        "as published": COLOURS[5],
        "here": COLOURS[0],
        "floor: its multiply-adds as one matrix product": COLOURS[1],
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    figure.legend(handles, named, loc="outside upper center", ncols=3)
    axes.grid(False, axis="y")
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--methods", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES)
    )
    parser.add_argument("--batch", type=int, help="images per iteration, for all methods (default: as published)")
    parser.add_argument("--rounds", type=int, default=3, help="of four iterations of each side (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--model", default="resnet20_cifar10", choices=MODELS, metavar="NAME", help="the teacher")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for steps.csv and steps.png")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = pick_device(arguments.device)
    seed_everything(0)
    teacher = load_teacher(arguments.model, device=device)
    rows = []
    for name in arguments.methods:
        case = make_case(name, teacher, arguments.batch)
        times = measure(case, arguments.rounds, device)
        rows.append({"method": name, "title": case.title, "batch": case.batch} | times)
        print(f"{case.title}: {times['published_s']:.3g} s as published, {times['ours_s']:.3g} s here", flush=True)
    peaks = peaks_in_new_processes(arguments.methods, arguments.batch, arguments.model, device)
    for row, (published, ours) in zip(rows, peaks, strict=True):
        row |= {"published_mb": published / 1e6, "ours_mb": ours / 1e6}
    table = pd.DataFrame([row | provenance(device, arguments.model) for row in rows])
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "steps.csv", index=False, float_format="%.5g")
    plot(table).savefig(arguments.out / "steps.png")
    print(f"\n{describe_hardware(device)}, torch {torch.__version__}, commit {code_version()}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
