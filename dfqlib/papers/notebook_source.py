"""The code cells of a notebook file and its parameters."""

import ast
import json
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError, first_line


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults of a notebook's cell tagged ``parameters``."""
    text = next((text for text, parameters in _cells(notebook) if parameters), None)
    if text is None:
        raise UserError(f"notebook {notebook.name} has no cell tagged 'parameters'.")
    try:
        body = ast.parse(text).body
        assigned = [node for node in body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
        targets: list[Any] = [node.targets[0] if isinstance(node, ast.Assign) else node.target for node in assigned]
        return {t.id: ast.literal_eval(node.value) for t, node in zip(targets, assigned, strict=True)}
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        told = f"notebook {notebook.name}: its cell tagged 'parameters' cannot be read ({first_line(error)})"
        raise UserError(f"{told}; allowed: lines such as batch = 64.") from None


def notebook_sources(notebook: Path) -> list[str]:
    """The text of each code cell but the one with the parameters."""
    return [text for text, parameters in _cells(notebook) if not parameters]


def _cells(notebook: Path) -> list[tuple[str, bool]]:
    """The text of each code cell of a notebook file, and whether it is tagged ``parameters``."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        cells = [cell for cell in cells if cell["cell_type"] == "code"]
        return [("".join(cell["source"]), "parameters" in cell["metadata"].get("tags", [])) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"notebook {notebook} cannot be read ({type(error).__name__}).") from None
