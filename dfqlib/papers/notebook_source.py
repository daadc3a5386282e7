"""The code cells of a notebook file and its parameters."""

import ast
import json
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults of a notebook's cell tagged ``parameters``."""
    cell = next(filter(_holds_parameters, notebook_cells(notebook)), None)
    if cell is None:
        raise UserError(f"notebook {notebook.name} has no cell tagged 'parameters'.")
    body = ast.parse("".join(cell["source"])).body
    assigned = [node for node in body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    targets = [node.targets[0] if isinstance(node, ast.Assign) else node.target for node in assigned]
    return {ast.unparse(t): ast.literal_eval(node.value) for t, node in zip(targets, assigned, strict=True)}


def notebook_cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook file."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"notebook {notebook} cannot be read ({type(error).__name__}).") from None
    return [cell for cell in cells if cell["cell_type"] == "code"]


def notebook_sources(notebook: Path) -> list[str]:
    """The text of each code cell but the one with the parameters."""
    return ["".join(cell["source"]) for cell in notebook_cells(notebook) if not _holds_parameters(cell)]


def _holds_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])
