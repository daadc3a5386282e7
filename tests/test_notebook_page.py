"""Executed notebooks as pages: formulas are drawn by the browser itself, nothing comes from the network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from browser import assert_accessible
from nbformat import v4

from dfqlib.runner.notebook_page import as_page

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MATH = re.compile(r"<math.*?</math>", re.DOTALL)


def page_of(path: Path, *cells: nbformat.NotebookNode) -> str:
    nbformat.write(v4.new_notebook(cells=list(cells)), path)
    return as_page(path)


def test_formulas_become_mathml_and_code_stays(tmp_path):
    text = r"Inline $\hat x = \frac{a}{2}$, and `$HOME` and `$x$` as they are." + "\n\n$$\n\\sum_i x_i^2\n$$\n"
    page = page_of(tmp_path / "one.ipynb", v4.new_markdown_cell(text))
    inline, block = MATH.findall(page)
    assert "<mfrac><mrow><mi>a</mi></mrow><mrow><mn>2</mn></mrow></mfrac>" in inline
    assert 'display="block"' in block and "<mo>∑</mo>" in block
    assert "<code>$HOME</code>" in page and "<code>$x$</code>" in page


@pytest.mark.parametrize("formula", [r"$a_b_c$", r"$$\left( x$$", r"\begin{align}{ a \end{align}"])
def test_a_formula_that_cannot_be_read_stays_as_it_is(tmp_path, formula):
    page = page_of(tmp_path / "one.ipynb", v4.new_markdown_cell(f"Here: {formula} and $y$"))
    assert formula in page and len(MATH.findall(page)) == 1


def test_bars_are_as_high_as_in_tex_and_environments_are_formulas(tmp_path):
    bars = v4.new_markdown_cell(r"$\lVert x \rVert \le \left\lvert \frac12 \right\rvert$")
    lines = v4.new_markdown_cell(r"\begin{align} a &= b \\ c &= d \end{align}")
    formula, table = MATH.findall(page_of(tmp_path / "one.ipynb", bars, lines))
    assert formula.count('<mo stretchy="false">‖</mo>') == 2 and formula.count('stretchy="true"') == 2
    assert table.count("<mtr>") == 2 and "begin" not in table


def test_an_output_keeps_its_dollars(tmp_path):
    output = v4.new_output("display_data", {"text/html": "<b>$5 and $6</b>"})
    page = page_of(tmp_path / "one.ipynb", v4.new_code_cell("1", outputs=[output]))
    assert "<b>$5 and $6</b>" in page and not MATH.search(page)


def test_a_figure_has_its_name_and_its_width(tmp_path):
    picture = {"image/png": "iVBORw0KGgo="}
    about = {"image/png": {"alt": "fine tuning", "width": 812}}
    outputs = [v4.new_output("display_data", picture, metadata=metadata) for metadata in (about, {})]
    page = page_of(tmp_path / "one.ipynb", v4.new_code_cell("1", outputs=outputs))
    first, second = re.findall("<img[^>]*>", page)
    for part in ('alt="fine tuning"', 'width="812"', 'src="data:image/png;base64,iVBORw0KGgo="'):
        assert part in first
    assert 'alt="figure"' in second


def test_a_page_begins_with_its_contents_its_commit_and_the_way_back(tmp_path):
    about = {"profile": "smoke", "provenance": {"commit": "0123abc"}}
    (tmp_path / "metrics.json").write_text(json.dumps(about))
    text = "# GDFQ & <b>friends</b>\n\nText.\n\n## The images of $x$\n\n### By class\n"
    page = page_of(tmp_path / "one.ipynb", v4.new_markdown_cell(text), v4.new_code_cell("# no heading"))
    assert "<title>GDFQ &amp; friends</title>" in page
    contents = page.partition("<main>")[2].partition("</nav>")[0]
    assert 'href="../../../smoke/report.html"' in contents and "0123abc" in contents
    links = re.findall('<a href="#([^"]*)">([^<]*)</a>', contents)
    assert [name for _, name in links] == ["The images of x", "By class"]
    assert all(f'id="{place}"' in page for place, _ in links)


def test_without_metrics_a_page_names_no_commit_and_no_report(tmp_path):
    page = page_of(tmp_path / "one.ipynb", v4.new_markdown_cell("## Images"))
    assert "<title>one</title>" in page and "commit" not in page.partition("<main>")[2] and "report.html" not in page


@pytest.mark.parametrize("width", [1280, 390])
def test_an_executed_notebook_can_be_read_by_everybody(browser, tmp_path, width):
    path = tmp_path / "notebook.html"
    path.write_text(as_page(next(path for path in NOTEBOOKS if "gdfq" in path.stem)), encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.goto(path.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    cut = "e => e.clientWidth && e.scrollWidth > e.clientWidth + 2 && getComputedStyle(e).overflowX === 'hidden'"
    assert not tab.evaluate(f"[...document.querySelectorAll('main *')].filter({cut}).map(e => e.className)")
    assert_accessible(tab)
    tab.close()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_kit_s_notebooks_have_formulas_that_are_understood_whole(notebook):
    page = as_page(notebook)
    formulas = MATH.findall(page)
    assert formulas and not [formula for formula in formulas if "\\" in formula]
    assert not re.search(r"""<script[^>]*\bsrc=|<link[^>]*\bhref=["']?http|<img[^>]*\bsrc=["']?http|import\(""", page)
