"""What the rounded weights of a layer should come close to, and in which metric."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve.correlations import Array
from pysolve.layer.layer_problem import LayerProblem, blocks, refit_rows

Mask = npt.NDArray[np.bool_]

# Times the largest weight before, from which on an input keeps its weights.
_WILD = 2.0


@dataclass(frozen=True, eq=False)
class Target:
    """The objective ½ Σ_i w_i ‖M_i − V_i‖²_A of rounded weights M, with some of them held at zero.

    Parameters
    ----------
    V : (h, d) array
        The best weights of any value; zero outside the mask.
    A : (d, d) array or None
        The metric of a row, positive definite; None for the identity.
    mask : (h, d) bool array or None
        Which weights may differ from zero; None for all.
    outputs : (h,) array, optional
        w, what the error of each output counts; 1 by default.
    """

    V: Array = field(repr=False)
    A: Array | None = field(repr=False)
    mask: Mask | None = field(repr=False)
    outputs: Array | None = field(default=None, repr=False)

    @property
    def rows(self) -> Array:
        """w."""
        return np.ones(len(self.V)) if self.outputs is None else self.outputs

    def product(self, M: Array) -> Array:
        """M A, as a new array."""
        return M.copy() if self.A is None else np.asarray(M @ self.A)

    def loss(self, M: Array) -> float:
        """The objective at M."""
        total = 0.0
        for rows in blocks(len(M)):
            change = M[rows] - self.V[rows]
            along = change if self.A is None else change @ self.A
            total += 0.5 * float(self.rows[rows] @ np.einsum("ij,ij->i", along, change))
        return total

    @property
    def diagonal(self) -> Array:
        """What the square of a change of each input's weight costs by itself, (d,)."""
        return np.ones(self.V.shape[1]) if self.A is None else np.diag(self.A)


def target_of(problem: LayerProblem, mask: Mask | None, outputs: Array | None = None) -> Target:
    """The target of a layer: the best weights on the mask, and the metric of its inputs as they are."""
    V = problem.optimum() / problem.unit if mask is None else refit_rows(problem, mask)
    # What the best weights of inputs that hardly vary gain is next to nothing, but they may be millions.
    wild = np.abs(V).max(0, initial=0.0) > _WILD * np.abs(problem.W).max(initial=0.0)
    V[:, wild] = problem.W[:, wild] if mask is None else np.where(mask, problem.W, 0.0)[:, wild]
    A = problem.metric()
    A *= problem.unit
    A *= problem.unit[:, None]
    return Target(V, A, mask, outputs)


def by_energy(target: Target) -> npt.NDArray[np.intp]:
    """Inputs by falling ‖V_j‖² A_jj: their errors are made up for by those that follow.

    On layers of LeNet-5 and ResNet-20 at 2 … 4 bits, feedback alone leaves 3 to 23 % less error in this order
    than in the inputs' own, and 15 % less to 3 % more than by falling A_jj.
    """
    energy = np.einsum("i,ij,ij->j", target.rows, target.V, target.V)
    return np.argsort(-energy * target.diagonal, kind="stable")


def factor(A: Array, order: npt.NDArray[np.intp]) -> Array:
    """Lower triangular L with L Lᵀ = A, rows and columns in an order."""
    # Symmetric, so the transpose is the same matrix in the order of LAPACK.
    L = scipy.linalg.cholesky(A[np.ix_(order, order)].T, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(L)
