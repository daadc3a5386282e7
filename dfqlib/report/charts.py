"""The charts of ``report.html``; rows are tidy, with their bit widths as text in the column ``bits``."""

import io
import itertools

import pandas as pd
import seaborn as sns
from matplotlib import pyplot
from matplotlib.figure import Figure

from dfqlib import plotting


def overview(rows: pd.DataFrame) -> list[bytes]:
    """The charts as SVG files; one without any rows is left out."""
    plotting.style()
    pyplot.rcParams["figure.constrained_layout.use"] = False  # seaborn's grids have a layout of their own
    timed = rows.dropna(subset=["seconds"])
    methods = rows[(rows["variant"] == "") & (rows["weight_bits"] < 32)]
    charts = {accuracy_against_time: timed, spread_over_seeds: methods}
    return [_svg(draw(part)) for draw, part in charts.items() if len(part)]


def accuracy_against_time(timed: pd.DataFrame) -> Figure:
    """Top-1 of every timed row by its seconds; one panel for each data set."""
    names = list(timed["method"].unique())
    colours = dict(zip(names, itertools.cycle([*plotting.COLOURS, "0.4", "0.75"]), strict=False))
    look = {"hue": "method", "style": "method", "style_order": names, "palette": colours, "s": 30}
    grid = sns.relplot(timed, x="seconds", y="top1", col="dataset", **look, height=4, aspect=0.9)
    grid.set(xscale="log").set_axis_labels("seconds", "top-1 (%)").set_titles("{col_name}")
    grid.figure.suptitle("Accuracy against time, every row", fontsize="medium", y=1.02)
    return grid.figure


def spread_over_seeds(methods: pd.DataFrame) -> Figure:
    """Each method as published: a point for every seed, their mean and one standard deviation."""
    settings = methods.assign(setting=methods["method"] + " " + methods["scheme"] + " " + methods["bits"])
    order = list(settings["setting"].unique())
    height = 1 + 0.22 * len(order)
    look = {"kind": "point", "linestyle": "none", "marker": "|", "markersize": 9, "color": plotting.COLOURS[0]}
    where = {"x": "top1", "y": "setting", "order": order}
    grid = sns.catplot(settings, **where, col="data", errorbar="sd", **look, height=height, aspect=4 / height)
    grid.map_dataframe(sns.stripplot, **where, color=plotting.COLOURS[1], jitter=False, size=4)
    grid.set_axis_labels("top-1 (%)", "").set_titles("{col_name}")
    grid.figure.suptitle("Methods as published: seeds (points), mean and standard deviation", fontsize="medium", y=1.02)
    return grid.figure


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()
