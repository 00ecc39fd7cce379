"""An exact change of variables that brings a problem to the form the compiled core expects.

Unpenalised groups u are minimised out (Schur complement): R − R_·u R_uu⁺ R_u·, C − C_u R_uu⁺ R_u·; where
R_uu is nearly singular this is inexact, and what comes back is refitted to the problem itself. More outputs
than inputs are rotated away: C = Q C′ (thin QR), M = Q M′. Groups are scaled to unit mean diagonal, so that
the scale of single channels does not slow the first-order solvers, and C to λ_max = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pysolve import _core
from pysolve.correlations import Array, Indices, group_columns, group_norms
from pysolve.solve.lapack import eigh
from pysolve.solve.problem import Problem, factors

EPS = float(np.finfo(np.float64).eps)
# Smaller numbers have no exact squares.
TINY = float(np.sqrt(np.finfo(np.float64).tiny)) / EPS
# An input counts when what the unpenalised ones leave of its variance is as many times its rounding.
TRUSTED = 1e4


@dataclass(frozen=True, eq=False)
class Reader:
    """One reader on the penalised columns p alone: M_p = rotation @ M′, M_u = base − M_p @ back."""

    xx: Array
    yx: Array
    back: Array
    base: Array
    root: Array
    rotation: Array | None


@dataclass(frozen=True, eq=False)
class Scaled:
    """A problem in the core's variables, and the way back.

    There, lam is lam/unit, the objective is the original one less ``constant`` and divided by unit², and the
    gradient norm of penalised group g is the original one divided by ``gradient_scale[g]``.
    """

    problem: Problem
    readers: list[Reader]
    core: _core.Problem
    columns: Indices
    unpenalised: Indices
    spread: Array
    weights: Array
    lam_max: float
    constant: float

    @property
    def unit(self) -> float:
        return self.lam_max or 1.0

    @property
    def gradient_scale(self) -> Array:
        return self.spread[:: self.problem.group_size] * self.unit

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs × outputs of the core's matrices."""
        return len(self.columns), sum(len(reader.yx) for reader in self.readers)


def scale(problem: Problem, energy: float = 0.0) -> Scaled:
    """The problem in the core's variables; precision is relative to its objective plus ``energy``, if any."""
    size, penalised = problem.group_size, problem.penalised
    p, u = group_columns(np.flatnonzero(penalised), size), group_columns(np.flatnonzero(~penalised), size)
    readers = [_reader(r, c, p, u) for r, c in zip(problem.xx, problem.yx, strict=True)]
    diagonal = np.sum([np.diag(reader.xx) for reader in readers], axis=0).reshape(-1, size).mean(1)
    spread = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    weights = problem.weights[penalised] / spread
    spread = np.repeat(spread, size)
    yx = np.concatenate([reader.yx for reader in readers]) / spread
    lam_max = float((group_norms([yx], size) / weights).max(initial=0.0))
    gains = [np.vdot(reader.base, c[:, u]) for reader, c in zip(readers, problem.yx, strict=True)]
    constant = -0.5 * float(sum(gains))
    core = _core.Problem(
        xx=[_divided(reader.xx, spread) for reader in readers],
        outputs=[len(reader.yx) for reader in readers],
        yx=np.ascontiguousarray(yx.T / (lam_max or 1.0)),
        group_size=size,
        weights=np.ascontiguousarray(weights),
        constant=(energy + constant) / (lam_max or 1.0) ** 2 if energy else 0.0,
    )
    return Scaled(problem, readers, core, p, u, spread, weights, lam_max, constant)


def restore(scaled: Scaled, answer: Array) -> tuple[Array, ...]:
    """One (h_r, d) matrix a reader from the core's (inputs, outputs) answer."""
    blocks = (answer * (scaled.unit / scaled.spread)[:, None]).T
    ends = np.cumsum([len(reader.yx) for reader in scaled.readers])
    restored = []
    for reader, block in zip(scaled.readers, np.split(blocks, ends[:-1]), strict=True):
        block = block if reader.rotation is None else reader.rotation @ block
        M = np.zeros((len(block), scaled.problem.inputs))
        M[:, scaled.columns] = block
        M[:, scaled.unpenalised] = reader.base - block @ reader.back
        restored.append(M)
    return tuple(restored)


def refitted(scaled: Scaled, M: Sequence[Array]) -> tuple[Array, ...]:
    """``M`` with its unpenalised columns fitted to the problem itself, down to rounding."""
    u, fits = scaled.unpenalised, []
    for m, reader, R, C in zip(M, scaled.readers, scaled.problem.xx, scaled.problem.yx, strict=True):
        m, best = m.copy(), np.inf
        while True:
            slope = (m @ R[:, u] - C[:, u]) @ reader.root
            gain = 0.5 * float(np.vdot(slope, slope))
            if not gain < 0.1 * best:
                break
            m[:, u], best = m[:, u] - slope @ reader.root.T, gain
        fits.append(m)
    return tuple(fits)


def reduce(scaled: Scaled, M: Sequence[Array], lam: float) -> Array:
    """The core's (inputs, outputs) matrix for one (h_r, d) matrix a reader to start from; zero if better."""
    value, blocks = 0.0, []
    with np.errstate(all="ignore"):
        for reader, m in zip(scaled.readers, M, strict=True):
            block = m[:, scaled.columns]
            if reader.rotation is not None:
                block = reader.rotation.T @ block
            block = block * (scaled.spread / scaled.unit)
            R, C = reader.xx / scaled.spread / scaled.spread[:, None], reader.yx / scaled.spread / scaled.unit
            # Along directions in which R is zero, rounding alone could speak for any start.
            rounding = EPS * len(R) * np.vdot(block, block)
            value += float(np.vdot(0.5 * block @ R - C, block) + rounding)
            blocks.append(block)
        size = scaled.problem.group_size
        norms = group_norms(blocks, size)
        value += float(lam / scaled.unit * scaled.weights @ norms)
    # Not a number where products overflow.
    if not value < 0:
        return np.zeros(scaled.shape)
    vanishing = np.repeat(norms < TINY, size)
    return np.ascontiguousarray(np.where(vanishing, 0.0, np.concatenate(blocks)).T)


def _divided(R: Array, spread: Array) -> Array:
    scaled = R / spread[:, None]
    scaled /= spread
    return np.ascontiguousarray(scaled)


def _reader(R: Array, C: Array, p: Indices, u: Indices) -> Reader:
    back, base = np.zeros((len(p), 0)), np.zeros((len(C), 0))
    root = np.zeros((0, 0))
    if len(u):
        R, C, back, base, root = schur(R, C, p, u, exact=True)
    if len(C) <= len(p):
        return Reader(R, C, back, base, root, None)
    rotation, C = np.linalg.qr(C)
    return Reader(R, C, back, base, root, rotation)


def schur(
    R: Array, C: Array, p: Indices, u: Indices, *, exact: bool = False
) -> tuple[Array, Array, Array, Array, Array]:
    """R and C on the columns p with the columns u minimised out, then back, base and root of the Reader.

    ``exact`` takes R and C for the problem itself, down to what rounding does here; otherwise they are
    estimates, and eigenvalues of R_uu below 1e-11 and variances left below 1e-10 count as zero.
    """
    unit = np.sqrt(np.where(np.diag(R)[u] > 0, np.diag(R)[u], 1.0))
    values, vectors = eigh(R[np.ix_(u, u)] / unit / unit[:, None])
    sound = values > (2 * EPS * len(u) if exact else 1e-11) * values[-1]
    root = vectors[:, sound] / np.sqrt(values[sound]) / unit[:, None]  # root @ rootᵀ = R_uu⁺
    half, half_yx = R[np.ix_(p, u)] @ root, C[:, u] @ root
    reduced, left = R[np.ix_(p, p)] - half @ half.T, C[:, p] - half_yx @ half.T
    # An input that is a combination of unpenalised ones leaves rounding alone, of either sign.
    variance = np.diag(R)[p]
    if exact:
        slack = EPS * len(u) * np.sqrt(np.maximum(variance, 0.0))[:, None] / np.sqrt(values[sound])
        least = TRUSTED * (EPS * variance + (slack * (2 * np.abs(half) + slack)).sum(1))
    else:
        least = 1e-10 * variance
    negligible = np.diag(reduced) <= least
    reduced[negligible, :] = reduced[:, negligible] = left[:, negligible] = 0.0
    if exact:
        reduced = _semidefinite(reduced)
    return reduced, left, half @ root.T, half_yx @ root.T, root


def _semidefinite(R: Array) -> Array:
    """R, its diagonal raised by as small a share as leaves a factorisation."""
    diagonal, share = np.diag(R), 1e-14
    unit = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    while not factors(R / unit / unit[:, None], share * len(R)):
        share *= 10
    return R if share == 1e-14 else R + np.diag(share * len(R) * diagonal)
