"""The chart of ``report.html``, accuracy against time: one SVG panel for each data set and bit width.

The marks are links to their runs and carry the line of the table that they belong to, so that the page's filters reach
them. Matplotlib draws them: a library that draws in the browser weighs ten times this page's charts.
"""

import io
import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfqlib import plotting
from dfqlib.papers import published

#: Rows whose scheme, variant or ranges say this use real images: they are no data-free methods.
REAL_IMAGES = r"\b(?:real|few-shot)\b"
MARK = Markup('<a href="#{0.run}" data-line="{0.line}" {0.filters} tabindex="-1"><title>{1}</title>')

#: Fixed, since a layout that measures its texts doubles the time.
MARGINS = {"left": 0.16, "right": 0.97, "bottom": 0.16, "top": 0.97}


class Panel(NamedTuple):
    """A chart as inline SVG, its heading, and in words what it shows."""

    heading: str
    svg: Markup
    text: str


def accuracy_against_time(rows: pd.DataFrame) -> tuple[Markup, list[Panel]]:
    """The legend and the panels of all timed rows that are quantized, with the page's ``bits``, ``line``, ``filters``.

    A bit width that was run once has no panel.
    """
    plotting.style()
    timed = rows[rows["seconds"].notna() & rows["top1"].notna() & (rows["weight_bits"] < 32)]
    timed = timed.assign(data_free=~_words(timed, "scheme", "variant", "ranges").str.contains(REAL_IMAGES))
    count = len(plotting.COLOURS)
    looks = {  # after six methods the same colours come again, with other markers
        method: {"color": plotting.COLOURS[i % count], "marker": plotting.MARKERS[(i + i // count) % count]}
        for i, method in enumerate(timed["method"].unique())
    }
    groups = [group for group in timed.groupby(["dataset", "bits"]) if len(group[1]) > 1]
    panels = [_panel(f"{dataset}, {bits}", part, looks) for (dataset, bits), part in groups]
    return _legend(looks) if panels else Markup(), panels


def _panel(heading: str, part: pd.DataFrame, looks: dict[str, Any]) -> Panel:
    """The drop from the teacher by the seconds taken; top-1 if a row has no teacher."""
    drop = part["fp32_top1"].notna().all()
    kind = "drop" if drop else "top-1"
    part = part.assign(score=part["fp32_top1"] - part["top1"] if drop else part["top1"])
    part = part.sort_values("seconds", ignore_index=True)
    best = part[part["data_free"]]
    best = best[(best["score"].cummin() if drop else best["score"].cummax()).diff().ne(0)]
    figure, axes = pyplot.subplots(figsize=(4.2, 3.1), layout="none", gridspec_kw=MARGINS)
    _draw(axes, part, looks)
    settings = set(part[published.KEYS].itertuples(index=False, name=None)) if drop else ()
    aims = [(setting[0], aim) for setting, aim in published.smallest_drops().items() if setting in settings]
    for method, aim in aims:  # at the edge, since papers tell no time
        tick = {"marker": "_", "markersize": 16, "markeredgewidth": 2, "color": looks[method]["color"]}
        axes.plot([1], [aim], **tick, transform=axes.get_yaxis_transform())
    last = best.tail(1).assign(seconds=part["seconds"].max())  # it lasts to the right edge
    steps = pd.concat([best, last])
    axes.step(steps["seconds"], steps["score"], "--", where="post", color="0.45", linewidth=1.2)
    axes.set(xscale="log", xlabel="seconds (log scale)")
    axes.set_ylabel("drop from the teacher (points)" if drop else "top-1 (%)")
    axes.xaxis.set_major_formatter("{x:g}")
    if drop:
        axes.invert_yaxis()
    named = _words(part.replace({"calibration": {"published": ""}}), "method", "calibration", "variant")
    texts = [
        f"{name}, seed {row.seed:.0f}: {kind} {row.score:.2f}, {row.seconds:.3g} s ({row.run})"
        for name, row in zip(named, part.itertuples(), strict=True)
    ]
    marks = [MARK.format(row, text) for row, text in zip(part.itertuples(), texts, strict=True)]
    ends = best.groupby(np.ceil(np.log10(best["seconds"]))).tail(1)  # the best of each power of ten
    told = "; ".join(f"{row.score:.2f} in {row.seconds:.3g} s ({named[row.Index]})" for row in ends.itertuples())
    text = f"{len(part)} results. Best data-free {kind}: {told or 'none'}."
    text += " Published drop: " + ", ".join(f"{name} {aim:.2f}" for name, aim in aims) + "." if aims else ""
    return Panel(heading, _svg(figure, heading, marks), text)


def _draw(axes: Axes, part: pd.DataFrame, looks: dict[str, Any]) -> None:
    for (method, data_free), own in part.groupby(["method", "data_free"], sort=False):
        look = looks[method] | {"urls": list(map(str, own.index))} | ({} if data_free else {"facecolor": "white"})
        axes.scatter(own["seconds"], own["score"], s=26, linewidth=1.2, zorder=3, **look)


def _legend(looks: dict[str, Any]) -> Markup:
    figure = pyplot.figure(figsize=(8, 0.6))
    handles = [pyplot.Line2D([], [], linestyle="", label=method, **look) for method, look in looks.items()]
    look: dict[str, Any] = {"linestyle": "", "marker": "o", "color": "0.3"}
    handles.append(pyplot.Line2D([], [], **look, markerfacecolor="white", label="hollow: uses real images"))
    handles.append(pyplot.Line2D([], [], **(look | {"marker": "_"}), markersize=12, label="right edge: published drop"))
    handles.append(pyplot.Line2D([], [], linestyle="--", marker="", color="0.45", label="best data-free so far"))
    figure.legend(handles=handles, ncols=5, loc="center")
    return _svg(figure, "legend", [])


def _words(rows: pd.DataFrame, *columns: str) -> "pd.Series[str]":
    """The texts of some columns of each row in one."""
    texts = [" ".join(filter(None, words)) for words in rows[list(columns)].fillna("").to_numpy()]
    return pd.Series(texts, index=rows.index, dtype=str)


def _svg(figure: Figure, salt: str, marks: list[Markup]) -> Markup:
    """The figure as an element of a page, its scatter's ``urls`` replaced by the opening tags in ``marks``.

    ``salt`` makes ids unique, which all the page's pictures share.
    """
    file = io.StringIO()
    with pyplot.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    pyplot.close(figure)
    svg = re.sub(r' id="[A-Za-z.]+_\d+"', "", file.getvalue()[file.getvalue().index("<svg") :])
    svg = re.sub(r'<a xlink:href="(\d+)"[^>]*>', lambda found: str(marks[int(found[1])]), svg)
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" ', 1))
