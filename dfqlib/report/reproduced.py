"""Which published numbers are reproduced: every published CIFAR cell, its drop in the paper and its drop here."""

import math
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from dfqlib.bits import bits_name
from dfqlib.papers import profiles, published
from dfqlib.report import tables

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NAMES = {
    "gdfq": "GDFQ",
    "qimera": "Qimera",
    "hast": "HAST",
    "synq": "SynQ",
    "zeroq": "ZeroQ",
    "dsg": "DSG",
    "saft": "SaFT",
}
#: How near a cell came, in the order of the sentence.
STATES = ("reached", "within error", "short", "not run")


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each published setting on CIFAR that has a number, by data set and by how near it came.

    Columns: those of a setting; ``published_drop`` and ``sources``, of every paper that prints one; ``drop`` and
    ``error``, half of its 95 % interval, both NaN if it was not run; ``schedule``, ``seeds`` and ``images``; ``state``:
    "reached" if the drop is at most the published one, "within error" if that lies in the interval, else "short". Of
    several schedules the longest counts, and of several sets of test images the largest.
    """
    measured = tables.summarise(rows) if len(rows) else pd.DataFrame(columns=[*tables.LINE, "drop"])
    found: dict[tuple, dict[str, Any]] = {}
    for row in published.rows():
        if row.dataset in DATASETS and row.drop is not None:
            setting = {name: getattr(row, name) for name in (*published.SETTING, "scheme")}
            cell = found.setdefault(tuple(setting.values()), setting | {"published_drop": row.drop, "sources": []})
            cell["sources"].append(row.told)
    lines = [cell | _measured(cell, measured) for cell in found.values()]
    table = pd.DataFrame(lines).assign(gap=lambda table: table["drop"] - table["published_drop"])
    return table.sort_values(["dataset", "gap"], kind="stable", ignore_index=True)


def _measured(cell: dict[str, Any], lines: pd.DataFrame) -> dict[str, Any]:
    keys, told = [*published.SETTING, "scheme"], ("profile", "schedule", "seeds", "data")
    own = lines[(lines[keys] == [cell[key] for key in keys]).all(axis=1) & (lines["variant"] == "")]
    own = own[own["drop"].notna()]
    if own.empty:
        return {"state": "not run", "error": math.nan, "drop": math.nan, **dict.fromkeys(told, "")}
    order = list(profiles.load()[0])
    line = max(
        own.to_dict("records"), key=lambda line: (order.index(line["profile"]), not line["data"].endswith("-2k"))
    )
    error, gap = 1.96 * line["drop_error"], line["drop"] - cell["published_drop"]
    state = "reached" if gap <= 0 else "within error" if gap <= error else "short"
    return {"state": state, "error": error, "drop": line["drop"], **{name: line[name] for name in told}}


def sentence(table: pd.DataFrame) -> str:
    """How many of the published cells are reached, in one sentence, from :func:`cells`."""
    counts, short = table["state"].value_counts(), table[table["state"] == "short"]["gap"]
    told = {"within error": "within the 95 % interval", "not run": "not run"}
    if len(short):
        told["short"] = f"short by {short.min():.1f} to {short.max():.1f} points"
    parts = [f"{counts[state]} {told[state]}" for state in STATES[1:] if state in counts]
    return (
        f"Reached: {counts.get('reached', 0)} of {len(table)} published CIFAR cells; {', '.join(parts) or 'no other'}."
    )


def present(table: pd.DataFrame) -> pd.DataFrame:
    """The cells as text to read."""
    runs = table["profile"] + " " + table["schedule"].map(tables.short) + table["seeds"].map(", seeds {}".format)
    runs += table["data"].str.endswith("-2k").map({True: ", 2,000 images", False: ""})
    return pd.DataFrame(
        {
            "data": table["dataset"].map(DATASETS),
            "method": table["method"].map(NAMES),
            "bits": list(map(bits_name, table["weight_bits"], table["activation_bits"])),
            "published drop": table["published_drop"].map(tables.number),
            "drop here": [tables.number(*each) for each in zip(table["drop"], table["error"], strict=True)],
            "state": table["state"],
            "schedule": runs.where(table["state"] != "not run", ""),
            "source": table["sources"].map("; ".join),
        }
    )


CAPTION = (
    "Drop: points of top-1 below the full-precision teacher, the published one below the authors' teacher "
    "(93.89 and 70.33 %), ours below the kit's. ±: half of the 95 % interval, from the test images and the seeds. "
    "Reached: at most the published drop. Of several schedules the longest that was run counts."
)


def elsewhere() -> str:
    """One sentence on the published rows that need ImageNet."""
    rows = [row for row in published.rows() if row.dataset == "imagenet"]
    methods = ", ".join(NAMES.get(name, name) for name in dict.fromkeys(row.method for row in rows))
    return (
        f"{len(rows)} published ImageNet rows ({methods}) need its validation images in `$DFQ_DATA/imagenet` and, for "
        "the published schedules, a GPU: `python run_all.py --list` names each."
    )


def context() -> pd.DataFrame:
    """Published top-1 of methods without a notebook here, on CIFAR, as text: methods by data set and bits."""
    with resources.files("dfqlib.papers").joinpath("context.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file).query("dataset in @DATASETS")
    where = rows["dataset"].map(DATASETS) + " " + list(map(bits_name, rows["weight_bits"], rows["activation_bits"]))
    rows = rows.assign(where=where, told=rows["top1"].map(tables.number))
    grid = rows.pivot_table("told", ["method", "source"], "where", aggfunc="first", sort=False)
    return grid.reindex(columns=sorted(grid, key=lambda name: (name[:9], -int(name[-1])))).fillna("").reset_index()


def picture(table: pd.DataFrame) -> Any:
    """A figure: published drop and drop here of every cell, one panel per data set, nearest first."""
    from matplotlib import pyplot  # here, since it takes seconds

    from dfqlib import plotting

    plotting.style()
    looks = {"reached": (plotting.COLOURS[2], "o"), "within error": (plotting.COLOURS[0], "s")}
    looks["short"] = (plotting.COLOURS[1], "^")
    counts = [len(table[table["dataset"] == name]) for name in DATASETS]
    figure, panels = pyplot.subplots(
        len(counts), figsize=(7.4, 1.3 + 0.24 * sum(counts)), sharex=True, height_ratios=counts
    )
    for axes, (dataset, title) in zip(panels, DATASETS.items(), strict=True):
        part = table[table["dataset"] == dataset]
        where, names = np.arange(len(part)), present(part)
        for state, (colour, marker) in looks.items():
            chosen = (part["state"] == state).to_numpy()
            about = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 2, "label": f"here: {state}"}
            axes.errorbar(part["drop"][chosen], where[chosen], xerr=part["error"][chosen], **about)
        about = {"color": "0.15", "marker": "|", "markersize": 12, "markeredgewidth": 2, "linestyle": "none"}
        axes.plot(part["published_drop"], where, **about, label="published")
        axes.set_yticks(where, names["method"] + " " + names["bits"])
        axes.set(title=title, ylim=(len(part) - 0.5, -0.5))
    panels[-1].set_xlabel("drop from the full-precision teacher (points of top-1), 95 % interval")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    return figure
