"""An executed notebook as one HTML page that needs nothing from the network.

It begins with its contents, its commit and a link to the report. Its formulas are MathML, which browsers draw
themselves; nbconvert's own page loads a script for them.
"""

import functools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from jinja2 import Environment, pass_context
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_notebook

from dfqlib.files import METRICS
from dfqlib.papers import profiles

TEMPLATE = Path(__file__).with_suffix(".html.jinja")
TOP = Environment(autoescape=True).from_string("""
<nav class="contents" aria-label="Contents">
{% if report %}<a href="{{ report }}">Report of all results</a>{% endif %}
{% if commit %} · commit <code>{{ commit }}</code>{% endif %}
<ul>
{% for level, id, text in headings %}<li class="level{{ level }}"><a href="#{{ id }}">{{ text }}</a></li>
{% endfor %}
</ul>
</nav>
""")
HEADING = re.compile(r'<h([1-3])[^>]* id="([^"]*)"[^>]*>(.*?)<a class="anchor-link"', re.DOTALL)
# \lvert and \lVert are no higher than a letter in TeX; in MathML they stretch to the line's height by default.
BARS = re.compile("<mo>(&#x0007C;|&#x02016;)</mo>")
EXPORTING = threading.Lock()


class MathMLRenderer(IPythonRenderer):
    """Markdown to HTML, with formulas as MathML, or in TeX as they stand where latex2mathml cannot read them."""

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline") or super().inline_math(body)

    def block_math(self, body: str) -> str:
        return _block(body) or super().block_math(body)

    def latex_environment(self, name: str, body: str) -> str:
        whole = f"\\begin{{{name}}}{body}\\end{{{name}}}"
        return _block(whole) or super().latex_environment(name, body)


def _mathml(tex: str, display: str) -> str:
    """A formula as MathML; "" for one that cannot be read, for a notebook that has run is not to fail for it."""
    try:
        return BARS.sub(r'<mo stretchy="false">\1</mo>', convert(tex, display=display))
    except Exception:  # latex2mathml's own errors have no common class, and others come through
        return ""


def _block(tex: str) -> str:
    """A formula on lines of its own, which can be scrolled, by keyboard too, where it is wider than the page."""
    formula = _mathml(tex, "block")
    return formula and f'<div class="formula" role="group" aria-label="formula" tabindex="0">{formula}</div>'


class PageExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        renderer = MathMLRenderer(escape=False, anchor_link_text=self.anchor_link_text)
        return MarkdownWithMath(renderer=renderer).render(source)


def as_page(notebook: Path) -> str:
    """The notebook in this file as HTML, with profile and commit from the metrics.json beside it, if there is one."""
    with EXPORTING:  # one at a time, since runs that end together share the exporter
        page = exporter().from_filename(os.fspath(notebook))[0]
    metrics = notebook.with_name(METRICS)
    about = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
    profile = profiles.load()[0].get(about.get("profile", ""))
    report = profile.overview_folder(Path("../../..")) / "report.html" if profile else None  # <profile>/<paper>/<run>
    headings = [(level, Markup(name), Markup(text).striptags()) for level, name, text in HEADING.findall(page)]
    title = next((text for level, _, text in headings if level == "1"), notebook.stem)
    commit = about.get("provenance", {}).get("commit", "")
    top = TOP.render(report=report, commit=commit, headings=[part for part in headings if part[0] != "1"])
    page = re.sub("<title>.*?</title>", lambda _: Markup("<title>{}</title>").format(title), page, count=1)
    return page.replace("<main>", f"<main>{top}", 1)


@functools.cache
def exporter() -> PageExporter:
    """The exporter of all pages, since compiling its templates takes half a second."""
    made = PageExporter(raw_template=TEMPLATE.read_text(encoding="utf-8"))
    made.from_notebook_node(new_notebook())  # compiles them
    return made
