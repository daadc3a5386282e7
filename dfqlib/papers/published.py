"""Published accuracies, from ``published.csv``: one row each, with its source."""

import csv
import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dfqlib.bits import BitWidths

SETTING = ("method", "dataset", "model", "weight_bits", "activation_bits")
KEYS = [*SETTING, "scheme"]  # what a published row and a measured one share where they are the same experiment
Failures = dict[tuple[str, str, str], str]  # (method, data set, model) of published rows -> why they were not run


@dataclass(frozen=True)
class Published:
    """One published result: accuracies in percent, ``None`` where a setting was published without them.

    ``std`` is over the authors' seeds, ``rerun`` a top-1 that they got again; ``source`` and ``address`` say where.
    """

    method: str
    dataset: str
    model: str
    weight_bits: int
    activation_bits: int
    top1: float | None
    fp32_top1: float | None
    scheme: str
    source: str
    std: float | None
    rerun: float | None
    top5: float | None
    fp32_top5: float | None
    address: str
    note: str

    @property
    def drop(self) -> float | None:
        """Points below the same source's full-precision top-1; ``None`` where one of the two was not published."""
        return None if self.top1 is None or self.fp32_top1 is None else self.fp32_top1 - self.top1

    @property
    def bits(self) -> str:
        """The bit widths as papers name them, e.g. ``"W4A8"``."""
        return str(BitWidths(self.weight_bits, self.activation_bits))

    @property
    def told(self) -> str:
        """The value with what its source says of it, such as ``63.58 ± 0.23 (GDFQ official README)``."""
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        again = "" if self.rerun is None else f", rerun {self.rerun:.2f}"
        return "not told" if self.top1 is None else f"{self.top1:.2f}{spread}{again} ({self.source})"


@functools.cache
def rows() -> tuple[Published, ...]:
    """Every published row, in the order of the file."""
    text = resources.files("dfqlib.papers").joinpath("published.csv").read_text(encoding="utf-8")
    widths, accuracies = ("weight_bits", "activation_bits"), ("top1", "fp32_top1", "std", "rerun", "top5", "fp32_top5")
    lines = []
    for line in csv.DictReader(text.splitlines()):
        values: dict[str, Any] = dict(line)
        values |= {name: int(line[name]) for name in widths}
        values |= {name: float(line[name]) if line[name] else None for name in accuracies}
        lines.append(Published(**values))
    return tuple(lines)


def find(*setting: str | int, scheme: str = "") -> list[Published]:
    """The rows of a ``SETTING``; several where sources disagree, an empty ``scheme`` admits both."""
    found = (row for row in rows() if tuple(getattr(row, name) for name in SETTING) == setting)
    return [row for row in found if scheme in ("", row.scheme)]


def smallest_drops() -> dict[tuple[Any, ...], float]:
    """Of each setting, as its ``KEYS``, the smallest drop that a paper prints."""
    found: dict[tuple[Any, ...], float] = {}
    for row in rows():
        if row.drop is not None:
            setting = tuple(getattr(row, key) for key in KEYS)
            found[setting] = min(row.drop, found.get(setting, row.drop))
    return found


def teacher_top1(dataset: str, model: str) -> float | None:
    """Published full-precision top-1 of a teacher, the highest where papers disagree; ``None`` if no paper tells it."""
    values = [row.fp32_top1 for row in rows() if (row.dataset, row.model) == (dataset, model) and row.fp32_top1]
    return max(values, default=None)


def models_of(dataset: str) -> list[str]:
    """The models that papers report on ``dataset``."""
    return list(dict.fromkeys(row.model for row in rows() if row.dataset == dataset))


def dataset_of(model: str) -> str:
    """The data set of a model that papers report, or of "torchvision/NAME" or "pytorchcv/NAME"; empty for any other."""
    other = "imagenet" if model.startswith(("torchvision/", "pytorchcv/")) else ""
    return next((row.dataset for row in rows() if row.model == model), other)
