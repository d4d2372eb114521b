"""A Sphinx extension that writes formulas as MathML, which browsers draw by themselves.

MathJax, Sphinx's default, would be fetched from the network by every reader.
"""

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx


def inline(translator, node):
    """Write a formula within a line."""
    translator.body.append(converter.convert(node.astext()))
    raise nodes.SkipNode


def block(translator, node):
    """Write a formula of its own, which scrolls if the page is too narrow."""
    formula = converter.convert(node.astext(), display="block")
    translator.body.append(f'<div style="overflow-x: auto">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx):
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
