"""Sizes stay within every target, use it up, and diverge little more than the best sizes."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from allocation import allocate
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.errors import PysolveError
from pysolve.solve.budget import MEASURES, Costs, check_targets, limits_of, site_sizes
from pysolve.solve.knapsack import Knapsack, pack, solve


def chain(sizes, macs=1, bias=True):
    """Linear layers one after the other; every hidden width is a site."""
    outputs, inputs, S, L = sizes[1:], sizes[:-1], len(sizes) - 2, len(sizes) - 1
    product = np.multiply.outer([1.0, 0.0, 4.0], np.ones(L))
    product[1] = macs
    return Costs(
        channels=np.array(sizes[1:-1], dtype=int),
        outputs=np.array(outputs, dtype=float),
        inputs=np.array(inputs, dtype=float),
        rows=np.eye(L, S),
        columns=np.eye(L, S, -1),
        product=product,
        per_output=np.multiply.outer([1.0, 0.0, 4.0], np.full(L, float(bias))),
        per_input=np.zeros((3, L)),
        constant=np.zeros(3),
    )


def tangle(rng, sites, most):
    """Layers that read and write any sites, several or the same one both ways, and products of sites."""
    channels, L = rng.integers(2, most + 1, sites), sites + 2
    rows, columns = (rng.random((L, sites)) < 0.4) * 1.0, (rng.random((L, sites)) < 0.4) * 1.0
    columns *= rng.integers(1, 4, (L, sites))
    tables = [rng.integers(0, 5, (3, L)).astype(float) for _ in range(3)]
    outputs, inputs = rows @ channels + rng.integers(1, 5, L), columns @ channels + rng.integers(1, 5, L)
    products = rng.integers(0, 3, (3, sites, sites)) * 2.0
    return Costs(
        *(channels, outputs, inputs, rows, columns, *tables, rng.integers(0, 50, 3).astype(float)),
        gradient=rng.integers(0, 9, (3, sites)).astype(float),
        hessian=products + products.swapaxes(1, 2),
    )


def random_curve(rng, channels):
    """Convex, exponential or with plateaus; each site on its own scale."""
    falls = rng.exponential(size=channels)
    kind = rng.integers(3)
    if kind == 0:
        falls = np.sort(falls)[::-1]
    elif kind == 1:
        falls *= np.exp(-np.linspace(0, rng.uniform(1, 10), channels))
    else:
        falls *= rng.random(channels) < 0.5
    return np.append(np.cumsum(falls[::-1])[::-1], 0.0) * np.exp(rng.normal(0, 1.5))


def random_problem(rng, sites, most):
    """Costs, curves and one to three targets that can be met."""
    if rng.random() < 0.5:
        costs = tangle(rng, sites, most)
    else:
        costs = chain([3, *rng.integers(2, most + 1, sites), 4], rng.integers(1, 9, sites + 1))
    curves = [random_curve(rng, channels) for channels in costs.channels]
    least, most_of = costs.cost(np.minimum(1, costs.channels)), costs.original
    measures = rng.permutation(MEASURES)[: rng.integers(1, 4)].tolist()
    share = rng.uniform(0, 1, 3)
    targets = {m: least[m] + s * (most_of[m] - least[m]) for m, s in zip(measures, share, strict=False)}
    return costs, curves, {m: int(v) + 2 for m, v in targets.items()}


@st.composite
def problems(draw, sites, most=8):
    return random_problem(np.random.default_rng(draw(seeds)), draw(sites), most)


def divergence(curves, kept):
    return sum(curve[k] for curve, k in zip(curves, kept, strict=True))


def holds(costs, kept, targets):
    cost = costs.cost(kept)
    return all(cost[measure] <= target for measure, target in targets.items())


def exhaustive(costs, curves, targets):
    """The least divergence within the targets, by trying all sizes."""
    sizes = product(*(range(1, channels + 1) for channels in costs.channels))
    return min(divergence(curves, kept) for kept in sizes if holds(costs, kept, targets))


@given(seeds, st.integers(0, 4))
def test_costs_are_those_of_each_layer_summed(seed, sites):
    rng = np.random.default_rng(seed)
    costs = tangle(rng, sites, 8)
    kept = rng.integers(0, costs.channels + 1)
    gone = costs.channels - kept
    for m, measure in enumerate(MEASURES):
        total = costs.constant[m]
        for layer in range(len(costs.outputs)):
            out = costs.outputs[layer] - sum(r * g for r, g in zip(costs.rows[layer], gone, strict=True))
            into = costs.inputs[layer] - sum(c * g for c, g in zip(costs.columns[layer], gone, strict=True))
            total += costs.product[m, layer] * out * into
            total += costs.per_output[m, layer] * out + costs.per_input[m, layer] * into
        for s, k in enumerate(kept):
            total += costs.gradient[m, s] * k
            total += sum(costs.hessian[m, s, t] * k * other / 2 for t, other in enumerate(kept))
        assert costs.cost(kept)[measure] == total
    c, g, H = costs.expansion()
    assert np.array_equal(c + g @ kept + 0.5 * kept @ H @ kept, [*costs.cost(kept).values()])


@given(problems(st.integers(1, 6), most=40), st.integers(0, 5), st.integers(1, 9))
def test_no_target_is_broken_and_nothing_more_would_fit(problem, least, round_to):
    costs, curves, targets = problem
    allowed = [
        [k for k in range(K + 1) if k == K or (k >= least and k % round_to == 0)]
        for K in costs.channels.tolist()
    ]
    if not holds(costs, [sizes[0] for sizes in allowed], targets):
        with pytest.raises(PysolveError, match="cannot go below"):
            allocate(costs, curves, targets, least=least, round_to=round_to)
        return
    kept = allocate(costs, curves, targets, least=least, round_to=round_to)
    assert kept.dtype == np.intp
    assert holds(costs, kept, targets)
    for s, sizes in enumerate(allowed):
        assert kept[s] in sizes
        above = [k for k in sizes if k > kept[s]]
        assert not above or not holds(costs, [*kept[:s], above[0], *kept[s + 1 :]], targets)


@given(problems(st.integers(1, 2), most=20))
def test_up_to_two_sites_get_the_best_sizes_there_are(problem):
    kept = allocate(*problem)
    assert divergence(problem[1], kept) <= exhaustive(*problem) * (1 + 1e-9) + 1e-300


def test_more_sites_come_close_to_the_best_sizes():
    rng = np.random.default_rng(0)
    found, best = [], []
    for _ in range(60):
        problem = random_problem(rng, int(rng.integers(3, 5)), 6)
        found.append(divergence(problem[1], allocate(*problem)))
        best.append(exhaustive(*problem))
    found, best = np.array(found), np.array(best)
    assert np.all(found >= best * (1 - 1e-12))
    assert np.mean(found <= best * (1 + 1e-9)) > 0.95
    assert found.sum() < 1.01 * best.sum()


@given(seeds, st.integers(1, 5), st.floats(0.1, 1.0))
def test_where_channels_cost_the_same_those_of_most_divergence_are_kept(seed, sites, share):
    rng = np.random.default_rng(seed)
    channels = rng.integers(1, 400, sites)
    falls = [np.sort(rng.exponential(size=K))[::-1] * 10.0 ** rng.uniform(-2, 2) for K in channels]
    curves = [np.append(np.cumsum(fall[::-1])[::-1], 0.0) for fall in falls]
    zeros, ones = np.zeros((3, sites)), np.ones((3, sites))
    eye, width = np.eye(sites), channels.astype(float)
    costs = Costs(channels, width, width, eye, 0 * eye, zeros, ones, zeros, np.zeros(3))
    total = max(int(share * channels.sum()), sites + 1)
    kept = allocate(costs, curves, {"macs": total}, least=0)
    best = np.concatenate(falls)[np.argsort(-np.concatenate(falls))[total:]].sum()
    assert kept.sum() == min(total, channels.sum())
    assert divergence(curves, kept) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(seeds, st.floats(0.15, 0.9))
def test_a_target_is_used_to_within_one_per_cent_where_steps_are_small(seed, share):
    rng = np.random.default_rng(seed)
    costs = chain([64, *rng.integers(200, 1500, 4), 10])
    kept = allocate(costs, [random_curve(rng, K) for K in costs.channels], {"params": share})
    assert 0.99 * share < costs.cost(kept)["params"] / costs.original["params"] <= share


@given(problems(st.integers(1, 3)), seeds)
def test_a_curve_that_rises_counts_as_the_highest_value_ahead(problem, seed):
    costs, curves, targets = problem
    rng = np.random.default_rng(seed)
    noisy = [curve + rng.exponential(0.1, len(curve)) for curve in curves]
    falling = [[max(curve[k:]) for k in range(len(curve))] for curve in noisy]
    assert allocate(costs, noisy, targets).tolist() == allocate(costs, falling, targets).tolist()


@given(seeds, st.sampled_from(MEASURES), st.floats(0.3, 1.0))
def test_a_share_means_the_same_as_the_number(seed, measure, share):
    rng = np.random.default_rng(seed)
    costs = chain([3, *rng.integers(5, 30, 3), 4])
    curves = [random_curve(rng, K) for K in costs.channels]
    number = int(share * costs.original[measure])
    assert (
        allocate(costs, curves, {measure: share}).tolist()
        == allocate(costs, curves, {measure: number}).tolist()
    )


def test_all_channels_stay_where_everything_is_allowed():
    costs = chain([3, 5, 6, 2])
    assert allocate(costs, [np.arange(5, -1, -1), np.arange(6, -1, -1)], {"bytes": 1.0}).tolist() == [5, 6]
    assert allocate(costs, [np.zeros(6), np.zeros(7)], {"params": 10**9}).tolist() == [5, 6]


def test_sizes_of_infinite_divergence_are_not_used():
    costs, curve = chain([4, 10, 4]), np.arange(10.0, -1, -1)
    curve[[5, 6, 7]] = np.inf
    assert allocate(costs, [curve], {"macs": 0.7}).tolist() == [4]
    curve[:8] = np.inf
    with pytest.raises(PysolveError, match=r"macs cannot go below 64 \(80 %\).*target is 56 \(70 %\)"):
        allocate(costs, [curve], {"macs": 0.7})


def test_channels_without_divergence_are_removed_first():
    costs = chain([8, 20, 20, 8])
    dead, needed = np.where(np.arange(21) < 8, 5.0, 0.0), np.arange(20.0, -1, -1)
    kept = allocate(costs, [dead, needed], {"macs": 0.6})
    assert kept[1] == 20
    assert kept[0] >= 8


def test_a_site_that_saves_nothing_keeps_everything():
    costs = chain([4, 6, 6, 3], macs=[5, 0, 0])
    assert allocate(costs, [np.arange(6, -1, -1.0)] * 2, {"macs": 0.5}).tolist() == [3, 6]


def test_least_may_exceed_what_a_site_has():
    costs = chain([4, 3, 30, 3])
    kept = allocate(costs, [np.zeros(4), np.zeros(31)], {"params": 0.5}, least=8)
    assert kept[0] == 3
    assert kept[1] >= 8


def test_what_is_added_counts_but_shares_are_of_the_original():
    costs = chain([4, 6, 3])
    richer = Costs(**{**vars(costs), "constant": np.full(3, 7.0), "added": np.full(3, 7.0)})
    assert richer.original == costs.original
    assert richer.cost([6])["params"] == costs.original["params"] + 7
    kept = allocate(richer, [np.arange(6, -1, -1.0)], {"params": 1.0})
    assert kept.tolist() == [5]
    assert richer.cost(kept)["params"] <= costs.original["params"]


def test_a_network_without_sites_can_only_stay_as_it_is():
    costs = chain([4, 3])
    assert allocate(costs, [], {"params": 1.0}).shape == (0,)
    with pytest.raises(PysolveError, match=r"params cannot go below 15 \(100 %\)"):
        allocate(costs, [], {"params": 0.5})


def test_an_impossible_target_is_refused_with_the_least_that_is_possible():
    costs, curves = chain([784, 300, 100, 10]), [np.zeros(301), np.zeros(101)]
    with pytest.raises(
        PysolveError, match=r"params cannot go below 807 \(0\.303 %\).*target is 267 \(0\.1 %\)"
    ):
        allocate(costs, curves, {"params": 0.001})
    with pytest.raises(PysolveError, match=r"macs cannot go below .*target is 5 "):
        allocate(costs, curves, {"bytes": 0.5, "macs": 5})


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({}, ValueError, "params, macs, bytes"),
        ({"flops": 0.5}, ValueError, "unknown measure 'flops'.*params, macs, bytes"),
        ({"params": 0}, ValueError, "target for params must be"),
        ({"params": -3}, ValueError, "got -3"),
        ({"macs": 1.5}, ValueError, "an integer above 1, got 1.5"),
        ({"macs": float("nan")}, ValueError, "got nan"),
        ({"macs": float("inf")}, ValueError, "got inf"),
        ({"bytes": True}, TypeError, "got bool"),
        ({"bytes": "half"}, TypeError, "got str"),
    ],
)
def test_targets_must_be_shares_or_numbers_of_a_known_measure(targets, error, message):
    with pytest.raises(error, match=message):
        allocate(chain([4, 6, 3]), [np.zeros(7)], targets)


@pytest.mark.parametrize(
    ("curves", "changes", "error", "message"),
    [
        ([], {}, ValueError, "each of 1 sites, got 0"),
        ([np.zeros(6)], {}, ValueError, r"curve 0 must have 7 values, for 0 … 6 .* shape \(6,\)"),
        ([np.full(7, np.nan)], {}, ValueError, "curve 0 must hold numbers"),
        ([np.full(7, np.inf)], {}, ValueError, "a finite one for all"),
        ([np.zeros(7)], {"least": -1}, ValueError, "least must be an integer of at least 0"),
        ([np.zeros(7)], {"round_to": 0}, ValueError, "round_to must be an integer of at least 1"),
        ([np.zeros(7)], {"round_to": 2.0}, TypeError, "round_to must be an integer"),
    ],
)
def test_curves_and_steps_must_fit_the_sites(curves, changes, error, message):
    with pytest.raises(error, match=message):
        allocate(chain([4, 6, 3]), curves, {"params": 0.5}, **changes)


ROWS = ("product", "per_output", "per_input", "constant", "gradient", "hessian")


def timed(costs, rng):
    """With a last measure for which sizes count as other numbers, in steps."""
    rows = {name: np.concatenate([getattr(costs, name), getattr(costs, name)[1:2]]) for name in ROWS}
    seen = []
    for channels in costs.channels.tolist():
        total = np.cumsum(rng.exponential(size=channels + 1) * (rng.random(channels + 1) < 0.6))
        seen.append(channels * total / total[-1] if total[-1] else np.arange(channels + 1.0))
    return replace(costs, **rows, added=np.zeros(4), measures=(*MEASURES, "ms"), seen=seen)


@given(seeds, st.integers(20, 99), st.booleans())
def test_sizes_that_count_as_others_are_chosen_as_well_as_by_trying_all(seed, share, several):
    rng = np.random.default_rng(seed)
    costs = timed(tangle(rng, 2, 7), rng)
    curves = [random_curve(rng, k) for k in costs.channels]
    # Of sizes that count as equally many, the largest.
    for curve, seen in zip(curves, costs.seen, strict=True):
        curve[:-1][np.diff(seen) <= 0] = np.inf
    sizes, divergences = site_sizes(costs, curves)
    rows, limits = limits_of(costs, {"ms": share / 100, **({"params": 0.8} if several else {})})
    tables = [dict(zip(k.tolist(), d.tolist(), strict=True)) for k, d in zip(sizes, divergences, strict=True)]

    def fits(k):
        cost = costs.cost(k)
        return all(cost[m] <= limit * (1 + 1e-12) for m, limit in zip(rows, limits, strict=True))

    within = [k for k in product(*tables) if fits(k)]
    assume(within)
    best = min(sum(table[n] for table, n in zip(tables, k, strict=True)) for k in within)
    as_seen = [seen[k.astype(int)] for seen, k in zip(costs.seen, sizes, strict=True)]
    seen = np.array([pack(as_seen if m == "ms" else sizes, sizes)[0] for m in rows])
    parts = (part[[costs.measures.index(m) for m in rows]] for part in costs.expansion())
    found = solve(Knapsack(*pack(sizes, divergences), limits, *parts, seen=seen))
    assert fits(found)
    assert sum(table[k] for table, k in zip(tables, found, strict=True)) == pytest.approx(best)


def test_tied_sites_count_as_their_mean():
    costs = timed(chain((4, 6, 6, 3)), np.random.default_rng(0))
    tied = costs.tied([[0, 1]])
    np.testing.assert_allclose(tied.seen[0], (costs.seen[0] + costs.seen[1]) / 2)
    assert tied.cost([3])["params"] == costs.cost([3, 3])["params"]


@pytest.mark.parametrize(("value", "good"), [(0.5, True), (2.5, True), (7, True), (0, False), (-1, False)])
def test_milliseconds_need_be_no_integers(value, good):
    if good:
        check_targets({"ms": value})
    else:
        with pytest.raises(ValueError, match="a number above 1"):
            check_targets({"ms": value})
