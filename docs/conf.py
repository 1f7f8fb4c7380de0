"""Sphinx configuration: `make docs` builds the site into build/docs."""

import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # generated_pages

from generated_pages import write_pages  # noqa: E402

_PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
project = _PROJECT["name"]
release = version = _PROJECT["version"]
author = "the meanflow-ray authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["gallery/**", "how-to/own_experiment/**"]
html_theme = "furo"
html_title = "meanflow-ray"
html_show_sphinx = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py executes them
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

write_pages(Path(__file__).parent / "reference")
