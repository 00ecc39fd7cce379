"""The best approximation of every rank: none of that rank does better, by code that decomposes otherwise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import correlated_samples, seeds

from pysolve.correlations import Correlations
from pysolve.layer import spectrum
from pysolve.layer.spectrum import activation_spectrum, balanced, plain_spectrum
from pysolve.solve.least_squares import prior_ridge


@st.composite
def matrices(draw):
    """Wide, tall and single rows; of any rank, none at all, scales over decades."""
    rng = np.random.default_rng(draw(seeds))
    h, d = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.integers(0, min(h, d)))
    W = rng.standard_normal((h, rank)) @ rng.standard_normal((rank, d))
    return W * 10.0 ** draw(st.integers(-6, 6))


@st.composite
def layers(draw, regular=False):
    """Old weights, and correlations of samples: few or many, inputs repeated or dead, outputs off centre."""
    rng = np.random.default_rng(draw(seeds))
    h, d = draw(st.sampled_from([1, 2, 5, 9])), draw(st.integers(1, 7))
    n = draw(st.integers(3 * d, 5 * d + 2)) + 3 if regular else draw(st.integers(2, 5 * d + 2))
    hazards = (
        {"rank": d, "repeated": 0, "dead": 0, "spread": 0.5}
        if regular
        else {
            "rank": draw(st.integers(1, d)),
            "repeated": draw(st.integers(0, 2)),
            "dead": draw(st.integers(0, d - 1)),
            "spread": draw(st.sampled_from([0.0, 1.0])),
        }
    )
    x = correlated_samples(rng, n, d, **hazards) + draw(st.sampled_from([0.0, 2.0])) * rng.standard_normal(d)
    W = rng.standard_normal((h, d))
    noise = draw(st.sampled_from([0.0, 0.3])) * rng.standard_normal((n, h))
    drift = draw(st.sampled_from([0.0, 0.5])) * rng.standard_normal((d, h))
    y = x @ W.T + rng.standard_normal(h) + noise + x @ drift
    return W, Correlations.from_samples(x, y)


def ridges(own):
    """ε v_j: v the variances, those far below the usual one raised."""
    v = np.diag(own.r_xx)
    usual = np.median(v[v > 0]) if v.any() else 0.0
    return prior_ridge(len(v), own.count) * np.where(v > 0, np.maximum(v, usual / 100), 0)


def objective(M, W, known):
    """½ E‖y − M x − b‖² + ½ ε Σ_j v_j ‖M_j − W_j‖² with the best b."""
    own = known.centered()
    ridge = ridges(own)
    return own.error(M) + 0.5 * float((ridge * np.square(M - W)).sum())


def quadratic(W, known):
    """G and C of the objective: ½ tr(M G Mᵀ) − ⟨C, M⟩ + constant."""
    own = known.centered()
    ridge = np.diag(ridges(own))
    return own.r_xx + ridge, own.r_yx + W @ ridge


@given(matrices())
def test_without_data_it_is_the_truncated_singular_value_decomposition(W):
    found, sizes = plain_spectrum(W), np.linalg.svd(W, compute_uv=False)
    U, s, V = np.linalg.svd(W, full_matrices=False)
    energy = np.square(W).sum()
    np.testing.assert_allclose(found.energies, np.square(sizes), atol=1e-12 * energy)
    assert found.total == pytest.approx(energy)
    for rank in range(1, len(s) + 1):
        product = found.factors(rank).dense()
        lost = np.square(W - product).sum()
        assert lost == pytest.approx(np.square(s[rank:]).sum(), abs=1e-12 * energy)
        assert found.tails[rank] * energy == pytest.approx(lost, abs=1e-12 * energy)
        if rank == len(s) or s[rank - 1] > 1.01 * s[rank]:
            np.testing.assert_allclose(product, (U[:, :rank] * s[:rank]) @ V[:rank], atol=1e-6 * energy**0.5)


@given(matrices())
def test_directions_are_orthonormal_and_energy_never_rises_with_the_rank_that_is_left(W):
    found = plain_spectrum(W)
    q = min(W.shape)
    np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(q), atol=1e-10)
    assert np.all(found.energies >= 0)
    assert np.all(np.diff(found.energies) <= 0)
    assert len(found.tails) == q + 1
    assert np.all(np.diff(found.tails) <= 0)
    assert found.tails[0] == (1.0 if W.any() else 0.0)
    assert found.tails[-1] == pytest.approx(0.0, abs=1e-12)


@given(layers(regular=True))
def test_on_regular_inputs_it_is_the_whitened_decomposition(case):
    W, known = case
    G, C = quadratic(W, known)
    B = C @ np.linalg.inv(G)
    values, vectors = np.linalg.eigh(G)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    U, s, V = np.linalg.svd(B @ root, full_matrices=False)
    found = activation_spectrum(W, known)
    best, energy = objective(B, W, known), float(np.square(s).sum())
    for rank in range(1, len(s) + 1):
        oracle = (U[:, :rank] * s[:rank]) @ V[:rank] @ inverse
        M = found.factors(rank).dense()
        assert objective(M, W, known) == pytest.approx(objective(oracle, W, known), abs=1e-9 * energy)
        assert objective(M, W, known) - best == pytest.approx(
            0.5 * found.tails[rank] * energy, abs=1e-9 * energy
        )


def alternating(G, C, rank, rng, steps=60):
    """Rank-r matrix by least squares in turn from a random start; any G."""
    U = rng.standard_normal((len(C), rank))
    for _ in range(steps):
        V = np.linalg.pinv(U.T @ U) @ U.T @ C @ np.linalg.pinv(G)
        U = C @ V.T @ np.linalg.pinv(V @ G @ V.T)
    return U @ V


@given(layers(), seeds)
def test_nothing_of_the_same_rank_does_better_even_where_inputs_repeat_or_die(case, seed):
    W, known = case
    G, C = quadratic(W, known)
    found, rng = activation_spectrum(W, known), np.random.default_rng(seed)
    scale = objective(np.zeros_like(W), W, known) + 1e-12
    for rank in {1, (len(found.energies) + 1) // 2, len(found.energies)}:
        M = found.factors(rank).dense()
        own = objective(M, W, known)
        rivals = [alternating(G, C, rank, rng) for _ in range(2)]
        rivals += [M + size * rng.standard_normal(M.shape) @ _projector(M, rank) for size in (1e-3, 0.1)]
        assert all(np.linalg.matrix_rank(rival, tol=1e-9) <= rank for rival in rivals)
        assert own <= min(objective(rival, W, known) for rival in rivals) + 1e-7 * scale


def _projector(M, rank):
    """Onto the rows of M."""
    V = np.linalg.svd(M)[2][:rank]
    return V.T @ V


@given(layers())
def test_tails_say_what_each_rank_costs_above_the_unbounded_minimum(case):
    W, known = case
    found = activation_spectrum(W, known)
    scale = objective(np.zeros_like(W), W, known) + found.total + 1e-12
    least = objective(found.matrix, W, known)
    G, C = quadratic(W, known)
    np.testing.assert_allclose(found.matrix @ G, C, atol=1e-8 * (1 + np.abs(C).max()))
    lost = [objective(found.factors(k).dense(), W, known) - least for k in range(1, len(found.tails))]
    np.testing.assert_allclose(lost, 0.5 * found.tails[1:] * found.total, atol=1e-8 * scale)
    assert np.all(np.diff(found.tails) <= 0)


@given(layers(), st.integers(1, 7))
def test_ranks_are_nested_and_a_bound_on_the_rank_changes_nothing_below_it(case, rank):
    W, known = case
    whole, bounded = activation_spectrum(W, known), activation_spectrum(W, known, rank)
    rank = min(rank, len(whole.energies))
    assert bounded.directions.shape == (len(W), rank)
    assert bounded.total == pytest.approx(whole.total)
    np.testing.assert_allclose(bounded.tails, whole.tails[: rank + 1], atol=1e-10)
    M, largest = bounded.factors(rank).dense(), whole.factors(rank).dense()
    scale = objective(np.zeros_like(W), W, known) + 1e-12
    assert objective(M, W, known) == pytest.approx(objective(largest, W, known), abs=1e-8 * scale)
    for k in range(1, rank):
        outer = bounded.factors(k).outer
        np.testing.assert_allclose(
            np.abs(outer / np.linalg.norm(outer, axis=0).clip(1e-300)),
            np.abs(bounded.directions[:, :k]) * (np.linalg.norm(outer, axis=0) > 0),
            atol=1e-9,
        )


@given(layers(), st.integers(1, 4))
def test_a_layer_whose_weight_has_the_rank_is_left_as_it_is(case, r):
    W, known = case
    U, s, V = np.linalg.svd(W, full_matrices=False)
    r = min(r, len(s))
    W = (U[:, :r] * s[:r]) @ V[:r]
    # Outputs that W makes of these inputs, with any bias.
    own = replace(known, yx=W @ known.xx, yy=W @ known.xx @ W.T, y_sum=W @ known.x_sum)
    M = activation_spectrum(W, own).factors(r).dense()
    scale = np.trace(own.centered().r_yy)
    assert 2 * own.centered().error(M) <= 1e-10 * scale + 1e-14


@given(layers(regular=True))
def test_inputs_in_r_directions_cost_a_layer_of_rank_r_no_more_than_the_pull(case):
    W, _ = case
    rng, d = np.random.default_rng(0), W.shape[1]
    r = (d + 1) // 2
    x = rng.standard_normal((9 * d, r)) @ rng.standard_normal((r, d)) + 1.0
    known = Correlations.from_samples(x, x @ W.T + 3.0)
    M = activation_spectrum(W, known).factors(min(r, len(W))).dense()
    R = known.centered().r_xx
    exact = W @ R @ np.linalg.pinv(R, rcond=1e-10)
    assert objective(M, W, known) <= objective(exact, W, known) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("shape", [(40, 50), (60, 40)])
@pytest.mark.parametrize("kind", ["dense", "few", "zero", "centred"])
def test_a_few_eigenvectors_of_large_matrices_are_those_of_all(monkeypatch, shape, kind):
    rng = np.random.default_rng(0)
    W = rng.standard_normal(shape) * np.geomspace(1, 0.01, shape[1])
    if kind == "few":
        W = rng.standard_normal((shape[0], 1)) @ rng.standard_normal((1, shape[1]))
    elif kind == "zero":
        W = np.zeros(shape)
    elif kind == "centred":
        # The vector that iterations start from lies in the null space.
        W -= W.mean(0)
    direct = plain_spectrum(W, 4)
    monkeypatch.setattr(spectrum, "_LARGE", 8)
    monkeypatch.setattr(spectrum, "_FEW", 1 / 8)
    lanczos = plain_spectrum(W, 4)
    np.testing.assert_allclose(lanczos.energies, direct.energies, atol=1e-10 * max(1.0, direct.total))
    np.testing.assert_allclose(lanczos.tails, direct.tails, atol=1e-10)
    np.testing.assert_allclose(lanczos.factors(4).dense(), direct.factors(4).dense(), atol=1e-7)


@given(matrices(), st.integers(1, 9), seeds)
def test_balanced_factors_have_the_same_product_and_equal_norms(outer, d, seed):
    inner = np.random.default_rng(seed).standard_normal((outer.shape[1], d))
    form = balanced(outer, inner)
    np.testing.assert_allclose(form.dense(), outer @ inner, atol=1e-12 * (1 + np.abs(outer).max()))
    alive = np.linalg.norm(outer, axis=0) > 0
    np.testing.assert_allclose(
        np.linalg.norm(form.outer, axis=0)[alive], np.linalg.norm(form.inner, axis=1)[alive]
    )


def test_a_zero_matrix_loses_nothing():
    found = plain_spectrum(np.zeros((3, 5)))
    assert not found.tails.any()
    assert not found.factors(2).dense().any()
