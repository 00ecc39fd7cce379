"""Problems that a solver should survive, by their seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Array

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

# Extended precision: 64 binary digits on x86.
Wide = npt.NDArray[np.longdouble]


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
    norms = group_norms(r_yx[None].astype(np.longdouble), size)[0]
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


def group_norms(M: Wide, size: int) -> Wide:
    """(starts, groups) ‖M_g‖_F of (starts, h, d) matrices."""
    return cast("Wide", np.sqrt(np.square(M).sum(1).reshape(len(M), -1, size).sum(2)))
