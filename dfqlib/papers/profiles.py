"""What each notebook runs with, from ``profiles.toml``: smoke (tests), quick (2 CPU cores), fast, paper (as published).

``$DFQ_PROFILES`` names another table of the same form, with its notebooks beside it, to run notebooks of your own.
"""

import functools
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError, check_choice
from dfqlib.papers.notebook_source import notebook_parameters
from dfqlib.papers.parameters import CORRECTIONS, NOTEBOOKS, RUN_PARAMETERS, declared_by
from dfqlib.settings import Settings


@dataclass(frozen=True)
class Profile:
    """What a call runs by default: ``datasets``, or every published row if empty; ``bits``, or the notebook's own.

    ``values`` are those of all notebooks.
    """

    name: str
    about: str
    datasets: list[str] = field(default_factory=list)
    bits: list[str] = field(default_factory=list)
    rehearsal: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    def overview_folder(self, results: Path) -> Path:
        """Where tables and pages go: a rehearsal's stay out of the others, in a folder of its own."""
        return results / self.name if self.rehearsal else results


@dataclass(frozen=True)
class Paper:
    """One notebook and what it reproduces."""

    key: str
    notebook: Path
    title: str
    methods: dict[str, str]  # rows of published.csv that it runs, and how each method is written
    scheme: str  # "ptq" or "qat", "" where the notebook quantizes nothing
    tables: dict[str, dict[str, Any]]  # per profile, as in the file
    declared: type[Settings] | None = None  # its parameters, where it is a notebook of the kit
    datasets: list[str] = field(default_factory=list)  # the only ones that it can run; empty for any
    minutes: float = 1.0  # roughly, under quick on 2 cores: a batch begins with the longest

    @property
    def parameters(self) -> type[Settings]:
        """Types, limits and published values of all parameters."""
        return self.declared or declared_by(notebook_parameters(self.notebook))

    def values(self, profile: str, dataset: str = "", model: str = "") -> dict[str, Any]:
        """All parameters under ``profile``; values for the data set, then those for the model, override it."""
        base = self.parameters().values() | ({} if profile == "paper" else notebook_parameters(self.notebook))
        table = self.tables.get(profile, {})
        inner = {name: value for name, value in table.items() if isinstance(value, dict)}
        own = {name: value for name, value in table.items() if name not in inner}
        return base | own | inner.get(dataset, {}) | inner.get(model, {})


CORRECTED = (
    "{corrected_iterations} iterations of {corrected_batch} of {corrected_images} images at {corrected_lr}, "
    "images refined for {corrected_refinement}"
)
MIXED = ", and in {corrected_mixed} further set(s) for mixed labels"
BEGUN = ", begun from those of a generator of {corrected_generator} iterations"


def load() -> tuple[dict[str, Profile], dict[str, Paper]]:
    """Profiles and papers by name, from ``$DFQ_PROFILES`` or else from the package."""
    return _read(os.environ.get("DFQ_PROFILES", ""))


@functools.cache
def _read(table: str) -> tuple[dict[str, Profile], dict[str, Paper]]:
    path = Path(table or Path(__file__).with_name("profiles.toml")).resolve()
    notebooks = path.parent if table else path.parents[2] / "notebooks"
    papers = {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        profiles = {name: Profile(name, **values) for name, values in content.pop("profiles").items()}
        for key, values in content.items():
            tables = {name: dict(values.pop(name)) for name in profiles if name in values}
            values["methods"] = {name.lower(): name for name in values["methods"]}
            declared = None if table else NOTEBOOKS[key]
            papers[key] = Paper(key, notebooks / values.pop("notebook"), **values, tables=tables, declared=declared)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"DFQ_PROFILES={table!r} cannot be read ({type(error).__name__}: {error}).") from None
    return profiles, papers


def paper(key: str) -> Paper:
    """The paper ``key``; an unknown key is a UserError that names the known ones."""
    papers = load()[1]
    return papers[check_choice("paper", key, papers)]


def paper_of(method: str) -> Paper | None:
    """The notebook that runs the published rows of ``method``."""
    return next((paper for paper in load()[1].values() if method in paper.methods), None)


def describe_schedule(key: str, parameters: dict[str, Any]) -> str:
    """``"as published"``, or how the schedule departs from the published one, and each parameter that does.

    ``"reduced (0.1 % of the published images seen)"`` where whole numbers differ, such as iterations; ``"retuned"``
    where others do, such as rates and weights. Lists say which experiments are made. ``"in bfloat16"``: not in float32.
    """
    published = paper(key).values("paper", parameters.get("dataset", ""), parameters.get("model", ""))
    compared = [name for name in published if name in parameters and name not in (*RUN_PARAMETERS, *CORRECTIONS)]
    differing = [name for name in compared if parameters[name] != published[name]]
    kinds = [type(published[name]) for name in differing]
    how = ["reduced"] * (int in kinds) + ["retuned"] * any(kind in (float, bool, str) for kind in kinds)
    seen = [images_seen(values) for values in (parameters, published)]
    if "reduced" in how and all(seen):
        share = 100 * seen[0] / seen[1]
        how[0] = f"reduced ({share:{'.2g' if share < 10 else '.0f'}} % of the published images seen)"
    told = [f"{name} {parameters[name]} (published {published[name]})" for name in differing]
    if parameters.get("corrected_iterations") and parameters["corrected_bits"]:
        corrected = CORRECTED + MIXED * bool(parameters.get("corrected_mixed"))
        corrected += BEGUN * bool(parameters.get("corrected_generator"))
        told.append(f"corrected students {corrected.format(**parameters)}")
    how = how or (["fewer experiments"] if differing else ["as published"])
    if (precision := parameters.get("precision", "float32")) != "float32":
        how.append(f"in {precision}")
    return ", ".join(how) + (f": {', '.join(told)}" if differing else "")


def images_seen(values: dict[str, Any]) -> int:
    """Images that a fine-tuning sees, or steps of all images of a synthesis; 0 without either."""
    pairs = ("iterations", "batch"), ("tuning_iterations", "batch"), ("synthesis_iterations", "images")
    return next((values[one] * values[other] for one, other in pairs if one in values and other in values), 0)
