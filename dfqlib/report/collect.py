"""Turn finished runs into a results folder's ``results.csv``, tables, figures, ``README.md`` and ``report.html``.

A group is a paper, profile, data set, test images and model. Its rows are those of the runs in the folder, all of one
version: the same code and schedule, those of the present call or else the latest. A group without a run in the folder
keeps its rows of ``results.csv``.
"""

import glob
import io
import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from dfqlib.files import atomic_path, write_text
from dfqlib.papers import profiles, published
from dfqlib.papers.parameters import RUN_PARAMETERS
from dfqlib.papers.profiles import Paper, Profile
from dfqlib.papers.published import Published
from dfqlib.report import tables
from dfqlib.report.page import Section, write_page
from dfqlib.runner import preflight
from dfqlib.runner.identity import code_identity, digest
from dfqlib.runner.run_folder import finished

GROUP = ["paper", "profile", "dataset", "data", "model"]
NUMBERS = ["weight_bits", "activation_bits", "seed", "top1", "top1_best", "fp32_top1", "seconds"]
ORIGIN = ["run", "commit", "hardware", "finished"]
#: Columns of a row that serve the report alone and are not written to results.csv.
INTERNAL = ["rank", "version", "folder", "figures", "order"]
README = """\
# Results

Written by `run_all.py` from the runs in this folder; each call adds to it. Rows without a run
in this folder are those of [`results.csv`](results.csv). Run, commit, hardware and date of every row are
in [`tables/`](tables), as CSV.
"""
Failures = dict[tuple[str, str, str], str]  # (method, data set, model) -> what stopped its run in this call


def write(results: Path, profile: Profile, present: Collection[str], failures: Failures) -> dict[str, Section]:
    """Write all overviews of a results folder; returns the tables by paper, of the papers that have rows.

    ``present`` holds the identities of this call's runs.
    """
    known, papers = profiles.load()
    names = [profile.name] if profile.rehearsal else [p.name for p in known.values() if not p.rehearsal]
    root = profile.overview_folder(results)
    rows = merge(collect(results, names, papers.values(), present), root / "results.csv")
    sections = {}
    for key, own in rows.groupby("paper", sort=False) if len(rows) else ():
        if paper := papers.get(key):
            sections[key] = Section(paper, own, not_run(own, paper.methods, failures), _copy_figures(root, own))
            _write_tables(root, sections[key])
    if sections:
        with atomic_path(root / "results.csv") as path:
            rows.drop(columns=INTERNAL, errors="ignore").to_csv(path, index=False)
        write_page(root, [sections[key] for key in papers if key in sections])
    _write_readme(root, papers, failures)
    return sections


def collect(results: Path, names: Iterable[str], papers: Iterable[Paper], present: Collection[str]) -> pd.DataFrame:
    """Rows of the finished runs of some profiles and papers, in each group those of one version.

    The runs of this call (identities in ``present``) come first, then runs of the present code, then the latest.
    """
    rows = pd.DataFrame([row for paper in papers for name in names for row in _rows(results, paper, name, present)])
    if rows.empty:
        return rows
    rows = rows.sort_values("rank", kind="stable")
    rows = rows[rows["version"] == rows.groupby(GROUP, dropna=False)["version"].transform("last")]
    rows = rows.drop_duplicates([*tables.SETTING, "profile", "seed"], keep="last")
    return rows.sort_values([*GROUP, "order", "seed"], kind="stable")


def _rows(results: Path, paper: Paper, profile: str, present: Collection[str]) -> Iterable[dict[str, Any]]:
    runs = finished(results / profile / paper.key)
    code = code_identity(paper.notebook) if runs else ""
    for folder, metrics in runs:
        run, provenance = metrics["run"], metrics["provenance"]
        current = run["depends"]["code"] == code
        own = {name: value for name, value in metrics["parameters"].items() if name not in RUN_PARAMETERS}
        figures = [str(folder / f"{name}.png") for name in metrics["figures"]]
        context = {"paper": paper.key, "profile": profile, "schedule": metrics["schedule"]}
        context["rank"] = (run["identity"] in present, current, provenance["finished"])
        context["version"] = digest(json.dumps([own, run["depends"]], sort_keys=True))
        context |= {"run": run["id"]} | {name: provenance[name] for name in ("commit", "hardware", "finished")}
        context |= {"folder": str(folder), "figures": figures}
        for order, row in enumerate(metrics["rows"]):
            line = context | row | {"order": order}
            kind, colon, details = line["schedule"].partition(":")
            yield line | {"schedule": kind + ("" if current else " (older code)") + colon + details}


def merge(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """``rows`` and, of the groups that they lack, the rows of the ``results.csv`` at ``path``, if there is one."""
    if path.is_file():
        rows = pd.concat([part for part in (rows, _read_rows(path)) if len(part)] or [rows], ignore_index=True)
    if rows.empty:
        return rows
    rows = rows.assign(folder=rows["folder"].fillna("") if "folder" in rows else "", seed=rows["seed"].astype("Int64"))
    here = rows["folder"] != ""
    measured = here.groupby([rows[name] for name in GROUP], dropna=False).transform("any")
    return rows[here | ~measured].sort_values(GROUP, kind="stable")


def _read_rows(path: Path) -> pd.DataFrame:
    """The rows of a ``results.csv``; of a truncated one its complete lines, saved whole as ``<name>.broken``."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, newline, rest = text.rpartition("\n")
    needed = [*tables.LINE, *ORIGIN, *NUMBERS]
    whole = whole if newline and set(needed) <= set(whole.partition("\n")[0].split(",")) else ",".join(needed)
    if rest or not newline or not text.startswith(whole):
        shutil.copyfile(path, path.with_name(f"{path.name}.broken"))
    rows = pd.read_csv(io.StringIO(whole), dtype=str, keep_default_na=False)
    # Numbers exactly as they were written, which not every version of pandas guarantees.
    numbers = {name: [int(x) if x.isdecimal() else float(x or "nan") for x in rows[name]] for name in NUMBERS}
    return rows.assign(**numbers)


def not_run(rows: pd.DataFrame, methods: Iterable[str], failures: Failures) -> pd.DataFrame:
    """Published rows of ``methods`` that no run covers, each with the reason or the command that runs it."""
    keys = [*published.SETTING, "scheme"]
    covered = set(rows.loc[rows["variant"] == "", keys].itertuples(index=False, name=None)) if len(rows) else set()
    lines = []
    for row in published.rows():
        setting = {key: getattr(row, key) for key in keys}
        if row.method in methods and tuple(setting.values()) not in covered:
            why = failures.get((row.method, row.dataset, row.model)) or _reason(row)
            lines.append(setting | {"published": row.top1, "published_source": row.source, "reason": why})
    return pd.DataFrame(lines)


def _reason(row: Published) -> str:
    paper = profiles.paper_of(row.method)
    if paper is None:
        return f"no notebook for {row.method}"
    command = f"python run_all.py --profile paper --papers {paper.key} --models {row.model} --bits {row.bits}"
    return preflight.missing(row.dataset, row.model) or f"not requested; `{command}` runs it"


def _write_tables(root: Path, section: Section) -> None:
    """``tables/<paper>.csv`` with all that is known of each line, and ``tables/<paper>.md`` to read."""
    paper, rows, missing, figures = section
    origin = tables.groups(rows)[ORIGIN].agg(lambda column: " | ".join(dict.fromkeys(column))).reset_index()
    lines = tables.summarise(rows).merge(origin, on=tables.LINE, how="left").assign(status="run")
    if len(missing):
        lines = pd.concat([lines, missing.assign(paper=paper.key, status="not run")], ignore_index=True)
    with atomic_path(root / "tables" / f"{paper.key}.csv") as path:
        lines.to_csv(path, index=False, float_format="%.4f")
    hardware, commits = (", ".join(dict.fromkeys(rows[name])) for name in ("hardware", "commit"))
    text = [f"## {paper.title}\n", tables.markdown(tables.present(rows)), tables.caption(rows) + "\n"]
    text.append(f"Runs on {hardware}; commit {commits}.\n")
    shown = [f"`{path.stem}`\n\n![{paper.key}: {path.stem}](../figures/{path.name})\n" for path in figures]
    if shown:  # folded, or the next table is a long way down
        text += [f"<details><summary>{len(shown)} figures</summary>\n", *shown, "</details>\n"]
    if len(missing):
        text += ["Published rows that were not run:\n", tables.markdown(tables.present_missing(missing))]
    write_text(root / "tables" / f"{paper.key}.md", "\n".join(text))


def _copy_figures(root: Path, rows: pd.DataFrame) -> list[Path]:
    """A paper's figures in ``root/figures``, copied from the run of the lowest seed of each data set and model.

    Those of rows without a run in this folder are already there.
    """
    copies = []
    for place, group in rows.groupby(["paper", "profile", "dataset", "model"], sort=False, dropna=False):
        prefix = "".join(f"{part.replace('/', '_')}-" for part in place if part)
        measured = group[group["folder"] != ""].sort_values("seed")
        if measured.empty:
            copies += sorted((root / "figures").glob(f"{glob.escape(prefix)}*.png"))
            continue
        for source in map(Path, measured.iloc[0]["figures"]):
            copies.append(root / "figures" / f"{prefix}{source.stem}.png")
            with atomic_path(copies[-1]) as path:
                shutil.copyfile(source, path)
    return copies


def _write_readme(root: Path, papers: dict[str, Paper], failures: Failures) -> None:
    def missing(methods: Iterable[str]) -> str:
        return tables.markdown(tables.present_missing(not_run(pd.DataFrame(), methods, failures)))

    text = [README]
    for paper in papers.values():
        table = root / "tables" / f"{paper.key}.md"
        if table.is_file():
            text.append(table.read_text(encoding="utf-8", errors="replace").replace("(../figures/", "(figures/"))
        elif paper.methods:
            text += [f"## {paper.title}\n", "Not run.\n", missing(paper.methods)]
    if other := missing({row.method for row in published.rows() if not profiles.paper_of(row.method)}):
        text += ["## Published rows without a notebook\n", other]
    write_text(root / "README.md", "\n".join(text))
