"""Pruned layers: the zeros that were asked for, the least error that they allow, and an honest account."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import correlated_samples, seeds

from pysolve.correlations import Correlations
from pysolve.layer import layer_problem as supports
from pysolve.layer import obs
from pysolve.layer.layer_problem import layer_problem, refit_rows
from pysolve.layer.obs import obs_prune
from pysolve.layer.row_paths import error_curve, row_paths, rows_kept, share_weights
from pysolve.layer.searches import Zeros, admm, sweep

METHODS = ("admm", "greedy", "sweep", "auto")


@dataclass(frozen=True)
class Layer:
    """Weights, samples of what they read, and what they should make of it."""

    W: np.ndarray
    x: np.ndarray
    y: np.ndarray

    @property
    def R(self):
        return self.x.T @ self.x / len(self.x)

    @property
    def correlations(self):
        return Correlations.from_samples(self.x, self.y)

    @property
    def rounding(self):
        """Of errors: centring costs the digits that the means have more than the deviations."""
        energy = np.square(self.y - self.y.mean(0)).sum()
        return 1e-10 + 1e-13 * np.square(self.y).sum() / max(energy, 1e-300)

    def error(self, M, b):
        missed = self.y - self.x @ M.T - b
        return np.square(missed).sum() / np.square(self.y - self.y.mean(0)).sum()


@st.composite
def layers(draw, max_d=9, noise=(0.0, 0.3), most_dead=2, spread=(0.0, 1.0)):
    """Repeated and dead inputs, fewer samples than inputs, means far from 0; y the layer's own or not."""
    rng = np.random.default_rng(draw(seeds))
    d, h = draw(st.integers(1, max_d)), draw(st.integers(1, 4))
    x = correlated_samples(
        rng,
        draw(st.integers(2, 4 * d + 2)),
        d,
        rank=draw(st.integers(1, d)),
        repeated=draw(st.integers(0, 2)),
        dead=draw(st.integers(0, min(d - 1, most_dead))),
        spread=draw(st.sampled_from(spread)),
    )
    x = np.where(x.any(0), x + draw(st.sampled_from([0.0, 2.0])) * np.abs(x).max(0), 0.0)
    W = rng.standard_normal((h, d))
    y = x @ W.T
    y = y + y.std() * (3.0 + draw(st.sampled_from(noise)) * rng.standard_normal(y.shape))
    return Layer(W, x, y)


amounts, methods = st.floats(0, 0.99), st.sampled_from(METHODS)


@given(layers(noise=(0.0,)), methods, st.booleans())
def test_where_nothing_goes_nothing_changes(layer, method, bare):
    found = obs_prune(layer.W, layer.R if bare else layer.correlations, amount=0.0, method=method)
    np.testing.assert_allclose(found.weight, layer.W, rtol=1e-6, atol=1e-6)
    assert found.mask.all()
    assert found.error < layer.rounding


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_layers_of_next_to_nothing_are_no_error(shape):
    found = obs_prune(np.ones(shape), np.eye(shape[1]), amount=0.5)
    assert found.weight.shape == shape
    assert len(error_curve(np.ones(shape), np.eye(shape[1]))) == found.weight.size + 1


@given(layers(), amounts, methods)
def test_exactly_as_many_weights_go_as_asked_and_they_are_zero(layer, amount, method):
    found = obs_prune(layer.W, layer.correlations, amount=amount, method=method)
    assert found.nonzeros == layer.W.size - int(amount * layer.W.size + 1e-9)
    assert not found.weight[~found.mask].any()
    assert np.isfinite(found.weight).all()


@given(layers(), amounts, st.sampled_from(["admm", "sweep", "auto"]))
def test_by_row_every_output_keeps_equally_many(layer, amount, method):
    found = obs_prune(layer.W, layer.correlations, amount=amount, scope="row", method=method)
    h, d = layer.W.shape
    assert (found.mask.sum(1) == (h * d - int(amount * h * d + 1e-9)) // h).all()


@given(layers(max_d=14), st.sampled_from([(1, 2), (2, 4), (1, 3)]), st.sampled_from(["admm", "sweep"]))
def test_a_pattern_holds_in_every_group_of_inputs(layer, pattern, method):
    n, m = pattern
    found = obs_prune(layer.W, layer.correlations, pattern=f"{n}:{m}", method=method)
    for first in range(0, layer.W.shape[1], m):
        group = found.mask[:, first : first + m]
        assert (group.sum(1) == min(n, group.shape[1])).all()


@given(layers(), amounts, methods)
def test_the_error_is_that_of_the_new_weights_and_bias_on_the_samples(layer, amount, method):
    found = obs_prune(layer.W, layer.correlations, amount=amount, method=method)
    if np.ptp(layer.y, axis=0).max() > 0:
        wanted = layer.error(found.weight, found.bias)
        assert found.error == pytest.approx(wanted, rel=1e-6, abs=layer.rounding)
    bare = obs_prune(layer.W, layer.R, amount=amount, method=method)
    energy, missed = (np.square(layer.x @ M.T).sum() for M in (layer.W, layer.W - bare.weight))
    assert bare.bias is None
    assert bare.error * energy == pytest.approx(missed, rel=1e-6, abs=1e-9 * energy)


def random_mask(layer, share=0.5):
    return np.random.default_rng(layer.W.size).random(layer.W.shape) < share


@given(layers(), st.sampled_from([1e-4, 1e-2]), st.booleans())
def test_refitted_weights_solve_the_normal_equations_on_their_support(layer, ridge, bare):
    mask, problem = (
        random_mask(layer),
        layer_problem(layer.W, layer.R if bare else layer.correlations, ridge=ridge),
    )
    M = refit_rows(problem, mask)
    C = layer.W @ problem.R if problem.C is None else problem.C
    prior = ridge * np.diag(problem.R) * (M - layer.W)
    gradient = np.where(mask, M @ problem.R - C + prior, 0.0)
    unit = np.sqrt(np.diag(problem.R)) + 1e-300
    assert np.abs(gradient / unit).max() <= 1e-8 * (np.abs(C / unit).max() + 1e-12)
    assert not M[~mask].any()


@given(layers(noise=(0.0,)))
def test_a_refit_is_never_worse_than_the_masked_weights(layer):
    mask, problem = random_mask(layer), layer_problem(layer.W, layer.R)
    masked = problem.error(np.where(mask, layer.W, 0.0))
    assert problem.error(refit_rows(problem, mask)) <= masked * (1 + 1e-9) + 1e-14


@given(layers())
def test_conjugate_gradients_and_direct_solves_agree(layer):
    mask, problem = random_mask(layer, 0.7), layer_problem(layer.W, layer.correlations, ridge=1e-2)
    direct = refit_rows(problem, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supports, "_DIRECT", -1.0)
        together = refit_rows(problem, mask)
        at_once = refit_rows(problem, mask, direct, iterations=1)
    scale = np.abs(direct * problem.unit).max() + 1e-12
    np.testing.assert_allclose(together * problem.unit, direct * problem.unit, atol=1e-7 * scale)
    np.testing.assert_allclose(at_once * problem.unit, direct * problem.unit, atol=1e-7 * scale)


@given(layers(), st.booleans(), st.sampled_from([1e-20, 1.0, 1e20]))
def test_single_precision_gives_the_same_weights_up_to_its_rounding(layer, bare, scale):
    W, statistics = (scale * layer.W, layer.R) if bare else (layer.W, layer.correlations)
    mask, problem = random_mask(layer, 0.7), layer_problem(W, statistics, ridge=1e-2)
    double, start = refit_rows(problem, mask), W.copy()
    single = refit_rows(problem, mask, start, single=True, overwrite=True)
    assert single is start
    largest = np.abs(double * problem.unit).max() + 1e-12 * np.abs(W * problem.unit).max() + 1e-300
    # A ridge of 1e-2 lets rounding grow a hundredfold.
    np.testing.assert_allclose(single * problem.unit, double * problem.unit, atol=1e-4 * largest)
    assert not single[~mask].any()


@given(layers(), amounts)
def test_large_layers_are_refitted_in_single_precision(layer, amount):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs, "_REFIT", 1.0)
        found = obs_prune(layer.W, layer.correlations, amount=amount, method="sweep", ridge=1e-2)
        again = obs_prune(layer.W, layer.correlations, mask=found.mask, ridge=1e-2)
    exact = obs_prune(layer.W, layer.correlations, mask=found.mask, ridge=1e-2)
    assert found.error == pytest.approx(exact.error, rel=1e-2, abs=1e-3)
    assert again.error == pytest.approx(exact.error, rel=1e-3, abs=1e-4)


@given(layers(max_d=6, noise=(0.0,), most_dead=0), seeds)
def test_elimination_in_rows_is_the_one_that_recomputes_everything(layer, seed):
    problem = layer_problem(layer.W, layer.R, ridge=1e-2)
    A = problem.metric()
    paths = row_paths(problem)
    for i, w in enumerate(layer.W * problem.unit):
        _, errors = reference.eliminate(A, (w @ A)[None])
        falls = np.diff(errors[::-1])
        np.testing.assert_allclose(paths.loss[i].sum(), falls.sum(), rtol=1e-8)
        # The convex minorant of what has been lost by then.
        lost = np.concatenate([[0.0], np.cumsum(falls)])
        assert (np.cumsum(paths.loss[i]) <= lost[1:] + 1e-9 * lost[-1]).all()
        assert (np.diff(paths.loss[i]) >= -1e-12 * lost[-1]).all()


def test_elimination_of_many_inputs_keeps_its_inverse_up_to_date():
    rng = np.random.default_rng(0)
    d = 150
    x = rng.standard_normal((400, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)))
    problem = layer_problem(rng.standard_normal((3, d)), x.T @ x / 400)
    A, left = problem.metric(), 40
    mask = rows_kept(problem, 3 * left)
    paths = row_paths(problem)
    for i, w in enumerate(problem.optimum()):
        gone, H, m = [], np.linalg.inv(A), w.copy()
        for _ in range(d - mask[i].sum()):
            cost = np.where(np.isin(np.arange(d), gone), np.inf, m**2 / np.maximum(np.diag(H), 1e-300))
            p = int(np.argmin(cost))
            m, H = m - m[p] / H[p, p] * H[p], H - np.outer(H[p], H[p]) / H[p, p]
            gone.append(p)
        assert paths.order[i, : len(gone)].tolist() == gone
        np.testing.assert_allclose(
            refit_rows(problem, mask)[i] * problem.unit, np.where(mask[i], m, 0), atol=1e-8
        )


def test_of_all_masks_of_a_small_layer_nearly_always_the_best_is_found():
    rng, found, best = np.random.default_rng(0), [], []
    for _ in range(60):
        d = int(rng.integers(1, 6))
        n, rank, repeated = rng.integers(2, 4 * d + 3), rng.integers(1, d + 1), rng.integers(0, 3)
        x = correlated_samples(rng, n, d, rank=rank, repeated=repeated, dead=0, spread=0.0)
        W, R = rng.standard_normal((rng.integers(1, 3), d)), x.T @ x / len(x)
        left, problem = int(rng.integers(1, W.size + 1)), layer_problem(W, R)
        found.append(obs_prune(W, R, count=left).error)
        best.append(min(problem.error(refit_rows(problem, mask)) for mask in all_masks(W.shape, left)))
    found, best = np.array(found), np.array(best)
    assert (found <= 4 * best + 1e-3).all()
    assert np.mean(found <= best * (1 + 1e-9) + 1e-6) > 0.9


def all_masks(shape, left):
    for chosen in combinations(range(np.prod(shape)), left):
        mask = np.zeros(shape, bool)
        mask.ravel()[list(chosen)] = True
        yield mask


@given(layers(most_dead=1), st.floats(0.2, 0.8), methods, seeds)
def test_units_of_inputs_and_outputs_do_not_matter(layer, amount, method, seed):
    scale = 2.0 ** np.random.default_rng(seed).integers(-20, 20, layer.W.shape[1])
    other = Layer(64 * layer.W / scale, layer.x * scale, 64 * layer.y)
    one, two = (obs_prune(each.W, each.correlations, amount=amount, method=method) for each in (layer, other))
    live = layer.correlations.centered().xx.any(0)
    assert np.array_equal(one.mask[:, live], two.mask[:, live])
    assert one.error == pytest.approx(two.error, rel=1e-6, abs=1e-12)


@given(layers(max_d=8, most_dead=3), methods)
def test_inputs_that_never_vary_go_first_and_keep_their_weights_where_they_stay(layer, method):
    dead = ~layer.correlations.centered().xx.any(0)
    gone = len(layer.W) * dead.sum()
    if 0 < gone < layer.W.size:
        found = obs_prune(layer.W, layer.correlations, count=layer.W.size - int(gone), method=method)
        assert np.array_equal(found.mask, np.tile(~dead, (len(layer.W), 1)))
    kept = obs_prune(layer.W, layer.correlations, mask=np.ones(layer.W.shape, bool))
    np.testing.assert_array_equal(kept.weight[:, dead], layer.W[:, dead])


@pytest.mark.parametrize("method", ["admm", "sweep", "greedy"])
def test_of_independent_inputs_the_weights_of_most_energy_stay_as_they_are(method):
    rng = np.random.default_rng(1)
    W, variance = rng.standard_normal((6, 40)), rng.uniform(0.1, 4, 40)
    found = obs_prune(W, np.diag(variance), count=60, method=method)
    energy = W**2 * variance
    assert energy[found.mask].min() >= energy[~found.mask].max()
    np.testing.assert_allclose(found.weight[found.mask], W[found.mask], rtol=1e-9)


def correlated_layer(h=24, d=96):
    rng = np.random.default_rng(2)
    x = np.maximum(rng.standard_normal((600, 30)) @ rng.standard_normal((30, d)), 0)
    W = rng.standard_normal((h, d))
    return Layer(W, x, x @ W.T)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_searches_leave_far_less_than_the_largest_weights_do(share):
    layer = correlated_layer()
    problem = layer_problem(layer.W, layer.correlations)
    score = np.abs(layer.W) * problem.unit
    largest = obs_prune(layer.W, layer.correlations, mask=score > np.quantile(score, share)).error
    errors = {m: obs_prune(layer.W, layer.correlations, amount=share, method=m).error for m in METHODS}
    assert errors["admm"] < 0.75 * largest
    assert errors["greedy"] < 0.75 * largest
    assert errors["sweep"] < 0.95 * largest
    assert errors["auto"] == min(errors["admm"], errors["greedy"])


def test_a_sweep_makes_up_for_what_goes_before_any_refit():
    layer = correlated_layer()
    problem = layer_problem(layer.W, layer.correlations)
    mask, M = sweep(problem, Zeros(layer.W.size // 2))
    assert not M[~mask].any()
    assert problem.error(M) < 0.6 * problem.error(np.where(mask, layer.W, 0.0))


def test_alternating_directions_end_near_the_refitted_weights():
    layer = correlated_layer()
    problem = layer_problem(layer.W, layer.correlations)
    mask, Z = admm(problem, Zeros(layer.W.size // 2))
    assert np.array_equal(Z != 0, mask)
    assert problem.error(Z) == pytest.approx(problem.error(refit_rows(problem, mask)), rel=0.02)


@given(layers(max_d=6, noise=(0.0,)))
def test_the_curve_falls_convexly_from_everything_to_nothing(layer):
    curve = error_curve(layer.W, layer.correlations)
    assert len(curve) == layer.W.size + 1
    assert (np.diff(curve) <= 1e-12).all()
    assert (np.diff(curve, 2) >= -1e-9).all()
    energy = np.square(layer.y - layer.y.mean(0)).sum()
    assert curve[0] == pytest.approx(1.0) or energy < 1e-9
    assert abs(curve[-1]) < 1e-9


def test_the_curve_of_a_layer_foretells_what_elimination_leaves():
    layer = correlated_layer()
    curve = error_curve(layer.W, layer.correlations, ridge=1e-8)
    for left in (200, 600, 1200):
        found = obs_prune(layer.W, layer.correlations, count=left, method="greedy", ridge=1e-8)
        assert curve[left] == pytest.approx(found.error, rel=0.02)


def test_rows_of_a_large_layer_stand_for_all(monkeypatch):
    layer = correlated_layer(h=60)
    exact = error_curve(layer.W, layer.correlations)
    monkeypatch.setattr("pysolve.layer.row_paths._EFFORT", 96.0**3 * 20 / 3)
    sampled = error_curve(layer.W, layer.correlations)
    assert len(sampled) == len(exact)
    np.testing.assert_allclose(sampled[:3000:100], exact[:3000:100], rtol=0.4, atol=1e-3)


@given(seeds, st.integers(0, 9))
def test_layers_share_weights_so_that_the_sum_of_errors_is_least(seed, left):
    rng = np.random.default_rng(seed)
    falls = [np.sort(rng.random(size))[::-1] for size in (4, 5)]
    curves = {
        name: 3 - np.concatenate([[0], np.cumsum(fall)]) for name, fall in zip("ab", falls, strict=True)
    }
    shared = share_weights(curves, left, importance={"a": 2.0, "b": 1.0})
    best = min(2 * curves["a"][k] + curves["b"][left - k] for k in range(5) if 0 <= left - k <= 5)
    assert sum(shared.values()) == left
    assert 2 * curves["a"][shared["a"]] + curves["b"][shared["b"]] == pytest.approx(best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of amount, count, pattern and mask; got none"),
        ({"amount": 0.5, "pattern": "2:4"}, "got amount and pattern"),
        ({"amount": 1.0}, r"amount must be in \[0, 1\), got 1.0"),
        ({"count": 17}, "count must be an integer within 0 … 12, got 17"),
        ({"pattern": "4:2"}, 'pattern must be like "2:4"'),
        ({"amount": 0.5, "method": "obs"}, "unknown method 'obs'; choose one of auto, admm, greedy, sweep"),
        ({"amount": 0.5, "scope": "global"}, "unknown scope 'global'; choose one of layer, row"),
        ({"amount": 0.5, "scope": "row", "method": "greedy"}, "the whole layer"),
        (
            {"mask": np.ones((4, 3), bool)},
            r"mask must be a bool array of shape \(3, 4\), got bool of \(4, 3\)",
        ),
        ({"mask": np.ones((3, 4))}, "got float64"),
        ({"amount": 0.5, "ridge": -1.0}, "ridge must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        obs_prune(np.ones((3, 4)), np.eye(4), **options)


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"W is 3 x 4, so .* must be \(4, 4\), got \(5, 5\)"):
        obs_prune(np.ones((3, 4)), np.eye(5), amount=0.5)
    with pytest.raises(
        ValueError, match="r_xx is not positive semi-definite, so it is no correlation matrix E"
    ):
        obs_prune(np.ones((1, 2)), np.array([[1.0, 3.0], [3.0, 1.0]]), amount=0.5)
    with pytest.raises(ValueError, match=r"count, of the weights .* within 0 … 2"):
        share_weights({"a": np.array([1.0, 0.5, 0.0])}, 3)
