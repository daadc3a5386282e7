"""Which notebook runs a call of ``run_all.py`` means, and what each run depends on.

A run is found again by its identity: a hash of the code it runs (the notebook's cells and the modules they import,
without comments and docstrings), its parameters, the teacher's weights and the data set. Nothing here imports torch,
so that planning takes no time.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import heapq
import json
import os
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqlib import published
from dfqlib.acceleration import off_from_start
from dfqlib.errors import UserError, check_choice
from dfqlib.files import sha256
from dfqlib.profiles import Paper, Profile, check_numbers, load

PACKAGE = Path(__file__).resolve().parent
ASSETS = PACKAGE / "assets"
NOTEBOOK = "notebook.ipynb"
NOTEBOOK_PAGE = "notebook.html"
METRICS = "metrics.json"
#: Ends of the names of folders that hold what is left of a run, not its results.
ASIDE = (".unfinished", ".broken")
#: Modules that show results but do not make them: a change in them does not make a finished run another one.
SHOWING = {"dfqlib.progress", "dfqlib.profiles", "dfqlib.published", "dfqlib.tables"}
#: Parameters that have an option of their own.
OPTIONS = {
    "profile": "profile",
    "dataset": "datasets",
    "model": "models",
    "bits": "bits",
    "seed": "seeds",
    "out": "results",
}


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
    depends: dict[str, str]  # what the run's identity is made of: code, teacher, data, accelerations turned off

    @property
    def name(self) -> str:
        """What people read: ``gdfq cifar10 resnet20_cifar10 w4a4 w3a3 seed 0``, with what the notebook has of it."""
        p = self.parameters
        parts = [
            p.get("dataset"),
            p.get("model"),
            " ".join(p.get("bits", [])),
            f"seed {p['seed']}" if "seed" in p else "",
        ]
        return " ".join([self.paper.key, *(part for part in parts if part)])

    @property
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
        """Where the finished run lies."""
        return results / self.profile / self.paper.key / self.id


def complete(folder: Path) -> bool:
    """Whether a folder holds a finished run: one without a notebook, or with a broken metrics.json, is none."""
    return (folder / NOTEBOOK).is_file() and read_metrics(folder) is not None


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder measured; None if metrics.json is not there, or not whole."""
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and "run" in metrics else None


def broken_files(results: Path) -> Iterable[str]:
    """A sentence for each file of a results folder that was cut off in the middle: its name, and what becomes of it."""
    for path in sorted(results.glob(f"*/*/[!.]*/{METRICS}")):
        if path.parent.suffix not in ASIDE and read_metrics(path.parent) is None:
            yield (
                f"{path} is broken: its run counts as not finished; a call that asks for it runs it again and keeps "
                f"this folder as {path.parent.name}.broken."
            )
    for path in sorted([*results.glob("results.csv"), *results.glob("*/results.csv")]):
        if not path.read_bytes().endswith(b"\n"):
            yield f"{path} is broken: its whole lines are kept, and a copy of it as {path.name}.broken."


def expected_seconds(runs: Iterable[PlannedRun], results: Path) -> dict[str, float | None]:
    """How long each run will take, by its identity: what the latest ones of its kind in ``results`` took.

    A kind is a paper, profile, data set and model. Where none is recorded it is the profile table's guess, which is for
    quick; None for other profiles.
    """
    kinds: dict[tuple[Path, str], float | None] = {}
    expected = {}
    for run in runs:
        folder = run.folder(results)
        kind = folder.parent, run.id.rsplit("-", 2)[0]
        if kind not in kinds:
            guess = 60 * run.paper.minutes if run.profile == "quick" else None
            kinds[kind] = _recorded(*kind) or guess
        expected[run.identity] = kinds[kind]
    return expected


def _recorded(folder: Path, kind: str, latest: int = 3) -> float | None:
    """Median seconds of the latest complete runs in ``folder`` whose ids begin with ``kind``."""
    files = [file for file in folder.glob(f"{kind}-*/{METRICS}") if file.parent.suffix not in ASIDE]
    newest = sorted(files, key=lambda file: file.stat().st_mtime)[-latest:]
    read = [metrics for file in newest if (metrics := read_metrics(file.parent))]
    seconds = [metrics["run"]["seconds"] for metrics in read]
    return statistics.median(seconds) if seconds else None


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until the last of some runs ends, ``jobs`` at once, the longest first."""
    ends = [0.0] * jobs
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def plan(selection: Selection) -> list[PlannedRun]:
    """The runs that ``selection`` means, in order; a :class:`UserError` for anything in it that does not exist."""
    profiles, papers = load()
    profile = profiles[check_choice("profile", selection.profile, profiles)]
    for key in selection.papers:
        check_choice("papers", key, papers)
    known = dict.fromkeys(row.dataset for row in published.rows())
    for dataset in selection.datasets:
        if "data_folder" not in selection.settings and not data_folder(dataset, {}):
            check_choice("datasets", dataset, known)
    for model in selection.models:
        check_choice("models", model, dict.fromkeys(row.model for row in published.rows()))
    widths = [check_widths(text) for text in selection.bits] or profile.bits
    chosen = [papers[key] for key in selection.papers or papers]
    defaults = {paper.key: notebook_parameters(paper.notebook) for paper in chosen}
    settings = check_settings(selection.settings, defaults)
    check_numbers(settings)

    runs: dict[str, PlannedRun] = {}
    teacher, data = functools.cache(teacher_identity), functools.cache(data_identity)  # files are hashed once a call
    for paper in chosen:
        code, own = code_identity(paper.notebook), defaults[paper.key]
        for dataset, model in settings_of(paper, profile, selection, own):
            values = own | scheduled(paper, profile.name, dataset, model, own)
            # A notebook that no published row stands for runs the widths of its own table.
            bits = widths or ([] if profile.datasets else published_widths(paper, dataset, model)) or values.get("bits")
            values |= {"profile": profile.name, "dataset": dataset, "model": model, "bits": bits} | settings
            for seed in selection.seeds:
                parameters = {name: (values | {"seed": seed})[name] for name in own if name != "out"}
                depends = {
                    "code": code,
                    "teacher": teacher(parameters.get("model", ""), parameters.get("weights", "")),
                    "data": data(parameters.get("dataset", ""), data_folder(dataset, parameters)),
                }
                if off := ",".join(sorted(off_from_start())):  # rounding differs, so it is another run
                    depends["without"] = off
                run = PlannedRun(paper, profile.name, parameters, depends)
                runs[run.identity] = run
    if not runs:
        raise UserError(
            f"the options leave nothing to run: {', '.join(defaults)} has none of these data sets and models."
        )
    check_single("data_folder", settings, {run.parameters.get("dataset") for run in runs.values()})
    check_single("weights", settings, {run.parameters.get("model") for run in runs.values()})
    return list(runs.values())


def scheduled(paper: Paper, profile: str, dataset: str, model: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """The values that the profile gives; all of them must be parameters of the notebook."""
    values = paper.parameters(profile, dataset, model)
    for name in values:
        if name not in defaults:
            raise UserError(f"profiles: {paper.key}.{profile} sets {name!r}, which {paper.notebook.name} has not.")
    return values


def settings_of(
    paper: Paper, profile: Profile, selection: Selection, defaults: dict[str, Any]
) -> list[tuple[str, str]]:
    """(data set, model) of each run of ``paper``: those asked for, else the profile's, else all that are published."""
    if "dataset" not in defaults:
        return [("", "")]
    rows = [row for row in published.rows() if row.method in paper.methods]
    implied = [dataset for model in selection.models for dataset in published.datasets_of(model)]
    every = paper.datasets or [row.dataset for row in rows]
    pairs = []
    for dataset in dict.fromkeys(selection.datasets or implied or profile.datasets or every):
        if paper.datasets and dataset not in paper.datasets:
            continue
        models = published.models_of(dataset)
        if not models and not selection.models:
            # A data set of one's own says nothing about models: it needs to be told.
            raise UserError(f"datasets={dataset!r} is no data set of the papers; name its model with --models.")
        asked = [model for model in selection.models if model in models or not models]
        if selection.datasets and selection.models and not asked:
            raise UserError(
                f"models={' '.join(selection.models)!r} has none for {dataset}; allowed: {', '.join(models)}."
            )
        # A profile without data sets means the published rows, hence every model of theirs.
        reported = [row.model for row in rows if row.dataset == dataset and not profile.datasets]
        pairs += [(dataset, model) for model in dict.fromkeys(asked or reported or models[:1])]
    return pairs


def published_widths(paper: Paper, dataset: str, model: str) -> list[str]:
    """The bit widths that the paper reports for this model."""
    rows = published.rows()
    return list(
        dict.fromkeys(r.bits for r in rows if r.method in paper.methods and (r.dataset, r.model) == (dataset, model))
    )


def check_widths(text: str) -> str:
    """``text`` in lower case if it names weight and activation bits from 2 to 8, such as ``w4a8``."""
    if not re.fullmatch(r"w[2-8]a[2-8]", text.lower()):
        raise UserError(
            f"bits={text!r} is not supported; allowed: w<weights>a<activations> with 2 to 8 bits, such as w4a8."
        )
    return text.lower()


def check_settings(texts: dict[str, str], defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values of ``--set``, each of the type that its parameter has in the notebooks; unknown names are refused."""
    values = {}
    for name, text in texts.items():
        if name in OPTIONS:
            raise UserError(f"--set {name}={text} has an option of its own: use --{OPTIONS[name]}.")
        examples = [parameters[name] for parameters in defaults.values() if name in parameters]
        if not examples:
            allowed = dict.fromkeys(n for parameters in defaults.values() for n in parameters if n not in OPTIONS)
            check_choice("--set", name, allowed)
        values[name] = parse(name, text, examples[0])
    return values


def parse(name: str, text: str, example: Any) -> Any:
    """``text`` as a value of the type of ``example``."""
    if isinstance(example, str):
        return str(Path(text).expanduser().resolve()) if name in ("data_folder", "weights") and text else text
    if isinstance(example, bool):
        return check_choice(f"--set {name}", text.lower(), ["true", "false"]) == "true"
    try:
        if isinstance(example, int):
            return int(text)
        if isinstance(example, float):
            return float(text)
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if value is None or (example is not None and not isinstance(value, type(example))):
        raise UserError(
            f"--set {name}={text} is not of the parameter's type; allowed: {type(example).__name__}, "
            f"such as {example!r}."
        )
    return value


def check_single(parameter: str, settings: dict[str, Any], uses: set[str | None]) -> None:
    """A folder or a weights file fits one data set or model: refuse it for several."""
    several = sorted(use for use in uses if use)
    if settings.get(parameter) and len(several) > 1:
        raise UserError(f"--set {parameter} would serve {', '.join(several)}; choose one with --datasets and --models.")


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults of a notebook's ``parameters`` cell."""
    for cell in notebook_cells(notebook):
        if "parameters" in cell["metadata"].get("tags", []):
            tree = ast.parse("".join(cell["source"]))
            assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
            targets = [node.targets[0] if isinstance(node, ast.Assign) else node.target for node in assigned]
            return {t.id: ast.literal_eval(n.value) for t, n in zip(targets, assigned, strict=True)}
    raise UserError(f"notebook {notebook.name} has no cell tagged 'parameters'.")


def notebook_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook file."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"notebook {notebook} cannot be read ({type(error).__name__}).") from None
    return [cell for cell in cells if cell["cell_type"] == "code"]


def digest(*parts: str) -> str:
    """SHA-256 of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def code_identity(notebook: Path) -> str:
    """Hash of the notebook's code cells and of every module of the kit that they import, directly or not."""
    cells = [normalise(cell) for cell in notebook_sources(notebook)]
    modules = {name: normalise(source) for name, source in modules_of(cells, without=SHOWING).items()}
    return digest(*cells, *(f"{name} {source}" for name, source in sorted(modules.items())))


def imports_of(notebook: Path) -> set[str]:
    """Every module that a notebook needs, and names that only look like one: all that it and the kit's part of it
    import, directly or not."""
    cells = notebook_sources(notebook)
    return {name for source in [*cells, *modules_of(cells).values()] for name in imported(source)}


def notebook_sources(notebook: Path) -> list[str]:
    """The text of each code cell."""
    return ["".join(cell["source"]) for cell in notebook_cells(notebook)]


def modules_of(sources: Iterable[str], without: Iterable[str] = ()) -> dict[str, str]:
    """Name and source of the kit's modules that some sources import, directly or not, ``without`` some of them."""
    todo = [name for source in sources for name in imported(source)]
    modules: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name.startswith("dfqlib.") and name not in modules and name not in without and module_file(name).is_file():
            modules[name] = module_file(name).read_text(encoding="utf-8")
            todo += imported(modules[name])
    return modules


@functools.cache
def normalise(source: str) -> str:
    """Python source without comments, docstrings and layout; as it is where it is not plain Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@functools.cache
def imported(source: str) -> tuple[str, ...]:
    """What some source imports, also inside functions; source that is not plain Python imports nothing.

    ``from a import b`` gives ``a`` and ``a.b``, which is a module or not.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return ()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def module_file(name: str) -> Path:
    """The file of a module of the kit, there or not."""
    return PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")


def teacher_identity(model: str, weights: str) -> str:
    """Hash of the weights that the teacher will be loaded from; the model's name where they are a library's own."""
    file = weights_file(model, weights)
    return sha256(file) if file else model


def weights_file(model: str, weights: str = "") -> Path | None:
    """The weights file on this machine, found as :func:`dfqlib.models.load_teacher` finds it; None if there is none."""
    root = os.environ.get("DFQ_DATA", "")
    own = (
        [Path(root).expanduser() / "teachers" / f"{model}{suffix}" for suffix in (".safetensors", ".pth")]
        if root
        else []
    )
    places = [Path(weights)] if weights else [ASSETS / f"{model}.safetensors", *own]
    return next((place for place in places if place.is_file()), None)


def data_identity(dataset: str, folder: Path | None) -> str:
    """Hash of the names and sizes of the files in the data set's folder, or of the embedded images."""
    if folder:
        return digest(*(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files_below(folder)))
    return digest(*(sha256(file) for file in sorted(ASSETS.glob(f"{dataset}-*.webp")))) if dataset else ""


def data_folder(dataset: str, parameters: dict[str, Any]) -> Path | None:
    """The folder that the data set will be read from: the one given, or ``$DFQ_DATA/<dataset>``; None: embedded."""
    if parameters.get("data_folder"):
        return Path(parameters["data_folder"])
    root = os.environ.get("DFQ_DATA", "")
    place = Path(root).expanduser() / dataset
    return place if root and dataset and place.is_dir() else None


def files_below(folder: Path) -> Iterable[Path]:
    """All files in a folder, in one order on every machine."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
