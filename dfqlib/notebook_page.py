"""An executed notebook as one HTML page that needs nothing from the network: its formulas are MathML.

Browsers draw MathML themselves; nbconvert's own page leaves formulas to a script that it loads from elsewhere.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import v4

# nbconvert's page without its scripts, which come from the network and have nothing to do here.
SCRIPTS = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
TEMPLATE = "{% extends 'index.html.j2' %}" + "".join(f"{{% block {name} %}}{{% endblock %}}" for name in SCRIPTS)
EXPORTING = threading.Lock()


class MathMLRenderer(IPythonRenderer):
    """Markdown to HTML, with ``$...$`` and ``$$...$$`` as MathML."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")


class PageExporter(HTMLExporter):
    """nbconvert's HTML with formulas by :class:`MathMLRenderer`."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        renderer = MathMLRenderer(escape=False, anchor_link_text=self.anchor_link_text)
        return MarkdownWithMath(renderer=renderer).render(source)


def as_page(notebook: Path) -> str:
    """The notebook in this file as HTML; one at a time, since runs that end together share the exporter."""
    with EXPORTING:
        return _exporter().from_filename(os.fspath(notebook))[0]


def warm_up() -> None:
    """Make the first page quick: loading and compiling its parts takes seconds."""
    with EXPORTING:
        _exporter()


@functools.cache
def _exporter() -> PageExporter:
    exporter = PageExporter(raw_template=TEMPLATE)
    exporter.from_notebook_node(v4.new_notebook(cells=[v4.new_code_cell("1")]))
    return exporter
