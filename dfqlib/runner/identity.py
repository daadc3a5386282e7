"""What a run depends on: its code, its teacher's weights and its data, as hashes."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from dfqlib import places
from dfqlib.files import sha256
from dfqlib.papers.notebook_source import notebook_sources

#: Modules that show results but do not make them: a change in them does not make a finished run another one.
DISPLAY_MODULES = {"dfqlib.progress", "dfqlib.papers.profiles", "dfqlib.papers.published", "dfqlib.report.tables"}


def digest(*parts: str) -> str:
    """SHA-256 of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def code_identity(notebook: Path) -> str:
    """Hash of the notebook's code cells and of every module of the kit that they import, directly or not."""
    cells = [normalise(cell) for cell in notebook_sources(notebook)]
    modules = {name: normalise(source) for name, source in modules_of(cells, without=DISPLAY_MODULES).items()}
    return digest(*cells, *(f"{name} {source}" for name, source in sorted(modules.items())))


def imports_of(notebook: Path) -> set[str]:
    """Every module that a notebook needs, and names that only look like one: all that it and the kit's part of it
    import, directly or not."""
    cells = notebook_sources(notebook)
    return {name for source in [*cells, *modules_of(cells).values()] for name in imported(source)}


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
    return places.PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")


def teacher_identity(model: str, weights: str) -> str:
    """Hash of the weights that the teacher will be loaded from; the model's name where they are a library's own."""
    file = places.weights_file(model, weights)
    return sha256(file) if file else model


def data_identity(dataset: str, folder: Path | None) -> str:
    """Hash of the names and sizes of the files in the data set's folder, or of the embedded images."""
    if folder:
        return digest(*(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files_below(folder)))
    return digest(*(sha256(file) for file in sorted(places.ASSETS.glob(f"{dataset}-*.webp")))) if dataset else ""


def files_below(folder: Path) -> Iterable[Path]:
    """All files in a folder, in one order on every machine."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
