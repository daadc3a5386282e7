"""Tables of results beside the published values, from tidy rows to what people read.

A row's setting is what was run: method, data set, model, bit widths, variant. Runs that differ only in the seed make
one line, with mean and standard deviation. Teachers differ, so the drop from the teacher is the fair measure.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pandas.api.typing import DataFrameGroupBy
from pandas.io.formats.style import Styler

from dfqlib.bits import bits_name
from dfqlib.papers import published

SETTING = [
    "paper",
    "method",
    "scheme",
    "dataset",
    "data",
    "model",
    "weight_bits",
    "activation_bits",
    "variant",
    "ranges",
]
#: Columns of text, aligned left; numbers are aligned right.
WORDS = {"method", "data", "model", "scheme", "bits", "variant", "ranges", "schedule", "source", "reason"}
NOTE = (
    "Top-1 in percent on the test images named under data, after the last iteration; best is the highest of all "
    "evaluations. Drop is the distance to the full-precision teacher of the same line, the fair measure where teachers "
    "differ. ± is the standard deviation over seeds."
)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per setting and schedule: mean and spread over seeds, with the published values beside them."""
    lines = []
    for setting, group in groups(rows):
        line = dict(zip([*SETTING, "profile", "schedule"], setting, strict=True))
        means = group[["top1", "top1_best", "fp32_top1", "seconds"]].astype(float).mean()
        line |= {"seeds": " ".join(f"{seed:.0f}" for seed in sorted(group["seed"].dropna().unique()))}
        line |= {"top1": means["top1"], "top1_std": group["top1"].std(), **means}
        line["drop"] = line["fp32_top1"] - line["top1"]
        lines.append(line | beside(line))
    return pd.DataFrame(lines)


def groups(rows: pd.DataFrame) -> DataFrameGroupBy:
    """The rows of each line: one setting under one schedule, all seeds."""
    return rows.groupby([*SETTING, "profile", "schedule"], sort=False, dropna=False)


def beside(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is published for a line: value, drop, source, and the difference of the line's top-1 from it.

    Empty for variants of a method and where nothing is published. The float network stands beside the papers' teacher.
    """
    value = drop = None
    source = ""
    if line["weight_bits"] == line["activation_bits"] == 32 and not line["variant"]:
        value = published.teacher_top1(line["dataset"], line["model"])
        source = "papers' teacher" if value else ""
    elif not line["variant"]:
        found = published.find(*(line[name] for name in published.SETTING), line["scheme"])
        if found and found[0].top1 is not None:
            # Where sources disagree, the method's own comes first; the others are named with the source.
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
    columns = {name: lines[name] for name in ("method", "data", "model")}
    columns |= {
        "scheme": lines["scheme"].str.upper() if several else "",
        "bits": list(map(bits_name, lines["weight_bits"], lines["activation_bits"])),
        "variant": lines["variant"],
        "ranges": lines["ranges"],
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
    """The text below a table: how to read it, and each schedule in full."""
    schedules = {} if rows.empty else dict.fromkeys(zip(rows["profile"], rows["schedule"], strict=True))
    described = [f"Schedule {profile}, {schedule}." for profile, schedule in schedules]
    return " ".join([NOTE, *unpublished(rows), *described])


def unpublished(rows: pd.DataFrame) -> list[str]:
    """A sentence if nothing is published for these methods on any of the data sets in ``rows``."""
    if rows.empty:
        return []
    methods, ours = dict.fromkeys(rows["method"]), set(rows["dataset"])
    theirs = dict.fromkeys(row.dataset for row in published.rows() if row.method in methods)
    if not theirs or ours & set(theirs):
        return []
    names = ", ".join(methods)
    return [f"No published value to compare with: {names} is published for {', '.join(theirs)} only."]


def number(value: float | None, spread: float | None = None, sign: str = "") -> str:
    """Two decimals, with the spread over seeds if there are several; empty for no value. ``sign="+"`` shows a plus."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:{sign}.2f}" if spread is None or pd.isna(spread) else f"{value:.2f} ± {spread:.2f}"


def styled(shown: pd.DataFrame, caption: str) -> Styler:
    """A table for a notebook: no index, cells aligned right, the caption below."""
    style = shown.style.hide(axis="index").set_caption(caption).set_uuid("results")
    return style.set_table_styles(
        [
            {"selector": "caption", "props": "caption-side: bottom; text-align: left; max-width: 60em"},
            {"selector": "td, th", "props": "text-align: right; white-space: nowrap"},
        ]
    )


def width(shown: pd.DataFrame) -> int:
    """Characters of a line of the table in a terminal, with two between columns."""
    return sum(max([len(name), *shown[name].astype(str).str.len()]) + 2 for name in shown)


def markdown(shown: pd.DataFrame) -> str:
    """A GitHub table; numbers aligned right."""
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
