"""What each notebook runs with, from ``profiles.toml``: smoke (tests), quick (2 CPU cores), paper (as published).

``$DFQ_PROFILES`` names another table of the same form, with its notebooks beside it, to run notebooks of your own.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError, check_choice, check_range

#: Parameters of a notebook that say what is run and where. All others are the method's schedule.
COMMON = ("profile", "dataset", "model", "bits", "seed", "device", "out", "data_folder", "weights")


@dataclass(frozen=True)
class Profile:
    """How far a call goes without further options: ``datasets``, or every published row where they are empty; and the
    bit widths where they are not the notebook's own."""

    name: str
    about: str
    datasets: list[str] = field(default_factory=list)
    bits: list[str] = field(default_factory=list)
    rehearsal: bool = False


@dataclass(frozen=True)
class Paper:
    """One notebook and what it reproduces."""

    key: str
    notebook: Path
    title: str
    methods: list[str]  # rows of published.csv that it runs
    scheme: str  # "ptq" or "qat", "" where the notebook quantizes nothing
    settings: dict[str, dict[str, Any]]  # per profile, as in the file
    datasets: list[str] = field(default_factory=list)  # the only ones that it can run; empty for any
    minutes: float = 1.0  # roughly, under quick on 2 cores: a batch begins with the longest

    def parameters(self, profile: str, dataset: str = "", model: str = "") -> dict[str, Any]:
        """Notebook parameters under ``profile``; those for the data set, then those for the model, are laid over it."""
        table = self.settings.get(profile, {})
        values = {name: value for name, value in table.items() if not isinstance(value, dict)}
        return values | table.get(dataset, {}) | table.get(model, {})


def load() -> tuple[dict[str, Profile], dict[str, Paper]]:
    """Profiles and papers by name, from ``$DFQ_PROFILES`` or else from the package."""
    return _read(os.environ.get("DFQ_PROFILES", ""))[:2]


def check_numbers(parameters: dict[str, Any]) -> None:
    """UserError for a number, alone or in a list, that is beyond the limits of its parameter, if it has some."""
    limits = _read(os.environ.get("DFQ_PROFILES", ""))[2]
    for name in parameters.keys() & limits.keys():
        low, high = limits[name]
        for value in _flat(parameters[name]):
            if isinstance(low, int) and not isinstance(value, int):
                raise UserError(f"{name}={value!r} is not a whole number; allowed: {low} to {high}.")
            check_range(name, value, low, high)


def _flat(value: Any) -> Iterator[Any]:
    """What a list holds, its lists taken apart; anything else by itself."""
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    else:
        yield value


@functools.cache
def _read(table: str) -> tuple[dict[str, Profile], dict[str, Paper], dict[str, list[float]]]:
    folder = Path(__file__).resolve().parent
    path = Path(table).resolve() if table else folder / "profiles.toml"
    notebooks = path.parent if table else folder.parents[1] / "notebooks"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"DFQ_PROFILES={table!r} cannot be read ({error}).") from None
    profiles = {name: Profile(name, **values) for name, values in content.pop("profiles").items()}
    papers, limits = {}, content.pop("limits", {})
    for key, values in content.items():
        settings = {name: values.pop(name) for name in profiles if name in values}
        notebook = notebooks / values.pop("notebook")
        papers[key] = Paper(key, notebook, **values, settings=settings)
    return profiles, papers, limits


def paper(key: str) -> Paper:
    """The paper ``key``; an unknown key is a UserError that names the known ones."""
    papers = load()[1]
    return papers[check_choice("paper", key, papers)]


def departures(key: str, parameters: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where a run departs from the published schedule: parameter -> (value of the run, published value)."""
    published = paper(key).parameters("paper", parameters.get("dataset", ""), parameters.get("model", ""))
    return {
        name: (parameters[name], value)
        for name, value in published.items()
        if name not in COMMON and name in parameters and parameters[name] != value
    }


def describe_schedule(key: str, parameters: dict[str, Any]) -> str:
    """``"as published"``, or ``"reduced: "`` and each parameter that differs with the published value."""
    differing = departures(key, parameters)
    if not differing:
        return "as published"
    return "reduced: " + ", ".join(f"{name} {ours} (published {paper})" for name, (ours, paper) in differing.items())
