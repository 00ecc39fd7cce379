"""Heads in their principal axes: an equal network, and dimensions in the order of what they carry."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from heads import inputs, network, of_rank
from hypothesis import given, settings
from hypothesis import strategies as st

from pysolve.methods import heads as module
from pysolve.methods.goal import Options
from pysolve.methods.heads import _of_results, _of_scores, in_head_axes, order_of, scores_lost
from pysolve.methods.streams import as_needed
from pysolve.methods.studied import studied
from pysolve.nn.gathering.gather import gather


def study_of(model, n=48):
    return studied(model, inputs(n).split(8), Options(progress=False), sites=True, heads=True)


def dims_of(study):
    return [site for site in study.sites if site.attention]


def turned(study):
    return in_head_axes(study, dims_of(study))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 50),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    bias=st.booleans(),
    scale=st.sampled_from(["held", "sizes", "fixed"]),
)
def test_a_turned_network_gives_the_same(seed, heads, bias, scale):
    model = network(seed, heads=heads[0], groups=heads[1], bias=bias, scale=scale)
    found = turned(study_of(model))
    assert found.turn is not None
    assert all(site.pinned is None for site in dims_of(found))
    x = inputs(8, seed=2)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_turned_network_of_grouped_queries_gives_the_same():
    model, x = network(blocks=1, heads=4, groups=2), inputs(8, seed=2)
    found = turned(study_of(model))
    assert found.turn is not None
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [4, 2])
def test_correlations_are_those_of_the_turned_network(groups):
    before = study_of(network(blocks=1, heads=4, groups=groups))
    found = turned(before)
    seen = gather(found.model, [*before], layers=[*found.correlations])
    for name, one in found.correlations.items():
        scale = np.abs(seen[name].xx).max()
        np.testing.assert_allclose(one.xx, seen[name].xx, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(one.yx, seen[name].yx, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(one.x_sum, seen[name].x_sum, atol=1e-4 * scale, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), d=st.integers(2, 6), k=st.integers(1, 5))
def test_the_first_axes_of_results_are_the_best_ones(seed, d, k):
    """With a refit, what is lost of  W z  with k functionals of z is at least the tail of  W Z^½ ."""
    rng, k = np.random.default_rng(seed), min(k, d)
    L, W = rng.normal(size=(d, d)) * np.geomspace(1, 0.2, d), rng.normal(size=(7, d))
    Z = L @ L.T
    M = _of_results(Z, W.T @ W)[:k]
    explained = W @ Z @ M.T @ np.linalg.solve(M @ Z @ M.T, M @ Z @ W.T)
    lost = np.trace(W @ Z @ W.T) - np.trace(explained)
    best = np.square(np.linalg.svd(W @ L, compute_uv=False)[k:]).sum()
    assert best - 1e-9 <= lost <= best + 0.02 * np.trace(W @ Z @ W.T)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), d=st.integers(2, 6), k=st.integers(1, 5))
def test_the_first_axes_of_scores_are_the_best_ones(seed, d, k):
    """Scores without the later axes are off by the tail of the singular values of  Q^½ K^½ , no more."""
    rng, k = np.random.default_rng(seed), min(k, d)
    A, B = (rng.normal(size=(d, d)) * np.geomspace(1, 0.2, d) for _ in range(2))
    N = _of_scores(A @ A.T, B @ B.T)
    # q · k = (N⁻ᵀ q) · (N k)
    T = np.linalg.inv(N).T[k:].T @ N[k:]
    lost = np.square(A.T @ T @ B).sum()
    best = np.square(np.linalg.svd(A.T @ B, compute_uv=False)[k:]).sum()
    assert best - 1e-9 <= lost <= best + 0.02 * np.square(A.T @ B).sum()


def test_lost_scores_are_those_of_all_pairs():
    """Of queries and keys at any positions, keys without their means, which softmax does not hear."""
    study = turned(study_of(network(blocks=1, heads=4, groups=2)))
    (site,) = dims_of(study)
    (one,) = site.attention
    with torch.no_grad():
        x = study.model[0](torch.cat([*study]))
        q, k = (getattr(study.model[1].attend, name)(x).flatten(0, 1).double().numpy() for name in "qk")
    energy = np.zeros(site.channels + 1)
    for h, rows in enumerate(one.queries):
        keys = k[:, one.keys[h // 2]] - k[:, one.keys[h // 2]].mean(0)
        energy += [np.square(q[:, rows[n:]] @ keys[:, n:].T).mean() for n in range(site.channels + 1)]
    found = scores_lost(study, site, order_of(study, site))
    np.testing.assert_allclose(found, energy / energy[0], atol=1e-4)
    assert (np.diff(found) <= 1e-9).all()


def test_dimensions_of_low_rank_come_first():
    study = turned(study_of(of_rank(network(blocks=1), 2)))
    for site in dims_of(study):
        assert (scores_lost(study, site, order_of(study, site))[2:] < 1e-4).all()


def test_heads_that_cannot_be_turned_say_why(monkeypatch):
    study = study_of(network())
    first, second = dims_of(study)
    exact, tried = module.apart, []

    def apart(study, network):
        tried.append(network)
        return 0.5 if len(tried) < 3 else exact(study, network)

    monkeypatch.setattr(module, "apart", apart)
    found = turned(study)
    assert [site.pinned for site in dims_of(found)] == ["turned, its outputs would differ by 5.0e-01", None]
    assert found.turn is not None
    assert found.turn.sites == (second,)
    assert first in found.sites


def test_heads_that_keep_all_are_not_turned():
    study = turned(study_of(network()))
    first, _ = dims_of(study)
    assert study.turn is not None
    assert as_needed(study, {}).model is study.turn.before.model
    found = as_needed(study, {first: np.arange(2)})
    assert found.turn is not None
    assert found.turn.sites == (first,)
    assert {name.split(".")[0] for name in found.turn.values} == {"1"}
    assert as_needed(study, dict.fromkeys(dims_of(study), np.arange(2))) is study


def test_layers_of_which_nothing_is_known_stay():
    study = study_of(network(blocks=1))
    known = {name: one for name, one in study.correlations.items() if name != "1.attend.q"}
    (site,) = dims_of(turned(replace(study, correlations=known)))
    assert site.pinned == "nothing is known of what 1.attend.q reads"
