"""From finished runs to the results folder's ``tables/<paper>.csv`` and ``.md``, ``figures/``, ``README.md``,
``results.csv`` and ``report.html``.

Every table holds, for each (profile, data set, model), the runs of one version only: the same code and the same
schedule, those of the present call or else the latest. A paper without any run here keeps the table it has.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from dfqlib.files import atomic_path, write_text
from dfqlib.papers import profiles, published
from dfqlib.papers.parameters import PLACES
from dfqlib.papers.profiles import Paper, Profile
from dfqlib.papers.published import Published
from dfqlib.report import tables
from dfqlib.report.page import write_page
from dfqlib.runner import preflight
from dfqlib.runner.identity import code_identity, digest
from dfqlib.runner.run_folder import LEFTOVER_SUFFIXES, complete, read_metrics

GROUP = ["paper", "profile", "dataset", "data", "model"]


def collect(results: Path, names: Iterable[str], papers: Iterable[Paper], present: Collection[str]) -> pd.DataFrame:
    """Rows of the finished runs of some profiles and papers; of several versions the one that shall be shown.

    ``present`` holds the identities of the runs of this call, which come first; then runs of the present code, then
    the latest.
    """
    rows = [row for paper in papers for name in names for row in _rows(results, paper, name, present)]
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame = frame.sort_values("rank", kind="stable")
    latest = frame.groupby(GROUP, sort=False, dropna=False)["version"].transform("last")
    frame = frame[frame["version"] == latest]
    frame = frame.drop_duplicates([*tables.SETTING, "profile", "seed"], keep="last")
    return frame.sort_values([*GROUP, "order", "seed"], kind="stable")


def _rows(results: Path, paper: Paper, profile: str, present: Collection[str]) -> Iterable[dict[str, Any]]:
    folders = sorted((results / profile / paper.key).glob("[!.]*"))
    folders = [folder for folder in folders if complete(folder) and folder.suffix not in LEFTOVER_SUFFIXES]
    code = code_identity(paper.notebook) if folders else ""
    for folder in folders:
        metrics = read_metrics(folder)
        run, provenance = metrics["run"], metrics["provenance"]
        current = run["depends"]["code"] == code
        own = {name: value for name, value in metrics["parameters"].items() if name not in PLACES}
        kind, colon, details = metrics["schedule"].partition(":")
        context = {
            "paper": paper.key,
            "profile": profile,
            "schedule": kind + ("" if current else " (older code)") + colon + details,
            "rank": (run["identity"] in present, current, provenance["finished"]),
            "version": digest(json.dumps([own, run["depends"]], sort_keys=True)),
            "run": run["id"],
            "commit": provenance["commit"],
            "hardware": provenance["hardware"],
            "finished": provenance["finished"],
            "folder": str(folder),
            "figures": [str(folder / f"{name}.png") for name in metrics["figures"]],
        }
        for order, row in enumerate(metrics["rows"]):
            yield context | row | {"order": order}


def not_run(rows: pd.DataFrame, methods: Iterable[str], failures: dict[tuple[str, str, str], str]) -> pd.DataFrame:
    """Published rows of ``methods`` that no run covers, with the reason; never filled in.

    ``failures`` maps (method, data set, model) to what stopped a run of this call.
    """
    keys = ["method", "dataset", "model", "weight_bits", "activation_bits", "scheme"]
    own = rows[rows["variant"] == ""] if len(rows) else rows
    covered = set(own[keys].itertuples(index=False, name=None)) if len(own) else set()
    lines = []
    for row in published.rows():
        if row.method in methods and tuple(getattr(row, key) for key in keys) not in covered:
            line = {key: getattr(row, key) for key in keys} | {"published": row.top1, "published_source": row.source}
            failure = failures.get((row.method, row.dataset, row.model))
            lines.append(line | {"reason": failure or reason(row)})
    return pd.DataFrame(lines)


def paper_of(row: Published) -> Paper | None:
    """The notebook that runs a published row."""
    return next((paper for paper in profiles.load()[1].values() if row.method in paper.methods), None)


def reason(row: Published) -> str:
    """Why a published row was not run: what it lacks, or the command that runs it."""
    paper = paper_of(row)
    if paper is None:
        return f"the kit has no notebook for {row.method}"
    lacking = preflight.missing(row.dataset, row.model)
    return lacking or f"not asked for; `{command(row, paper)}` runs it"


def command(row: Published, paper: Paper) -> str:
    """The call that runs a published row with the published schedule."""
    return f"python run_all.py --profile paper --papers {paper.key} --models {row.model} --bits {row.bits}"


def write(
    results: Path, profile: Profile, present: Collection[str], failures: dict[tuple[str, str, str], str]
) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Write all of a results folder's overviews; returns the rows, and those not run, of each paper with runs.

    The results of a rehearsal go into its own folder, ``results/<profile>``.
    """
    known, papers = profiles.load()
    names = [profile.name] if profile.rehearsal else [p.name for p in known.values() if not p.rehearsal]
    root = results / profile.name if profile.rehearsal else results
    rows = collect(results, names, papers.values(), present)
    written, shown = {}, []
    for paper in papers.values():
        own = rows[rows["paper"] == paper.key] if len(rows) else rows
        if len(own):
            missing, figures = not_run(own, paper.methods, failures), _copy_figures(root, own)
            _write_paper(root, paper, own, missing, figures)
            written[paper.key] = own, missing
            shown.append((paper, own, missing, figures))
    if shown:
        _write_tidy(root / "results.csv", rows)
        write_page(root, shown)
    _write_readme(root, papers, failures)
    return written


def _write_tidy(path: Path, rows: pd.DataFrame) -> None:
    """Every row of every run behind the tables, one line per seed; papers without a run here keep their lines."""
    tidy = rows.drop(columns=["rank", "version", "folder", "figures", "order"])
    if path.is_file():
        before = _whole_lines(path)
        tidy = pd.concat([tidy, before[~before["paper"].isin(tidy["paper"])]])
    with atomic_path(path) as temporary:
        tidy.to_csv(temporary, index=False)


def _whole_lines(path: Path) -> pd.DataFrame:
    """The lines of a table; if it was cut off, those that are whole, and a copy of it stays as ``<name>.broken``."""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, newline, rest = text.rpartition("\n")
    if rest or not newline:
        shutil.copyfile(path, path.with_name(f"{path.name}.broken"))
    return pd.read_csv(io.StringIO(whole if newline else "paper"), dtype=object, keep_default_na=False)


def _write_paper(root: Path, paper: Paper, rows: pd.DataFrame, missing: pd.DataFrame, figures: Iterable[Path]) -> None:
    lines = tables.summarise(rows)
    keys = [*tables.SETTING, "profile", "schedule"]
    sources = rows.groupby(keys, sort=False, dropna=False)[["run", "commit", "hardware", "finished"]].agg(
        lambda column: " | ".join(dict.fromkeys(column))
    )
    tidy = lines.merge(sources.reset_index(), on=keys, how="left")
    tidy["status"] = "run"
    if len(missing):
        tidy = pd.concat([tidy, missing.assign(paper=paper.key, status="not run")], ignore_index=True)
    with atomic_path(root / "tables" / f"{paper.key}.csv") as path:
        tidy.to_csv(path, index=False, float_format="%.4f")
    text = [f"## {paper.title}\n", tables.markdown(tables.present(rows)), tables.caption(rows) + "\n"]
    hardware = ", ".join(dict.fromkeys(rows["hardware"]))
    text.append(f"Runs on {hardware}; commit {', '.join(dict.fromkeys(rows['commit']))}.\n")
    shown = [f"`{figure.stem}`\n\n![{paper.key}: {figure.stem}](../figures/{figure.name})\n" for figure in figures]
    if shown:  # folded, or a reader scrolls past a hundred of them to the next table
        text += [f"<details><summary>{len(shown)} figures</summary>\n", *shown, "</details>\n"]
    if len(missing):
        text += ["Published rows that were not run:\n", tables.markdown(tables.present_missing(missing))]
    write_text(root / "tables" / f"{paper.key}.md", "\n".join(text))


def _copy_figures(root: Path, rows: pd.DataFrame) -> list[Path]:
    """Copies under names that stay the same from run to run, of the lowest seed for each data set and model."""
    copies = []
    for _, group in rows.groupby(["profile", "dataset", "model"], sort=False, dropna=False):
        first = group.sort_values("seed").iloc[0]
        for source in map(Path, first["figures"]):
            parts = [first["paper"], first["profile"], first["model"].replace("/", "_"), source.stem]
            copy = root / "figures" / f"{'-'.join(part for part in parts if part)}.png"
            with atomic_path(copy) as path:
                shutil.copyfile(source, path)
            copies.append(copy)
    return list(dict.fromkeys(copies))


def _write_readme(root: Path, papers: dict[str, Paper], failures: dict[tuple[str, str, str], str]) -> None:
    text = ["# Results\n", "Written by `run_all.py` from the runs in this folder; a call that runs more adds to it."]
    text.append("Run, commit, hardware and date of every row stand in [`tables/`](tables), as CSV.\n")
    for paper in papers.values():
        table = root / "tables" / f"{paper.key}.md"
        if table.is_file():
            text.append(table.read_text(encoding="utf-8", errors="replace").replace("(../figures/", "(figures/"))
        elif paper.methods:
            missing = not_run(pd.DataFrame(), paper.methods, failures)
            text += [f"## {paper.title}\n", "Not run here.\n", tables.markdown(tables.present_missing(missing))]
    covered = {method for paper in papers.values() for method in paper.methods}
    other = not_run(pd.DataFrame(), {row.method for row in published.rows()} - covered, failures)
    if len(other):
        text += ["## Published rows without a notebook\n", tables.markdown(tables.present_missing(other))]
    write_text(root / "README.md", "\n".join(text))
