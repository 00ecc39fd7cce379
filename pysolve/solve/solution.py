"""The result of a convex solver."""

from __future__ import annotations

from dataclasses import dataclass, field

from pysolve.correlations import Array, Indices
from pysolve.solve.problem import Matrices
from pysolve.tables import Table, as_html


@dataclass(frozen=True, eq=False)
class History:
    """One entry an iteration: seconds since the start, objective, duality gap."""

    seconds: Array
    objective: Array
    gap: Array


@dataclass(frozen=True, eq=False)
class Solution:
    """A reconstruction with its proven distance from the optimum.

    Parameters
    ----------
    M : (h, d) array
        The solution; a tuple of one matrix a reader when several problems were solved together.
    keep : (k,) int array
        Groups that are not zero, ascending.
    lam : float
    objective : float
        P(M), plus ½ E‖y‖² when ``r_yy`` was given.
    gap, relative_gap : float
        Proven bound on P(M) − min P, and the same divided by abs(objective).
    kkt : float
        Largest violation of the optimality conditions over the groups.
    iterations : int
    method : str
    seconds : float
        Wall time, preparation included.
    status : str
        "converged" (relative gap ≤ tol), "precision" (the gap is at what float64 can certify, above tol) or
        "max_iter".
    history : History
    shift : float
        Largest amount by which the diagonal of an r_xx was raised, in its units: where rounding has left it
        indefinite, P has no minimum. R_ii is raised by ``shift`` R_ii/max R_ii. ``objective`` is that of the
        given r_xx; ``gap`` holds against all matrices up to √2 times as large as M,  Σ_i R_ii ‖M_i‖²  being
        the square of the size. An amount that float64's rounding of the unpenalised groups alone explains
        is reported, not added.
    """

    M: Matrices
    keep: Indices
    lam: float
    objective: float
    gap: float
    relative_gap: float
    kkt: float
    iterations: int
    method: str
    seconds: float
    status: str
    history: History = field(repr=False)
    shift: float = 0.0

    @property
    def readers(self) -> tuple[Array, ...]:
        """One matrix a reader, also of a single one."""
        return self.M if isinstance(self.M, tuple) else (self.M,)

    @property
    def converged(self) -> bool:
        """Whether the precision asked for is certified."""
        return self.status == "converged"

    def __repr__(self) -> str:
        return (
            f"Solution({self.method}: {len(self.keep)} groups kept at lam={self.lam:.4g}, "
            f"objective={self.objective:.6g}, relative_gap={self.relative_gap:.1e}, {self.status} "
            f"after {self.iterations} iterations in {self.seconds:.3g} s)"
        )

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        cells = {
            "method": self.method,
            "groups kept": f"{len(self.keep):,}",
            "lam": f"{self.lam:.4g}",
            "objective": f"{self.objective:.6g}",
            "relative gap": f"{self.relative_gap:.1e}",
            "KKT": f"{self.kkt:.1e}",
            "iterations": f"{self.iterations:,}",
            "seconds": f"{self.seconds:.3g}",
            "status": self.status,
        }
        return as_html(Table("Solution", tuple(cells), (tuple(cells.values()),), words=(0, 8)))
