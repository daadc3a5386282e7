"""Which notebook runs a call of ``run_all.py`` requests, and what each run depends on; without importing torch.

A finished run is recognised by its identity, see :mod:`dfqlib.runner.identity`.
"""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError, check_choice
from dfqlib.papers import published
from dfqlib.papers.profiles import Paper, Profile, load
from dfqlib.places import GIVEN_WEIGHTS, PACKAGE, PATH_PARAMETERS, data_folder, expand
from dfqlib.runner.identity import code_identity, data_identity, digest, teacher_identity, torch_version
from dfqlib.speed.switches import off_from_start

#: Parameters that have an option of their own.
OPTIONS = {"profile": "profile", "dataset": "datasets", "model": "models", "bits": "bits", "seed": "seeds"}
OPTIONS |= {"out": "results"}


@dataclass(frozen=True)
class Selection:
    """What a call asks for; an empty list leaves the choice to the profile. ``settings`` are texts, as typed."""

    profile: str = "quick"
    papers: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    bits: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One execution of one notebook; ``parameters`` are all of its parameters but ``out``."""

    paper: Paper
    profile: str
    parameters: dict[str, Any]
    depends: dict[str, str]  # what the identity is made of: code, teacher, data, torch, accelerations turned off

    @property
    def name(self) -> str:
        """For messages, such as ``gdfq cifar10 resnet20_cifar10 W4A4 W3A3 seed 0``, without what the notebook lacks."""
        p = self.parameters
        seed = f"seed {p['seed']}" if "seed" in p else ""
        return " ".join(filter(None, [self.paper.key, p.get("dataset"), p.get("model"), *p.get("bits", []), seed]))

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """Profile, paper, data set and model: runs that share them take about the same time."""
        p = self.parameters
        return self.profile, self.paper.key, p.get("dataset", ""), p.get("model", "")

    @functools.cached_property
    def identity(self) -> str:
        """Hash of everything that the run depends on."""
        return digest(json.dumps([self.paper.key, self.parameters, self.depends], sort_keys=True))

    @property
    def id(self) -> str:
        """The run's folder name, e.g. ``cifar10-resnet20_cifar10-s0-1f0c9a2b``."""
        p = self.parameters
        parts = [p.get("dataset"), p.get("model"), f"s{p['seed']}" if "seed" in p else "", self.identity[:8]]
        return "-".join(part.replace("/", "_") for part in parts if part)

    def folder(self, results: Path) -> Path:
        """Where the finished run is stored."""
        return results / self.profile / self.paper.key / self.id


def plan(selection: Selection) -> list[PlannedRun]:
    """The runs of ``selection``, in order; a :class:`UserError` for anything in it that does not exist."""
    profiles, papers = load()
    profile = profiles[check_choice("profile", selection.profile, profiles)]
    for key in selection.papers:
        check_choice("papers", key, papers)
    for dataset in selection.datasets:
        if "data_folder" not in selection.settings and not data_folder(dataset, {}):
            check_choice("datasets", dataset, dict.fromkeys(row.dataset for row in published.rows()))
    for model in selection.models:
        if not published.dataset_of(model):
            check_choice("models", model, dict.fromkeys(row.model for row in published.rows()))
    widths = [str(BitWidths.parse(text)) for text in selection.bits or profile.bits]
    chosen = [papers[key] for key in selection.papers or papers]
    settings = check_settings(selection.settings, chosen)

    runs: dict[str, PlannedRun] = {}
    torch = torch_version()
    teacher, data = functools.cache(teacher_identity), functools.cache(data_identity)  # files are hashed once a call
    for paper in chosen:
        code, declared = code_identity(paper.notebook), paper.parameters
        rows = [row for row in published.rows() if row.method in paper.methods and not profile.datasets]
        for dataset, model in pairs_of(paper, profile, selection):
            values = paper.values(profile.name, dataset, model)
            reported = [row.bits for row in rows if (row.dataset, row.model) == (dataset, model)]
            # A notebook without published rows runs the bit widths of its parameters cell.
            bits = widths or list(dict.fromkeys(reported)) or values.get("bits")
            values |= {"profile": profile.name, "dataset": dataset, "model": model, "bits": bits}
            values |= profile.values | settings[paper.key]
            for seed in selection.seeds:
                parameters = declared.of(values | {"seed": seed}).values()
                parameters.pop("out", None)
                if parameters.get("precision") == "auto":
                    parameters["precision"] = precision_here(parameters["device"])
                # A notebook that quantizes nothing trains teachers.
                training = not paper.methods or bool(parameters.get("training_images"))
                depends = {
                    "code": code,
                    "teacher": teacher(parameters.get("model", ""), parameters.get("weights", "")),
                    "data": data(parameters.get("dataset", ""), data_folder(dataset, parameters), training),
                    "torch": torch,
                }
                for name in filter(parameters.get, GIVEN_WEIGHTS):
                    if not Path(parameters[name]).is_file():
                        raise UserError(f"--set {name}={parameters[name]} is not a file.")
                    depends[name] = teacher(parameters["model"], parameters[name])
                if off := ",".join(sorted(off_from_start())):  # rounding differs, so it is another run
                    depends["without"] = off
                run = PlannedRun(paper, profile.name, parameters, depends)
                runs[run.identity] = run
    if not runs:
        keys = ", ".join(paper.key for paper in chosen)
        raise UserError(f"the options leave nothing to run: {keys} has none of these data sets and models.")
    for parameter, use in (("data_folder", "dataset"), ("weights", "model")):  # one file or folder serves one of them
        several = sorted({run.parameters.get(use, "") for run in runs.values()} - {""})
        if selection.settings.get(parameter) and len(several) > 1:
            names = ", ".join(several)
            raise UserError(f"--set {parameter} would serve {names}; choose one with --datasets and --models.")
    return list(runs.values())


@functools.cache
def precision_here(device: str) -> str:
    """What the precision ``auto`` is on ``device``, asked of torch in another process; float32 if it is not here."""
    call = [sys.executable, "-m", "dfqlib.speed.precision", device]
    return subprocess.run(call, cwd=PACKAGE.parent, capture_output=True, text=True).stdout.strip() or "float32"


def pairs_of(paper: Paper, profile: Profile, selection: Selection) -> list[tuple[str, str]]:
    """(data set, model) of each run of ``paper``: those requested, else the profile's, else every published pair."""
    if "dataset" not in paper.parameters.kinds():
        return [("", "")]
    rows = [row for row in published.rows() if row.method in paper.methods]
    implied = [published.dataset_of(model) for model in selection.models]
    every = paper.datasets or [row.dataset for row in rows]
    pairs = []
    for dataset in dict.fromkeys(selection.datasets or implied or profile.datasets or every):
        if paper.datasets and dataset not in paper.datasets:
            continue
        models = published.models_of(dataset)
        if not models and not selection.models:
            raise UserError(f"datasets={dataset!r} is no data set of the papers; name its model with --models.")
        asked = [model for model in selection.models if published.dataset_of(model) == dataset or not models]
        if selection.datasets and selection.models and not asked:
            given = " ".join(selection.models)
            raise UserError(f"models={given!r} has none for {dataset}; allowed: {', '.join(models)}.")
        # A profile without data sets means every published row, hence each of its models.
        reported = [row.model for row in rows if row.dataset == dataset and not profile.datasets]
        pairs += [(dataset, model) for model in dict.fromkeys(asked or reported or models[:1])]
    return pairs


def check_settings(texts: dict[str, str], papers: list[Paper]) -> dict[str, dict[str, Any]]:
    """The values of ``--set`` by paper, for those parameters that it has; UserError for unknown names."""
    values: dict[str, dict[str, Any]] = {paper.key: {} for paper in papers}
    known = dict.fromkeys(name for paper in papers for name in paper.parameters.kinds() if name not in OPTIONS)
    for name, text in texts.items():
        if name in OPTIONS:
            raise UserError(f"--set {name}={text} has an option of its own: use --{OPTIONS[name]}.")
        check_choice("--set", name, known)
        if name in PATH_PARAMETERS and text:
            text = str(expand(text).resolve())
        for paper in papers:
            if name in paper.parameters.kinds():
                values[paper.key][name] = paper.parameters.parse(name, text)
    return values
