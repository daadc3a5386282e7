"""The code cells of a notebook file and its parameters."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError


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


def notebook_sources(notebook: Path) -> list[str]:
    """The text of each code cell."""
    return ["".join(cell["source"]) for cell in notebook_cells(notebook)]
