"""Values whose bits are paid for: the best codes at any price, and a price that shares out bytes."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import correlated_samples, seeds

from pysolve.layer.codebooks import PricedValues, code_lengths, spaced_values
from pysolve.layer.quantize_layer import quantize_layer
from pysolve.layer.rounding import Target, descend, round_with_feedback, settle
from pysolve.methods.kinds.codes import coded_bits
from pysolve.methods.rate import price_for

lams = st.floats(-6, 2).map(lambda power: 10.0**power)


@st.composite
def targets(draw, masked=None):
    """A layer's weights, in the metric of inputs of any rank, outputs that count for more or less."""
    rng = np.random.default_rng(draw(seeds))
    h, d = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    x = correlated_samples(
        rng, 3 * d + 2, d, draw(st.integers(1, d)), 1, 0, draw(st.sampled_from([0.0, 1.0]))
    )
    A = x.T @ x / len(x)
    A += (1e-3 * np.trace(A) / d + 1e-9) * np.eye(d)
    mask = rng.random((h, d)) < 0.6 if draw(st.booleans()) and masked is not False else None
    V = rng.standard_normal((h, d)) * (1.0 if mask is None else mask)
    outputs = rng.uniform(0.1, 3.0, h) if draw(st.booleans()) else None
    return Target(V, A if draw(st.booleans()) else None, mask, outputs)


def priced(rng, k, lam):
    """Any values, zero first, with bits of any codes."""
    centroids = np.concatenate([[0.0], rng.standard_normal(k - 1)])
    return PricedValues(centroids, True, lam=lam, bits=code_lengths(rng.integers(0, k, 50), k))


@given(seeds, st.integers(1, 9), lams, st.booleans())
def test_codes_are_the_best_of_all(seed, k, lam, single):
    rng = np.random.default_rng(seed)
    levels = priced(rng, k, lam)
    values = rng.standard_normal((5, 4))
    curvature = float(rng.uniform(0.01, 3)) if single else rng.uniform(0.01, 3, (5, 4))
    codes = levels.codes(values, None, curvature)
    wide = np.broadcast_to(curvature, values.shape)[..., None]
    cost = 0.5 * wide * np.square(values[..., None] - levels.centroids) + lam * levels.bits
    taken = np.take_along_axis(cost, codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(taken, cost.min(-1), rtol=1e-9, atol=1e-12)


def test_an_input_that_does_not_count_takes_the_cheapest_code():
    levels = PricedValues(np.array([0.0, 1.0, 2.0]), True, lam=0.1, bits=np.array([3.0, 1.0, 2.0]))
    assert levels.codes(np.array([0.0, 2.0, -5.0]), None, 0.0).tolist() == [1, 1, 1]


@given(seeds, st.integers(1, 6), st.integers(1, 60))
def test_lengths_of_codes_add_up_to_their_entropy(seed, k, n):
    codes = np.random.default_rng(seed).integers(0, k, n)
    lengths = code_lengths(codes, k + 1)
    share = np.bincount(codes, minlength=k + 1) / n
    entropy = -sum(p * np.log2(p) for p in share if p)
    assert lengths[codes].sum() == pytest.approx(n * entropy, abs=1e-9)
    assert coded_bits(codes) == pytest.approx(n * entropy, abs=1e-9)
    # A code that nobody has is dearer than any that is used.
    assert lengths[k] > lengths[codes].max(initial=0.0)
    assert PricedValues(np.zeros(k + 1), True, lam=0.5, bits=lengths).price(codes) == pytest.approx(
        0.5 * n * entropy
    )


@given(targets(), st.integers(2, 20), lams)
def test_spaced_values_begin_with_zero_are_few_and_reach_as_far_as_weights_are_worth_a_bit(target, size, lam):
    levels = spaced_values(target, size, lam)
    assert levels.centroids[0] == 0
    assert levels.zero
    assert 1 <= len(levels.centroids) <= size
    assert len(np.unique(levels.centroids)) == len(levels.centroids)
    steps = np.unique(np.abs(levels.centroids))
    worth = 0.5 * np.outer(target.rows, target.diagonal) * target.V**2 > lam
    top = np.abs(target.V[worth]).max(initial=0.0)
    if size > 2 and top:
        assert steps[-1] >= top * (1 - 1e-6)
        np.testing.assert_allclose(np.diff(steps), steps[1], rtol=1e-5)


@pytest.mark.parametrize("V", [np.zeros((2, 3)), np.zeros((0, 3)), np.zeros((3, 0))])
def test_a_layer_of_nothing_has_zero_alone(V):
    levels = spaced_values(Target(V, None, None), 16, 0.1)
    assert levels.centroids.tolist() == [0.0]


@given(targets(), st.integers(2, 12), lams, seeds)
def test_the_objective_with_its_bits_never_rises(target, size, lam, seed):
    def cost(levels, codes):
        return target.loss(levels.values(codes)) + levels.price(codes)

    levels = spaced_values(target, size, lam)
    codes = round_with_feedback(target, levels)
    start = cost(levels, codes)
    slack = 1e-9 * (start + float(np.square(target.V).sum())) + 1e-12
    assert cost(levels, descend(target, levels, codes)) <= start + slack
    fitted = levels.refit(codes, target)
    assert target.loss(fitted.values(codes)) <= target.loss(levels.values(codes)) * (1 + 1e-6) + slack
    # Lengths for codes that nobody has are on top of those of a code, by which they may be too short.
    short = np.log2(np.exp2(-levels.bits).sum())
    assert fitted.price(codes) <= levels.price(codes) + lam * codes.size * max(0.0, short) + slack
    settled, found, loss = settle(target, levels, codes, 4)
    assert loss <= start + slack
    assert loss == pytest.approx(cost(settled, found), rel=1e-9, abs=1e-12)
    assert settled.centroids[0] == 0
    if target.mask is not None:
        assert not settled.values(found)[~target.mask].any()


def layer(seed=0, h=12, d=20):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, d)) @ rng.standard_normal((d, d))
    return rng.standard_normal((h, d)), x.T @ x / len(x)


def bits_of(found):
    return coded_bits(found.codes)


@given(seeds, st.booleans())
def test_bits_for_nothing_give_the_error_of_many_values_and_dear_ones_zeros(seed, bare):
    W, R = layer(seed)
    known = None if bare else R
    energy = np.trace(R) if not bare else W.shape[1]
    free = quantize_layer(W, known, bits=8, lam=1e-9 * energy)
    assert free.error < 1.2 * quantize_layer(W, known, bits=8).error + 1e-4
    dear = quantize_layer(W, known, bits=8, lam=1e3 * energy)
    # At such a price no two values are worth it, and the one that is left costs nothing.
    assert len(dear.form.centroids) == 1
    assert bits_of(dear) == 0


def test_more_for_a_bit_takes_fewer_bits_and_loses_more():
    W, R = layer()
    found = [quantize_layer(W, R, bits=8, lam=10.0**power) for power in np.arange(-4, 3, 0.5)]
    taken, errors = [bits_of(one) for one in found], [one.error for one in found]
    for i in range(len(found) - 1):
        assert taken[i + 1] <= 1.03 * taken[i] + 5
        assert errors[i + 1] >= 0.97 * errors[i] - 1e-6
    assert taken[0] > 4 * taken[-1]


def test_bits_are_better_spent_than_by_as_many_values_for_all():
    W, R = layer(h=60)
    W = np.sign(W) * W**2
    plain = quantize_layer(W, R, bits=3)
    lam = price_for(bits_of(plain), lambda lam: bits_of(quantize_layer(W, R, lam=lam, bits=8)), 1e-2)
    best = quantize_layer(W, R, bits=8, lam=lam)
    assert bits_of(best) <= bits_of(plain)
    assert best.error < 0.9 * plain.error


@given(seeds, lams, st.floats(0.2, 5))
def test_outputs_that_all_count_for_more_are_a_lower_price(seed, lam, factor):
    W, R = layer(seed, h=5, d=8)
    weighted = quantize_layer(W, R, bits=5, lam=lam, outputs=np.full(5, factor))
    cheaper = quantize_layer(W, R, bits=5, lam=lam / factor)
    # The same but for rounding, by which ties may be broken another way.
    assert weighted.error == pytest.approx(cheaper.error, rel=0.02, abs=1e-6)
    assert bits_of(weighted) == pytest.approx(bits_of(cheaper), rel=0.02, abs=8)


def test_an_output_that_counts_for_more_is_kept_better():
    W, R = layer()
    outputs = np.ones(len(W))
    outputs[3] = 100.0
    changes = [
        np.einsum("ij,jk,ik->i", W - one.weight, R, W - one.weight)
        for one in (
            quantize_layer(W, R, bits=8, lam=1.0),
            quantize_layer(W, R, bits=8, lam=1.0, outputs=outputs),
        )
    ]
    assert changes[1][3] < 0.3 * changes[0][3]


@given(seeds, lams)
def test_what_is_pruned_stays_so_at_any_price(seed, lam):
    W, R = layer(seed, h=4, d=6)
    mask = np.random.default_rng(seed).random(W.shape) < 0.5
    assume(mask.any())
    found = quantize_layer(W, R, bits=4, lam=lam, mask=mask)
    assert not found.weight[~mask].any()
    assert len(found.form.centroids) <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0.0}, "lam must be a positive number"),
        ({"lam": np.inf}, "lam must be a positive number"),
        ({"lam": "1"}, "lam must be a positive number"),
        ({"lam": 1.0, "scheme": "int"}, "lam and outputs are for"),
        ({"outputs": np.ones(12), "scheme": "ternary"}, "lam and outputs are for"),
        ({"outputs": np.ones(3)}, "outputs must be 12 positive numbers"),
        ({"outputs": np.zeros(12)}, "outputs must be 12 positive numbers"),
        ({"outputs": np.full(12, np.nan)}, "outputs must be 12 positive numbers"),
    ],
)
def test_prices_that_cannot_be_meant_are_refused(options, message):
    W, R = layer()
    with pytest.raises(ValueError, match=message):
        quantize_layer(W, R, **options)


# --- the price at which a file is as large as it may be


@given(st.floats(0.3, 3), st.floats(1, 6), st.floats(-8, 4), st.floats(0.02, 0.9))
def test_a_price_is_found_in_few_calls_whatever_the_curve(power, scale, start, share):
    calls = []

    def size(lam):
        calls.append(lam)
        return 10.0**scale / (1 + (1e3 * lam) ** power) + 50.0

    wanted = 50.0 + share * 10.0**scale
    lam = price_for(wanted, size, 10.0**start)
    assert len(calls) <= 12
    assert min(calls) > 0
    # From thousands of times too dear or too cheap, a dozen calls may not be enough.
    if lam is not None:
        assert size(lam) <= wanted
    if abs(start + 3) < 2:
        assert lam is not None
        assert size(lam) >= 0.8 * wanted


def test_there_is_no_price_where_nothing_is_small_enough():
    calls = []
    assert price_for(10, lambda lam: calls.append(lam) or 20.0, steps=7) is None
    assert len(calls) == 14
    assert np.all(np.diff(calls) > 0)


def test_where_all_values_are_in_use_the_search_ends():
    calls = []
    lam = price_for(1000.0, lambda lam: calls.append(lam) or 100.0, 1.0)
    assert lam is not None
    assert len(calls) <= 4


def test_a_size_that_jumps_is_held_from_below():
    sizes = []

    def size(lam):
        sizes.append(900.0 if lam < 0.37 else 300.0)
        return sizes[-1]

    assert price_for(500.0, size, 1e-3) >= 0.37
    assert price_for(500.0, size, 1e3) >= 0.37
    assert len(sizes) <= 24
