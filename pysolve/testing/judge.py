"""A judge in extended precision, which trusts no solver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pysolve.correlations import Array, Mask
from pysolve.testing.problems import HostileProblem, Wide, group_norms

# What rounding may leave between two values of P: of P itself, and of the terms that it sums.
OF_VALUE, OF_TERMS = 1e-9, 1e-13
# Sums of samples leave R indefinite by up to this share of each input's variance, for each input. Exactly as
# it stands, P then has no minimum: a witness counts with the curvature that this share of R_ii adds.
ROUNDING = 2.2e-16
# Steps down from each start.
STEPS = 40


@dataclass(frozen=True)
class Verdict:
    """What the judge found of one answer.

    Parameters
    ----------
    objective : float
        P of the answer and the given matrices.
    lowest : float
        The lowest P that was found; inf for an answer that is not finite.
    bound : float
        No matrix has a lower P, as far as R is positive semi-definite; −inf where that is not known.
    terms : float
        Sum of the sizes of P's terms, by which rounding goes.
    faults : tuple of str
        What is wrong, in words; empty for a good answer.
    """

    objective: float
    lowest: float
    bound: float
    terms: float
    faults: tuple[str, ...]


def judge(problem: HostileProblem, answer: object, *, tol: float | None = None) -> Verdict:
    """What is wrong with an answer, by extended precision alone.

    Parameters
    ----------
    problem : HostileProblem
    answer : (h, d) array, or an object with M
        And, where it has them, ``gap`` (a bound on P(M) − min P), ``objective``, ``keep`` (groups that are
        not zero) and ``shift`` (the amount by which the diagonal of r_xx was raised), which are judged, too.
    tol : float, optional
        P(M) − min P as a share of |P(M)| that is asked for, whatever the answer claims.

    Returns
    -------
    Verdict
    """
    M = getattr(answer, "M", answer)
    # Of several readers of the same inputs.
    M = np.vstack(M) if isinstance(M, tuple) else np.asarray(M, np.float64)
    if M.shape != problem.r_yx.shape:
        return _refused(f"M is {M.shape}, not {problem.r_yx.shape}")
    if not np.isfinite(M).all():
        return _refused("M is not finite")
    exact = _Exact.of(problem, float(getattr(answer, "shift", 0.0)))
    value, terms = (float(part[0]) for part in exact.values(M[None].astype(np.longdouble)))
    found, bound = exact.descend(M)
    lowest = min(float(found), value)
    noise = OF_VALUE * abs(value) + OF_TERMS * terms
    faults = []
    gap = getattr(answer, "gap", None)
    if gap is not None:
        if not gap >= 0:
            faults.append(f"the gap is {gap}")
        if value - lowest > gap * (1 + 1e-6) + noise:
            faults.append(f"P is {value - lowest:.3g} above another, the gap said {gap:.3g} (P {value:.3g})")
    if tol is not None and value - lowest > tol * abs(value) + noise:
        faults.append(f"P is {value - lowest:.3g} above another, of {value:.3g}")
    claimed = getattr(answer, "objective", None)
    if claimed is not None and not abs(claimed - value) <= 1e-9 * terms:
        faults.append(f"the objective is {value:.12g}, not {claimed:.12g}")
    for name in ("relative_gap", "kkt", "objective"):
        if not np.isfinite(getattr(answer, name, 0.0)) and np.isfinite(gap or 0.0):
            faults.append(f"{name} is {getattr(answer, name)}")
    keep = getattr(answer, "keep", None)
    if keep is not None:
        kept = np.flatnonzero(M.any(0).reshape(-1, problem.group_size).any(1))
        if not np.array_equal(keep, kept):
            faults.append(f"keep is {list(keep)}, but groups {kept.tolist()} are not zero")
    return Verdict(value, lowest, bound, terms, tuple(faults))


def _refused(fault: str) -> Verdict:
    return Verdict(float("nan"), float("inf"), float("-inf"), float("nan"), (fault,))


@dataclass(frozen=True, eq=False)
class _Exact:
    """A problem in extended precision; matrices M come as (starts, h, d)."""

    R: Wide
    C: Wide
    lam: np.longdouble
    weights: Wide
    size: int
    raised: Wide

    @classmethod
    def of(cls, problem: HostileProblem, shift: float) -> _Exact:
        R = np.asarray(problem.r_xx, np.longdouble)
        variance: Wide = np.maximum(np.diag(R), np.longdouble(0))
        share = np.longdouble(ROUNDING * len(R) + shift / (float(variance.max()) or 1.0))
        return cls(
            R / 2 + R.T / 2,
            np.asarray(problem.r_yx, np.longdouble),
            np.longdouble(problem.lam),
            problem.weights.astype(np.longdouble),
            problem.group_size,
            share * variance,
        )

    def values(self, M: Wide) -> tuple[Wide, Wide]:
        """P of each M, and the sum of the sizes of its terms."""
        penalty = self.lam * (self.weights * group_norms(M, self.size)).sum(1)
        smooth = (0.5 * (M @ self.R) * M).sum((1, 2)) - (self.C * M).sum((1, 2))
        size = np.abs(M)
        terms = (0.5 * (size @ np.abs(self.R)) * size).sum((1, 2)) + (np.abs(self.C) * size).sum((1, 2))
        return smooth + penalty, terms + penalty

    def descend(self, M: Array) -> tuple[np.longdouble, float]:
        """The lowest P on the way down from M and from starts with all groups, and a lower bound of all P."""
        variance = np.maximum(np.diag(self.R), 0)
        live = variance > 0
        unit = np.sqrt(np.where(live, variance, 1))
        own = M[None].astype(np.longdouble)
        length = group_norms(own, self.size)[0]
        slope = group_norms(own @ self.R - self.C, self.size)[0]
        power = variance.reshape(-1, self.size).max(1)
        # A zero group that wants in would, alone, come to this.
        excess = np.maximum(slope - self.lam * self.weights, 0) / np.where(power > 0, power, 1)
        alone = group_norms(self.C[None], self.size)[0] / np.where(power > 0, power, 1)
        entering = np.where(length > 0, length, excess)
        starts = np.stack([entering, np.maximum(entering, 1e-4 * alone), np.maximum(alone, entering), alone])
        best, bound = np.longdouble(0), -np.inf
        scales = starts
        least_squares = self._fit(np.longdouble(1e12) * starts[-1:], unit, live)[0]
        for _ in range(STEPS):
            N = self._fit(scales, unit, live)
            values = self.values(N)[0] + 0.5 * (np.square(N) * self.raised).sum((1, 2))
            values = np.where(np.isfinite(values), values, np.inf)
            best = min(best, values.min())
            lengths = group_norms(N, self.size)
            scales = np.where(np.isfinite(lengths), lengths, scales)
            bound = max(bound, self._bound(N[int(values.argmin())], least_squares))
        return best, bound

    def _fit(self, scales: Wide, unit: Wide, live: Mask) -> Wide:
        """argmin ½⟨N R, N⟩ − ⟨C, N⟩ + ½ lam Σ_g w_g ‖N_g‖²/scale_g for each start: P's majorant."""
        pull = self.lam * self.weights
        free = np.repeat(pull == 0, self.size) & live
        # S = I + D^½ R D^½ for penalised columns, R itself, at unit diagonal, for the others.
        with np.errstate(all="ignore"):
            root = np.sqrt(scales / np.where(pull > 0, pull, 1))
        root = np.where(free, 1 / unit, np.repeat(root, self.size, axis=1) * live)
        S = root[:, :, None] * (self.R + np.diag(self.raised)) * root[:, None, :]
        columns = np.arange(len(unit))
        S[:, columns, columns] += np.where(free, np.longdouble(0), np.longdouble(1))
        # Unpenalised columns last, where next to nothing may be left of them.
        order = np.concatenate([np.flatnonzero(~free), np.flatnonzero(free)])
        Y = _solved(S[:, order][:, :, order], (self.C * root[:, None, :])[:, :, order])
        N = np.empty_like(Y)
        N[:, :, order] = Y
        return N * root[:, None, :]

    def _bound(self, N: Wide, B: Wide) -> float:
        """−½⟨X R, X⟩ for X from N towards least squares B, until ‖(X R − C)_g‖ ≤ lam w_g for every group."""
        if not (self.weights > 0).all() or not np.isfinite(N).all() or not np.isfinite(B).all():
            return -np.inf
        room = self.lam * self.weights
        far, near = (group_norms((X @ self.R - self.C)[None], self.size)[0] for X in (N, B))
        if np.any(near > room):
            return -np.inf
        outside = far > room
        s = np.min((room - near)[outside] / (far - near)[outside], initial=np.longdouble(1))
        X = s * N + (1 - s) * B
        return float(-0.5 * ((X @ self.R) * X).sum())


def _solved(S: Wide, right: Wide) -> Wide:
    """X with X S = right for positive semi-definite S, by Cholesky; what vanishing pivots stand for is 0."""
    n = S.shape[-1]
    L, X, alive = S.copy(), right.copy(), np.ones(S.shape[:-1], bool)
    smallest = n * np.finfo(np.longdouble).eps * 16
    for k in range(n):
        pivot = L[:, k, k]
        alive[:, k] = pivot > smallest
        root = np.sqrt(np.where(alive[:, k], pivot, 1))
        column = np.where(alive[:, k, None], L[:, :, k] / root[:, None], 0)
        column[:, :k] = 0
        L[:, :, k] = column
        L[:, k + 1 :, k + 1 :] -= column[:, k + 1 :, None] * column[:, None, k + 1 :]
        X[:, :, k] = np.where(alive[:, k, None], X[:, :, k] / root[:, None], 0)
        X[:, :, k + 1 :] -= X[:, :, k, None] * column[:, None, k + 1 :]
    for k in range(n - 1, -1, -1):
        tail = (X[:, :, k + 1 :] * L[:, None, k + 1 :, k]).sum(2)
        root = np.where(alive[:, k], L[:, k, k], 1)
        X[:, :, k] = np.where(alive[:, k, None], (X[:, :, k] - tail) / root[:, None], 0)
    return X
