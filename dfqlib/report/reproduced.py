"""Which published numbers are reproduced: every published CIFAR cell, its drop in the paper and its drop here."""

import math
from importlib import resources
from typing import Any

import pandas as pd

from dfqlib.papers import profiles, published
from dfqlib.report import tables

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
TEST_IMAGES = 10_000  # of either
NEAR = {"near": "within half a point", "within error": "within the 95 % interval"}  # states, as a sentence tells them
CELL = ["method", "dataset", "weight_bits", "activation_bits"]


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The published settings on CIFAR that have a number, with what was measured: a line for each calibration.

    By data set and by how near the best line of a cell came. Columns: those of a setting; ``published_drop``, the
    smallest that a paper prints, and all ``sources``; ``drop`` and ``error``, half of its 95 % interval, both NaN
    if it was not run; ``profile``, ``schedule``, ``seeds``, ``data`` and its number of ``images``; ``gap``, from the
    published drop; ``state``: "reached" if the drop is at most the published one, "near" if at most half a point
    more, "within error" if the published one lies in the interval, else "short". Of several schedules the longest
    counts, and of several sets of test images the largest.
    """
    measured = tables.summarise(rows) if len(rows) else pd.DataFrame(columns=[*tables.LINE, "drop"])
    found: dict[tuple, dict[str, Any]] = {}
    smallest = published.smallest_drops()
    for row in published.rows():
        if row.dataset in DATASETS and row.drop is not None:
            setting = {name: getattr(row, name) for name in published.KEYS}
            key = tuple(setting.values())
            cell = found.setdefault(key, setting | {"published_drop": smallest[key], "sources": []})
            cell["sources"].append(row.told)
    table = pd.DataFrame([cell | line for cell in found.values() for line in _measured(cell, measured)])
    nearest = table.groupby(CELL)["gap"].transform("min")
    return table.assign(nearest=nearest).sort_values(["dataset", "nearest", *CELL], kind="stable", ignore_index=True)


def _measured(cell: dict[str, Any], lines: pd.DataFrame) -> list[dict[str, Any]]:
    same = lines[published.KEYS] == [cell[key] for key in published.KEYS]
    own = lines[same.all(axis=1) & (lines["variant"] == "")]
    found, order = [], list(profiles.load()[0])
    for _, part in sorted(own[own["drop"].notna()].groupby("calibration"), reverse=True):  # published, corrected
        part = part.assign(order=part["profile"].map(order.index))
        line = part.sort_values(["order", "images"], ascending=False, kind="stable").iloc[0].to_dict()
        error, gap = 1.96 * line["drop_error"], line["drop"] - cell["published_drop"]
        state = "reached" if gap <= 0 else "near" if gap <= 0.5 else "within error" if gap <= error else "short"
        found.append(line | {"error": error, "gap": gap, "state": state})
    numbers = ["images", "drop", "error", "gap"]
    told = ["calibration", "profile", "schedule", "seeds", "data", *numbers, "state"]
    nothing = dict.fromkeys(told, "") | dict.fromkeys(numbers, math.nan) | {"state": "not run"}
    return [{name: line[name] for name in told} for line in found or [nothing]]


def names() -> dict[str, str]:
    """How each method is written, by its name in ``published.csv``."""
    return {key: name for paper in profiles.load()[1].values() for key, name in paper.methods.items()}


def teachers() -> str:
    """The full-precision top-1 that papers print on CIFAR."""
    rows, told = published.rows(), []
    for key, name in DATASETS.items():
        found = sorted({row.fp32_top1 for row in rows if row.dataset == key and row.fp32_top1})
        told.append(f"{' or '.join(map(tables.number, found))} % on {name}")
    return ", ".join(told)


def sentence(table: pd.DataFrame) -> str:
    """How many of the published cells are reached, in one sentence, from :func:`cells`."""
    count = len(table.drop_duplicates(CELL))
    parts = []
    for calibration, lines in sorted(table[table["calibration"] != ""].groupby("calibration"), reverse=True):
        counts, short = lines["state"].value_counts(), lines[lines["state"] == "short"]["gap"]
        near = [f"{counts[state]} more {told}" for state, told in NEAR.items() if state in counts]
        off = [f"{len(short)} short by {short.min():.1f} to {short.max():.1f} points"] if len(short) else []
        how = f"{counts.get('reached', 0)} of {count} with the {calibration} calibration"
        parts.append(", ".join([how, *near, *off]))
    missing = count - len(table[table["state"] != "not run"].drop_duplicates(CELL))
    parts += [f"{missing} not run"] if missing else []
    return f"Published CIFAR cells reached: {'; '.join(parts)}."


def present(table: pd.DataFrame) -> pd.DataFrame:
    """The cells as text to read."""
    runs = table["profile"] + " " + table["schedule"].map(tables.short) + table["seeds"].map(", seeds {}".format)
    runs += [f", {images:,.0f} images" if images < TEST_IMAGES else "" for images in table["images"]]
    cell = table["method"].replace(names()) + " " + table["dataset"].map(DATASETS) + " " + tables.bits_of(table)
    return pd.DataFrame(
        {
            "cell": cell,
            "published drop": table["published_drop"].map(tables.number),
            "drop here": [tables.number(*each) for each in zip(table["drop"], table["error"], strict=True)],
            "state": table["state"],
            "calibration": table["calibration"],
            "schedule": runs.where(table["state"] != "not run", ""),
            "source": table["sources"].map("; ".join),
        }
    )


def caption() -> str:
    """How to read the cells."""
    return (
        "Drop: points of top-1 below the full-precision teacher, the published one below the authors' teacher "
        f"({teachers()}), ours below the kit's. ±: half of the 95 % interval, from the test images and the seeds. "
        "Reached: at most the published drop, of several the smallest; near: at most half a point more; within error: "
        "the published drop lies in the interval. Schedule: the profile, of several that were run "
        "the longest; reduced, fewer iterations or images than published; retuned, other rates or weights; older code, "
        "measured before the notebook's code last changed and not found the same since. Calibration: published, as the "
        "method's paper has it; corrected, students on the method's images with the kit's ranges, batch-norm "
        "statistics and tuning (a table's caption says where these images start from a generator's and are refined)."
    )


def elsewhere() -> str:
    """One sentence on the published rows that need ImageNet."""
    rows = [row for row in published.rows() if row.dataset == "imagenet"]
    methods = ", ".join(names().get(name, name) for name in dict.fromkeys(row.method for row in rows))
    return (
        f"{len(rows)} published ImageNet rows ({methods}) need ImageNet's validation images in `$DFQ_DATA/imagenet` "
        "and, for the published schedules, a GPU: `python run_all.py --list` names each."
    )


def context() -> pd.DataFrame:
    """Published top-1 of methods without a notebook here, on CIFAR, as text: methods by data set and bits."""
    with resources.files("dfqlib.papers").joinpath("context.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file).query("dataset in @DATASETS")
    where = rows["dataset"].map(DATASETS) + " " + tables.bits_of(rows)
    rows = rows.assign(where=where, told=rows["top1"].map(tables.number))
    grid = rows.pivot_table("told", ["method", "source"], "where", aggfunc="first", sort=False)
    return grid.reindex(columns=sorted(grid, key=lambda name: (name[:9], -int(name[-1])))).fillna("").reset_index()


def picture(table: pd.DataFrame) -> Any:
    """A figure: published drop and drop here of every cell, one panel per data set, nearest first."""
    from matplotlib.figure import Figure  # here, since it takes seconds

    from dfqlib import plotting

    plotting.style()
    markers, colours = "oDs^", [plotting.COLOURS[index] for index in (2, 3, 0, 1)]
    looks = dict(zip(("reached", *NEAR, "short"), zip(colours, markers, strict=True), strict=True))
    cell = table["method"].replace(names()) + " " + tables.bits_of(table)
    of_set = [table["dataset"] == name for name in DATASETS]
    counts = [cell[chosen].nunique() for chosen in of_set]
    figure = Figure(figsize=(7.4, 1.3 + 0.24 * sum(counts)))
    panels = figure.subplots(len(counts), sharex=True, height_ratios=counts)
    for axes, chosen, title in zip(panels, of_set, DATASETS.values(), strict=True):
        rows, labels = table[chosen], list(dict.fromkeys(cell[chosen]))
        where = cell[chosen].map(labels.index)
        for (calibration, state), part in rows.groupby(["calibration", "state"]):
            if state in looks:
                about = {"color": looks[state][0], "marker": looks[state][1], "linestyle": "none", "capsize": 2}
                about["fillstyle"] = "full" if calibration == "published" else "none"
                axes.errorbar(part["drop"], where[part.index], xerr=part["error"], **about)
        about = {"color": "0.15", "marker": "|", "markersize": 12, "markeredgewidth": 2, "linestyle": "none"}
        axes.plot(rows["published_drop"], where, **about)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(title=title, ylim=(len(labels) - 0.5, -0.5))
    panels[-1].set_xlabel("drop from the full-precision teacher (points of top-1), 95 % interval")
    marks = [panels[0].plot([], [], **about, label="published")[0]]
    for state, (colour, marker) in looks.items():
        marks += panels[0].plot([], [], color=colour, marker=marker, linestyle="none", label=state)
    if (table["calibration"] == "corrected").any():
        about = {"color": "0.4", "marker": "o", "linestyle": "none", "fillstyle": "none"}
        marks += panels[0].plot([], [], **about, label="hollow: corrected")
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), fontsize="small")
    return figure
