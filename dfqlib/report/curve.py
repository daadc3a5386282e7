"""Accuracy against time: the drop of each published method on CIFAR, from the shortest profile to the longest."""

from typing import Any

import pandas as pd

from dfqlib.report import reproduced, tables

SHOWN = ["method", "dataset", "weight_bits", "activation_bits", "calibration", "profile", "seeds"]
SHOWN += ["seconds", "drop", "error", "published_drop"]
TITLE = "Drop of every published CIFAR method against seconds, by profile, bit width and calibration"
CAPTION = (
    "A line goes from `quick`, on 2,000 test images, to `fast`. Seconds: wall time of a method's images and students "
    "on one core, with other work on the machine. Marks at the right edge: published drops."
)
LEAST = 0.1  # points; smaller drops stand at the lower edge, since the axis is logarithmic
LOOKS = {"published": {"linestyle": "--"}, "corrected": {"linestyle": "-", "fillstyle": "none"}}


def points(rows: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """What was measured of the published ``cells`` of :func:`dfqlib.report.reproduced.cells`, under each profile.

    Columns ``SHOWN``: means over seeds of ``seconds``, which are wall time of images and students, and ``drop``; its
    ``error``, half of the 95 % interval; the smallest ``published_drop``.
    """
    if rows.empty:
        return pd.DataFrame(columns=SHOWN)
    measured = tables.summarise(rows).drop(columns="published_drop")
    measured = measured[(measured["variant"] == "") & measured["seconds"].notna() & measured["drop"].notna()]
    aims = cells[[*reproduced.CELL, "published_drop"]].drop_duplicates(reproduced.CELL)
    found = aims.merge(measured, on=reproduced.CELL)  # first the cells, whose bits are whole numbers
    return found.assign(error=1.96 * found["drop_error"])[SHOWN]


def picture(found: pd.DataFrame) -> Any:
    """A figure of what :func:`points` found: panels by bit width and data set, lines by method and calibration."""
    from matplotlib.figure import Figure  # here, since it takes seconds
    from matplotlib.ticker import LogLocator, NullLocator

    from dfqlib import plotting

    plotting.style()
    names = reproduced.names()
    looks = dict(zip(found["method"].unique(), zip(plotting.COLOURS, plotting.MARKERS, strict=True), strict=False))
    widths = sorted(tables.bits_of(found).unique(), reverse=True)
    figure = Figure(figsize=(7.4, 0.6 + 2.3 * len(widths)))
    panels = figure.subplots(len(widths), len(reproduced.DATASETS), squeeze=False, sharex=True)
    for axes, (bits, dataset) in zip(panels.flat, [(w, d) for w in widths for d in reproduced.DATASETS], strict=True):
        part = found[(tables.bits_of(found) == bits) & (found["dataset"] == dataset)]
        for (method, calibration), own in part.sort_values("seconds").groupby(["method", "calibration"], sort=False):
            about = {"color": looks[method][0], "marker": looks[method][1], "capsize": 2, "linewidth": 1}
            about |= LOOKS[calibration]
            axes.errorbar(own["seconds"], own["drop"].clip(lower=LEAST), yerr=own["error"], **about)
        for method, aim in part.groupby("method")["published_drop"].first().items():  # papers tell no time
            tick = {"color": looks[method][0], "marker": "_", "markersize": 16, "markeredgewidth": 2}
            axes.plot([1], [aim], transform=axes.get_yaxis_transform(), **tick)
        axes.set(title=f"{reproduced.DATASETS[dataset]}, {bits}", xscale="log", yscale="log")
        axes.set_ylim(bottom=max(LEAST, axes.get_ylim()[0]))  # intervals may hold 0
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    for axes in panels[-1]:
        axes.set_xlabel("seconds of one core (log scale)")
    figure.supylabel("drop from the full-precision teacher (points, log scale), 95 % interval", fontsize="medium")
    first, marks = panels.flat[0], []
    for method, (colour, marker) in looks.items():
        marks += first.plot([], [], color=colour, marker=marker, linestyle="none", label=names.get(method, method))
    grey = {"color": "0.4", "marker": "o"}
    for calibration, look in LOOKS.items():
        marks += first.plot([], [], **grey, **look, label=f"{calibration} calibration")
    marks += first.plot([], [], color="0.4", marker="_", markersize=12, linestyle="none", label="published drop")
    figure.legend(handles=marks, loc="outside upper center", ncols=4, fontsize="small")
    return figure
