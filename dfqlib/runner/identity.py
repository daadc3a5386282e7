"""What a run depends on, as hashes: its code, its teacher's weights, its data, and torch's version."""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from dfqlib import places
from dfqlib.files import sha256, write_json
from dfqlib.papers.notebook_source import notebook_sources

#: Modules and packages that show or keep results and compute none: a change in them leaves finished runs valid.
DISPLAY_MODULES = ("dfqlib.progress", "dfqlib.papers", "dfqlib.report", "dfqlib.deploy.store")
#: Calls that only show their texts.
MESSAGES = ("print", "warn", "warnings.warn", "findings")
MAGIC = re.compile(r"^(\s*)([%!].*)$", re.MULTILINE)


def digest(*parts: str) -> str:
    """SHA-256 of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def code_identity(notebook: Path) -> str:
    """Hash of the notebook's code cells and of every module of the kit that they import, directly or not.

    Excluded are the parameters cell, whose values are hashed with the run, :data:`DISPLAY_MODULES`, and what
    :func:`normalise` leaves out.
    """
    cells = notebook_sources(notebook)
    modules, _ = follow_imports(cells, without=DISPLAY_MODULES)
    return digest(*map(normalise, cells), *(f"{name} {normalise(source)}" for name, source in sorted(modules.items())))


def torch_version() -> str:
    """The version of torch without its build, such as 2.6.0: sums may differ between versions in the last digits."""
    return importlib.metadata.version("torch").partition("+")[0]


def imports_of(notebook: Path) -> set[str]:
    """The modules that a notebook and the kit's part of it import, and names that only look like modules."""
    return follow_imports(notebook_sources(notebook))[1]


def follow_imports(sources: Iterable[str], without: Iterable[str] = ()) -> tuple[dict[str, str], set[str]]:
    """What some sources import, directly or through the kit: the kit's modules with their sources, and all names.

    Modules and packages in ``without`` are not followed.
    """
    todo = [name for source in sources for name in imported(source)]
    modules: dict[str, str] = {}
    names: set[str] = set()
    while todo:
        if (name := todo.pop()) in names:
            continue
        names.add(name)
        left_out = any(f"{name}.".startswith(f"{other}.") for other in without)
        if not left_out and (file := module_file(name)):
            modules[name] = file.read_text(encoding="utf-8")
            todo += imported(modules[name], name if file.name == "__init__.py" else name.rpartition(".")[0])
    return modules, names


def module_file(name: str) -> Path | None:
    """The file of a module or package of the kit; None where there is none of this name."""
    kit, *parts = name.split(".")
    path = places.PACKAGE.joinpath(*parts)
    files = (path / "__init__.py", path.with_suffix(".py")) if kit == "dfqlib" else ()
    return next(filter(Path.is_file, files), None)


@functools.cache
def imported(source: str, package: str = "") -> frozenset[str]:
    """What a source in ``package`` imports, also inside functions: ``from a import b`` gives ``a`` and ``a.b``."""
    tree, names = parse(source), []
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level <= len([*filter(None, package.split("."))]):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return frozenset(part for name in names for part in accumulate(name.split("."), "{}.{}".format))


@functools.cache
def normalise(source: str) -> str:
    """Python source without what only people read; unchanged if it is not Python.

    Left out are comments, layout, docstrings, ``__version__``, every string in a ``raise`` statement, and strings and
    f-strings given to one of :data:`MESSAGES`. All other strings stay: they may be keys or choices.
    """
    tree = parse(source)
    if tree is None:
        return source
    texts: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            names: dict[ast.stmt, str] = {s: ast.unparse(s.targets[0]) for s in node.body if isinstance(s, ast.Assign)}
            node.body = [s for s in node.body if names.get(s) != "__version__"] or [ast.Pass()]
        elif isinstance(node, ast.Raise):
            texts += ast.walk(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in MESSAGES:
            texts += [part for argument in node.args for part in (argument, *getattr(argument, "values", ()))]
    for node in texts:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def parse(source: str) -> ast.Module | None:
    """The tree of a source, IPython's magic lines as strings; None if it is not Python."""
    for text in (source, MAGIC.sub(r"\1(r'''\2''',)", source)):
        with contextlib.suppress(SyntaxError, ValueError):  # the second is of a zero byte
            return ast.parse(text)
    return None


def teacher_identity(model: str, weights: str) -> str:
    """Hash of the weights that the teacher will be loaded from; the model's name where they are a library's own."""
    file = places.weights_file(model, weights)
    return sha256(file) if file and file.is_file() else model


def data_identity(dataset: str, folder: Path | None, training: bool = False) -> str:
    """Hash of the embedded images of a data set and of the names and content of those in its folder."""
    if not dataset:
        return ""
    embedded = [sha256(file) for file in sorted(places.ASSETS.glob(f"{dataset}-*.webp"))]
    return digest(*embedded, *([_content(folder, places.data_files(dataset, folder, training))] if folder else []))


def _content(folder: Path, files: list[Path]) -> str:
    """Hash of the names and content of a folder's files, cached on disk until a name, a size or a time changes."""
    names = [file.relative_to(folder).as_posix() for file in files]
    times = (f"{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for s in (file.stat() for file in files))
    state, store = digest(str(folder.resolve()), *names, *times), places.cache_folder() / "data.json"
    kept: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # no cache, or a broken one
        kept = dict(json.loads(store.read_text(encoding="utf-8")))
    if state not in kept:
        with ThreadPoolExecutor() as pool:
            kept[state] = digest(*names, *pool.map(sha256, files))
        with contextlib.suppress(OSError):
            write_json(store, kept)
    return kept[state]
