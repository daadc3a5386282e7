"""Tables of results: ours beside the published values, from tidy rows to what people read.

A row's setting is what was asked for (method, data set, model, bit widths, variant); runs that differ in the seed alone
are one line, their mean and spread. The drop from the teacher is the fair measure, since teachers differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from dfqlib.bits import bits_name
from dfqlib.papers import published

if TYPE_CHECKING:
    from pandas.api.typing import DataFrameGroupBy
    from pandas.io.formats.style import Styler
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
#: Columns of words, which begin at the left; numbers end at the right.
WORDS = {"method", "data", "model", "scheme", "bits", "variant", "ranges", "schedule"}
NOTE = (
    "Top-1 in percent on the test images named under data, after the last iteration; best is the highest of all "
    "evaluations. Drop is the distance to the full-precision teacher of the same line, the fair measure where teachers "
    "differ. ± is the standard deviation over seeds."
)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per setting and schedule: mean and spread over seeds, with the published values beside them."""
    lines = []
    for _, group in groups(rows):
        first = group.iloc[0]
        line = {name: first[name] for name in [*SETTING, "profile", "schedule"]}
        line |= {
            "seeds": " ".join(str(seed) for seed in sorted(group["seed"].dropna().unique())),
            "top1": group["top1"].mean(),
            "top1_std": group["top1"].std(),
            "top1_best": group["top1_best"].mean(),
            "fp32_top1": group["fp32_top1"].astype(float).mean(),
            "seconds": group["seconds"].astype(float).mean(),
        }
        line["drop"] = line["fp32_top1"] - line["top1"]
        lines.append(line | beside(first))
    return pd.DataFrame(lines)


def groups(rows: pd.DataFrame) -> DataFrameGroupBy:
    """The rows of each line: one setting under one schedule, all seeds."""
    return rows.groupby([*SETTING, "profile", "schedule"], sort=False, dropna=False)


def beside(row: pd.Series | dict[str, Any]) -> dict[str, Any]:
    """Published value, drop and source for a row of the method as published; empty for variants and new settings."""
    if row["variant"]:
        return {"published": None, "published_drop": None, "published_source": ""}
    if row["weight_bits"] == row["activation_bits"] == 32:
        value = published.teacher_top1(row["dataset"], row["model"])
        return {"published": value, "published_drop": None, "published_source": "papers' teacher" if value else ""}
    found = published.find(
        *(row[name] for name in ("method", "dataset", "model", "weight_bits", "activation_bits", "scheme"))
    )
    if not found or found[0].top1 is None:
        return {"published": None, "published_drop": None, "published_source": ""}
    # Where sources disagree the method's own comes first in the file; the others stay visible in its source.
    others = [f"{row.top1:.2f} in {row.source}" for row in found[1:]]
    return {
        "published": found[0].top1,
        "published_drop": found[0].fp32_top1 - found[0].top1 if found[0].fp32_top1 else None,
        "published_source": "; ".join([found[0].source, *others]),
    }


def present(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarised rows as the strings that people read, without the columns in which nothing differs or nothing is.

    What is compared comes first: a page narrower than the table hides its last columns.
    """
    if rows.empty:
        return pd.DataFrame()
    lines = summarise(rows)
    shown = pd.DataFrame(
        {
            "method": lines["method"],
            "data": lines["data"],
            "model": lines["model"],
            "scheme": lines["scheme"].str.upper() if lines["scheme"].nunique() > 1 else "",
            "bits": [bits_name(w, a) for w, a in zip(lines["weight_bits"], lines["activation_bits"], strict=True)],
            "variant": lines["variant"],
            "ranges": lines["ranges"],
            "top-1": [number(v, s) for v, s in zip(lines["top1"], lines["top1_std"], strict=True)],
            "published": lines["published"].map(number),
            "difference": (lines["top1"] - lines["published"].astype(float)).map(signed),
            "drop": lines["drop"].map(number),
            "published drop": lines["published_drop"].map(number),
            "teacher": lines["fp32_top1"].map(number),
            "best": lines["top1_best"].map(number),
            "seeds": lines["seeds"],
            "schedule": [
                f"{p}: {s}" if p else s for p, s in zip(lines["profile"], short(lines["schedule"]), strict=True)
            ],
            "seconds": lines["seconds"].map(lambda v: "" if pd.isna(v) else f"{v:.0f}"),
        }
    )
    return shown[[name for name in shown if (shown[name] != "").any()]]


def short(schedules: Iterable[str]) -> list[str]:
    """``"as published"`` or ``"reduced"`` for the schedule column; the caption says what was reduced."""
    return [schedule.partition(":")[0] for schedule in schedules]


def caption(rows: pd.DataFrame) -> str:
    """What stands under a table: how to read it, and each schedule in full where it is not the published one."""
    schedules = {} if rows.empty else dict.fromkeys(zip(rows["profile"], rows["schedule"], strict=True))
    told = [f"Schedule {profile}, {schedule}." for profile, schedule in schedules]
    return " ".join([NOTE, *unpublished(rows), *told])


def unpublished(rows: pd.DataFrame) -> list[str]:
    """A sentence where the paper has no number for any of the data sets in ``rows``, so that none can stand beside."""
    if rows.empty:
        return []
    methods, ours = dict.fromkeys(rows["method"]), set(rows["dataset"])
    theirs = dict.fromkeys(row.dataset for row in published.rows() if row.method in methods)
    if not theirs or ours & set(theirs):
        return []
    names = ", ".join(methods)
    return [f"No published value stands beside these rows: {names} is published for {', '.join(theirs)} only."]


def number(value: float | None, spread: float | None = None) -> str:
    """Two decimals, with the spread over seeds where there are several; empty for nothing."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:.2f}" if spread is None or pd.isna(spread) else f"{value:.2f} ± {spread:.2f}"


def signed(value: float) -> str:
    """Two decimals with their sign; empty for nothing."""
    return "" if pd.isna(value) else f"{value:+.2f}"


def styled(shown: pd.DataFrame, caption: str) -> Styler:
    """A table for a notebook: no index, numbers to the right, the caption below."""
    style = shown.style.hide(axis="index").set_caption(caption).set_uuid("results")
    return style.set_table_styles(
        [
            {"selector": "caption", "props": "caption-side: bottom; text-align: left; max-width: 60em"},
            {"selector": "td, th", "props": "text-align: right; white-space: nowrap"},
        ]
    )


def width(shown: pd.DataFrame) -> int:
    """Characters that a line of the table takes in a terminal, with two between columns."""
    return sum(max([len(name), *shown[name].astype(str).str.len()]) + 2 for name in shown)


def markdown(shown: pd.DataFrame) -> str:
    """A GitHub table; numbers to the right."""
    if shown.empty:
        return ""
    rule = ["---" if name in WORDS else "---:" for name in shown.columns]
    cells = [list(shown.columns), rule, *(shown.astype(str).values.tolist())]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells) + "\n"


def present_missing(missing: pd.DataFrame) -> pd.DataFrame:
    """Published rows that were not run, as the strings that people read."""
    if missing.empty:
        return pd.DataFrame()
    widths = zip(missing["weight_bits"], missing["activation_bits"], strict=True)
    return pd.DataFrame(
        {
            "method": missing["method"],
            "data": missing["dataset"],
            "model": missing["model"],
            "bits": [bits_name(w, a) for w, a in widths],
            "scheme": missing["scheme"],
            "published": missing["published"].map(number),
            "source": missing["published_source"],
            "reason": missing["reason"],
        }
    )
