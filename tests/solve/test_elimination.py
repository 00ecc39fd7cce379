import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import columns_of, eliminate, support_error
from strategies import correlated_samples, instances, seeds

import pysolve as ps
from pysolve import _core
from pysolve.solve.elimination import nested_errors, scale_to_unit_variance
from pysolve.solve.problem import problem_of
from pysolve.solve.selection import polish

METHODS = ("elimination", "swap", "forward", "lasso", "weighted_lasso", "magnitude", "activation")


def generic(d, h, group_size, seed=0, samples=None):
    """Correlated inputs of full rank, so that no two removals cost the same."""
    rng = np.random.default_rng(seed)
    n = samples or 3 * d + 10
    x = correlated_samples(rng, n, d, rank=d, repeated=0, dead=0, spread=0.5)
    x += 0.3 * x.std(0) * rng.standard_normal((n, d))
    y = x / x.std(0) @ rng.standard_normal((d, h)) + 0.3 * rng.standard_normal((n, h))
    return x.T @ x / n, y.T @ x / n, float(np.mean(np.square(y).sum(1)))


def path_of(case, **options):
    return ps.elimination_path(case.r_xx, case.r_yx, group_size=case.group_size, **options)


@given(instances())
def test_the_error_at_every_size_is_that_of_an_independent_refit(case):
    path = path_of(case, r_yy=case.r_yy)
    energy = 0.5 * np.trace(case.r_yy)
    assert np.all(np.isfinite(path.error))
    for k in range(case.groups + 1):
        refit = support_error(case.r_xx, case.r_yx, path.keep(k), case.group_size, path.ridge)
        assert path.error[k] - energy == pytest.approx(refit, abs=1e-7 * energy)


@given(instances(spread=12.0), st.floats(-60, 60))
def test_hostile_scales_neither_fail_nor_yield_nan(case, exponent):
    scale = 10.0**exponent
    path = ps.elimination_path(case.r_xx, scale * case.r_yx, group_size=case.group_size)
    assert np.all(np.isfinite(path.error))
    assert np.all(np.diff(path.error) <= 0)
    for k in range(case.groups + 1):
        refit = support_error(case.r_xx, case.r_yx, path.keep(k), case.group_size, path.ridge)
        assert path.error[k] / scale**2 == pytest.approx(refit, rel=1e-6, abs=1e-7 * np.trace(case.r_yy))
    for method in METHODS:
        options = {"method": method, "group_size": case.group_size}
        assert len(ps.select_channels(case.r_xx, scale * case.r_yx, 1, **options)) == 1


@given(instances())
def test_refits_reach_the_error_that_is_promised(case):
    path = path_of(case)
    energy = 0.5 * np.trace(case.r_yy)
    for k in range(case.groups + 1):
        M = path.refit(k)
        error = 0.5 * np.vdot(M @ case.r_xx, M) - np.vdot(case.r_yx, M)
        assert error <= path.error[k] + 1e-7 * energy
        assert error >= support_error(case.r_xx, case.r_yx, path.keep(k), case.group_size) - 1e-7 * energy
        others = np.setdiff1d(np.arange(len(case.r_xx)), columns_of(path.keep(k), case.group_size))
        assert not M[:, others].any()


@given(instances())
def test_more_groups_never_reconstruct_worse(case):
    path = path_of(case, r_yy=case.r_yy)
    assert np.all(np.diff(path.error) <= 1e-12 * np.trace(case.r_yy))
    assert path.error[0] == 0.5 * np.trace(case.r_yy)
    assert path.error[-1] >= -1e-7 * np.trace(case.r_yy)


@given(instances())
def test_the_order_is_a_permutation_and_dead_groups_lead_it(case):
    path = path_of(case)
    np.testing.assert_array_equal(np.sort(path.order), np.arange(case.groups))
    dead = ~np.diag(case.r_xx).reshape(-1, case.group_size).any(1)
    assert dead[path.order[: dead.sum()]].all()
    np.testing.assert_array_equal(path.error[case.groups - dead.sum() :], path.error[-1])
    kept = [set(path.keep(k)) for k in range(case.groups + 1)]
    assert all(small < large for small, large in itertools.pairwise(kept))


@pytest.mark.parametrize(("d", "h", "group_size"), [(12, 3, 1), (24, 5, 3), (12, 40, 2), (18, 1, 9)])
def test_agrees_with_elimination_that_recomputes_everything(d, h, group_size):
    R, C, _ = generic(d, h, group_size)
    path = ps.elimination_path(R, C, group_size=group_size, ridge=1e-8)
    order, error = eliminate(R, C, group_size, 1e-8)
    np.testing.assert_array_equal(path.order, order)
    np.testing.assert_allclose(path.error, error, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("d", "h", "group_size"), [(250, 20, 1), (300, 7, 4), (390, 400, 13), (256, 9, 128)])
def test_delayed_updates_across_many_panels_stay_exact(d, h, group_size):
    R, C, _ = generic(d, h, group_size)
    path = ps.elimination_path(R, C, group_size=group_size)
    for k in range(0, d // group_size + 1, max(d // group_size // 10, 1)):
        assert path.error[k] == pytest.approx(
            support_error(R, C, path.keep(k), group_size, path.ridge), rel=1e-9
        )
    # The group that goes next is the cheapest to lose.
    k = d // group_size // 2 + 1
    keep = path.keep(k)
    losses = [support_error(R, C, np.setdiff1d(keep, [g]), group_size, path.ridge) for g in keep]
    assert keep[np.argmin(losses)] == path.order[d // group_size - k]


@given(seed=seeds, data=st.data())
def test_permuting_groups_permutes_the_order(seed, data):
    R, C, _ = generic(12, 4, 2, seed)
    shuffle = np.array(data.draw(st.permutations(range(6))))
    columns = columns_of(shuffle, 2)
    plain = ps.elimination_path(R, C, group_size=2)
    moved = ps.elimination_path(R[np.ix_(columns, columns)], C[:, columns], group_size=2)
    np.testing.assert_array_equal(shuffle[moved.order], plain.order)
    np.testing.assert_allclose(moved.error, plain.error, rtol=1e-8)


@given(seed=seeds, scales=st.lists(st.floats(-5, 5), min_size=8, max_size=8))
def test_the_scale_of_single_inputs_does_not_matter(seed, scales):
    R, C, _ = generic(8, 3, 1, seed)
    unit = 10.0 ** np.array(scales)
    plain, scaled = ps.elimination_path(R, C), ps.elimination_path(R * unit * unit[:, None], C * unit)
    np.testing.assert_array_equal(scaled.order, plain.order)
    np.testing.assert_allclose(scaled.error, plain.error, rtol=1e-8)


def test_readers_that_share_a_layers_outputs_choose_as_that_layer():
    R, C, energy = generic(120, 10, 3)
    single = ps.elimination_path(R, C, group_size=3, r_yy=energy)
    joint = ps.elimination_path([(R, C[:4]), (R, C[4:])], group_size=3, r_yy=[energy / 4, 0.75 * energy])
    np.testing.assert_array_equal(joint.order, single.order)
    np.testing.assert_allclose(joint.error, single.error, rtol=1e-9)
    listed = ps.elimination_path([R, R], [C[:4], C[4:]], group_size=3)
    np.testing.assert_array_equal(listed.order, single.order)
    np.testing.assert_allclose(np.vstack(joint.refit(7)), single.refit(7), rtol=1e-9)
    for method in ("forward", "swap", "magnitude", "activation"):
        np.testing.assert_array_equal(
            ps.select_channels([(R, C[:4]), (R, C[4:])], k=5, method=method, group_size=3),
            ps.select_channels(R, C, 5, method=method, group_size=3),
        )


def test_readers_with_inputs_of_their_own_add_their_errors():
    problems = [generic(12, 4, 2, seed)[:2] for seed in (1, 2)]
    path = ps.elimination_path(problems, group_size=2)
    for k in range(7):
        errors = [support_error(R, C, path.keep(k), 2, path.ridge) for R, C in problems]
        assert path.error[k] == pytest.approx(sum(errors), rel=1e-9)


def test_takes_correlations():
    x = np.random.default_rng(0).standard_normal((50, 6))
    correlations = ps.Correlations.from_samples(x, x @ np.diag([3.0, 3, 1, 1, 2, 2]), group_size=2)
    path = ps.elimination_path(correlations, r_yy=correlations.r_yy)
    np.testing.assert_array_equal(path.order, [1, 2, 0])
    np.testing.assert_array_equal(ps.select_channels(correlations, k=2), [0, 2])
    assert path.error[2] == pytest.approx(correlations.error(path.refit(2)), rel=1e-6)


@given(instances(), st.data())
def test_swaps_never_raise_the_error(case, data):
    scaled = scale_to_unit_variance(problem_of((case.r_xx, case.r_yx), case.group_size))
    live = len(scaled.live)
    keep = np.array(data.draw(st.lists(st.integers(0, live - 1), unique=True)), dtype=np.intp)
    after = polish(scaled, keep, 1e-8)
    assert len(after) == len(keep)
    assert len(np.unique(after)) == len(keep)
    errors = [nested_errors(scaled, groups, 1e-8)[-1] for groups in (keep, after)]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("group_size", [1, 3])
def test_no_single_exchange_improves_what_swaps_leave(group_size):
    R, C, _ = generic(10 * group_size, 6, group_size, seed=5)
    keep = ps.select_channels(R, C, 4, method="swap", group_size=group_size)
    best = support_error(R, C, keep, group_size, 1e-8)
    for out, into in itertools.product(keep, np.setdiff1d(np.arange(10), keep)):
        exchanged = np.append(np.setdiff1d(keep, [out]), into)
        assert support_error(R, C, exchanged, group_size, 1e-8) >= best * (1 + 1e-9)


def test_close_to_the_best_of_all_sets():
    """Exhaustive search on 40 problems of 9 inputs, 3 kept, inputs of rank 6 with noise."""
    ratios, wins = {method: [] for method in METHODS}, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = correlated_samples(rng, 60, 9, rank=6, repeated=0, dead=0, spread=0.0)
        x = np.maximum(x + 0.5 * rng.standard_normal(x.shape), 0)
        y = x @ rng.standard_normal((9, 4))
        R, C, energy = x.T @ x / 60, y.T @ x / 60, 0.5 * np.mean(np.square(y).sum(1))
        best = min(energy + support_error(R, C, keep) for keep in itertools.combinations(range(9), 3))
        for method in METHODS:
            keep = ps.select_channels(R, C, 3, method=method)
            ratios[method].append((energy + support_error(R, C, keep)) / best)
        wins += ratios["swap"][-1] <= ratios["lasso"][-1] * (1 + 1e-9)
    means = {method: np.mean(values) for method, values in ratios.items()}
    assert min(map(min, ratios.values())) >= 1 - 1e-6
    assert means["swap"] < 1.005
    assert means["elimination"] < 1.04
    assert means["swap"] <= means["elimination"] < means["lasso"]
    assert means["swap"] <= means["forward"]
    # On all but one of these problems swaps end at least as well as the lasso's groups.
    assert wins >= 39


@pytest.mark.parametrize("method", METHODS)
@given(case=instances(), data=st.data())
def test_every_method_keeps_exactly_k_groups(method, case, data):
    k = data.draw(st.integers(1, case.groups))
    keep = ps.select_channels(case.r_xx, case.r_yx, k, method=method, group_size=case.group_size)
    assert len(keep) == k
    assert np.all(np.diff(keep) > 0)
    assert 0 <= keep[0] <= keep[-1] < case.groups


def test_all_methods_find_the_only_channels_that_matter():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 12))
    x[:, [2, 3, 8, 9]] *= 3.0
    y = x[:, [2, 3, 8, 9]] @ rng.standard_normal((4, 5))
    correlations = ps.Correlations.from_samples(x, y, group_size=2)
    for method in METHODS:
        np.testing.assert_array_equal(ps.select_channels(correlations, k=2, method=method), [1, 4])


def test_a_repeated_channel_goes_at_no_cost():
    x = np.random.default_rng(0).standard_normal((50, 4))
    x[:, 3] = x[:, 1]
    path = ps.elimination_path(x.T @ x / 50, x.T @ x / 50, r_yy=x.T @ x / 50)
    assert path.order[0] in (1, 3)
    assert path.error[3] < 1e-7


def test_a_layer_without_any_input_keeps_what_it_is_told():
    R, C = np.zeros((4, 4)), np.zeros((2, 4))
    path = ps.elimination_path(R, C, r_yy=3.0)
    np.testing.assert_array_equal(path.order, range(4))
    np.testing.assert_array_equal(path.error, 1.5)
    assert not path.refit(4).any()
    for method in METHODS:
        assert len(ps.select_channels(R, C, 3, method=method)) == 3


@pytest.mark.usefixtures("interruptible")
def test_control_c_ends_the_elimination():
    d = 2500
    core = scale_to_unit_variance(problem_of((np.eye(d) + 0.1, np.ones((1, d))))).core
    killer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        _core.eliminate(core, ridges=[1e-8], smallest=0)


@pytest.mark.parametrize(
    ("k", "options", "error", "message"),
    [
        (0, {}, ValueError, "k, the number of groups to keep, must be an integer within 1 … 3, got 0"),
        (4, {}, ValueError, "within 1 … 3, got 4"),
        (None, {}, TypeError, "must be an integer within 1 … 3, got None"),
        (1.0, {}, TypeError, "must be an integer within 1 … 3, got 1.0"),
        (True, {}, TypeError, "must be an integer within 1 … 3, got True"),
        (1, {"method": "best"}, ValueError, "unknown method 'best'; choose one of activation, elimination"),
        (1, {"ridge": -1.0}, ValueError, "ridge must be"),
        (1, {"ridge": 0.0}, ValueError, "singular at the ridge asked for"),
        (1, {"group_size": 2}, ValueError, "group_size must divide the 3 inputs"),
    ],
)
def test_bad_values_are_refused(k, options, error, message):
    R = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    with pytest.raises(error, match=message):
        ps.select_channels(R, np.ones((1, 3)), k, **options)


def test_a_path_refuses_sizes_it_does_not_have():
    path = ps.elimination_path(np.eye(3), np.ones((1, 3)))
    assert path.keep(0).size == 0
    with pytest.raises(ValueError, match="within 0 … 3, got 4"):
        path.keep(4)
    with pytest.raises(ValueError, match="within 0 … 3, got -1"):
        path.refit(-1)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("verb", ["swap", "debias", "alternate"])
def test_control_c_ends_long_calls_at_once(verb):
    """Also those that are few products of large matrices."""
    R = np.eye(2400) + 0.01
    C = np.random.default_rng(0).standard_normal((600, 2400))
    calls = {
        "swap": lambda: ps.select_channels(R, C, 200, method="swap"),
        "debias": lambda: [ps.debias(R, C, np.arange(2400)) for _ in range(9)],
        "alternate": lambda: ps.alternate_minimization((R, C), 0.1, tol=0.0),
    }
    sent = []

    def interrupt():
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.3, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        calls[verb]()
    assert time.process_time() - sent[0] < 0.5
