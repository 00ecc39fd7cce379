"""What a layer loses and costs at a rank: enough energy, enough saved, curves through what was measured."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.layer.reduced_rank import rank_keeping
from pysolve.methods.kinds.ranks import RankMenu, most_useful
from pysolve.methods.menu import FLOOR


@st.composite
def candidates(draw, least=1):
    """A layer with an error that falls, may stand still, and may end at nothing."""
    rng = np.random.default_rng(draw(seeds))
    most = draw(st.integers(least, 12))
    energy = rng.random(most + draw(st.integers(0, 4))) ** draw(st.sampled_from([1, 8]))
    energy[draw(st.integers(1, len(energy))) :] = 0.0
    energy = np.sort(energy)[::-1]
    error = np.concatenate([[1.0], np.maximum(1 - np.cumsum(energy) / energy.sum(), 0.0)])
    return candidate(np.minimum.accumulate(error)[: most + 1])


def candidate(error, name="fc"):
    h, d = 20, 30
    inner, outer, dense = ({"params": float(n), "macs": 2.0 * n, "bytes": 4.0 * n} for n in (d, h, h * d))
    lost = np.asarray(error, dtype=float)
    floored = np.minimum.accumulate(np.append(np.maximum(lost, FLOOR), FLOOR))
    return RankMenu(name, floored, None, lost=lost, inner=inner, outer=outer, dense=dense)


@given(candidates(), st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_smallest_one_that_keeps_it(one, energy):
    rank = rank_keeping(one.lost, energy)
    allowed = max(1 - energy, 1e-12)
    assert 1 <= rank <= one.most + 1
    if rank <= one.most:
        assert one.lost[rank] <= allowed
    if rank > 1:
        assert np.all(one.lost[:rank] > allowed)


def test_all_energy_is_kept_where_the_rank_is_enough():
    assert rank_keeping(candidate([1, 0.5, 1e-13, 0]).lost, 1.0) == 2
    assert rank_keeping(candidate([1, 0.5, 0.1]).lost, 1.0) == 3
    assert rank_keeping(candidate([0, 0, 0]).lost, 0.5) == 1


@given(candidates(), st.data())
def test_a_curve_falls_from_infinity_to_nothing_through_what_was_measured(one, data):
    known = data.draw(st.lists(st.integers(1, one.most), unique=True, min_size=1).map(sorted))
    # Below the floor all errors are one, so that a curve cannot tell their divergences apart.
    divergences = {rank: float(one.error[rank] + 1e-6) ** 1.5 for rank in known}
    curve = replace(one, measured=divergences).curve
    assert len(curve) == one.most + 2
    assert curve[0] == np.inf
    assert curve[-1] == 0
    assert np.all(np.isfinite(curve[1:]))
    assert np.all(np.diff(curve[1:]) <= 0)
    assert np.all(curve[1:-1] > 0)
    for rank, wanted in divergences.items():
        assert curve[rank] == pytest.approx(max(wanted, FLOOR), rel=1e-6)


def test_without_measurements_a_curve_knows_nothing():
    curve = candidate([1, 0.5, 0.2]).curve
    assert curve.tolist() == [np.inf, 0, 0, 0]


@given(candidates(), st.lists(st.floats(0.001, 0.9), min_size=1, max_size=5))
def test_ranks_are_probed_where_errors_reach_the_shares(one, shares):
    ranks = one.probes(shares)
    assert ranks == sorted(set(ranks))
    assert all(1 <= rank <= one.most for rank in ranks)
    for share in shares:
        below = np.flatnonzero(one.error[:-1] <= share)
        wanted = max(1, int(below[0])) if len(below) else one.most
        assert wanted in ranks


@given(st.tuples(*[st.integers(1, 60)] * 3), st.tuples(*[st.integers(1, 60)] * 3), st.integers(1, 4000))
def test_the_largest_useful_rank_is_the_last_that_saves_of_everything(inner, outer, dense):
    names = ("params", "macs", "bytes")
    parts = [dict(zip(names, map(float, values), strict=True)) for values in (inner, outer)]
    whole = dict.fromkeys(names, float(dense))
    most = most_useful(*parts, whole)

    def saves(rank):
        return all(rank * (parts[0][name] + parts[1][name]) < whole[name] for name in names)

    assert most == 0 or saves(most)
    assert not saves(most + 1)
