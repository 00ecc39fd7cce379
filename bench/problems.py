"""The reconstruction problems that the solvers are timed on."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ReconstructionProblem:
    """min_M ½⟨M R, M⟩ − ⟨C, M⟩ + lam Σ_g ‖M_g‖."""

    name: str
    r_xx: np.ndarray
    r_yx: np.ndarray
    lam: float
    group_size: int = 1


def published(
    d: int, h: int, r: int, n: int, lam: float, *, name: str, seed: int = 0
) -> ReconstructionProblem:
    """The published random problem: x of rank r, y linear in x, correlations divided by d as published."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((d, r)) @ rng.standard_normal((r, n))
    y = rng.standard_normal((h, d)) @ x
    return ReconstructionProblem(name, (x / d) @ (x.T / n), (y / d) @ (x.T / n), lam)


def toy() -> ReconstructionProblem:
    return published(100, 200, 80, 10_000, 0.1, name="toy, d=100 h=200")


def benchmark() -> ReconstructionProblem:
    return published(500, 200, 450, 60_000, 0.1, name="benchmark, d=500 h=200")


def relu_layer(d: int, h: int, share: float, *, group_size: int = 1, seed: int = 0) -> ReconstructionProblem:
    """A layer after a ReLU, uncentred: correlated inputs whose spectrum decays, and random outgoing weights."""
    rng = np.random.default_rng(seed)
    n, latent = 4 * d, d // 16
    factors = rng.standard_normal((n, latent)) / np.arange(1, latent + 1)
    x = factors @ rng.standard_normal((latent, d)) / np.sqrt(latent) + 0.03 * rng.standard_normal((n, d))
    x = np.maximum(x + 0.5, 0)
    r_xx = x.T @ x / n
    r_yx = rng.standard_normal((h, d)) / np.sqrt(d) @ r_xx
    lam_max = np.sqrt(np.square(r_yx).sum(0).reshape(-1, group_size).sum(1)).max()
    name = f"ReLU layer, d={d} h={h}" + (f" groups of {group_size}" if group_size > 1 else "")
    return ReconstructionProblem(f"{name}, {share} lam_max", r_xx, r_yx, share * lam_max, group_size)
