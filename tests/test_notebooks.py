"""The notebooks run from top to bottom under the smoke profile, and their committed outputs are right and complete.

nbval runs a copy of each notebook with the smoke values after its parameters cell, in a kernel of its own, forked as in
a batch. Every cell must run. The output of cells tagged ``nbval-check-output``, which depends neither on the profile
nor on the machine, must equal the committed one after the replacements of ``nbval.cfg``; all other outputs come from
the quick profile and need only exist.
"""

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from dfqlib.papers import profiles
from dfqlib.runner import plan

ROOT = Path(__file__).resolve().parent.parent
PAPERS = profiles.load()[1]
each = pytest.mark.parametrize("key", PAPERS)


def read(key: str) -> nbformat.NotebookNode:
    return nbformat.read(PAPERS[key].notebook, as_version=4)


def test_every_notebook_is_in_the_table():
    assert {paper.notebook for paper in PAPERS.values()} == set((ROOT / "notebooks").glob("*.ipynb"))


def test_all_run_under_smoke(tmp_path):
    runs = plan.plan(plan.Selection("smoke"))
    assert {run.paper.key for run in runs} == set(PAPERS)
    for run in runs:
        out = tmp_path / run.paper.key
        out.mkdir()
        notebook = load_notebook_node(str(run.paper.notebook))
        values = run.parameters | {"out": str(out)}
        notebook = parameterize_notebook(notebook, values, kernel_name="python3", language="python")
        nbformat.write(notebook, out.with_suffix(".ipynb"))
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
    command += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval.cfg"), "-p", "no:cacheprovider", "-q"]
    command += ["-p", "forked_kernels", *(f"{run.paper.key}.ipynb" for run in runs)]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    for run in runs:
        out = tmp_path / run.paper.key
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["paper"] == out.name and metrics["profile"] == "smoke" and metrics["rows"] and metrics["figures"]
        for name in metrics["figures"]:
            assert (out / f"{name}.png").stat().st_size and (out / f"{name}.svg").stat().st_size


@each
def test_committed_outputs_are_there_and_from_the_quick_profile(key):
    notebook = read(key)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "injected-parameters" not in {tag for cell in code for tag in cell.metadata.get("tags", [])}
    assert all(cell.execution_count for cell in code if cell.source.strip())
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})], "no figure"
    table, found = (cell.outputs[-1].data for cell in code[-2:])
    assert "text/html" in table and "text/markdown" in found, "does not end with its results table and findings"
    text = json.dumps([output.get("text", "") for output in outputs])
    assert not re.search(r"/(home|root|Users|tmp)/", text), "an output names a folder of the machine it ran on"
    assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in code)


@each
def test_every_profile_gives_declared_parameters_values_that_are_allowed(key):
    paper, declared = PAPERS[key], PAPERS[key].parameters
    for profile in profiles.load()[0]:
        overlays = [name for name, value in paper.tables.get(profile, {}).items() if isinstance(value, dict)]
        for overlay in ["", *overlays]:
            values = paper.values(profile, overlay)
            assert set(values) <= set(declared.kinds())
            declared.of(values)


@each
@pytest.mark.parametrize(("dataset", "most"), [("cifar10", 200), ("cifar100", 20)])
@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_reduced_profiles_ask_for_images_that_are_there(key, dataset, most, profile):
    """The embedded test sets hold 2,000 images, whatever the number of classes."""
    asked = PAPERS[key].values(profile, dataset)
    assert {name: count for name, count in asked.items() if name.endswith("per_class") and count > most} == {}


@each
def test_form(key):
    """Sources and aims, parameters with comments, a short set-up, cells that one can read, findings at the end."""
    notebook = read(key)
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    assert "**Sources.**" in opening.source and "**After this notebook you can**" in opening.source
    parameters, setup = notebook.cells[1:3]
    assert parameters.metadata["tags"] == ["parameters"]
    tokens = tokenize.generate_tokens(io.StringIO(parameters.source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.parse(parameters.source).body:
        assert node.end_lineno in comments or node.lineno in comments, f"{ast.unparse(node)} has no comment"
    assert len(setup.source.splitlines()) <= 8 and f'("{key}", globals())' in setup.source
    assert notebook.cells[3].cell_type == "markdown"
    code = [cell.source.splitlines() for cell in notebook.cells[2:] if cell.cell_type == "code"]
    assert not [lines[0] for lines in code if len(lines) > 25], "cells of more than 25 lines"
    heading, found, limits = notebook.cells[-3:]
    assert heading.source.endswith("What this run shows, and what it does not")
    assert "findings(\n    run," in found.source and limits.source.startswith("Not shown:")


@each
def test_local_links_lead_somewhere(key):
    text = "\n".join(cell.source for cell in read(key).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert links and not [link for link in links if not (ROOT / "notebooks" / link).is_file()]
