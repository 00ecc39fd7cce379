"""Masks keep the right weights, exactly as many as asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.masks import masks


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, r"amount must be in \[0, 1\), got 1.0"),
        ({"amount": {"a": -0.1}}, "amount of a must be"),
        ({"amount": {"d": 0.1}}, r"names \['d'\]; layers with weights: a, b, c"),
        ({"amount": {"a": 0.1}, "scope": "global"}, "one amount for all layers"),
        ({"amount": 0.1, "scope": "layer"}, "unknown scope 'layer'; choose one of local, global"),
        ({"amount": 0.1, "method": "norm"}, "unknown method 'norm'; choose one of magnitude, random"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masks(weights(), **options)
