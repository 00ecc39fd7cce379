"""One layer quantised from matrices: an honest error, the values its form holds, any input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import correlated_samples, seeds

from pysolve.correlations import Correlations
from pysolve.forms import Codebook, Integers
from pysolve.layer.quantize_layer import quantize_layer

SCHEMES = ("codebook", "int", "ternary")
schemes = st.sampled_from(SCHEMES)


def layer(seed=0, h=8, d=20, n=400, noise=0.3):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    W = rng.standard_normal((h, d)).astype(np.float32).astype(float)
    y = x @ W.T + noise * rng.standard_normal((n, h)) + 1.0
    return W, x, y, Correlations.from_samples(x, y)


@given(seeds, schemes, st.integers(2, 8), st.booleans())
def test_the_error_is_that_on_the_samples_and_the_form_is_the_weight(seed, scheme, bits, masked):
    W, x, y, found = layer(seed)
    mask = np.random.default_rng(seed).random(W.shape) < 0.5 if masked else None
    best = quantize_layer(W, found, bits=bits, scheme=scheme, mask=mask, rounds=1)
    lost = np.square(y - x @ best.weight.T - best.bias).sum() / np.square(y - y.mean(0)).sum()
    assert best.error == pytest.approx(lost, rel=1e-6, abs=1e-9)
    assert np.array_equal(best.form.dense(), best.weight)
    assert best.codes is best.form.codes
    if mask is not None:
        assert not best.weight[~mask].any()
        assert scheme == "int" or not best.codes[~mask].any()
    if scheme == "int":
        assert isinstance(best.form, Integers)
        assert best.form.bits == bits
        for row in best.weight:
            assert len(np.unique(row)) <= 1 << bits
    else:
        assert isinstance(best.form, Codebook)
        assert len(np.unique(best.weight)) <= (3 if scheme == "ternary" else 1 << bits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_feedback_loses_less_than_nearest_rounding(scheme):
    for seed in range(5):
        W, _, _, found = layer(seed, noise=0.0)
        fed, near = (
            quantize_layer(W, found, bits=3, scheme=scheme, method=method).error
            for method in ("feedback", "nearest")
        )
        assert fed < 0.8 * near


@given(seeds, st.integers(1, 8), st.booleans())
def test_weights_of_few_values_stay_exactly_as_they_are(seed, bits, bare):
    rng = np.random.default_rng(seed)
    W, _, _, found = layer(seed, noise=0.0)
    W = rng.standard_normal(1 << bits).astype(np.float32)[rng.integers(0, 1 << bits, W.shape)].astype(float)
    best = quantize_layer(W, None if bare else found.r_xx, bits=bits)
    # Products with R round the last digits of the values.
    np.testing.assert_allclose(best.weight, W, rtol=1e-6)
    assert best.error < 1e-12


def test_eight_bits_lose_next_to_nothing():
    W, _, _, found = layer(noise=0.0)
    for scheme in ("codebook", "int"):
        assert quantize_layer(W, found, bits=8, scheme=scheme).error < 1e-5


@given(seeds, st.integers(1, 4))
def test_without_statistics_the_weights_themselves_are_approached(seed, bits):
    W, *_ = layer(seed, h=3, d=5)
    best = quantize_layer(W, bits=bits)
    assert best.error == pytest.approx(np.square(W - best.weight).sum() / np.square(W).sum(), abs=1e-12)
    assert best.bias is None
    # No value is better than the mean of the weights that take it.
    for code in np.unique(best.codes):
        assert best.weight[best.codes == code] == pytest.approx(
            W[best.codes == code].mean(), rel=1e-5, abs=1e-7
        )


def test_the_outputs_of_another_network_are_what_is_approached():
    W, x, y, _ = layer(noise=0.0)
    x = x + 0.5 * np.random.default_rng(1).standard_normal(x.shape)
    found = Correlations.from_samples(x, y)
    own, theirs = quantize_layer(W, found.r_xx, bits=6), quantize_layer(W, found, bits=6)
    lost = [np.square(y - y.mean(0) - (x - x.mean(0)) @ one.weight.T).sum() for one in (own, theirs)]
    assert lost[1] < 0.9 * lost[0]
    assert own.bias is None


@st.composite
def hard_layers(draw):
    rng = np.random.default_rng(draw(seeds))
    d, h, n = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(2, 30))
    rank, repeated, dead = draw(st.integers(1, d)), draw(st.integers(0, 2)), draw(st.integers(0, d))
    x = correlated_samples(rng, n, d, rank, repeated, dead, draw(st.sampled_from([0.0, 3.0])))
    return rng.standard_normal((h, d)), x


@given(hard_layers(), schemes, st.booleans(), st.booleans(), st.sampled_from([None, 2]))
def test_singular_correlations_and_dead_inputs_are_normal_input(layer, scheme, bare, symmetric, group):
    W, x = layer
    statistics = x.T @ x / len(x) if bare else Correlations.from_samples(x, x @ W.T)
    best = quantize_layer(W, statistics, bits=3, scheme=scheme, symmetric=symmetric, group=group)
    near = quantize_layer(
        W, statistics, bits=3, scheme=scheme, symmetric=symmetric, group=group, method="nearest"
    )
    assert np.isfinite(best.weight).all()
    # What is minimised includes the ridge towards the old weights, so not by the last per cent.
    assert best.error <= 1.01 * near.error + 0.01


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_of_next_to_nothing_are_no_error(shape, scheme):
    for statistics in (None, np.eye(shape[1])):
        assert quantize_layer(np.ones(shape), statistics, scheme=scheme).weight.shape == shape


def test_a_layer_of_zeros_stays_one():
    for scheme in SCHEMES:
        for mask in (None, np.zeros((3, 4), bool)):
            best = quantize_layer(np.zeros((3, 4)), np.eye(4), scheme=scheme, mask=mask)
            assert not best.weight.any()


def test_tensors_are_taken():
    W, _, _, found = layer()
    tensors = torch.from_numpy(W), torch.from_numpy(found.r_xx)
    assert np.array_equal(quantize_layer(*tensors).weight, quantize_layer(W, found.r_xx).weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "1 … 8"),
        ({"bits": 9}, "1 … 8"),
        ({"bits": 2.0}, "an integer"),
        ({"bits": True}, "an integer"),
        ({"bits": 1, "scheme": "int"}, "2 … 8"),
        ({"scheme": "float"}, "codebook, int, ternary"),
        ({"method": "up"}, "feedback, nearest"),
        ({"group": 0}, "group"),
        ({"rounds": 0}, "rounds"),
        ({"mask": np.ones((2, 2), bool)}, "bool array of shape"),
        ({"mask": np.ones((8, 20))}, "bool array of shape"),
        ({"r_xx": np.eye(3)}, "correlations must be"),
        ({"ridge": -1.0}, "ridge"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    W, _, _, found = layer()
    with pytest.raises(TypeError if message == "an integer" else ValueError, match=message):
        quantize_layer(W, **{"r_xx": found, **options})


@pytest.mark.parametrize(
    "how", [{"bits": 4}, {"scheme": "int", "bits": 4}, {"lam": 1e-3}, {"scheme": "ternary"}]
)
def test_an_input_that_hardly_varies_takes_no_values_from_the_others(how):
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((8, 20)), rng.standard_normal((2000, 20))
    y = x @ W.T
    x[:, 3] *= 1e-9
    # Its best weights are a thousand million times the others.
    y += 1e-3 * np.outer(x[:, 3] / 1e-9, rng.standard_normal(8))
    faint = Correlations.from_samples(x, y)
    x[:, 3] = 0.0
    without = Correlations.from_samples(x, y)
    assert quantize_layer(W, faint, **how).error <= 1.05 * quantize_layer(W, without, **how).error + 1e-6
