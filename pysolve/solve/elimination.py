"""Backward elimination of groups: remove, one at a time, the group that the others compensate best.

With R + ε diag(R) in place of R, the error of keeping the groups A is

    error(A) = min_M Σ_r ½⟨M_r R_r, M_r⟩ − ⟨C_r, M_r⟩   over M that is zero outside A, for readers r.

With H = (R_AA)⁻¹ and W = C_A H (the refitted weights), losing one more group p of A costs exactly
½ tr(W_p H_pp⁻¹ W_pᵀ), and H and W of what is left are Schur complements. This is optimal
brain surgeon (OBS) for groups of inputs and for several readers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve import _core
from pysolve.correlations import Array, Indices, all_but, group_columns
from pysolve.errors import whole
from pysolve.solve.least_squares import Ridge, check_ridge, debias
from pysolve.solve.problem import Matrices, Problem, Problems, half_trace, problem_of, takes_problem

SIZE = "k, the number of groups to keep,"

# What "auto" tries. A smaller first one would cost the inverse more digits than the costs can spare.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2)

# Costs of removal come out to about 1e-15 times the largest entry of the inverse: 1e2 in LeNet's fc1, 1e8
# with repeated inputs. Beyond this, errors are computed afresh.
TRUSTED_INVERSE = 1e4
# Groups that are named at a prompt.
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class EliminationPath:
    """The groups to keep at every size, and the error of each size.

    Parameters
    ----------
    order : (groups,) int array
        All groups in the order of removal; groups without any variance lead.
    error : (groups + 1,) array
        ``error[k]`` is the error with the k groups ``keep(k)`` refitted, summed over readers; ½ E‖y − M x‖²
        when ``r_yy`` was given, otherwise that less ½ E‖y‖², so that ``error[0]`` is 0. Never rises with k.
    ridge : float
        ε, relative to each input's own variance; its penalty ½ ε Σ_i R_ii ‖M_i‖² is part of the error.
    """

    order: Indices
    error: Array
    ridge: float
    problem: Problem = field(repr=False)

    def __repr__(self) -> str:
        last = ", ".join(map(str, self.order[: -_SHOWN - 1 : -1])) + ", …" * (len(self.order) > _SHOWN)
        return f"EliminationPath({len(self.order)} groups, most wanted first: {last})"

    def keep(self, k: int) -> Indices:
        """The k kept groups, ascending."""
        groups = self.problem.groups
        return np.sort(self.order[groups - whole(SIZE, k, 0, groups) :])

    def refit(self, k: int) -> Matrices:
        """The (h, d) matrix refitted on ``keep(k)``, zero elsewhere; a tuple of one a reader if several."""
        return debias(self.problem, self.keep(k), ridge=self.ridge)


@takes_problem
def elimination_path(
    problem: Problems,
    *,
    group_size: int | None = None,
    r_yy: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
    ridge: Ridge = "auto",
) -> EliminationPath:
    """The groups to keep at every size, by exact backward elimination (group OBS).

    Removes, again and again, the group p of the least cost ½ Σ_r tr(W_p H_pp⁻¹ W_pᵀ), the exact rise of
    min_M ½ E‖y − M x‖². One inversion, 2 d³ + 3 h d² operations for all sizes together.

    Parameters
    ----------
    problem, group_size
        As in ``solve_linear_reconstruction``; a singular r_xx is no error.
    r_yy : (h, h) array, (h,) diagonal or float trace, optional
        E[y yᵀ], one for each of several readers; adds half its trace to the errors.
    ridge : float or "auto"
        ε, relative to each input's own variance. "auto" takes the smallest of 1e-8 … 1e-2 that leaves a
        factorisation, so that repeated or dead inputs are no error.

    Returns
    -------
    EliminationPath

    Raises
    ------
    ValueError, TypeError
        For input that is no such problem.

    References
    ----------
    B. Hassibi, D. Stork, Second order derivatives for network pruning: optimal brain surgeon, 1993.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> x = np.random.default_rng(0).standard_normal((1000, 20))
    >>> y = x[:, :5] @ np.ones((5, 3))
    >>> r_xx, r_yx = x.T @ x / 1000, y.T @ x / 1000
    >>> path = ps.elimination_path((r_xx, r_yx))
    >>> path.keep(5)
    array([0, 1, 2, 3, 4])
    >>> path.error.shape
    (21,)
    """
    problem = problem_of(problem, group_size)
    constant = half_trace(r_yy, [len(C) for C in problem.yx])
    scaled = scale_to_unit_variance(problem)
    order, path = eliminate(scaled, ridge, 0)
    if path.largest_inverse <= TRUSTED_INVERSE:
        error = np.concatenate([[0.0], -np.cumsum(path.change[::-1])])
    else:
        error = nested_errors(scaled, order[::-1], path.ridge)
    dead = all_but(problem.groups, scaled.live)
    error = scaled.energy * np.concatenate([error, np.full(len(dead), error[-1])]) + constant
    return EliminationPath(np.concatenate([dead, scaled.live[order]]), error, path.ridge, problem)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A problem on its live groups alone, every input of every reader scaled to unit variance.

    Groups that no reader sees vary are left out. ``yx`` has at most as many rows as inputs: of more, only the
    triangular factor of a QR decomposition is kept, which has the same products. Its largest entry is 1:
    errors here are the original ones divided by ``energy``.
    """

    live: Indices
    xx: list[Array]
    yx: list[Array]
    core: _core.Problem
    group_size: int
    energy: float


def scale_to_unit_variance(problem: Problem) -> Scaled:
    """The problem in the variables in which groups are selected."""
    size = problem.group_size
    variance = np.sum([np.diag(R) for R in problem.xx], axis=0).reshape(-1, size)
    # With nothing alive, every group stands in as one that costs nothing.
    live = np.flatnonzero(variance.any(1) | ~variance.any())
    columns = group_columns(live, size)
    readers = [_unit_variance(R, C, columns) for R, C in zip(problem.xx, problem.yx, strict=True)]
    peak = max(float(np.abs(C).max()) for _, C in readers) or 1.0
    xx, yx = [R for R, _ in readers], [C / peak for _, C in readers]
    core = _core.Problem(
        xx=xx,
        outputs=[len(C) for C in yx],
        yx=np.ascontiguousarray(np.concatenate(yx).T),
        group_size=size,
        weights=np.ones(len(live)),
    )
    return Scaled(live, xx, yx, core, size, peak**2)


def eliminate(scaled: Scaled, ridge: Ridge, smallest: int) -> tuple[Indices, _core.Selection]:
    """Order of removal down to ``smallest`` live groups, and the core's account of it."""
    check_ridge(ridge)
    ridges = list(RIDGES) if ridge == "auto" else [float(ridge)]
    path = _core.eliminate(scaled.core, ridges=ridges, smallest=min(smallest, len(scaled.live)))
    return np.array(path.order, dtype=np.intp), path


def nested_errors(scaled: Scaled, order: Indices, ridge: float) -> Array:
    """Error of the first 0, 1, 2 … of the live groups in ``order``, from one fresh Cholesky factorisation.

    With R_AA = G Gᵀ and Z = C_A G⁻ᵀ the error is −½‖Z‖²; leading columns of Z belong to leading groups.
    """
    columns = group_columns(order, scaled.group_size)
    explained = np.zeros(len(order))
    for R, C in zip(scaled.xx, scaled.yx, strict=True):
        ordered = R[np.ix_(columns, columns)]
        ordered.flat[:: len(ordered) + 1] += ridge
        G = scipy.linalg.cholesky(ordered, lower=True, overwrite_a=True, check_finite=False)
        Z = scipy.linalg.solve_triangular(G, C[:, columns].T, lower=True, check_finite=False)
        explained += np.square(Z).sum(1).reshape(-1, scaled.group_size).sum(1)
    return np.concatenate([[0.0], -0.5 * np.cumsum(explained)])


def _unit_variance(R: Array, C: Array, columns: Indices) -> tuple[Array, Array]:
    if len(columns) < len(R):
        R, C = R[np.ix_(columns, columns)], C[:, columns]
    dead = np.diag(R) == 0
    unit = np.sqrt(np.where(dead, 1.0, np.diag(R)))
    R = R / unit
    R /= unit[:, None]
    R[dead, dead] = 1.0
    C = C / unit
    return R, np.asarray(np.linalg.qr(C, mode="r")) if len(C) > len(R) else C
