"""``report.html``: everything a results folder holds on one page that needs nothing but itself.

Tables that can be filtered, figures, accuracy against time, the spread over seeds, and for every number the run it came
from, with its parameters, software, hardware and executed notebook.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dfqlib.bits import bits_name
from dfqlib.files import write_text
from dfqlib.papers.profiles import Paper
from dfqlib.report import tables
from dfqlib.runner.identity import digest
from dfqlib.runner.run_folder import METRICS, NOTEBOOK, NOTEBOOK_PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
TEMPLATE = Path(__file__).with_name("templates") / "page.html.jinja"
FILTERS = ("data", "model", "method", "bits")


def write_page(root: Path, papers: list[tuple[Paper, pd.DataFrame, pd.DataFrame, list[Path]]]) -> None:
    """Write ``root/report.html`` from each paper's rows, its published rows not run, and its figures' files.

    A page that was made from the same is left as it is: its charts take seconds to draw.
    """
    rows = pd.concat([rows for _, rows, _, _ in papers])
    runs = rows.drop_duplicates("run")
    sections = [
        {
            "key": paper.key,
            "title": paper.title,
            "columns": list(tables.present(own).columns),
            "lines": table_lines(own),
            "caption": tables.caption(own),
            "missing": tables.present_missing(missing).to_dict("split") if len(missing) else None,
            "figures": [{"name": path.stem, "png": embed(path)} for path in figures],
        }
        for paper, own, missing, figures in papers
    ]
    choices = {name: list(dict.fromkeys(line[name] for s in sections for line in s["lines"])) for name in FILTERS}
    content = {"papers": sections, "choices": choices, "runs": [run_details(root, Path(f)) for f in runs["folder"]]}
    sources = [Path(module).read_text(encoding="utf-8") for module in (__file__, TEMPLATE)]
    made_from = digest(*sources, json.dumps(content), rows.drop(columns="rank", errors="ignore").to_json())
    path = root / "report.html"
    if path.is_file() and _is_whole(path.read_text(encoding="utf-8", errors="replace"), made_from):
        return
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(sources[-1])
    overview = [as_svg(accuracy_against_time(rows)), as_svg(spread_over_seeds(rows))]
    write_text(path, page.render(**content, words=tables.WORDS, overview=overview, made_from=made_from))


def _is_whole(text: str, made_from: str) -> bool:
    """Whether a page was made from just this, and not cut off afterwards."""
    return made_from in text and text.rstrip().endswith("</html>")


def table_lines(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a paper's table: the cells that are read, what filters ask for, and the runs behind them."""
    cells = tables.present(rows).to_numpy().tolist()
    lines = []
    for text, (_, group) in zip(cells, tables.groups(rows), strict=True):
        first = group.iloc[0]
        bits = bits_name(first["weight_bits"], first["activation_bits"])
        about = {"data": first["data"], "model": first["model"], "method": first["method"], "bits": bits}
        lines.append(about | {"cells": text, "runs": list(dict.fromkeys(group["run"]))})
    return lines


def run_details(root: Path, folder: Path) -> dict[str, Any]:
    """Where one run's numbers come from, and where its files are, as seen from ``root``."""
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    files = [name for name in (NOTEBOOK_PAGE, NOTEBOOK, METRICS) if (folder / name).is_file()]
    return {
        "id": metrics["run"]["id"],
        "paper": metrics["paper"],
        "files": {name: Path(os.path.relpath(folder / name, root)).as_posix() for name in files},
        "facts": {"schedule": metrics["schedule"], **flat(metrics["provenance"])},
        "parameters": metrics["parameters"],
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as one, ``{"a": {"b": 1}}`` as ``{"a b": 1}``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def accuracy_against_time(rows: pd.DataFrame) -> Figure:
    """Top-1 of every row that took time of its own, by the seconds it took; a panel for each data set."""
    import seaborn as sns
    from matplotlib import pyplot

    from dfqlib import plotting

    plotting.style()
    timed = rows.dropna(subset=["seconds"])
    methods, sets = list(timed["method"].unique()), list(timed["dataset"].unique()) or [""]
    look = {"hue": "method", "style": "method", "hue_order": methods, "style_order": methods, "s": 30}
    look["palette"] = dict(zip(methods, itertools.cycle([*plotting.COLOURS, "0.4", "0.75"]), strict=False))
    figure, places = pyplot.subplots(1, len(sets), figsize=(8, 4), sharex=True, sharey=True, squeeze=False)
    for axes, dataset in zip(places[0], sets, strict=True):
        own = timed[timed["dataset"] == dataset]
        if len(own):  # for none seaborn warns that their colours mean nothing
            sns.scatterplot(own, x="seconds", y="top1", ax=axes, legend=axes is places[0, -1], **look)
        axes.set(xscale="log", xlabel="seconds", ylabel="top-1 (%)", title=dataset)
    if len(timed):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("Accuracy against time, every row", fontsize="medium")
    return figure


def spread_over_seeds(rows: pd.DataFrame) -> Figure:
    """Every seed of each method as published, a point, with the mean and one standard deviation."""
    import seaborn as sns
    from matplotlib import pyplot

    from dfqlib import plotting

    plotting.style()
    own = rows[(rows["variant"] == "") & (rows["weight_bits"] < 32)]
    own = own.assign(setting=own["method"] + " " + own["scheme"] + " " + bit_names(own))
    settings, sets = list(own["setting"].unique()), list(own["data"].unique()) or [""]
    size = (8, 1 + 0.22 * len(settings))
    figure, places = pyplot.subplots(1, len(sets), figsize=size, sharex=True, sharey=True, squeeze=False)
    look = {"linestyle": "none", "marker": "|", "color": plotting.COLOURS[0], "markersize": 9}
    for axes, data in zip(places[0], sets, strict=True):
        where = {"data": own[own["data"] == data], "x": "top1", "y": "setting", "order": settings, "ax": axes}
        sns.stripplot(**where, color=plotting.COLOURS[1], jitter=False, size=4)
        sns.pointplot(**where, errorbar="sd", **look)
        axes.set(xlabel="top-1 (%)", ylabel="", title=data)
    figure.suptitle("Methods as published: seeds (points), their mean and standard deviation", fontsize="medium")
    return figure


def bit_names(rows: pd.DataFrame) -> pd.Series:
    """``W4A4`` and the like for every row."""
    return pd.Series(list(map(bits_name, rows["weight_bits"], rows["activation_bits"])), rows.index, dtype=object)


def as_svg(figure: Figure) -> str:
    """The figure as the text of an image's address."""
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="svg")
    pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def embed(path: Path) -> str:
    """A PNG file as the text of an image's address."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
