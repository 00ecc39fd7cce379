"""Warnings come where something is wrong, and say what to do."""

import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pysolve.correlations import Correlations
from pysolve.plan import Site
from pysolve.report.rows import REST, Latency, LayerMass, LayerReport
from pysolve.report.warnings import FAR, ROWS, SAMPLES, SLOWER, few_samples, lean, pinned, slower


def mass(name, params=100, seconds=1e-3, seconds_left=1e-3):
    return LayerMass(name, params, params // 2, 10, 5, seconds, seconds_left)


def calls(median, spread=0.05, size=64):
    return Latency(median, median * (1 - spread), median * (1 + spread), size, 1)


def test_a_network_that_takes_clearly_longer_is_a_warning_with_the_layers_timed_as_slower():
    lines = [LayerReport("a", 0.5, "sparse", "", 1e-3, 4e-3), LayerReport("b", 0.5, "dense", "", 1e-3, 2e-3)]
    (text,) = slower([(calls(1e-3, size=1), calls(0.9e-3, size=1)), (calls(1e-3), calls(2e-3))], lines)
    assert "a batch of 64 takes 2.0 times as long" in text
    assert "(slower alone: a)" in text
    assert "round_to" in text


@given(st.floats(1e-6, 1), st.floats(0.01, 100), st.floats(0, 0.9))
def test_only_times_that_do_not_overlap_are_a_warning(seconds, ratio, spread):
    before, after = calls(seconds, spread), calls(ratio * seconds, spread)
    assert bool(slower([(before, after)])) == (ratio > SLOWER and after.low > before.high)


def test_what_cannot_shrink_is_a_warning_where_it_is_much():
    sites = [Site(8, ("a",), ("b",)), Site(8, ("c",), ("d",), pinned="it is an output")]
    assert pinned([mass("a"), mass("b"), mass("c", params=50)], sites) == []
    (text,) = pinned([mass("a"), mass("b"), mass("c", params=300), mass("d", params=100)], sites)
    assert text.startswith("67% of the parameters are in layers that cannot shrink (c, d)")


def test_matrices_that_the_network_itself_holds_shrink_in_the_row_of_all_others():
    sites = [Site(8, ("w:io",), ("v:io",))]
    assert pinned([mass(REST)], sites) == []
    assert pinned([mass(REST), mass("a", params=300)], sites) != []
    assert pinned([mass(REST), mass("a")], [Site(8, ("a.w:io",), ("a.v:io",))]) != []


def correlations(rows, inputs):
    x = np.random.default_rng(0).standard_normal((rows, inputs))
    return Correlations(x.T @ x, x.T @ x, x.T @ x, rows, x.sum(0), x.sum(0), 1)


def test_few_samples_are_a_warning_that_names_the_worst_layer():
    enough = correlations(10 * ROWS, 10)
    assert few_samples(40, "a", {"a": enough}) == []
    poor = {"a": enough, "b": correlations(9, 10), "c": correlations(5, 10)}
    (text,) = few_samples(40, poor, poor)
    assert "40 were given" in text
    assert "c was fitted on 5 rows for its 10 inputs" in text
    assert few_samples(SAMPLES, poor, {}) == []


def test_few_samples_hold_correlations_one_at_a_time():
    alive = weakref.WeakSet()

    class OnDisk(dict):
        def __getitem__(self, name):
            found = correlations(5, 10)
            alive.add(found)
            assert len(alive) <= 2
            return found

    names = [str(i) for i in range(9)]
    assert few_samples(40, names, OnDisk()) != []


def test_far_outputs_are_told_with_what_brings_them_nearer():
    assert lean(FAR) == lean(float("nan")) == []
    (text,) = lean(0.25)
    assert "divergence 0.25" in text
    assert all(remedy in text for remedy in ("distill=60", "more samples", "dry_run=True"))
