"""The documentation site: `make docs`.

The source folder is the repository, so that pages, notebooks and figures stay where they
are, and their links to one another work on a code host and in the site alike.
"""

import sys
from pathlib import Path

import hfjax

sys.path.insert(0, str(Path(__file__).parent))  # For our extensions.

project = "hfjax"
author = project_copyright = "The hfjax authors"
version = release = hfjax.__version__

extensions = [
    "docstrings",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "notebooks/*.ipynb",
    "benchmarks/**.md",
]
exclude_patterns = [".*", "docs/_build", "dist", "hfjax", "runs", "tests"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make notebooks` has executed them.

default_role = "code"
add_module_names = False
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False  # "Shape: …" is prose.
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
smartquotes_action = "D"  # Dashes. "clip" is what to write.

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"hfjax {release}"
html_copy_source = False
