"""Is a solver right? Hostile problems, and a judge in extended precision that trusts no solver.

The problem, for correlations R (d × d) and C (h × d), groups g of consecutive columns and weights w_g ≥ 0:

    min_M  P(M) = ½⟨M R, M⟩ − ⟨C, M⟩ + lam Σ_g w_g ‖M_g‖_F

``check_solver(solve)`` tries any function that claims to solve it. An answer is proven wrong by a better one:
from the answer and from starts of its own, the judge goes down by reweighted ridge fits in extended
precision; each of them is only a witness, whose P is then evaluated on the matrices that were given. Where
all groups are penalised, feasible points of the dual say how far down it could be at all.

``python -m pysolve.testing --seconds 60`` does so with the solvers of this package.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array, Mask
from pysolve.solve.certificate import lam_max
from pysolve.solve.solvers import solve_linear_reconstruction

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Extended precision: 64 binary digits on x86.
Wide = npt.NDArray[np.longdouble]

# What rounding may leave between two values of P: of P itself, and of the terms that it sums.
OF_VALUE, OF_TERMS = 1e-9, 1e-13
# Sums of samples leave R indefinite by up to this share of each input's variance, for each input. Exactly as
# it stands, P then has no minimum: a witness counts with the curvature that this share of R_ii adds.
ROUNDING = 2.2e-16
# Steps down from each start.
STEPS = 40
# What a solver may take, in seconds of this process.
PATIENCE = 10.0


@dataclass(frozen=True, eq=False)
class HostileProblem:
    """A problem that a solver should survive; ``hostile_problem(seed)`` makes the same one every time.

    Parameters
    ----------
    r_xx, r_yx : (d, d) and (h, d) arrays
        Of any memory order, strides and write protection.
    lam : float
    group_size : int
    weights : (groups,) array
    M0 : (h, d) array or None
        A start, of any scale.
    kinds : tuple of str
        What is hostile about it.
    seed : int
    """

    r_xx: Array
    r_yx: Array
    lam: float
    group_size: int
    weights: Array
    M0: Array | None
    kinds: tuple[str, ...]
    seed: int

    @property
    def groups(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        h, d = self.r_yx.shape
        kinds = ", ".join(self.kinds)
        return f"hostile_problem({self.seed}): {h} x {d}, groups of {self.group_size}, {kinds}"


class Solve(Protocol):
    """A solver: returns M (h, d), or an object with M and claims: gap, objective, keep, shift."""

    def __call__(
        self, r_xx: Array, r_yx: Array, lam: float, *, group_size: int, weights: Array, M0: Array | None
    ) -> Any: ...


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


def hostile_problem(seed: int) -> HostileProblem:
    """Problem number ``seed``: odd data, copies, dead groups, scales, sums, weights, starts and layouts."""
    rng = np.random.default_rng(seed)
    kinds: list[str] = []

    def one(*choices: str) -> str:
        kinds.append(str(rng.choice(choices)))
        return kinds[-1]

    size = int(rng.integers(1, 4))
    groups = int(rng.integers(1, 13))
    d, h = size * groups, int(rng.choice([1, 2, 5, size * groups + 2]))
    n = int(rng.integers(1, 3 * d + 4))
    data = one("normal", "normal", "integers", "powers", "constant", "rectified", "low rank")
    if data == "integers":
        x = rng.integers(-3, 9, (n, d)).astype(np.float64)
    elif data == "powers":
        x = (rng.random((n, 1)) + 10 * rng.random()) ** np.arange(d) * 10.0 ** -np.arange(d)
    elif data == "low rank":
        rank = int(rng.integers(1, d + 1))
        x = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    else:
        x = rng.standard_normal((n, d))
    if data == "constant":
        x += 10.0 ** rng.uniform(0, 4) * rng.random(d)
        x[:, rng.integers(d)] = 1.0
    if data == "rectified":
        x = np.maximum(x, 0)
    copies = one("no copies", "no copies", "copies", "near copies")
    for _ in range(int(rng.integers(1, d + 1)) if copies != "no copies" else 0):
        i, j = rng.integers(d, size=2)
        near = 0.0 if copies == "copies" else 10.0 ** rng.uniform(-12, -1)
        x[:, i] = x[:, j] + near * rng.standard_normal(n)
    if rng.random() < 0.2:
        kinds.append("dead")
        dead = rng.random(groups) < 0.3
        x[:, np.repeat(dead, size)] = 0.0
    y = x @ rng.standard_normal((d, h)) + rng.choice([0.0, 1e-3, 1.0]) * rng.standard_normal((n, h))
    scale = one("even", "even", "uneven", "wild", "tiny", "huge")
    if scale in ("uneven", "wild"):
        x *= 10.0 ** (rng.uniform(-3, 3, d) if scale == "uneven" else rng.uniform(-6, 6, d))
    if scale in ("tiny", "huge"):
        x *= 1e-12 if scale == "tiny" else 1e12
    y *= 10.0 ** rng.choice([-12, -4, 0, 0, 0, 4, 12])
    r_xx, r_yx = x.T @ x / n, y.T @ x / n
    variance = np.diag(r_xx)[np.diag(r_xx) > 0]
    # Squares that single precision holds with all their digits.
    single = (
        scale not in ("tiny", "huge") and variance.min(initial=1) > 1e-34 and variance.max(initial=1) < 1e34
    )
    if one("float64", "float64", "float64", "float32" if single else "float64") == "float32":
        narrow = x.astype(np.float32)
        r_xx = (narrow.T @ narrow / np.float32(n)).astype(np.float64)
        r_yx = (y.astype(np.float32).T @ narrow / np.float32(n)).astype(np.float64)
    weights = np.ones(groups)
    weighing = one("weights 1", "weights 1", "weights", "zero weights", "zero weights")
    if weighing == "weights":
        weights = 10.0 ** rng.uniform(-2, 2, groups)
    elif weighing == "zero weights":
        weights[rng.permutation(groups)[: rng.integers(1, groups + 1)]] = 0.0
    # From 1e-8 of the lam at which all penalised groups would be zero, were there no unpenalised ones.
    norms = _norms(r_yx[None].astype(np.longdouble), size)[0]
    highest = float(np.max(norms[weights > 0] / weights[weights > 0], initial=0.0)) or 1.0
    lam = highest * 10.0 ** rng.uniform(-8 if rng.random() < 0.3 else -3, 0.1)
    M0 = None
    if rng.random() < 0.4:
        exponent = float(rng.choice([-320, -300, -160, -100, -30, -8, 0, 8, 30, 100, 160, 300]))
        kinds.append(f"start 1e{exponent:.0f}")
        spread = np.where(rng.random(groups) < 0.5, 1.0, rng.choice([0.0, 1.0, 1e-8]))
        M0 = rng.standard_normal((h, d)) * np.repeat(spread, size) * 10.0 ** max(exponent, -323.0)
    layout = one("rows", "rows", "columns", "strided", "read-only")
    xx, yx = (_laid_out(np.asarray(one, np.float64), layout) for one in (r_xx, r_yx))
    return HostileProblem(xx, yx, float(lam), size, weights, M0, tuple(kinds), seed)


def hostile_problems() -> SearchStrategy[HostileProblem]:
    """``hostile_problem`` of any seed as a strategy of hypothesis, which must be installed."""
    from hypothesis import strategies

    return strategies.integers(0, 2**32 - 1).map(hostile_problem)


def judge(problem: HostileProblem, answer: Any, *, tol: float | None = None) -> Verdict:
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


def check_solver(solve: Solve, *, problems: int = 200, seed: int = 0, tol: float | None = None) -> None:
    """AssertionError with seed and fault at the first hostile problem that a solver gets wrong.

    Parameters
    ----------
    solve : callable
        ``solve(r_xx, r_yx, lam, group_size=, weights=, M0=)`` returning M, or an object with M and claims as
        for ``judge``.
    problems, seed : int
        How many, from which on.
    tol : float, optional
        As for ``judge``; without it, only what the solver claims is judged.

    Examples
    --------
    >>> import pysolve as ps
    >>> ps.check_solver(ps.newton, problems=3)
    """
    for number in range(seed, seed + problems):
        problem = hostile_problem(number)
        faults = judge_solver(solve, problem, tol=tol).faults
        assert not faults, f"{problem}: {'; '.join(faults)}"


def judge_solver(solve: Solve, problem: HostileProblem, *, tol: float | None = None) -> Verdict:
    """``judge`` the answer of a solver to one problem, and the time it takes."""
    began = time.process_time()
    answer = solve(
        problem.r_xx,
        problem.r_yx,
        problem.lam,
        group_size=problem.group_size,
        weights=problem.weights,
        M0=problem.M0,
    )
    seconds = time.process_time() - began
    verdict = judge(problem, answer, tol=tol)
    if seconds > PATIENCE:
        verdict = replace(verdict, faults=(*verdict.faults, f"took {seconds:.1f} s"))
    return verdict


def own_solver(seed: int) -> Solve:
    """A solver of this package: method, number of iterations and of readers by ``seed``."""
    rng = np.random.default_rng([seed, 1])
    method = str(rng.choice(["newton", "newton", "fista", "alternate_minimization", "proximal_gradient"]))
    max_iter, split = int(rng.choice([2000, 2000, 2000, 3, 0])), rng.random() < 0.2

    def solve(
        r_xx: Array, r_yx: Array, lam: float, *, group_size: int, weights: Array, M0: Array | None
    ) -> Any:
        how: dict[str, Any] = {"group_size": group_size, "weights": weights}
        problem: Any = (r_xx, r_yx)
        if split and len(r_yx) > 1:
            problem = [(r_xx, r_yx[:1]), (r_xx, r_yx[1:])]
        # Where all penalised groups are zero from, and not below.
        highest = lam_max(problem, **how)
        if highest:
            above = solve_linear_reconstruction(problem, highest * (1 + 1e-9), method, **how, max_iter=50)
            assert not weights[above.keep].any(), "a penalised group is not zero above lam_max"
            below = solve_linear_reconstruction(problem, 0.9 * highest, method, **how, max_iter=50)
            assert weights[below.keep].any(), "all penalised groups are zero below lam_max"
        start: Any = (M0[:1], M0[1:]) if isinstance(problem, list) and M0 is not None else M0
        found = solve_linear_reconstruction(problem, lam, method, **how, M0=start, max_iter=max_iter)
        assert found.converged == (found.relative_gap <= 1e-8), f"{found.status} at {found.relative_gap:.1e}"
        return found

    return solve


def main() -> int:
    """Try this package's solvers for as long as told; 1 where one was wrong."""
    parser = argparse.ArgumentParser(prog="python -m pysolve.testing", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--problems", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, help="of the first problem; by default another one each time")
    options = parser.parse_args()
    first = int(np.random.default_rng().integers(2**31)) if options.seed is None else options.seed
    print(f"problems from seed {first} on", flush=True)
    began, counts, seed = time.monotonic(), Counter[str](), first
    while time.monotonic() - began < options.seconds and seed - first != options.problems:
        problem = hostile_problem(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                faults = judge_solver(own_solver(seed), problem).faults
        except Exception as error:
            faults = (f"{type(error).__name__}: {error}",)
        counts["right" if not faults else "wrong"] += 1
        if faults:
            print(f"{problem}: {'; '.join(faults)}", flush=True)
        seed += 1
    print(f"{seed - first:,} problems, seeds {first} to {seed - 1}: {counts['wrong']} wrong")
    return 1 if counts["wrong"] else 0


def _refused(fault: str) -> Verdict:
    return Verdict(float("nan"), float("inf"), float("-inf"), float("nan"), (fault,))


def _laid_out(matrix: Array, layout: str) -> Array:
    """The same numbers in another memory order."""
    if layout == "columns":
        return np.asfortranarray(matrix)
    if layout == "strided":
        wide = np.zeros((2 * matrix.shape[0], 3 * matrix.shape[1]))
        wide[::2, ::3] = matrix
        return wide[::2, ::3]
    if layout == "read-only":
        matrix = matrix.copy()
        matrix.flags.writeable = False
    return matrix


def _norms(M: Wide, size: int) -> Wide:
    """(starts, groups) ‖M_g‖_F of (starts, h, d) matrices."""
    return cast("Wide", np.sqrt(np.square(M).sum(1).reshape(len(M), -1, size).sum(2)))


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
        penalty = self.lam * (self.weights * _norms(M, self.size)).sum(1)
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
        length = _norms(own, self.size)[0]
        slope = _norms(own @ self.R - self.C, self.size)[0]
        power = variance.reshape(-1, self.size).max(1)
        # A zero group that wants in would, alone, come to this.
        excess = np.maximum(slope - self.lam * self.weights, 0) / np.where(power > 0, power, 1)
        alone = _norms(self.C[None], self.size)[0] / np.where(power > 0, power, 1)
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
            lengths = _norms(N, self.size)
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
        far, near = (_norms((X @ self.R - self.C)[None], self.size)[0] for X in (N, B))
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


if __name__ == "__main__":
    raise SystemExit(main())
