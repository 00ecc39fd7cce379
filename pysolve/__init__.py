"""Make trained neural networks smaller without retraining them.

Solvers on correlation matrices need NumPy alone; the names that work on networks import torch on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pysolve.certificate import Certificate, certify, lam_max
from pysolve.correlations import Correlations
from pysolve.debias import debias
from pysolve.elimination import EliminationPath, elimination_path
from pysolve.errors import CollapseError, DataError, LayerNotFoundError, PysolveError
from pysolve.path import lam_for_groups, regularization_path
from pysolve.plan import Collapse, Plan, Site
from pysolve.prox import prox_group_lasso
from pysolve.selection import select_channels
from pysolve.solution import History, Solution
from pysolve.solvers import (
    alternate_minimization,
    fista,
    newton,
    proximal_gradient,
    solve_linear_reconstruction,
)
from pysolve.sparse import SparseMatrix, csr_matmul, get_num_threads, set_num_threads

if TYPE_CHECKING:
    from pysolve.compressed import Compressed
    from pysolve.nn.checkpoint import load, save
    from pysolve.nn.gather import gather
    from pysolve.nn.graph.sites import find_sites
    from pysolve.nn.inspect import inspect
    from pysolve.nn.surgery import apply
    from pysolve.recipe import compress, sweep
    from pysolve.report import Report
    from pysolve.unstructured import prune

__version__ = "0.1.0"

_NEEDS_TORCH = {
    "gather": "pysolve.nn.gather",
    "inspect": "pysolve.nn.inspect",
    "apply": "pysolve.nn.surgery",
    "compress": "pysolve.recipe",
    "prune": "pysolve.unstructured",
    "sweep": "pysolve.recipe",
    "load": "pysolve.nn.checkpoint",
    "save": "pysolve.nn.checkpoint",
    "Compressed": "pysolve.compressed",
    "Report": "pysolve.report",
    "find_sites": "pysolve.nn.graph.sites",
}

__all__ = [
    "Certificate",
    "Collapse",
    "CollapseError",
    "Compressed",
    "Correlations",
    "DataError",
    "EliminationPath",
    "History",
    "LayerNotFoundError",
    "Plan",
    "PysolveError",
    "Report",
    "Site",
    "Solution",
    "SparseMatrix",
    "alternate_minimization",
    "apply",
    "certify",
    "compress",
    "csr_matmul",
    "debias",
    "elimination_path",
    "find_sites",
    "fista",
    "gather",
    "get_num_threads",
    "inspect",
    "lam_for_groups",
    "lam_max",
    "load",
    "newton",
    "prox_group_lasso",
    "proximal_gradient",
    "prune",
    "regularization_path",
    "save",
    "select_channels",
    "set_num_threads",
    "solve_linear_reconstruction",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module 'pysolve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
