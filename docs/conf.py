"""The site: ``make docs`` writes it to ``build/docs``."""

import os
import re

from sphinx.application import Sphinx

import pysolve

# For the tutorials: threads of tiny products only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

project, author, release = "pysolve", "the pysolve developers", pysolve.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb", "sphinxcontrib.mermaid"]
exclude_patterns = ["images"]
templates_path = ["templates"]
smartquotes = False

html_theme = "furo"
html_title = f"pysolve {release}"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
myst_fence_as_directive = {"mermaid"}

nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections say more
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 90
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False


def link(app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]) -> None:
    """Link public names in a docstring that are not its own name or parameter."""
    own = set(re.findall(r"^(?:\*\*)?(\w+)(?:, \w+)* : ", "\n".join(lines), re.MULTILINE))
    names = "|".join(sorted({*pysolve.__all__} - own - {name.rpartition(".")[2]}))
    lines[:] = [re.sub(rf"``({names})``", r":obj:`\1 <pysolve.\1>`", line) for line in lines]


def setup(app: Sphinx) -> None:
    # Before numpydoc, which makes fields of the sections that ``link`` reads.
    app.connect("autodoc-process-docstring", link, priority=100)
