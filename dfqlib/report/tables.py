"""Tables of results beside the published values: tidy rows are summarised over seeds and formatted as text."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pandas.api.typing import DataFrameGroupBy
from pandas.io.formats.style import Styler

from dfqlib.bits import bits_name
from dfqlib.papers import published

SETTING = ["paper", "method", "scheme", "dataset", "data", "model"]
SETTING += ["weight_bits", "activation_bits", "variant", "ranges"]
#: What the rows of one line of a table share: they differ in the seed alone.
LINE = [*SETTING, "profile", "schedule"]
#: Columns of text, aligned left; numbers are aligned right.
WORDS = {"method", "data", "model", "scheme", "bits", "variant", "ranges", "schedule", "source", "reason"}
NOTE = (
    "Top-1 in percent on the test images named under data, after the last iteration; best is the highest of all "
    "evaluations. Drop is the distance to the full-precision teacher of the same line, the fair measure where teachers "
    "differ. ± is the standard deviation over seeds."
)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per setting and schedule: mean and standard deviation over seeds, with the published values."""
    lines = []
    for setting, group in groups(rows):
        line = dict(zip(LINE, setting, strict=True))
        line["seeds"] = " ".join(f"{seed:.0f}" for seed in sorted(group["seed"].dropna().unique()))
        means = group[["top1", "top1_best", "fp32_top1", "seconds"]].astype(float).mean()
        line |= {"top1": means["top1"], "top1_std": group["top1"].std(), **means}
        line["drop"] = line["fp32_top1"] - line["top1"]
        lines.append(line | beside(line))
    return pd.DataFrame(lines)


def groups(rows: pd.DataFrame) -> DataFrameGroupBy:
    """The rows of each line: one setting under one schedule, all seeds."""
    return rows.groupby(LINE, sort=False, dropna=False)


def beside(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is published for a line: value, drop, source, and the difference of the line's top-1 from it.

    Empty for variants of a method and where nothing is published. The full-precision network is compared with the
    papers' teacher. Where sources disagree, the first in the file counts; the others are named with the source.
    """
    value, drop, source = None, None, ""
    if line["weight_bits"] == line["activation_bits"] == 32 and not line["variant"]:
        value = published.teacher_top1(line["dataset"], line["model"])
        source = "papers' teacher" if value else ""
    elif not line["variant"]:
        found = published.find(*(line[name] for name in published.SETTING), scheme=line["scheme"])
        if found and found[0].top1 is not None:
            value, teacher = found[0].top1, found[0].fp32_top1
            drop = teacher - value if teacher else None
            source = "; ".join([found[0].source, *(f"{row.top1:.2f} in {row.source}" for row in found[1:])])
    difference = None if value is None else line["top1"] - value
    return {"published": value, "published_drop": drop, "published_source": source, "difference": difference}


def present(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarised rows as the text that people read; columns without content are left out.

    What is compared comes first, since a narrow page cuts off the last columns.
    """
    if rows.empty:
        return pd.DataFrame()
    lines = summarise(rows)
    several = lines["scheme"].nunique() > 1
    short = lines["schedule"].str.partition(":")[0]  # "reduced"; the caption says what was reduced
    columns = {
        **lines[["method", "data", "model"]],
        "scheme": lines["scheme"].str.upper() if several else "",
        "bits": list(map(bits_name, lines["weight_bits"], lines["activation_bits"])),
        **lines[["variant", "ranges"]],
        "top-1": list(map(number, lines["top1"], lines["top1_std"])),
        "published": lines["published"].map(number),
        "difference": lines["difference"].map(lambda value: number(value, sign="+")),
        "drop": lines["drop"].map(number),
        "published drop": lines["published_drop"].map(number),
        "teacher": lines["fp32_top1"].map(number),
        "best": lines["top1_best"].map(number),
        "seeds": lines["seeds"],
        "schedule": (lines["profile"] + ": " + short).str.removeprefix(": "),
        "seconds": lines["seconds"].map(lambda value: "" if pd.isna(value) else f"{value:.0f}"),
    }
    return pd.DataFrame({name: column for name, column in columns.items() if (pd.Series(column) != "").any()})


def caption(rows: pd.DataFrame) -> str:
    """The text below a table: how to read it, what no paper reports, and each schedule in full."""
    if rows.empty:
        return NOTE
    sentences, methods = [NOTE], dict.fromkeys(rows["method"])
    theirs = dict.fromkeys(row.dataset for row in published.rows() if row.method in methods)
    if theirs and not set(rows["dataset"]) & set(theirs):
        names = ", ".join(methods)
        sentences.append(f"No published value to compare with: {names} is published for {', '.join(theirs)} only.")
    schedules = dict.fromkeys(zip(rows["profile"], rows["schedule"], strict=True))
    return " ".join([*sentences, *(f"Schedule {profile}, {schedule}." for profile, schedule in schedules)])


def number(value: float | None, spread: float | None = None, sign: str = "") -> str:
    """Two decimals, with the spread over seeds if there are several; empty for no value. ``sign="+"`` shows a plus."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:{sign}.2f}" if spread is None or pd.isna(spread) else f"{value:.2f} ± {spread:.2f}"


def styled(shown: pd.DataFrame, caption: str) -> Styler:
    """A table for a notebook: no index, cells aligned right, the caption below."""
    below = {"selector": "caption", "props": "caption-side: bottom; text-align: left; max-width: 60em"}
    right = {"selector": "td, th", "props": "text-align: right; white-space: nowrap"}
    return shown.style.hide(axis="index").set_caption(caption).set_uuid("results").set_table_styles([below, right])


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


def present_missing(missing: pd.DataFrame) -> pd.DataFrame:
    """Published rows that were not run, as the text that people read."""
    if missing.empty:
        return pd.DataFrame()
    widths = map(bits_name, missing["weight_bits"], missing["activation_bits"])
    shown = missing.rename(columns={"dataset": "data", "published_source": "source"})
    shown = shown.assign(bits=list(widths), published=shown["published"].map(number))
    return shown[["method", "data", "model", "bits", "scheme", "published", "source", "reason"]]
