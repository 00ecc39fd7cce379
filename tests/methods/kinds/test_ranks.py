"""What a layer loses and costs at a rank: enough energy, enough saved, curves through what was measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

from pysolve.methods.kinds.ranks import RankMenu, Ranks, _floored, most_useful
from pysolve.methods.menu import FLOOR, PROBED_ERRORS
from pysolve.methods.study import Options, Study


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
    return RankMenu(name, _floored(lost), None, lost=lost, inner=inner, outer=outer, dense=dense)


@given(candidates(), st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_smallest_one_that_keeps_it(one, energy):
    rank = one.rank_for(energy)
    allowed = max(1 - energy, 1e-12)
    assert 1 <= rank <= one.most + 1
    if rank <= one.most:
        assert one.lost[rank] <= allowed
    if rank > 1:
        assert np.all(one.lost[:rank] > allowed)


def test_all_energy_is_kept_where_the_rank_is_enough():
    assert candidate([1, 0.5, 1e-13, 0]).rank_for(1.0) == 2
    assert candidate([1, 0.5, 0.1]).rank_for(1.0) == 3
    assert candidate([0, 0, 0]).rank_for(0.5) == 1


@given(candidates(), st.data())
def test_a_curve_falls_from_infinity_to_nothing_through_what_was_measured(one, data):
    known = data.draw(st.lists(st.integers(1, one.most), unique=True, min_size=1).map(sorted))
    # Below the floor all errors are one, so that a curve cannot tell their divergences apart.
    divergences = {rank: float(max(one.lost[rank], FLOOR) + 1e-6) ** 1.5 for rank in known}
    curve = replace(one, measured=divergences).curve
    assert len(curve) == one.most + 2
    assert curve[0] == np.inf
    assert curve[-1] == 0
    assert np.all(np.isfinite(curve[1:]))
    assert np.all(np.diff(curve[1:]) <= 0)
    assert np.all(curve[1:-1] > 0)
    for rank, divergence in divergences.items():
        assert curve[rank] == pytest.approx(max(divergence, FLOOR), rel=1e-6)


def test_without_measurements_a_curve_knows_nothing():
    curve = candidate([1, 0.5, 0.2]).curve
    assert curve.tolist() == [np.inf, 0, 0, 0]


@given(candidates())
def test_ranks_are_probed_where_errors_reach_the_shares(one):
    ranks = one.probes()
    assert ranks == sorted(set(ranks))
    assert all(1 <= rank <= one.most for rank in ranks)
    for share in PROBED_ERRORS:
        below = np.flatnonzero(one.lost <= share)
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


def test_the_menu_of_an_exactly_low_rank_layer_finds_its_rank():
    rng = np.random.default_rng(0)
    layer = nn.Linear(30, 20).double()
    layer.weight.data[:] = torch.as_tensor(rng.standard_normal((20, 3)) @ rng.standard_normal((3, 30)))
    model = nn.Sequential(layer)
    menu = Ranks("channel").menu(Study(model, Options(), weights={"0": layer.weight}), "0")
    assert menu.rank_for(1.0) == 3
    assert menu.most == 11
    assert np.all(menu.error >= FLOOR)
