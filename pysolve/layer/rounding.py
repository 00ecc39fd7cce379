"""Rounding of weights in the metric of a layer's inputs.

    min_M  ½ Σ_i w_i ‖M_i − V_i‖²_A + Σ_ij price(M_ij)

over M whose entries are among the values allowed there, zero outside the mask; w weighs the outputs, and
prices are for values that cost bits. First with feedback: one input after the other, each rounded after
compensating the errors so far; then by descent: each rounded again, when all others are known, and the
allowed values fitted to the codes in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pysolve import _core
from pysolve.correlations import Array, Indices, Mask
from pysolve.forms import QuantForm
from pysolve.layer.layer_problem import LayerProblem, blocks, refit_rows

Codes = npt.NDArray[np.int64]
Columns = int | Indices

# Columns that are rounded before the others are compensated for them.
_WIDTH = 64
# Share of the loss that a pass has to gain for another one to follow.
_GAIN = 1e-3
# Factor of the layer's largest weight beyond which an input keeps its own weights.
_WILD = 2.0


@dataclass(frozen=True, eq=False)
class Target:
    """The objective ½ Σ_i w_i ‖M_i − V_i‖²_A of rounded weights M, zero outside the mask (None: all free).

    V (h, d) are the best weights of any value, zero outside the mask; A (d, d), positive definite, is the
    metric of a row (None: the identity); ``outputs`` (h,) is w, the weight of each output's error.
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
        """(d,) factors of the square of a change of one input's weight alone."""
        return np.ones(self.V.shape[1]) if self.A is None else np.diag(self.A)


def target_of(problem: LayerProblem, mask: Mask | None, outputs: Array | None = None) -> Target:
    """The target of a layer: the best weights on the mask, and the metric of its inputs."""
    V = problem.optimum() / problem.unit if mask is None else refit_rows(problem, mask)
    # The best weights of inputs that hardly vary gain next to nothing, but may be millions.
    wild = np.abs(V).max(0, initial=0.0) > _WILD * np.abs(problem.W).max(initial=0.0)
    V[:, wild] = problem.W[:, wild] if mask is None else np.where(mask, problem.W, 0.0)[:, wild]
    A = problem.metric()
    A *= problem.unit
    A *= problem.unit[:, None]
    return Target(V, A, mask, outputs)


class Levels(Protocol):
    """The values that a weight may take: a ``Grid``, or ``SharedValues``."""

    @property
    def compiled(self) -> _core.Levels:
        """The same values, for whole blocks of inputs."""

    def codes(self, values: Array, columns: Columns, curvature: npt.ArrayLike) -> Codes:
        """Codes of least ½ curvature (value − level)² + price, of the values' shape: (h,) or (h, n)."""

    def values(self, codes: Codes, columns: Columns) -> Array:
        """Values of the codes."""

    def zero_codes(self, columns: Columns) -> Codes | int:
        """Codes of zero."""

    def refit(self, codes: Codes, target: Target) -> Self:
        """Values of least loss, and prices, for given codes."""

    def price(self, codes: Codes) -> float:
        """Price of all codes together."""

    def form(self, codes: Codes) -> QuantForm:
        """The weight of those codes as it is stored."""


Kind = TypeVar("Kind", bound=Levels)


def round_nearest(target: Target, levels: Levels) -> Codes:
    """Codes of the values nearest to V, (h, d)."""
    columns = np.arange(target.V.shape[1])
    return _rounded(target, levels, target.V, columns, np.outer(target.rows, target.diagonal))


def round_with_feedback(target: Target, levels: Levels) -> Codes:
    """Codes (h, d) of one sweep over the inputs: Babai's nearest plane, which is GPTQ's rounding.

    With A = L Lᵀ the loss is ½ Σ_k ‖Σ_{j ≥ k} (m_j − v_j) L_jk‖², so from the last input on, each is rounded
    after v_k − Σ_{j > k} (m_j − v_j) L_jk / L_kk, where its own term is least. Inputs of most energy come
    first, that is last in L. Takes ½ h d² + d³/6 multiplications.

    References
    ----------
    E. Frantar et al., GPTQ, 2023. J. Chen et al., The geometry of LLM quantization, 2025.
    """
    if target.A is None:
        return round_nearest(target, levels)
    back = _by_energy(target)[::-1]
    L, V, weights = _factor(target.A, back), target.V, target.rows
    # Inputs in rows, so that each is contiguous.
    codes, errors = np.empty(V.shape[::-1], np.int64), np.empty(V.shape[::-1])
    for b in range(len(back), 0, -_WIDTH):
        # The last input first.
        own = np.arange(b - 1, max(0, b - _WIDTH) - 1, -1)
        owed, inputs = L[b:, own].T @ errors[b:], back[own]
        divisor = L[own, own]
        codes[inputs], errors[own] = levels.compiled.round_block(
            base=V.T[inputs],
            slope=owed,
            divisor=divisor,
            power=np.square(divisor),
            outputs=weights,
            coupling=L[np.ix_(own, own)],
            inputs=inputs,
            mask=None if target.mask is None else target.mask.T[inputs],
        )
    return np.ascontiguousarray(codes.T)


def descend(target: Target, levels: Levels, codes: Codes) -> Codes:
    """Codes after one pass of coordinate descent: each input at its best with the others fixed.

    The loss never rises. Takes 2 h d² multiplications.
    """
    if target.A is None:
        return round_nearest(target, levels)
    A, order, weights = target.A, _by_energy(target), target.rows
    M = np.ascontiguousarray(levels.values(codes, np.arange(len(A))).T)
    # A copy even of one row, whose transpose is contiguous as it is.
    codes, slope = codes.T.copy(), A @ (M - target.V.T)
    for a in range(0, len(A), _WIDTH):
        own = order[a : a + _WIDTH]
        inner, divisor = A[np.ix_(own, own)], A[own, own]
        codes[own], change = levels.compiled.round_block(
            base=M[own],
            slope=slope[own],
            divisor=divisor,
            power=divisor,
            outputs=weights,
            coupling=inner,
            inputs=own,
            mask=None if target.mask is None else target.mask.T[own],
        )
        M[own] += change
        slope += A[:, own] @ change
    return np.ascontiguousarray(codes.T)


def settle(target: Target, levels: Kind, codes: Codes, passes: int) -> tuple[Kind, Codes, float]:
    """Values fitted to the codes and codes to them, in turn; both, and their loss, which never rises."""
    levels, loss = _refitted(target, levels, codes, _loss(target, levels, codes))
    for _ in range(passes if loss else 0):
        last = loss
        codes = descend(target, levels, codes)
        levels, loss = _refitted(target, levels, codes, _loss(target, levels, codes))
        if not loss < (1 - _GAIN) * last:
            break
    return levels, codes, loss


def round_best(target: Target, levels: Kind, rounds: int, passes: int) -> tuple[Kind, Codes]:
    """Feedback from the values where the round before settled, as long as that gains; the best of all."""
    best, codes, least = levels, round_nearest(target, levels), np.inf
    for _ in range(rounds):
        # In small groups the feedback can ask for values beyond the range, and be worse than none.
        start, other = round_with_feedback(target, levels), round_nearest(target, levels)
        if _loss(target, levels, other) < _loss(target, levels, start):
            start = other
        levels, found, loss = settle(target, levels, start, passes)
        if not loss < least:
            break
        best, codes, least = levels, found, loss
    return best, codes


def _loss(target: Target, levels: Levels, codes: Codes) -> float:
    return target.loss(levels.values(codes, np.arange(codes.shape[1]))) + levels.price(codes)


def _rounded(
    target: Target, levels: Levels, values: Array, columns: Columns, curvature: npt.ArrayLike
) -> Codes:
    """The best codes, those of zero outside the mask."""
    codes = levels.codes(values, columns, curvature)
    if target.mask is None:
        return codes
    return np.where(target.mask[:, columns], codes, levels.zero_codes(columns))


def _refitted(target: Target, levels: Kind, codes: Codes, loss: float) -> tuple[Kind, float]:
    """Better values for the codes, if they still are in single precision; and the loss."""
    fitted = levels.refit(codes, target)
    new = _loss(target, fitted, codes)
    return (fitted, new) if new < loss else (levels, loss)


def _by_energy(target: Target) -> Indices:
    """Inputs by falling ‖V_j‖² A_jj: those that follow compensate their errors.

    On layers of LeNet-5 and ResNet-20 at 2 … 4 bits, feedback alone leaves 3 to 23 % less error in this order
    than in the inputs' own, and 15 % less to 3 % more than by falling A_jj.
    """
    energy = np.einsum("i,ij,ij->j", target.rows, target.V, target.V)
    return np.argsort(-energy * target.diagonal, kind="stable")


def _factor(A: Array, order: Indices) -> Array:
    """Lower triangular L with L Lᵀ = A, rows and columns in a given order."""
    # Symmetric, so the transpose is the same matrix in the order of LAPACK.
    L = scipy.linalg.cholesky(A[np.ix_(order, order)].T, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(L)
