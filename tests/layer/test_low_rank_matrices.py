"""One layer at low rank from matrices: exact, on any input, and refused in words."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import pysolve as ps


def layer(h=6, d=9, n=400, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    W = rng.standard_normal((h, d))
    y = x @ W.T + rng.standard_normal(h) + noise * rng.standard_normal((n, h))
    return W, x, y, ps.Correlations.from_samples(x, y)


@given(st.integers(1, 6), st.integers(0, 5))
def test_the_error_is_that_on_the_samples_and_no_other_layer_of_the_rank_has_less(rank, seed):
    W, x, y, found = layer(seed=seed)
    best = ps.reduced_rank(W, found, rank=rank)
    around = np.square(y - y.mean(0)).sum()
    lost = np.square(y - x @ best.weight.T - best.bias).sum() / around
    assert best.error == pytest.approx(lost, rel=1e-6, abs=1e-9)
    assert np.linalg.matrix_rank(best.weight) <= rank
    assert np.allclose(best.form.outer @ best.form.inner, best.weight)
    # Alternating least squares from random factors, an independent way down.
    rng = np.random.default_rng(seed + 1)
    own, V = found.centered(), rng.standard_normal((rank, W.shape[1]))
    for _ in range(30):
        U = own.r_yx @ V.T @ np.linalg.pinv(V @ own.r_xx @ V.T)
        V = np.linalg.pinv(U) @ own.r_yx @ np.linalg.inv(own.r_xx)
    other = np.square(y - y.mean(0) - (x - x.mean(0)) @ (U @ V).T).sum() / around
    assert lost <= other * (1 + 1e-3) + 1e-6


@given(st.integers(1, 6))
def test_without_statistics_it_is_the_truncated_decomposition(rank):
    W, *_ = layer()
    U, s, V = np.linalg.svd(W, full_matrices=False)
    best = ps.reduced_rank(W, rank=rank)
    assert np.allclose(best.weight, (U[:, :rank] * s[:rank]) @ V[:rank])
    assert best.error == pytest.approx(np.square(s[rank:]).sum() / np.square(s).sum(), abs=1e-12)
    assert best.bias is None


def test_a_metric_gives_way_where_errors_matter_less():
    W, x, y, found = layer()
    S = np.diag([100.0, 100.0, 1e-3, 1e-3, 1e-3, 1e-3])
    plain, weighed = (ps.reduced_rank(W, found, rank=2, metric=one) for one in (None, S))

    def cost(one):
        gone = y - x @ one.weight.T - one.bias
        return float(np.einsum("ni,ij,nj->", gone, S, gone))

    assert cost(weighed) < 0.01 * cost(plain)
    assert np.allclose(ps.reduced_rank(W, found, rank=2, metric=np.eye(6)).weight, plain.weight)


def test_correlations_of_the_inputs_alone_are_enough():
    W, x, _, _ = layer()
    R = x.T @ x / len(x)
    best = ps.reduced_rank(torch.from_numpy(W), torch.from_numpy(R), rank=3)
    lost = np.square(x @ (W - best.weight).T).sum()
    U, _, _ = np.linalg.svd(W @ np.linalg.cholesky(R))
    wanted = np.square(x @ (W - U[:, :3] @ U[:, :3].T @ W).T).sum()
    assert lost == pytest.approx(wanted, rel=1e-3)
    assert best.bias is None


@given(
    st.floats(0.1, 1.0),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.none() | st.integers(0, 5),
    st.sampled_from([20, 400]),
)
@example(0.9311921218474818, 0.0, None, 400)
def test_energy_takes_the_smallest_rank_that_keeps_it(energy, noise, weighed, n):
    W, x, y, found = layer(n=n, noise=noise)
    S = np.eye(6)
    if weighed is not None:
        A = np.random.default_rng(weighed).standard_normal((6, 6)) * np.geomspace(1, 30, 6)
        S = A @ A.T + np.eye(6)

    def lost(best):
        gone, z = y - x @ best.weight.T - best.bias, y - y.mean(0)
        return np.vdot(gone @ S, gone) / np.vdot(z @ S, z)

    metric = None if weighed is None else S
    best = ps.reduced_rank(W, found, energy=energy, metric=metric)
    # Of outputs with noise, no rank may keep as much.
    assert lost(best) <= 1 - energy + 1e-9 or best.form.rank == 6
    if best.form.rank > 1:
        assert lost(ps.reduced_rank(W, found, rank=best.form.rank - 1, metric=metric)) > 1 - energy - 1e-9


def test_singular_and_dead_inputs_are_normal_input():
    W, x, _, _ = layer()
    x[:, 3] = x[:, 2]
    x[:, 5] = 0.0
    best = ps.reduced_rank(W, ps.Correlations.from_samples(x, x @ W.T), rank=6)
    assert np.isfinite(best.weight).all()
    assert best.error < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rank and energy"),
        ({"rank": 2, "energy": 0.5}, "exactly one of rank and energy"),
        ({"rank": 0}, "within 1 … 6"),
        ({"rank": 7}, "within 1 … 6"),
        ({"rank": 2.5}, "an integer"),
        ({"rank": True}, "an integer"),
        ({"energy": 1.5}, "share"),
        ({"rank": 2, "metric": np.eye(5)}, "metric of shape"),
        ({"rank": 2, "r_xx": np.eye(5)}, "correlations must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    W, _, _, found = layer()
    with pytest.raises(TypeError if message == "an integer" else ValueError, match=message):
        ps.reduced_rank(W, **{"r_xx": found, **options})


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize(
    "fit",
    [
        lambda *given: ps.obs_prune(*given, amount=0.5),
        lambda *given: ps.quantize_layer(*given, bits=2),
        lambda *given: ps.reduced_rank(*given, rank=2),
        lambda *given: ps.reduced_rank(*given, energy=0.6),
    ],
)
def test_two_matrices_say_what_correlations_do_but_for_what_no_weights_explain(fit, noise):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6000, 6)) @ rng.standard_normal((6, 6))
    x -= x.mean(0)
    W = rng.standard_normal((5, 6))
    y = x @ (W + 0.3 * rng.standard_normal(W.shape)).T + noise * rng.standard_normal((6000, 5))
    y -= y.mean(0)
    found, (R, C) = ps.Correlations.from_samples(x, y), (x.T @ x / 6000, y.T @ x / 6000)
    explained = x @ np.linalg.solve(R, C.T)
    pair = fit(W, R, C)
    lost = np.square(explained - x @ pair.weight.T).sum() / np.square(explained).sum()
    assert pair.error == pytest.approx(lost, rel=1e-6)
    assert pair.bias is None
    if not noise:
        both = fit(W, found)
        np.testing.assert_allclose(pair.weight, both.weight, rtol=1e-6, atol=1e-9)
        assert pair.error == pytest.approx(both.error, rel=1e-6)
    with pytest.raises(ValueError, match="r_yx"):
        fit(W, R, C[:, :3])
    with pytest.raises(TypeError, match="a Correlations comes alone"):
        fit(W, found, C)
