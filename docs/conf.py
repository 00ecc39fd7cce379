"""The site: ``make docs`` writes it to ``build/docs``."""

import os

import pysolve

# For the notebooks: threads of tiny products only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

project, author, release = "pysolve", "the pysolve authors", pysolve.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb", "sphinxcontrib.mermaid"]
exclude_patterns = ["images"]
templates_path = ["templates"]

html_theme = "furo"
html_title = f"pysolve {release}"
html_copy_source = False

myst_heading_anchors = 3
myst_fence_as_directive = {"mermaid"}
myst_links_external_new_tab = False
mermaid_init_js = "mermaid.initialize({startOnLoad: true, securityLevel: 'strict'})"

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections say more
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 90
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
