"""How Sphinx builds the site, from the templates of this folder as `kure_lib.site` has filled them in."""

from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = html_title = "KURE, reproduced"
author = "the authors of this study"
extensions = ["myst_nb"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"
suppress_warnings = ["myst.header"]  # a notebook may go from its title to a heading of the third level
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_math_renderer = "mathml"  # MathJax would come from a network
html_copy_source = html_show_copyright = html_show_sphinx = html_use_index = False
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}


def mathml(tex: str, display: str) -> str:
    """MathML, or the TeX itself if it is more than the converter knows."""
    try:
        return convert(tex, display=display)
    except Exception:  # the converter has no common class of errors
        return f"<code class='tex'>{escape(tex)}</code>"


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f"<div class='math'>{mathml(node.astext(), 'block')}</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
