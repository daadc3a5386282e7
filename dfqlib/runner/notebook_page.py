"""An executed notebook as one HTML page that needs nothing from the network.

Its formulas are MathML, which browsers draw themselves; nbconvert's own page loads a script for them.
"""

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_notebook

# nbconvert's page without its scripts, which load from the network and are not needed, and with the alternative texts
# of figures, which it omits.
SCRIPTS = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
PICTURE = """
{% block data_png scoped %}
<div class="jp-RenderedImage jp-OutputArea-output {{ extra_class }}">
<img alt="{{ (output | get_metadata('alt', 'image/png') or 'figure') | escape_html }}"
 width="{{ output | get_metadata('width', 'image/png') or '' }}"
 src="data:image/png;base64,{{ output.data['image/png'] }}">
</div>
{% endblock %}
"""
NO_SCRIPTS = "".join(f"{{% block {name} %}}{{% endblock %}}" for name in SCRIPTS)
# \lvert and \lVert are no higher than a letter in TeX; in MathML they stretch to the line's height by default.
BARS = re.compile("<mo>(&#x0007C;|&#x02016;)</mo>")
EXPORTING = threading.Lock()


class MathMLRenderer(IPythonRenderer):
    """Markdown to HTML, with formulas as MathML, or in TeX as they stand where latex2mathml cannot read them."""

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline") or super().inline_math(body)

    def block_math(self, body: str) -> str:
        return _mathml(body, "block") or super().block_math(body)

    def latex_environment(self, name: str, body: str) -> str:
        whole = f"\\begin{{{name}}}{body}\\end{{{name}}}"
        return _mathml(whole, "block") or super().latex_environment(name, body)


def _mathml(tex: str, display: str) -> str:
    """A formula as MathML; "" for one that cannot be read, for a notebook that has run is not to fail for it."""
    try:
        return BARS.sub(r'<mo stretchy="false">\1</mo>', convert(tex, display=display))
    except Exception:  # latex2mathml's own errors have no common class, and others come through
        return ""


class PageExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        renderer = MathMLRenderer(escape=False, anchor_link_text=self.anchor_link_text)
        return MarkdownWithMath(renderer=renderer).render(source)


def as_page(notebook: Path) -> str:
    """The notebook in this file as HTML; one at a time, since runs that end together share the exporter."""
    with EXPORTING:
        return exporter().from_filename(os.fspath(notebook))[0]


@functools.cache
def exporter() -> PageExporter:
    """The exporter of all pages, since compiling its templates takes half a second."""
    made = PageExporter(raw_template="{% extends 'index.html.j2' %}" + NO_SCRIPTS + PICTURE)
    made.from_notebook_node(new_notebook())  # compiles them
    return made
