"""Turn the measurements of finished runs into a results folder's tables, figures, ``README.md`` and ``report.html``.

Each run's ``metrics.json`` is what was measured; all else in a results folder is made from these, by every call of
``run_all.py`` and by ``python -m dfqlib.report``. A group is a paper, profile, data set, test images, model and
calibration. Its rows are of one version: the same code and schedule, those of this call or else the latest.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dfqlib.files import atomic_path, write_between, write_text
from dfqlib.papers import profiles, published
from dfqlib.papers.parameters import RUN_PARAMETERS
from dfqlib.papers.profiles import Paper, Profile
from dfqlib.papers.published import Failures
from dfqlib.places import PACKAGE
from dfqlib.report import curve, reproduced, tables
from dfqlib.report.page import Section, write_page
from dfqlib.runner.identity import digest
from dfqlib.runner.run_folder import finished

PROJECT = PACKAGE.parent / "results"  # what the project measured; nothing of it is changed by a call elsewhere
GROUP = ["paper", "profile", "dataset", "data", "model", "calibration"]
ORIGIN = ["run", "commit", "hardware", "finished"]
#: Columns of a row that serve the report alone and are not written to results.csv.
INTERNAL = ["rank", "version", "folder", "figures", "order", "correct"]


def write(results: Path, profile: Profile, present: Collection[str], failures: Failures) -> dict[str, Section]:
    """Write all overviews of a results folder; returns the tables by paper, of the papers that have rows.

    ``present`` holds the identities of this call's runs.
    """
    papers = profiles.load()[1]
    root = profile.overview_folder(results)
    rows, project = collect(results, profile, present), None
    if results.resolve() != PROJECT.resolve():
        project = collect(PROJECT, profile, ())
    sections = {}
    for key, paper in papers.items():
        own = rows[rows["paper"] == key] if len(rows) else rows
        section = Section(paper, own, not_run(own, paper.methods, failures), _copy_figures(root, own))
        _write_tables(root, section, project)
        if len(own):
            sections[key] = section
    cells = reproduced.cells(rows)
    points = curve.points(rows, cells)
    if sections:
        with atomic_path(root / "results.csv") as path:
            rows.drop(columns=INTERNAL, errors="ignore").to_csv(path, index=False)
        if not profile.rehearsal:
            shown = cells.assign(schedule=cells["schedule"].map(tables.short)).drop(columns=["sources", "images"])
            _draw(root / "reproduced.png", shown, partial(reproduced.picture, cells))
            if len(points):
                _draw(root / "curve.png", points, partial(curve.picture, points))
        write_page(root, list(sections.values()))
    overview = "" if profile.rehearsal else _overview(cells, points, "")
    _write_readme(root, papers, sections, overview)
    if project is None and not profile.rehearsal:
        write_between(PROJECT.parent / "README.md", "results", _overview(cells, points, "results/"))
    return sections


def collect(results: Path, profile: Profile, present: Collection[str]) -> pd.DataFrame:
    """Rows of a folder's finished runs, in each group those of one version: that of this call's runs, else the latest.

    Those of a rehearsal profile stand apart. A row of other code than the latest of its paper says so, unless that code
    gave the same (:func:`_standing_code`).
    """
    known, papers = profiles.load()
    names = [profile.name] if profile.rehearsal else [p.name for p in known.values() if not p.rehearsal]
    rows = pd.DataFrame([row for paper in papers.values() for row in _rows(results, paper, names, present)])
    if rows.empty:
        return rows
    rows = rows.sort_values("rank", kind="stable")
    rows = rows[rows["version"] == rows.groupby(GROUP, dropna=False)["version"].transform("last")]
    rows = rows.drop_duplicates([*tables.SETTING, "profile", "seed"], keep="last")
    order = [*GROUP, "order", "seed"]
    published_first = [name != "calibration" for name in order]
    return rows.sort_values(order, ascending=published_first, kind="stable", ignore_index=True)


def _rows(results: Path, paper: Paper, names: Iterable[str], present: Collection[str]) -> Iterable[dict[str, Any]]:
    runs = [(name, *run) for name in names for run in finished(results / name / paper.key)]
    runs.sort(key=lambda run: _rank(run[2], present), reverse=True)
    schedules = {metrics["run"]["identity"]: _schedule(paper, metrics) for *_, metrics in runs}
    standing = _standing_code([metrics for *_, metrics in runs], schedules)
    for profile, folder, metrics in runs:
        run, provenance = metrics["run"], metrics["provenance"]
        depends = run["depends"] | {"code": standing[run["identity"]]}
        older = depends["code"] != runs[0][2]["run"]["depends"]["code"]
        figures = [str(folder / f"{name}.png") for name in metrics["figures"]]
        context = {"paper": paper.key, "profile": profile, "schedule": metrics["schedule"]}
        context["calibration"] = "published"  # unless the row says otherwise
        version = digest(json.dumps([schedules[run["identity"]], depends], sort_keys=True))
        context |= {"rank": _rank(metrics, present), "version": version, "run": run["id"]}
        context |= {name: provenance[name] for name in ("commit", "hardware", "finished")}
        context |= {"folder": str(folder), "figures": figures, "images": (provenance.get("data") or {}).get("images")}
        for order, row in enumerate(metrics["rows"]):
            line = context | row | {"order": order}
            kind, colon, details = line["schedule"].partition(":")
            yield line | {"schedule": kind + (" (older code)" if older else "") + colon + details}


def _standing_code(runs: list[dict[str, Any]], schedules: dict[str, str]) -> dict[str, str]:
    """For each of a paper's runs, latest first, the code that it stands for, by the run's identity.

    That is the latest code with the same predictions, image by image, in a run of the same seed and parameters on the
    same data and teacher, students among them. All other runs of the earlier code on these stand for the latest, too.
    ``schedules``: of each identity, by :func:`_schedule`.
    """
    same: dict[tuple[str, str], str] = {}  # (data and teacher, code) -> the code that it is as good as
    made: dict[str, str] = {}  # a run with its predictions -> the latest code that made it
    places = {}
    for metrics in runs:
        identity, depends, given = metrics["run"]["identity"], metrics["run"]["depends"], metrics["parameters"]
        where = json.dumps([depends | {"code": ""}, given.get("dataset"), given.get("model")])
        code = depends["code"]
        places[identity] = where, code
        predictions = [row.get("correct", row.get("top1")) for row in metrics["rows"]]
        content = json.dumps([where, schedules[identity], given.get("seed"), predictions])
        proves = any(row.get("weight_bits", 32) < 32 for row in metrics["rows"])  # a teacher's predictions do not
        if proves and (latest := made.setdefault(content, same.get((where, code), code))) != code:
            same[where, code] = latest
    return {identity: same.get(place, place[1]) for identity, place in places.items()}


def _schedule(paper: Paper, metrics: dict[str, Any]) -> str:
    """The parameters of a run that are neither its seed nor where or on what it ran; later ones have their defaults."""
    given = paper.parameters().values() | metrics["parameters"]
    own = {name: value for name, value in given.items() if name == "precision" or name not in RUN_PARAMETERS}
    return json.dumps(own, sort_keys=True)


def _rank(metrics: dict[str, Any], present: Collection[str]) -> tuple[bool, str]:
    """Of two versions the greater one is shown."""
    return metrics["run"]["identity"] in present, metrics["provenance"]["finished"]


def not_run(rows: pd.DataFrame, methods: Iterable[str], failures: Failures) -> pd.DataFrame:
    """Published rows of ``methods`` that no run covers, as text: a line for each model, with what its runs need.

    ``rerun`` is what the authors got again, where they print it.
    """
    own = rows.loc[rows["variant"] == "", published.KEYS] if len(rows) else rows
    covered, lines = set(own.itertuples(index=False, name=None)), []
    for row in published.rows():
        if row.method in methods and tuple(getattr(row, key) for key in published.KEYS) not in covered:
            needs = "ImageNet, a GPU" if row.dataset == "imagenet" else "nothing" if row.top1 else "a teacher"
            needs = failures.get((row.method, row.dataset, row.model), needs)
            value = f"{row.bits} {tables.number(row.top1)}".strip()
            again = f"{row.bits} {row.rerun:.2f}" if row.rerun else ""
            lines.append((row.method, row.dataset, row.model, row.scheme, needs, value, again))
    setting = ["method", "data", "model", "scheme", "needs"]
    groups = pd.DataFrame(lines, columns=[*setting, "published", "rerun"]).groupby(setting, sort=False)
    table = groups.agg(lambda texts: ", ".join(filter(None, texts))).reset_index()
    return table.loc[:, (table != "").any()]


def _write_tables(root: Path, section: Section, project: pd.DataFrame | None) -> None:
    """``tables/<paper>.csv`` with all that is known of each line, and ``tables/<paper>.md`` to read."""
    paper, rows, missing, figures = section
    text = [f"# {paper.title}\n", "[All results](../README.md).\n"]
    if len(rows):
        origin = tables.groups(rows)[ORIGIN].agg(lambda column: " | ".join(dict.fromkeys(column))).reset_index()
        lines = tables.summarise(rows, project).drop(columns=["rows", "images"])
        with atomic_path(root / "tables" / f"{paper.key}.csv") as path:
            lines.merge(origin, on=tables.LINE, how="left").to_csv(path, index=False, float_format="%.4f")
        hardware, commits = (", ".join(dict.fromkeys(rows[name])) for name in ("hardware", "commit"))
        text.append(f"Runs on {hardware}; commit {commits}.\n")
    for part in tables.parts(rows):
        table = tables.present(part, project)
        dataset, profile = part.iloc[0][["dataset", "profile"]]
        text += [f"## {reproduced.DATASETS.get(dataset, dataset)}, {profile}\n", tables.markdown(table.shown)]
        text += [f"{table.caption}\n"]
    if sources := _published_values(paper.methods):
        text += ["## Published values\n", sources]
    if len(missing):
        text += ["## Published, not run\n", tables.markdown(missing)]
    if figures:
        text += ["## Figures\n", *(f"![{path.stem}](../figures/{path.name})\n" for path in figures)]
    write_text(root / "tables" / f"{paper.key}.md", "\n".join(text))


def _published_values(methods: Collection[str]) -> str:
    """Every published value on the data sets that run here, with its source, and values of other methods beside it."""
    lines = [
        {"method": row.method, "data": row.dataset, "bits": row.bits, "top-1": tables.number(row.top1, row.std)}
        | {"teacher": tables.number(row.fp32_top1)}
        | {"source": f"[{row.source}](https://{row.address})" if row.address else row.source, "note": row.note}
        for row in published.rows()
        if row.method in methods and row.dataset in reproduced.DATASETS
    ]
    return tables.markdown(pd.DataFrame(lines))


def _copy_figures(root: Path, rows: pd.DataFrame) -> list[Path]:
    """A paper's figures in ``root/figures``, copied from the run of the lowest seed of each data set and model.

    Those of a run whose notebook is not in this folder are already there.
    """
    copies, places = [], ["paper", "profile", "dataset", "model"]
    for place, group in rows.groupby(places, sort=False, dropna=False) if len(rows) else ():
        prefix = "".join(f"{part.replace('/', '_')}-" for part in place if part)
        for source in map(Path, group.sort_values("seed").iloc[0]["figures"]):
            copy = root / "figures" / f"{prefix}{source.stem}.png"
            if source.is_file():
                with atomic_path(copy) as path:
                    shutil.copyfile(source, path)
            copies += [copy] if copy.is_file() else []
    return copies


def _draw(path: Path, values: pd.DataFrame, picture: Callable[[], Any]) -> None:
    """A ``picture`` and its ``values`` beside it, drawn only where these have changed, since that takes seconds."""
    table = path.with_suffix(".csv")
    before = table.read_text(encoding="utf-8") if table.is_file() else ""
    text = values.to_csv(index=False, float_format="%.4f")
    if text != before or not path.is_file():
        figure = picture()
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
        write_text(table, text)


def _overview(cells: pd.DataFrame, points: pd.DataFrame, place: str) -> str:
    """The first question's answer in Markdown: sentence, pictures, table; files are in ``place``."""
    picture = f"![Published drop and drop here of every published CIFAR cell]({place}reproduced.png)\n"
    text = [f"**{reproduced.sentence(cells)}**\n", picture, tables.markdown(reproduced.present(cells))]
    text += [f"{reproduced.caption()}\n", reproduced.elsewhere(), ""]
    if len(points):
        text += [f"![{curve.TITLE}]({place}curve.png)\n", curve.CAPTION, ""]
    return "\n".join(text)


def _write_readme(root: Path, papers: dict[str, Paper], sections: dict[str, Section], overview: str) -> None:
    text = ["# Results\n", "Made from the measurements (`metrics.json`) in this folder by `python -m dfqlib.report`.\n"]
    text += [overview, "## Tables and figures of each notebook\n"]
    for key, paper in papers.items():
        rows = f"{len(sections[key].rows)} rows" if key in sections else "not run"
        text.append(f"- [{paper.title}](tables/{key}.md): {rows}")
    told = f"Copied from the tables of the papers named as source; teachers there have {reproduced.teachers()}."
    text += ["\n## Other methods, as context\n", f"{told}\n", tables.markdown(reproduced.context())]
    text.append("\nAll rows, with run, commit, hardware and date: [`results.csv`](results.csv).\n")
    write_text(root / "README.md", "\n".join(text))
