"""Sphinx configuration."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from sphinx.application import Sphinx

project = "vardistill"
author = "vardistill contributors"
project_copyright = author
release = version = metadata.version("vardistill")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"vardistill {release}"
html_show_sphinx = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

SPECIAL = re.compile(
    r"(?P<kept>``[^`]+``|:\w+:`[^`]+`|\*{1,2}\w[\w -]*\*{1,2})"  # code, roles, emphasis
    r"|`(?P<name>[^`]+)`"
    r"|(?P<escaped>[*|]|(?<=\w)_(?!\w))"
)


def plain_text(match: re.Match[str]) -> str:
    if match["kept"]:
        return match["kept"]
    return f"``{match['name']}``" if match["name"] else "\\" + match["escaped"]


def plain_docstrings(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read docstrings as plain text: `name` is code, * and | are themselves, indented formulas stay."""
    out: list[str] = []
    for line in lines:
        formula = what == "module" and line.startswith("    ")
        if formula and out[-1] == "":
            out += ["::", ""]
        out.append(line if formula else SPECIAL.sub(plain_text, line))
    lines[:] = out


def setup(app: Sphinx) -> None:
    before_napoleon = 400
    app.connect("autodoc-process-docstring", plain_docstrings, priority=before_napoleon)
