"""What each notebook runs with, from ``profiles.toml``: smoke (tests), quick (2 CPU cores), paper (as published)."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from dfqlib.errors import check_choice

#: Parameters of a notebook that say what is run and where. All others are the method's schedule.
COMMON = ("profile", "dataset", "model", "bits", "seed", "device", "out", "data_folder", "weights")


@dataclass(frozen=True)
class Profile:
    """How far a call goes: its data sets by default, and the bit widths where they differ from the notebook's own."""

    name: str
    about: str
    datasets: list[str]
    bits: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Paper:
    """One notebook and what it reproduces."""

    key: str
    notebook: str
    title: str
    methods: list[str]  # rows of published.csv that it runs
    scheme: str  # "ptq" or "qat", "" where the notebook quantizes nothing
    settings: dict[str, dict[str, Any]]  # per profile, as in the file

    def parameters(self, profile: str, dataset: str = "", model: str = "") -> dict[str, Any]:
        """Notebook parameters under ``profile``; those for the data set, then those for the model, are laid over it."""
        table = self.settings.get(profile, {})
        values = {name: value for name, value in table.items() if not isinstance(value, dict)}
        return values | table.get(dataset, {}) | table.get(model, {})


def packaged_table() -> Path:
    """The table of profiles that comes with the package."""
    return Path(str(resources.files("dfqlib").joinpath("profiles.toml")))


@functools.cache
def load(table: Path | None = None) -> tuple[dict[str, Profile], dict[str, Paper]]:
    """Profiles and papers by name, from ``table`` or, without it, from the package."""
    content = tomllib.loads((table or packaged_table()).read_text(encoding="utf-8"))
    profiles = {name: Profile(name, **values) for name, values in content.pop("profiles").items()}
    papers = {}
    for key, values in content.items():
        settings = {name: values.pop(name) for name in profiles if name in values}
        papers[key] = Paper(key, **values, settings=settings)
    return profiles, papers


def paper(key: str) -> Paper:
    """The packaged paper ``key``; an unknown key is a UserError that names the known ones."""
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
