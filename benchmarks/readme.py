"""What README.md and benchmarks/README.md show of the measured costs: ``python -m benchmarks.readme``."""

from pathlib import Path

import pandas as pd

from benchmarks.rows import markdown
from dfqlib.files import write_between

HERE = Path(__file__).parent


def ratio(value: float, unit: str = "") -> str:
    """``value`` with one decimal and its unit; that the machine was busy for NaN."""
    return "machine busy" if pd.isna(value) else f"{value:.1f} {unit}".strip()


def digits(value: float, form: str = "{:.3g}") -> str:
    """``value``, or a dash for NaN."""
    return "-" if pd.isna(value) else form.format(value)


def where(row: pd.Series) -> str:
    """The hardware and the version behind numbers."""
    return f"{row.hardware}, torch {row.torch}, commit {row.commit}, {row.date[:10]}."


def of_steps(steps: pd.DataFrame) -> str:
    """An iteration of every method in each precision."""
    precisions = list(dict.fromkeys(steps.precision))
    columns, rows = ["iteration, batch", "published beside each, s"], []
    columns += [each for name in precisions for each in (f"{name}, s", "times faster")] + ["floor / float32"]
    columns.append(f"MB published, {', '.join(precisions)}")
    for _, lines in steps.groupby("method", sort=False):
        first = lines.iloc[0]
        row = [f"{first.title}, {first.batch}", ", ".join(map(digits, lines.published_s))]
        for line in lines.itertuples():
            row += [digits(line.ours_s), ratio(line.times_faster)]
        row.append(digits(100 * first.share_of_floor, "{:.0f} %"))
        rows.append([*row, ", ".join(f"{megabytes:.0f}" for megabytes in (first.published_mb, *lines.ours_mb))])
    return f"{where(steps.iloc[0])}\n\n{markdown([columns, *rows], 1).rstrip()}"


def of_students(students: pd.DataFrame) -> str:
    """Milliseconds of a student for each of 32 images, on one thread."""
    names = {
        "float_ms": "float",
        "fake_ms": "fake-quantized",
        "low_bits_ms": "in int8 here",
        "batch_32_ms": "ONNX Runtime",
    }
    rows = [
        [row.bits, *("" if pd.isna(row[name]) else f"{row[name] / 32:.2f}" for name in names)]
        for _, row in students.iterrows()
    ]
    return f"{where(students.iloc[0])}\n\n{markdown([['ms per image', *names.values()], *rows], 1).rstrip()}"


def of_large_images(growth: pd.DataFrame) -> str:
    """Seconds and memory of an iteration at 224 pixels."""
    large = growth[growth.grows == "pixels"]
    columns = ["network", "method", "batch", "precision", "s", "MB"]
    rows = [
        [row.model, row.method, str(row.batch), row.precision, digits(row.ours_s), digits(row.ours_mb, "{:.0f}")]
        for row in large.itertuples()
    ]
    return f"{where(large.iloc[0])}\n\n{markdown([columns, *rows], 1).rstrip()}"


def show_steps(steps: pd.DataFrame) -> None:
    """Both pages show what ``steps.csv`` holds."""
    for path in (HERE.parent / "README.md", HERE / "README.md"):
        write_between(path, "steps", of_steps(steps) + "\n")


def show_students(students: pd.DataFrame) -> None:
    """README.md shows the milliseconds that ``deploy.csv`` holds."""
    write_between(HERE.parent / "README.md", "students", of_students(students) + "\n")


def show_growth(growth: pd.DataFrame) -> None:
    """benchmarks/README.md shows the iterations at 224 pixels of ``growth.csv``."""
    write_between(HERE / "README.md", "growth", of_large_images(growth) + "\n")


if __name__ == "__main__":
    show_steps(pd.read_csv(HERE / "results" / "steps.csv"))
    show_students(pd.read_csv(HERE / "results" / "deploy.csv"))
    show_growth(pd.read_csv(HERE / "results" / "growth.csv"))
