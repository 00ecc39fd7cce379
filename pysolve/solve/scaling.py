"""An exact change of variables that brings a problem to the form the compiled core expects.

Unpenalised groups u are minimised out (Schur complement): R − R_·u R_uu⁺ R_u·, C − C_u R_uu⁺ R_u·. More
outputs than inputs are rotated away: C = Q C′ (thin QR), M = Q M′. Groups are scaled to unit mean diagonal,
so that the scale of single channels does not slow the first-order solvers, and C to λ_max = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pysolve import _core
from pysolve.correlations import Array, Indices, group_columns, group_norms
from pysolve.solve.problem import Problem


@dataclass(frozen=True, eq=False)
class Reader:
    """One reader on the penalised columns p alone: M_p = rotation @ M′, M_u = base − M_p @ back."""

    xx: Array
    yx: Array
    back: Array
    base: Array
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
    return Scaled(problem, readers, core, p, u, spread, lam_max, constant)


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


def reduce(scaled: Scaled, M: Sequence[Array]) -> Array:
    """The core's (inputs, outputs) matrix for one (h_r, d) matrix a reader."""
    blocks = [
        m[:, scaled.columns] if reader.rotation is None else reader.rotation.T @ m[:, scaled.columns]
        for reader, m in zip(scaled.readers, M, strict=True)
    ]
    return np.ascontiguousarray(np.concatenate(blocks).T * (scaled.spread / scaled.unit)[:, None])


def _divided(R: Array, spread: Array) -> Array:
    scaled = R / spread[:, None]
    scaled /= spread
    return np.ascontiguousarray(scaled)


def _reader(R: Array, C: Array, p: Indices, u: Indices) -> Reader:
    back, base = np.zeros((len(p), 0)), np.zeros((len(C), 0))
    if len(u):
        R, C, back, base = schur(R, C, p, u)
    if len(C) <= len(p):
        return Reader(R, C, back, base, None)
    rotation, C = np.linalg.qr(C)
    return Reader(R, C, back, base, rotation)


def schur(R: Array, C: Array, p: Indices, u: Indices) -> tuple[Array, Array, Array, Array]:
    """R and C on the columns p with the columns u minimised out, then back and base of the Reader."""
    unit = np.sqrt(np.where(np.diag(R)[u] > 0, np.diag(R)[u], 1.0))
    values, vectors = np.linalg.eigh(R[np.ix_(u, u)] / unit / unit[:, None])
    sound = values > 1e-11 * values[-1]
    root = vectors[:, sound] / np.sqrt(values[sound]) / unit[:, None]  # root @ rootᵀ = R_uu⁺
    half, half_yx = R[np.ix_(p, u)] @ root, C[:, u] @ root
    reduced, left = R[np.ix_(p, p)] - half @ half.T, C[:, p] - half_yx @ half.T
    # An input that is a combination of unpenalised ones leaves rounding alone, of either sign.
    negligible = np.diag(reduced) <= 1e-10 * np.diag(R)[p]
    reduced[negligible, :] = reduced[:, negligible] = left[:, negligible] = 0.0
    return reduced, left, half @ root.T, half_yx @ root.T
