"""Rounding with feedback and descent: allowed values only, zeros kept, and never a higher loss."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.layer.codebooks import share_values, spaced_values
from pysolve.layer.grids import fit_grid
from pysolve.layer.rounding import Target, descend, round_best, round_nearest, round_with_feedback, settle


@dataclass(frozen=True)
class Case:
    """A target, and values that its weights may take."""

    target: Target
    levels: object

    @property
    def columns(self):
        return np.arange(self.target.V.shape[1])

    def weights(self, codes, levels=None):
        return (levels or self.levels).values(codes, self.columns)

    def loss(self, codes):
        return self.target.loss(self.weights(codes))


def random_case(seed, h, d, bits, kind, masked=False, diagonal=False, group=3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((d + 5, d)) * np.exp(rng.standard_normal(d))
    x += 0.7 * x[:, rng.permutation(d)]
    A = x.T @ x / len(x)
    A = np.diag(np.diag(A)) if diagonal else A + 1e-4 * np.diag(np.diag(A))
    mask = rng.random((h, d)) < 0.5 if masked else None
    V = rng.standard_normal((h, d)) * (1 if mask is None else mask)
    target = Target(V, A, mask)
    if kind == "codebook":
        return Case(target, share_values(V, 1 << bits, mask=mask, weights=np.diag(A)))
    grid = fit_grid(V, bits, symmetric=kind == "symmetric", group=group, weights=np.diag(A))
    return Case(target, grid)


kinds = st.sampled_from(["codebook", "symmetric", "affine"])
cases = st.builds(
    random_case, seeds, st.integers(1, 5), st.integers(1, 12), st.integers(2, 4), kinds, st.booleans()
)


@given(cases)
def test_only_allowed_values_are_taken_and_zeros_stay(case):
    nearest = round_nearest(case.target, case.levels)
    for codes in (
        nearest,
        round_with_feedback(case.target, case.levels),
        descend(case.target, case.levels, nearest),
    ):
        M = case.weights(codes)
        assert codes.shape == M.shape == case.target.V.shape
        assert np.array_equal(case.levels.values(case.levels.codes(M, case.columns), case.columns), M)
        if case.target.mask is not None:
            assert not M[~case.target.mask].any()


@given(cases, st.booleans(), st.floats(1e-6, 1.0))
def test_compiled_blocks_choose_as_single_inputs_do(case, priced, lam):
    V, A, mask = case.target.V, case.target.A, case.target.mask
    levels = spaced_values(case.target, 7, lam) if priced else case.levels
    curvature = np.linspace(0.5, 2.0, len(V))
    codes, change = levels.compiled.round_block(
        base=V.T,
        slope=np.zeros_like(V.T),
        divisor=np.diag(A),
        power=np.diag(A),
        outputs=curvature,
        coupling=A,
        inputs=case.columns,
        mask=None if mask is None else mask.T,
    )
    # Each input's errors have moved those after it; slopes begin at none.
    slope = np.zeros_like(V)
    for j in case.columns:
        wanted = V[:, j] - slope[:, j] / A[j, j]
        expected = levels.codes(wanted, j, curvature * A[j, j])
        if mask is not None:
            expected = np.where(mask[:, j], expected, levels.zero_codes(j))
        assert np.array_equal(codes[j], expected)
        assert np.array_equal(change[j], levels.values(codes[j], j) - V[:, j])
        slope += np.outer(change[j], A[j])


def sequential_oracle(case):
    """Inputs one by one; after each, all those still to come at their best by a least squares solve."""
    V, A = case.target.V, case.target.A
    order = list(np.argsort(-np.square(V).sum(0) * np.diag(A), kind="stable"))
    M = V.copy()
    for step, j in enumerate(order):
        M[:, [j]] = case.levels.values(case.levels.codes(M[:, [j]], np.array([j])), np.array([j]))
        rest, done = order[step + 1 :], order[: step + 1]
        owed = (M[:, done] - V[:, done]) @ A[np.ix_(done, rest)]
        M[:, rest] = V[:, rest] - np.linalg.solve(A[np.ix_(rest, rest)], owed.T).T
    return M


@given(seeds, st.integers(1, 12), kinds)
def test_feedback_is_rounding_with_all_later_inputs_at_their_best(seed, d, kind):
    case = random_case(seed, 3, d, 3, kind)
    np.testing.assert_allclose(
        case.weights(round_with_feedback(case.target, case.levels)), sequential_oracle(case), atol=1e-7
    )


@pytest.mark.parametrize("size", [63, 64, 65, 130])
def test_blocks_of_inputs_make_no_difference(size):
    case = random_case(size, 2, size, 2, "codebook")
    M = case.weights(round_with_feedback(case.target, case.levels))
    np.testing.assert_allclose(M, sequential_oracle(case), atol=1e-7)


@given(seeds, st.integers(1, 8), kinds, st.booleans())
def test_where_inputs_are_uncorrelated_it_is_nearest_rounding(seed, d, kind, masked):
    case = random_case(seed, 3, d, 3, kind, masked, diagonal=True)
    nearest = round_nearest(case.target, case.levels)
    for codes in (round_with_feedback(case.target, case.levels), descend(case.target, case.levels, nearest)):
        assert np.array_equal(case.weights(codes), case.weights(nearest))
    alone = Target(case.target.V, None, case.target.mask)
    assert np.array_equal(round_with_feedback(alone, case.levels), nearest)


@pytest.mark.parametrize("kind", ["codebook", "symmetric", "affine"])
def test_on_average_feedback_loses_less_than_nearest_rounding(kind):
    found = [random_case(seed, 4, 24, 3, kind, group=None) for seed in range(20)]
    fed = [case.loss(round_with_feedback(case.target, case.levels)) for case in found]
    near = [case.loss(round_nearest(case.target, case.levels)) for case in found]
    assert np.mean(np.log(np.array(fed) / near)) < np.log(0.7)


@given(cases)
def test_descent_never_raises_the_loss_and_ends_where_no_single_change_helps(case):
    codes = round_nearest(case.target, case.levels)
    last = case.loss(codes)
    for _ in range(50):
        codes = descend(case.target, case.levels, codes)
        assert case.loss(codes) <= last * (1 + 1e-9) + 1e-14
        if case.loss(codes) >= last * (1 - 1e-12):
            break
        last = case.loss(codes)
    M, A, V = case.weights(codes), case.target.A, case.target.V
    best = M - (M - V) @ A / np.diag(A)
    inside = np.ones(M.shape, bool) if case.target.mask is None else case.target.mask
    rounded = case.levels.values(case.levels.codes(best, case.columns), case.columns)
    gain = np.square(M - best) - np.square(rounded - best)
    assert (gain[inside] <= 1e-9 * (1 + np.square(best[inside]))).all()


@given(cases)
def test_codes_that_are_given_stay_as_they_were(case):
    codes = round_nearest(case.target, case.levels)
    before = codes.copy()
    descend(case.target, case.levels, codes)
    settle(case.target, case.levels, codes, 2)
    assert np.array_equal(codes, before)


@given(cases, st.integers(0, 4))
@example(random_case(9, 1, 9, 2, "affine", True), 1)
def test_alternating_never_raises_the_loss(case, passes):
    codes = round_with_feedback(case.target, case.levels)
    levels, settled, loss = settle(case.target, case.levels, codes, passes)
    assert loss == pytest.approx(case.target.loss(case.weights(settled, levels)), rel=1e-9, abs=1e-15)
    assert loss <= case.loss(codes) * (1 + 1e-12)
    nearest = case.loss(round_nearest(case.target, case.levels))
    best, found = round_best(case.target, case.levels, 3, passes)
    least = case.target.loss(case.weights(found, best))
    assert least <= nearest * (1 + 1e-12)
    assert least <= loss * (1 + 1e-12) or nearest < case.loss(codes)


@given(seeds)
def test_small_layers_come_close_to_the_best_of_all_codes(seed):
    case = random_case(seed, 1, 4, 2, "symmetric")
    levels, codes = round_best(case.target, case.levels, 4, 4)
    every = [np.array([one]) for one in product(range(-2, 2), repeat=4)]
    least = min(case.target.loss(case.weights(one, levels)) for one in every)
    nearest = case.target.loss(case.weights(round_nearest(case.target, levels), levels))
    found = case.target.loss(case.weights(codes, levels))
    assert least * (1 - 1e-9) <= found <= nearest * (1 + 1e-9) + 1e-12
