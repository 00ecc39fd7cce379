"""Masks keep the right weights, exactly as many as asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.layer.masks import keep_in_rows, keep_largest, masks, parse_pattern


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {"a": rng.standard_normal((4, 5)), "b": 10 * rng.standard_normal((3, 2, 3)), "c": np.zeros((0, 4))}


shares = st.floats(0, 0.99)


@given(shares, st.integers(0, 9))
def test_in_each_layer_the_largest_weights_stay(amount, seed):
    for name, mask in masks(weights(seed), amount).items():
        w = np.abs(weights(seed)[name])
        assert mask.shape == w.shape
        assert (~mask).sum() == int(amount * w.size + 1e-9)
        assert w[mask].min(initial=np.inf) >= w[~mask].max(initial=0)


@given(shares, st.integers(0, 9))
def test_of_all_layers_together_the_largest_weights_stay(amount, seed):
    kept = masks(weights(seed), amount, scope="global")
    every = np.concatenate([np.abs(w).ravel() for w in weights(seed).values()])
    mask = np.concatenate([kept[name].ravel() for name in weights(seed)])
    assert (~mask).sum() == int(amount * every.size + 1e-9)
    assert every[mask].min(initial=np.inf) >= every[~mask].max(initial=0)


def test_shares_are_what_they_say_in_decimals():
    assert all((~masks({"a": np.arange(100.0)}, k / 100)["a"]).sum() == k for k in range(100))


def test_of_equal_weights_the_first_stay():
    assert masks({"a": np.ones(5)}, 0.4)["a"].tolist() == [True, True, True, False, False]


def test_each_layer_may_have_an_amount_of_its_own():
    kept = masks(weights(), {"b": 0.5})
    assert kept["a"].all()
    assert (~kept["b"]).sum() == 9


def test_random_masks_follow_the_seed_and_not_the_weights():
    one, again, other = (masks(weights(), 0.5, method="random", seed=seed) for seed in (0, 0, 1))
    scaled = masks({name: w**3 for name, w in weights().items()}, 0.5, method="random", seed=0)
    assert all(np.array_equal(one[n], again[n]) and np.array_equal(one[n], scaled[n]) for n in one)
    assert not np.array_equal(one["a"], other["a"])


def moments(seed=0):
    rng = np.random.default_rng(seed + 100)
    return {name: rng.uniform(0, 4, int(np.prod(w.shape[1:]))) for name, w in weights().items()}


@given(st.floats(0, 2), st.integers(0, 9))
def test_a_threshold_keeps_what_reaches_it(threshold, seed):
    for name, mask in masks(weights(seed), threshold=threshold).items():
        assert np.array_equal(mask, np.abs(weights(seed)[name]) >= threshold)


def test_a_threshold_of_each_layer_leaves_the_others_alone():
    kept = masks(weights(), threshold={"b": 3.0})
    assert kept["a"].all()
    assert np.array_equal(kept["b"], np.abs(weights()["b"]) >= 3.0)


@given(st.floats(0, 3), st.integers(0, 9))
def test_sensitivity_counts_in_deviations_of_the_layer(sensitivity, seed):
    layers = {name: w for name, w in weights(seed).items() if w.size}
    kept = masks(layers, sensitivity=sensitivity, method="std")
    scaled = masks({name: 8 * w for name, w in layers.items()}, sensitivity=sensitivity, method="std")
    for name, w in layers.items():
        far = np.abs(np.abs(w) - sensitivity * w.std()) > 1e-9
        assert np.array_equal(kept[name][far], (np.abs(w) > sensitivity * w.std())[far])
        assert np.array_equal(kept[name], scaled[name])


def test_weights_that_are_all_alike_stay_unless_they_are_zero():
    kept = masks({"a": np.full((2, 3), 0.5), "b": np.zeros((2, 3))}, sensitivity=2.0, method="std")
    assert kept["a"].all()
    assert not kept["b"].any()


@given(shares, st.integers(0, 9))
def test_by_deviation_all_layers_together_are_of_one_scale(amount, seed):
    layers = {name: w for name, w in weights(seed).items() if w.size}
    kept = masks(layers, amount, method="std", scope="global")
    alike = masks({name: w / w.std() for name, w in layers.items()}, amount, scope="global")
    assert all(np.array_equal(kept[name], alike[name]) for name in layers)


@given(shares, st.integers(0, 9))
def test_wanda_compares_the_inputs_of_one_output(amount, seed):
    kept = masks(weights(seed), amount, method="wanda", second_moments=moments())
    for name, w in weights(seed).items():
        assert (~kept[name]).sum() == int(amount * w.size + 1e-9)
        for mask, row in zip(kept[name], w, strict=True):
            score = np.abs(row.ravel()) * np.sqrt(moments()[name])
            assert score[mask.ravel()].min(initial=np.inf) >= score[~mask.ravel()].max(initial=0)
        sizes = [int(mask.sum()) for mask in kept[name]]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


@given(shares, st.integers(0, 9))
def test_wanda_compares_layers_by_their_shares_of_the_output(amount, seed):
    layers = {name: w for name, w in weights(seed).items() if w.size}
    kept = masks(layers, amount, method="wanda", scope="global", second_moments=moments())
    scaled = {name: 4.0**i * w for i, (name, w) in enumerate(layers.items())}
    again = masks(scaled, amount, method="wanda", scope="global", second_moments=moments())
    assert sum((~mask).sum() for mask in kept.values()) == int(amount * 38 + 1e-9)
    assert all(np.array_equal(kept[name], again[name]) for name in layers)


@given(st.sampled_from(["1:2", "2:4", "3:5"]), st.sampled_from(["magnitude", "wanda", "random", "std"]))
def test_a_pattern_leaves_so_many_of_every_group(pattern, method):
    n, m = parse_pattern(pattern)
    for mask in masks(weights(), method=method, pattern=pattern, second_moments=moments()).values():
        rows = mask.reshape(len(mask), int(np.prod(mask.shape[1:])))
        for first in range(0, rows.shape[1], m):
            group = rows[:, first : first + m]
            assert (group.sum(1) == min(n, group.shape[1])).all()


def test_of_a_pattern_the_largest_stay():
    w = np.array([[1.0, -4.0, 3.0, 2.0, 5.0, 0.0]])
    assert masks({"a": w}, pattern="2:4")["a"].tolist() == [[False, True, True, False, True, True]]


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 20))
def test_of_equal_scores_the_first_stay_in_a_layer_and_in_a_row(scores, count):
    array = np.array([scores], dtype=float)
    count = min(count, len(scores))
    wanted = np.zeros(len(scores), bool)
    wanted[np.argsort(-array[0], kind="stable")[:count]] = True
    assert keep_largest(array, count).tolist() == [wanted.tolist()]
    assert keep_in_rows(array, count).tolist() == [wanted.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, r"amount must be in \[0, 1\), got 1.0"),
        ({"amount": {"a": -0.1}}, "amount of a must be"),
        ({"amount": {"d": 0.1}}, r"names \['d'\]; layers with weights: a, b, c"),
        ({"amount": {"a": 0.1}, "scope": "global"}, "one amount for all layers"),
        ({"amount": 0.1, "scope": "layer"}, "unknown scope 'layer'; choose one of local, global"),
        ({"amount": 0.1, "method": "norm"}, "unknown method 'norm'; choose one of magnitude, random"),
        ({}, "exactly one of amount, threshold, sensitivity and pattern; got none"),
        ({"amount": 0.1, "pattern": "2:4"}, "got amount and pattern"),
        ({"threshold": 0.1, "method": "std"}, "threshold goes with method='magnitude', got method='std'"),
        ({"sensitivity": 1.0}, "sensitivity goes with method='std', got method='magnitude'"),
        ({"threshold": -0.1}, "threshold must be a finite number of at least 0, got -0.1"),
        ({"threshold": {"d": 0.1}}, r"threshold names \['d'\]"),
        ({"pattern": "2:4", "scope": "global"}, "got a pattern"),
        ({"pattern": "4:4"}, "0 < n < m, got '4:4'"),
        ({"amount": 0.1, "method": "wanda"}, "needs second_moments, .* of every layer"),
        ({"amount": 0.1, "method": "wanda", "second_moments": {"a": np.ones(5)}}, r"\['b', 'c'\] have none"),
        (
            {
                "amount": 0.1,
                "method": "wanda",
                "second_moments": {"a": np.ones(4), "b": np.ones(6), "c": np.ones(4)},
            },
            r"second_moments of a must be 5 numbers .*, got an array of shape \(4,\)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masks(weights(), **options)
