"""``report.html``: a results folder on one page that needs no network.

Tables to sort, filter and search (DataTables, from itables), figures, charts, and for every number the run it came
from, with its parameters, software, hardware and executed notebook.
"""

import base64
import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from itables.utils import find_package_file
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from dfqlib.files import METRICS, write_text
from dfqlib.papers.profiles import Paper
from dfqlib.report import reproduced, tables
from dfqlib.runner.identity import digest
from dfqlib.runner.run_folder import NOTEBOOK, NOTEBOOK_PAGE, read_metrics

#: A change in these files draws the page again.
SOURCES = [Path(__file__).parent / name for name in ("templates/page.html.jinja", "page.py", "charts.py")]
#: Columns by which all tables and charts of the page can be filtered, also from its address: ``?bits=W3A3``.
FILTERS = {"dataset": "data set", "model": "model", "method": "method", "bits": "bits", "calibration": "calibration"}
#: Columns that come first, so that they stay in view on a phone.
FIRST = ["method", "variant", "bits", "top-1", "drop"]


class Section(NamedTuple):
    """The results of one paper: its rows, the published rows that were not run, and the files of its figures."""

    paper: Paper
    rows: pd.DataFrame
    missing: pd.DataFrame
    figures: list[Path]


def write_page(root: Path, sections: list[Section]) -> None:
    """Write ``root/report.html``; a page that was made from the same content is left, since charts take seconds."""
    rows = pd.concat([section.rows for section in sections], ignore_index=True)
    rows = rows.assign(bits=tables.bits_of(rows))
    papers: list[dict[str, Any]] = []
    for paper, _, missing, figures in sections:
        own = tables.parts(rows[rows["paper"] == paper.key])
        about = {"key": paper.key, "title": paper.title, "figures": [figure(paper, path) for path in figures]}
        about |= {"tables": [table(f"{paper.key}-{index}", part) for index, part in enumerate(own)]}
        papers.append(about | {"missing": missing.to_dict("split") if len(missing) else None})
    for line in (line for paper in papers for part in paper["tables"] for line in part["lines"]):
        rows.loc[line.pop("rows"), "line"] = line["id"]
    choices = {name: (label, list(rows[name].unique())) for name, label in FILTERS.items() if rows[name].nunique() > 1}
    published = overview(root, rows)
    runs = [run_details(root, row) for row in rows.drop_duplicates("run").to_dict("records")]
    scripts = [find_package_file("html", name) for name in ("dt_bundle.js", "dt_bundle.css")]
    script, style, template, *code = (path.read_text(encoding="utf-8") for path in (*scripts, *SOURCES))
    parts = json.dumps([papers, runs, published]), rows.drop(columns="rank", errors="ignore").to_json()
    made_from = digest(script, style, template, *code, *parts)
    path = root / "report.html"
    before = path.read_text(encoding="utf-8", errors="replace").rstrip() if path.is_file() else ""
    if made_from in before and before.endswith("</html>"):  # made from this content, and not truncated afterwards
        return
    from dfqlib.report import charts  # here, since it takes seconds

    rows["filters"] = [filters(row) for _, row in rows[list(FILTERS)].groupby(level=0)]
    legend, panels = charts.accuracy_against_time(rows)
    content: dict[str, Any] = {"papers": papers, "choices": choices, "runs": runs, "published": published}
    content |= {"legend": legend, "panels": panels, "words": tables.WORDS, "made_from": made_from, "style": style}
    content["datatables"] = data_address("text/javascript", script.encode())
    write_text(path, Environment(autoescape=True).from_string(template).render(**content))


def overview(root: Path, rows: pd.DataFrame) -> dict[str, Any] | None:
    """Which published results are reproduced: sentence, table and the picture in ``root``; None without a picture."""
    picture = root / "reproduced.png"
    if not picture.is_file():
        return None
    cells = reproduced.cells(rows)
    shown = {"sentence": reproduced.sentence(cells), "cells": reproduced.present(cells).to_dict("split")}
    shown["picture"] = data_address("image/png", picture.read_bytes())
    return shown | {"caption": f"{reproduced.caption()} {reproduced.elsewhere()}"}


def table(key: str, rows: pd.DataFrame) -> dict[str, Any]:
    """A table and for each of its lines the text, the runs, the filters that keep it, and the index of its rows."""
    shown, caption, of_lines = tables.present(rows)
    shown = shown[sorted(shown, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))]
    name = " ".join(rows.iloc[0][["dataset", "profile"]])
    known = rows[["run", "seed", *FILTERS]]
    lines: list[dict[str, Any]] = []
    for cells, index in zip(shown.to_numpy().tolist(), of_lines, strict=True):
        own = known.loc[index]
        runs = [(run, _seeds(seeds)) for run, seeds in own.groupby("run", sort=False)["seed"]]
        words = " ".join(own[list(FILTERS)].to_numpy().ravel())  # what a search finds beside the cells
        line = {"id": f"{key}-{len(lines)}", "cells": cells, "words": words, "runs": runs}
        lines.append(line | {"filters": filters(own), "rows": index})
    return {"key": key, "name": name, "columns": list(shown.columns), "caption": caption, "lines": lines}


def _seeds(seeds: pd.Series) -> str:
    names = [f"{seed:.0f}" for seed in sorted(seeds.unique())]
    return " ".join(["seeds" if len(names) > 1 else "seed", *names])


def filters(rows: pd.DataFrame) -> Markup:
    """The attributes of an element that shows these rows: the values of each filter that keep it, with | between."""
    attributes = [Markup('data-{}="{}"').format(name, "|".join(rows[name].unique())) for name in FILTERS]
    return Markup(" ").join(attributes)


def figure(paper: Paper, path: Path) -> dict[str, str]:
    """A figure as a ``data:`` address, with the alternative text that its file carries, or its name."""
    text = path.stem
    with contextlib.suppress(UnidentifiedImageError), Image.open(path) as image:
        text = image.info.get("Description", text)
    return {"name": path.stem, "text": f"{paper.key}: {text}", "png": data_address("image/png", path.read_bytes())}


def run_details(root: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Where a row's numbers come from, and the files of its run as seen from ``root``, if the run is there."""
    details = {"id": row["run"], "paper": row["paper"], "files": {}, "parameters": {}}
    metrics = read_metrics(Path(row["folder"])) if row["folder"] else None
    if metrics is None:
        return details | {"facts": {name: row[name] for name in ("schedule", "commit", "hardware", "finished")}}
    files = [Path(row["folder"], name) for name in (NOTEBOOK_PAGE, NOTEBOOK, METRICS)]
    details["files"] = {file.name: Path(os.path.relpath(file, root)).as_posix() for file in files if file.is_file()}
    provenance = pd.json_normalize(metrics["provenance"], sep=" ").to_dict("records")[0]
    return details | {"facts": {"schedule": metrics["schedule"], **provenance}, "parameters": metrics["parameters"]}


def data_address(kind: str, content: bytes) -> str:
    """Content of a MIME type as a ``data:`` address, which a page loads from itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
