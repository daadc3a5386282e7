"""``report.html``: a results folder on one page that needs no network.

Tables to sort, filter and search (DataTables, from itables), figures, charts, and for every number the run it came
from, with its parameters, software, hardware and executed notebook.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from itables.utils import find_package_file
from jinja2 import Environment

from dfqlib.bits import bits_name
from dfqlib.files import METRICS, write_text
from dfqlib.papers.profiles import Paper
from dfqlib.report import tables
from dfqlib.runner.identity import digest
from dfqlib.runner.run_folder import NOTEBOOK, NOTEBOOK_PAGE, read_metrics

#: A change in these files draws the page again.
SOURCES = [Path(__file__).parent / name for name in ("templates/page.html.jinja", "page.py", "charts.py")]
#: Columns by which all tables of the page can be filtered, also from its address: ``report.html?bits=W3A3``.
FILTERS = ("data", "model", "method", "bits")


class Section(NamedTuple):
    """The results of one paper: its rows, the published rows that were not run, and the files of its figures."""

    paper: Paper
    rows: pd.DataFrame
    missing: pd.DataFrame
    figures: list[Path]


def write_page(root: Path, sections: list[Section]) -> None:
    """Write ``root/report.html``; a page that was made from the same content is left, since charts take seconds."""
    rows = pd.concat([section.rows for section in sections])
    rows = rows.assign(bits=list(map(bits_name, rows["weight_bits"], rows["activation_bits"])))
    papers = [
        {
            "key": paper.key,
            "title": paper.title,
            "tables": [
                {"shown": table.shown.to_dict("split"), "runs": table.runs, "caption": table.caption}
                for table in map(tables.present, tables.parts(own))
            ],
            "missing": missing.to_dict("split") if len(missing) else None,
            "figures": [{"name": path.stem, "png": data_address("image/png", path.read_bytes())} for path in figures],
        }
        for paper, own, missing, figures in sections
    ]
    runs = [run_details(root, row) for row in rows.drop_duplicates("run").to_dict("records")]
    content = {"papers": papers, "choices": {name: list(rows[name].unique()) for name in FILTERS}, "runs": runs}
    scripts = [find_package_file("html", name) for name in ("dt_bundle.js", "dt_bundle.css")]
    script, style, template, *code = (path.read_text(encoding="utf-8") for path in (*scripts, *SOURCES))
    parts = json.dumps(content), rows.drop(columns="rank", errors="ignore").to_json()
    made_from = digest(script, style, template, *code, *parts)
    path = root / "report.html"
    before = path.read_text(encoding="utf-8", errors="replace").rstrip() if path.is_file() else ""
    if made_from in before and before.endswith("</html>"):  # made from this content, and not truncated afterwards
        return
    from dfqlib.report import charts  # here, since it takes seconds

    content["overview"] = [data_address("image/svg+xml", svg) for svg in charts.overview(rows)]
    content |= {"words": tables.WORDS, "made_from": made_from, "style": style}
    content["datatables"] = data_address("text/javascript", script.encode())
    write_text(path, Environment(autoescape=True).from_string(template).render(**content))


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
