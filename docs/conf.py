"""Configuration of the documentation's build."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import gdr
from figures import draw_all

project = "gdr"
author = "the gdr developers"
copyright = "2026, the gdr developers"
version = release = gdr.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_design",
]
exclude_patterns = ["_build", "data", "figures"]
nitpicky = False
suppress_warnings = []

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
numpydoc_show_class_members = False
autodoc_typehints = "none"
autodoc_mock_imports = ["torch", "transformers"]  # what the integrations need and this build does not
autodoc_member_order = "bysource"

html_theme = "pydata_sphinx_theme"
html_title = "gdr"
html_static_path = ["_static"]
html_css_files = ["gdr.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {
    "navbar_align": "left",
    "show_toc_level": 2,
    "header_links_before_dropdown": 5,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"getting-started": []}  # a section of one page
html_show_sourcelink = False
# MathJax, which draws the formulas, lies beside the pages: they load nothing from elsewhere.
mathjax3_config = {"tex": {"macros": {"T": "^\\mathsf{T}"}}}

# Every picture is drawn here, from the library itself or from docs/data.
draw_all(HERE / "_build" / "figures")
