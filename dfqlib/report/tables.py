"""Tables of results beside the published values: tidy rows are summarised over seeds and formatted as text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from pandas.api.typing import DataFrameGroupBy
from pandas.io.formats.style import Styler

from dfqlib.bits import bits_name
from dfqlib.papers import profiles, published
from dfqlib.scores import Score, paired_difference, unpack

SETTING = ["paper", "method", "scheme", "dataset", "data", "model"]
SETTING += ["weight_bits", "activation_bits", "calibration", "variant", "ranges"]
#: What the rows of one line of a table share: they differ in the seed alone.
LINE = [*SETTING, "profile", "schedule"]
#: Columns of text, aligned left; numbers are aligned right. One with the same text in every line goes to the caption.
WORDS = {"method", "data", "model", "scheme", "bits", "calibration", "variant", "ranges", "schedule", "seeds", "source"}
WORDS |= {"needs", "published", "rerun", "cell", "state", "note", "layer", "kind", "file"}
MAX_COLUMNS = 8
#: Left out first in a wide table.
LEAST_NEEDED = ("seeds", "top-5", "seconds", "model", "ranges", "over seeds", "schedule", "scheme")
NOTE = (
    "Top-1 in percent after the last iteration, ± its standard error on the test images. Drop: how far it is below the "
    "full-precision teacher on the same images, ± the standard error of this paired difference; the fair measure where "
    "teachers differ."
)
SEVERAL = "Over seeds: standard deviation of the top-1, and the number of seeds."
MEASURED = "Project: the top-1 in the project's results/, and what it differs by on the same images."


class Table(NamedTuple):
    """A table as people read it: text in up to ``MAX_COLUMNS`` columns, caption, the index of each line's rows."""

    shown: pd.DataFrame
    caption: str
    rows: list[list[Any]]


def parts(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows that stand in one table: those of a data set and profile."""
    for _, part in rows.groupby(["dataset", "profile"], sort=False, dropna=False) if len(rows) else ():
        yield part


def bits_of(rows: pd.DataFrame) -> "pd.Series[str]":
    """The bit widths of each row as text, such as ``W4A4``."""
    return pd.Series(map(bits_name, rows["weight_bits"], rows["activation_bits"]), rows.index, dtype=str)


def groups(rows: pd.DataFrame) -> DataFrameGroupBy:
    """The rows of each line: one setting under one schedule, all seeds."""
    return rows.groupby(LINE, sort=False, dropna=False)


def summarise(rows: pd.DataFrame, project: pd.DataFrame | None = None) -> pd.DataFrame:
    """One line per setting and schedule: means over seeds with their doubt, published values, and the project's.

    The standard error of a drop over several seeds is that of the test images, which all seeds share, and of the seeds.
    """
    numbers = ["top1", "top5", "top1_best", "fp32_top1", "standard_error", "drop_error", "seconds", "images"]
    rows = rows.reindex(columns=list(dict.fromkeys([*rows, *numbers, "correct"])))
    lines = []
    for setting, group in groups(rows):
        line = dict(zip(LINE, setting, strict=True))
        line["seeds"] = " ".join(f"{seed:.0f}" for seed in sorted(group["seed"].dropna().unique()))
        line |= group[numbers].astype(float).mean().to_dict() | {"top1_std": group["top1"].astype(float).std()}
        line["drop"] = line["fp32_top1"] - line["top1"]
        line["drop_error"] = _with_seeds(line["drop_error"], group["top1"].astype(float))
        line["rows"] = list(group.index)
        lines.append(line | beside(line) | _project(group, project))
    return pd.DataFrame(lines)


def beside(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is published for a line: value, drop, source, and the difference of the line's top-1 from it.

    Empty for variants of a method, for rehearsals and where nothing is published. The full-precision network is
    compared with the papers' teacher. Where sources disagree, the first in the file counts; all are named.
    """
    value, drop, source = None, None, ""
    profile = profiles.load()[0].get(line["profile"])
    if line["variant"] or (profile and profile.rehearsal):
        pass
    elif line["weight_bits"] == line["activation_bits"] == 32:
        value = published.teacher_top1(line["dataset"], line["model"])
        source = "papers' teacher" if value else ""
    elif found := published.find(*(line[name] for name in published.SETTING), scheme=line["scheme"]):
        value, drop, source = found[0].top1, found[0].drop, "; ".join(row.told for row in found)
    difference = None if value is None else line["top1"] - value
    return {"published": value, "published_drop": drop, "published_source": source, "difference": difference}


def _project(group: pd.DataFrame, project: pd.DataFrame | None) -> dict[str, str]:
    """The project's top-1 of a line's setting, and the paired difference from it, on the seeds that both have."""
    if project is None or project.empty:
        return {}
    keys = [*SETTING, "profile"]
    same = project[(project[keys] == group[keys].iloc[0]).all(axis=1)].reindex(columns=group.columns)
    both = group.merge(same, on="seed", suffixes=("", "_theirs")).dropna(subset=["top1", "top1_theirs"])
    if both.empty:
        return {"project": ""}
    points = both["top1"] - both["top1_theirs"]
    told = f"{both['top1_theirs'].mean():.2f} ({points.mean():+.2f}"
    if both[["correct", "correct_theirs"]].isna().any(axis=None) or (both["images"] != both["images_theirs"]).any():
        return {"project": f"{told})"}
    errors = []
    for row in both.itertuples():
        ours, theirs = (Score(unpack(text, row.images)) for text in (row.correct, row.correct_theirs))
        errors.append(paired_difference(ours, theirs).standard_error)
    return {"project": f"{told} ± {_with_seeds(sum(errors) / len(errors), points):.2f})"}


def _with_seeds(error: float, values: pd.Series) -> float:
    """The standard error of a mean over seeds: ``error``, of the test images they share, with that of the seeds."""
    return math.hypot(error, 0.0 if values.count() < 2 else values.std() / math.sqrt(values.count()))


def _over_seeds(top1: pd.Series) -> str:
    """Standard deviation and number of the top-1 of several seeds, and how many diverged; empty for one seed."""
    if len(top1) < 2:
        return ""
    spread = f"{top1.std():.2f} ({top1.count()})" if top1.count() > 1 else ""
    return ", ".join(filter(None, [spread, f"{top1.isna().sum()} diverged" if top1.hasnans else ""]))


def present(rows: pd.DataFrame, project: pd.DataFrame | None = None) -> Table:
    """Rows of one data set as a table to read; a comparison of sources with uses as a grid.

    ``project`` are the rows that the project measured, to stand beside those of this machine.
    """
    if rows.empty:
        return Table(pd.DataFrame(), NOTE, [])
    lines = summarise(rows, project)
    if (lines["variant"].str.contains(": ", regex=False) & (lines["method"] == "compare")).all():
        return _grid(lines)
    columns = {
        **lines[["method", "data", "model"]],
        "scheme": lines["scheme"].str.upper(),
        "bits": bits_of(lines),
        "calibration": lines["calibration"] if lines["calibration"].nunique() > 1 else "",
        **lines[["variant", "ranges"]],
        "top-1": [number(*each) or "diverged" for each in zip(lines["top1"], lines["standard_error"], strict=True)],
        "top-5": lines["top5"].map(number),
        "drop": [number(*each) for each in zip(lines["drop"], lines["drop_error"], strict=True)],
        "published drop": lines["published_drop"].map(number),
        "project": lines.get("project", ""),
        "over seeds": [_over_seeds(rows.loc[own, "top1"].astype(float)) for own in lines["rows"]],
        "seeds": lines["seeds"],
        "schedule": lines["schedule"].map(short),
        "seconds": lines["seconds"].map(lambda value: "" if pd.isna(value) else f"{value:.0f}"),
    }
    shown = pd.DataFrame({name: column for name, column in columns.items() if (pd.Series(column) != "").any()})
    same = [name for name in shown if name in WORDS and name != "bits" and shown[name].nunique() == 1]
    constants = shown[same].iloc[0].to_dict()
    shown = shown.drop(columns=same)
    for name in LEAST_NEEDED:
        if len(shown.columns) > MAX_COLUMNS:
            shown = shown.drop(columns=name, errors="ignore")
    return Table(shown, caption(lines, constants), list(lines["rows"]))


def _grid(lines: pd.DataFrame) -> Table:
    """Sources and calibrations by bits and use; each cell is the mean top-1 over seeds ± their standard deviation.

    Several sets of test images, or several models, stand below each other.
    """
    own = lines["variant"].str.partition(": ")
    spread = lines["top1_std"].map(lambda std: "" if pd.isna(std) else f" ± {std:.1f}")
    cells = lines["top1"].map("{:.1f}".format).replace("nan", "diverged") + spread
    lines = lines.assign(source=own[0], head=bits_of(lines) + " " + own[2], cell=cells)
    constants = {name: lines[name].iloc[0] for name in ("data", "model", "seeds") if lines[name].nunique() == 1}
    side = ["source", "calibration", *(name for name in ("data", "model") if name not in constants)]
    by_side = lines.groupby(side, sort=False)["rows"].sum()
    shown = lines.pivot(index=side, columns="head", values="cell")
    shown = shown.reindex(by_side.index, columns=lines["head"].unique()).fillna("").reset_index()
    told = "Top-1 in percent, mean ± standard deviation over seeds, of every source of images with every use of them."
    return Table(shown, f"{told} {_facts(lines, constants)}", list(by_side))


def caption(lines: pd.DataFrame, constants: Mapping[str, str]) -> str:
    """The text below a table: how to read it, what all lines share, where published values are from, the schedules."""
    sentences = [NOTE]
    sentences += [SEVERAL] if lines["top1_std"].notna().any() else []
    sentences += [MEASURED] if "project" in lines else []
    return " ".join([*sentences, _facts(lines, constants)])


def _facts(lines: pd.DataFrame, constants: Mapping[str, str]) -> str:
    teachers = ", ".join(f"{top1:.2f} %" for top1 in lines["fp32_top1"].dropna().unique())
    alike = "; ".join(f"{name} {value}" for name, value in constants.items() if name != "schedule")
    sentences = [f"All lines: {alike}." if alike else "", f"Teacher: {teachers}." if teachers else ""]
    methods, of_published = dict.fromkeys(lines["method"]), lines[lines["published_source"] != ""]
    theirs = dict.fromkeys(row.dataset for row in published.rows() if row.method in methods)
    if theirs and not set(lines["dataset"]) & set(theirs):
        told = f"{', '.join(methods)} is published for {', '.join(theirs)} only"
        sentences.append(f"No published value to compare with: {told}.")
    if len(of_published):
        told = of_published["method"] + " " + bits_of(of_published) + " " + of_published["published_source"]
        sentences.append(f"Published: {'; '.join(told.unique())}.")
    schedules = dict.fromkeys(zip(lines["profile"], lines["schedule"], strict=True))
    sentences += [f"Schedule {profile}, {schedule}." for profile, schedule in schedules]
    return " ".join(filter(None, sentences))


def short(schedule: str) -> str:
    """``"reduced, retuned"``: how a schedule departs; the caption says how far."""
    return re.sub(r" \([\d.e+-]+ % [^)]*\)", "", schedule.partition(":")[0])


def number(value: float | None, error: float | None = None) -> str:
    """Two decimals, with the standard error if there is one; empty for no value."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:.2f}" if error is None or pd.isna(error) else f"{value:.2f} ± {error:.2f}"


def styled(table: Table) -> Styler:
    """A table for a notebook: no index, cells aligned right, the caption below."""
    below = {"selector": "caption", "props": "caption-side: bottom; text-align: left; max-width: 60em"}
    right = {"selector": "td, th", "props": "text-align: right; white-space: nowrap"}
    shown = table.shown.style.hide(axis="index").set_caption(table.caption)
    return shown.set_uuid("results").set_table_styles([below, right])


def width(shown: pd.DataFrame) -> int:
    """Characters of a line of the table in a terminal, with two between columns."""
    return sum(max([len(name), *shown[name].astype(str).str.len()]) + 2 for name in shown)


def markdown(shown: pd.DataFrame) -> str:
    """A GitHub table, numbers aligned right; empty for an empty table."""
    if shown.empty:
        return ""
    rule = ["---" if name in WORDS else "---:" for name in shown.columns]
    cells = [list(shown.columns), rule, *(shown.astype(str).values.tolist())]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells) + "\n"
