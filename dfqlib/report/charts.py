"""The charts of ``report.html``; rows are tidy, with their bit widths as text in the column ``bits``."""

import io
import itertools

import pandas as pd
import seaborn as sns
from matplotlib import pyplot
from matplotlib.figure import Figure

from dfqlib import plotting


def accuracy_against_time(rows: pd.DataFrame) -> Figure:
    """Top-1 of every timed row by its seconds; one panel for each data set."""
    plotting.style()
    timed = rows.dropna(subset=["seconds"])
    methods = list(timed["method"].unique())
    colours = dict(zip(methods, itertools.cycle([*plotting.COLOURS, "0.4", "0.75"]), strict=False))
    look = {"hue": "method", "style": "method", "style_order": methods, "palette": colours, "s": 30}
    grid = sns.relplot(timed, x="seconds", y="top1", col="dataset", **look, height=4, aspect=0.9)
    grid.set(xscale="log").set_axis_labels("seconds", "top-1 (%)").set_titles("{col_name}")
    grid.figure.suptitle("Accuracy against time, every row", fontsize="medium", y=1.02)
    return grid.figure


def spread_over_seeds(rows: pd.DataFrame) -> Figure:
    """Each method as published: a point for every seed, their mean and one standard deviation."""
    plotting.style()
    own = rows[(rows["variant"] == "") & (rows["weight_bits"] < 32)]
    own = own.assign(setting=own["method"] + " " + own["scheme"] + " " + own["bits"])
    height = 1 + 0.22 * own["setting"].nunique()
    look = {"kind": "point", "linestyle": "none", "marker": "|", "markersize": 9, "color": plotting.COLOURS[0]}
    grid = sns.catplot(own, x="top1", y="setting", col="data", errorbar="sd", **look, height=height, aspect=4 / height)
    order = list(own["setting"].unique())
    grid.map_dataframe(
        sns.stripplot, x="top1", y="setting", order=order, color=plotting.COLOURS[1], jitter=False, size=4
    )
    grid.set_axis_labels("top-1 (%)", "").set_titles("{col_name}")
    grid.figure.suptitle("Methods as published: seeds (points), mean and standard deviation", fontsize="medium", y=1.02)
    return grid.figure


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG file; it is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()
