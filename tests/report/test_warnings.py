"""Warnings come where something is wrong, and say what to do."""

import numpy as np

from pysolve.correlations import Correlations
from pysolve.plan import Site
from pysolve.report.rows import LayerMass
from pysolve.report.warnings import ROWS, SAMPLES, few_samples, pinned, slower


def mass(name, params=100, seconds=1e-3, seconds_left=1e-3):
    return LayerMass(name, params, params // 2, 10, 5, seconds, seconds_left)


def test_a_layer_that_takes_clearly_longer_is_named():
    (text,) = slower([mass("a"), mass("b", seconds_left=2e-3), LayerMass("rest", 5, 5, 0, 0)])
    assert text.startswith("b takes 2.0 times as long as before")
    assert "round_to" in text


def test_noise_is_no_warning():
    assert slower([mass("a", seconds_left=1.15e-3)]) == []
    assert slower([mass("tiny", seconds=1e-6, seconds_left=3e-6), mass("large")]) == []
    assert slower([LayerMass("same", 100, 50, 10, 10, 1e-3, 5e-3)]) == []


def test_what_cannot_shrink_is_a_warning_where_it_is_much():
    sites = [Site(8, ("a",), ("b",)), Site(8, ("c",), ("d",), pinned="it is an output")]
    assert pinned([mass("a"), mass("b"), mass("c", params=50)], sites) == []
    (text,) = pinned([mass("a"), mass("b"), mass("c", params=300), mass("d", params=100)], sites)
    assert text.startswith("67% of the parameters are in layers that cannot shrink (c, d)")


def correlations(rows, inputs):
    x = np.random.default_rng(0).standard_normal((rows, inputs))
    return Correlations(x.T @ x, x.T @ x, x.T @ x, rows, x.sum(0), x.sum(0), 1)


def test_few_samples_are_a_warning_that_names_the_worst_layer():
    enough = correlations(10 * ROWS, 10)
    assert few_samples(40, {"a": enough}) == []
    poor = {"a": enough, "b": correlations(9, 10), "c": correlations(5, 10)}
    (text,) = few_samples(40, poor)
    assert "40 were given" in text
    assert "c was fitted on 5 rows for its 10 inputs" in text
    assert few_samples(SAMPLES, poor) == []
