"""Bounded inputs for property tests. Correlations come from samples, so every one of them is possible."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Instance:
    """A reconstruction problem; lam is the given share of λ_max."""

    r_xx: np.ndarray
    r_yx: np.ndarray
    r_yy: np.ndarray
    group_size: int
    share: float

    @property
    def groups(self) -> int:
        return len(self.r_xx) // self.group_size

    @property
    def lam_max(self) -> float:
        blocks = np.square(self.r_yx).sum(0).reshape(-1, self.group_size)
        return float(np.sqrt(blocks.sum(1)).max())

    @property
    def lam(self) -> float:
        return self.share * self.lam_max


seeds = st.integers(0, 2**32 - 1)


def correlated_samples(rng, n, d, rank, repeated, dead, spread):
    """n samples of d inputs of the given rank; some channels repeated, some always 0, scales over decades."""
    x = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    for _ in range(repeated):
        i, j = rng.integers(d, size=2)
        x[:, i] = x[:, j]
    x *= 10.0 ** rng.uniform(-spread, spread, d)
    x[:, rng.permutation(d)[:dead]] = 0.0
    return x


SHARES = st.floats(0.01, 0.9)


@st.composite
def instances(draw, max_groups=6, max_group_size=9, spread=3.0, shares=SHARES):
    """Rank deficient, repeated and all-zero channels, h > d and h = 1, groups of 1 to 9, wild scales."""
    rng = np.random.default_rng(draw(seeds))
    group_size = draw(st.integers(1, max_group_size))
    d = group_size * draw(st.integers(1, max_groups))
    h = draw(st.sampled_from([1, 2, 5, d + 3]))
    n = draw(st.integers(2, 3 * d + 2))
    x = correlated_samples(
        rng,
        n,
        d,
        rank=draw(st.integers(1, d)),
        repeated=draw(st.integers(0, 2)),
        dead=draw(st.integers(0, d - 1)),
        spread=draw(st.sampled_from([0.0, 0.5, spread])),
    )
    y = x @ rng.standard_normal((d, h)) + draw(st.sampled_from([0.0, 0.3])) * rng.standard_normal((n, h))
    y *= 10.0 ** draw(st.sampled_from([-4, 0, 4]))
    return Instance(x.T @ x / n, y.T @ x / n, y.T @ y / n, group_size, draw(shares))


@st.composite
def hostile_instances(draw):
    """Scales from 1e-12 to 1e12, repeated and nearly dependent columns, lam from 1e-8 λ_max up."""
    rng = np.random.default_rng(draw(seeds))
    group_size = draw(st.integers(1, 4))
    d = group_size * draw(st.integers(1, 8))
    n, h = draw(st.integers(1, 3 * d)), draw(st.sampled_from([1, 3, d + 2]))
    x = rng.standard_normal((n, d))
    for _ in range(draw(st.integers(0, d))):
        i, j = rng.integers(d, size=2)
        x[:, i] = x[:, j] + draw(st.sampled_from([0.0, 1e-12, 1e-7, 1e-3])) * rng.standard_normal(n)
    y = x @ rng.standard_normal((d, h)) + draw(st.sampled_from([0.0, 1.0])) * rng.standard_normal((n, h))
    x *= 10.0 ** rng.uniform(-12, 12, d)
    y *= 10.0 ** draw(st.integers(-12, 12))
    share = 10.0 ** draw(st.floats(-8, 0))
    return Instance(x.T @ x / n, y.T @ x / n, y.T @ y / n, group_size, share)


@st.composite
def nearly_singular(draw):
    """Two unpenalised groups or more that are nearly copies, powers of one number or combinations of others,
    or one that is constant; and the weights."""
    rng = np.random.default_rng(draw(seeds))
    group_size, groups = draw(st.integers(1, 3)), draw(st.integers(2, 7))
    d, n, h = group_size * groups, draw(st.integers(5, 60)), draw(st.sampled_from([1, 2, 4]))
    free = rng.permutation(groups)[: draw(st.integers(1, groups - 1))]
    u = (free[:, None] * group_size + np.arange(group_size)).ravel()
    x, near = rng.standard_normal((n, d)), 10.0 ** draw(st.floats(-9, -1))
    kind = draw(st.sampled_from(["copies", "powers", "constant", "combinations"]))
    if kind == "copies":
        x[:, u[1:]] = x[:, u[:1]] + near * rng.standard_normal((n, len(u) - 1))
    elif kind == "powers":
        x[:, u] = (rng.random((n, 1)) + 10 * rng.random()) ** np.arange(len(u))
    elif kind == "constant":
        x += 10.0 ** rng.uniform(0, 4) * rng.random(d)
        x[:, u[0]] = 1.0
    else:
        p = np.setdiff1d(np.arange(d), u)[::2]
        x[:, p] = x[:, u] @ rng.standard_normal((len(u), len(p))) + near * rng.standard_normal((n, len(p)))
    y = x @ rng.standard_normal((d, h)) * 10.0 ** rng.uniform(-3, 0) + rng.standard_normal((n, h))
    x *= 10.0 ** rng.uniform(-3, 3, d) if draw(st.booleans()) else 1.0
    weights = np.where(np.isin(np.arange(groups), free), 0.0, 1.0)
    share = 10.0 ** draw(st.floats(-4, -0.1))
    return Instance(x.T @ x / n, y.T @ x / n, y.T @ y / n, group_size, share), weights
