"""Accuracy against iterations, of the published schedule and of the fast one: ``python -m benchmarks.schedules``.

Each run is one generator and one student of ``--bits``, with the settings of ``--profiles``; a published run can be cut
after ``--until`` iterations, as all 80,000 take days on a CPU. A run is added to ``schedules.csv`` when it ends, so
several calls fill one table, and the figure is drawn from all of it.
"""

import argparse
import contextlib
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.rows import add
from dfqlib import plotting
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import load_test
from dfqlib.device import code_version, describe_hardware, pick_device, seed_everything
from dfqlib.finetuning.loop import Checkpoint, History, finetune
from dfqlib.methods import gdfq, qimera
from dfqlib.models.evaluate import top1
from dfqlib.models.teacher import load_teacher
from dfqlib.papers import profiles
from dfqlib.papers.published import find
from dfqlib.schedules import GeneratorSchedule

RESULTS = Path(__file__).resolve().parent / "results"
TABLE, FIGURE = RESULTS / "schedules.csv", RESULTS / "schedules.png"
KEY = ["method", "dataset", "bits", "profile", "seed"]


class Reached(Exception):
    """A run has reached the iteration at which it is cut."""


def schedule_of(method: str, profile: str, dataset: str) -> GeneratorSchedule:
    """The notebook's schedule under ``profile``."""
    return GeneratorSchedule.of(profiles.paper(method).values(profile, dataset, f"resnet20_{dataset}"))


def run(method: str, dataset: str, bits: BitWidths, profile: str, seed: int, until: int, every: int) -> pd.DataFrame:
    """Top-1 after every ``every`` iterations; those of the generator's warm-up are counted."""
    seed_everything(seed)
    schedule = schedule_of(method, profile, dataset)
    device = pick_device()
    teacher, test = load_teacher(f"resnet20_{dataset}", device=device), load_test(dataset)
    if method == "qimera":
        stream = qimera.make_stream(teacher, schedule, qimera.published_setting(teacher.name, bits), seed=seed)
    else:
        stream = gdfq.make_stream(teacher, schedule, seed=seed)
    students = {str(bits): gdfq.make_student(teacher, bits, schedule)}
    seen: list[History] = []

    def look(history: History) -> None:
        seen[:] = [history]
        if until and schedule.generator_warmup + history.scores[str(bits)][-1][0] >= until:
            raise Reached

    label = f"{method} {bits} {profile} seed {seed}"
    checkpoint = Checkpoint(RESULTS / f".{label.replace(' ', '-')}.pt", seconds=60.0)
    score = partial(top1, image_set=test, normalise=teacher)
    with contextlib.suppress(Reached):
        finetune(stream, students, schedule, score, every, look, label, schedule.generator_warmup, checkpoint)
    checkpoint.path.unlink(missing_ok=True)
    table = pd.DataFrame(seen[0].scores[str(bits)], columns=["iteration", "top1"])
    table["iteration"] += schedule.generator_warmup
    fixed = dict(zip(KEY, (method, dataset, str(bits), profile, seed), strict=True))
    fixed |= {"batch": schedule.batch, "data": test.name}
    fixed |= {"teacher": top1(teacher.network, test, teacher), "hardware": describe_hardware(device)}
    return table.assign(**fixed, torch=torch.__version__, commit=code_version())


def draw(table: pd.DataFrame) -> None:
    """A panel for each method: drop from the teacher against iterations, the published drop as a line."""
    plotting.style()
    methods = list(dict.fromkeys(table["method"]))
    figure, grid = plt.subplots(1, len(methods), figsize=(4.5 * len(methods), 3.4), squeeze=False, sharey=True)
    for axes, method in zip(grid[0], methods, strict=True):
        part = table[table["method"] == method]
        for colour, marker, (profile, runs) in zip(plotting.COLOURS, "os^", part.groupby("profile"), strict=False):
            for number, (_, one) in enumerate(runs.groupby("seed")):
                name = f"{profile}, {extent(runs)}, batch {one['batch'].iloc[0]}"
                drop = one["teacher"] - one["top1"]
                axes.plot(one["iteration"], drop, color=colour, marker=marker, label=None if number else name)
        bits, dataset = part[["bits", "dataset"]].iloc[0]
        published = published_drop(method, dataset, bits)
        axes.axhline(published, color="0.3", linestyle=":", marker="", label=f"published, 80,000: {published:.1f}")
        axes.set(title=f"{method}, {dataset}, {bits}", xlabel="iteration", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize="small")
    grid[0][0].set_ylabel("points below the teacher")
    figure.savefig(FIGURE, dpi=120, bbox_inches="tight")


def extent(runs: pd.DataFrame) -> str:
    """How many seeds, and up to which iteration if the runs were cut."""
    seeds, reached = runs["seed"].nunique(), runs["iteration"].max()
    method, profile, dataset = runs[["method", "profile", "dataset"]].iloc[0]
    schedule = schedule_of(method, profile, dataset)
    whole = schedule.generator_warmup + schedule.iterations
    return f"{seeds} seed{'s' if seeds > 1 else ''}" + (f", {reached:,} of {whole:,}" if reached < whole else "")


def published_drop(method: str, dataset: str, bits: str) -> float:
    """How far below its teacher the paper ends."""
    width = BitWidths.parse(bits)
    row = find(method, dataset, f"resnet20_{dataset}", width.weight, width.activation)[0]
    return row.fp32_top1 - row.top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["gdfq", "qimera"], choices=["gdfq", "qimera"])
    parser.add_argument("--profiles", nargs="+", default=["fast"], help="rows of dfqlib/papers/profiles.toml")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", default="cifar10", choices=["cifar10", "cifar100"])
    parser.add_argument("--bits", default=BitWidths(4, 4), type=BitWidths.parse, help="such as W4A4 (default)")
    parser.add_argument("--until", type=int, default=0, help="cut runs after so many iterations; 0 leaves them whole")
    parser.add_argument("--every", type=int, default=50, help="iterations between two tests")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for method in options.methods:
        for profile in options.profiles:
            for seed in options.seeds:
                table = run(method, options.dataset, options.bits, profile, seed, options.until, options.every)
                draw(add(TABLE, table, KEY))
                print(table[[*KEY, "iteration", "top1", "teacher"]].tail(1).to_string(index=False))


if __name__ == "__main__":
    main()
