"""Ranks under one budget: within it on the real network, nothing left to spend, as good as trying all."""

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

import pysolve as ps
from pysolve.methods.budget import choose
from pysolve.methods.kinds.ranks import RankMenu, most_useful
from pysolve.methods.result import costs as counted
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.evaluate import layer_macs
from pysolve.nn.layers.factored import Factored, empty
from pysolve.plan import Plan

MEASURES = ("params", "macs", "bytes")


class Images(nn.Module):
    """A convolution that sees many positions, one that sees few, and a wide Linear that sees one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2)
        self.b = nn.Conv2d(8, 6, 3, bias=False)
        self.fc = nn.Linear(6, 12)
        self.out = nn.Linear(12, 7)

    def forward(self, x):
        x = self.b(torch.relu(self.a(x))).relu()
        return self.out(torch.relu(self.fc(x.mean((2, 3)))))


def images():
    torch.manual_seed(0)
    return Images().eval(), torch.randn(2, 3, 9, 9)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5)).eval(), (
        torch.randn(2, 9)
    )


def candidates(model, batch, spatial=()):
    """Layers of a network with what they really cost, and curves that fall strictly."""
    found, calls = [], layer_macs(model, batch)
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        along = name in spatial
        form = empty(layer, 1, spatial=along)
        two = ps.apply(model, Plan(forms={f"{name}.weight": form}))
        macs = layer_macs(two, batch)
        sizes = form.inner.size, form.outer.size, layer.weight.numel()
        times = macs[f"{name}.inner"], macs[f"{name}.outer"], calls[name]
        inner, outer, dense = (
            {"params": float(n), "macs": m / len(batch), "bytes": 4.0 * n}
            for n, m in zip(sizes, times, strict=True)
        )
        most = most_useful(inner, outer, dense)
        if most:
            error = np.geomspace(1, 1e-9, most + 2)
            found.append(RankMenu(name, error, None, spatial=along, inner=inner, outer=outer, dense=dense))
    return found


@cache
def prepared(build, spatial=(), last=0):
    """A network, its batch, the last candidates or all, and the costs of all sizes and of the whole."""
    model, batch = build()
    found = candidates(model, batch, spatial)[-last:]
    return model, batch, found, costs_of(model, batch, found), counted(model, batch)


def costs_of(model, batch, found):
    return cost_model(model, [], batch, also=[one.unit for one in found])


def falling(found, seed):
    rng = np.random.default_rng(seed)
    curves = []
    for one in found:
        one_curve = np.sort(rng.random(one.most) ** 3 * 10 ** rng.uniform(-2, 1) + 1e-6)[::-1]
        curves.append(np.array([np.inf, *one_curve, 0.0]))
    return curves


def shared(costs, found, curves, targets):
    menus = [
        replace(one, measured={k: float(curve[k]) for k in range(1, one.most + 1)})
        for one, curve in zip(found, curves, strict=True)
    ]
    sizes, ranks = choose(costs, [], menus, targets)
    assert not len(sizes)
    return ranks


def factored(model, found, ranks):
    forms = {
        f"{one.unit}.weight": empty(model.get_submodule(one.unit), ranks[one.unit], spatial=one.spatial)
        for one in found
        if one.unit in ranks
    }
    return ps.apply(model, Plan(forms=forms))


def divergence(found, curves, ranks):
    return sum(curve[ranks.get(one.unit, -1)] for one, curve in zip(found, curves, strict=True))


def within(now, before, targets):
    return all(now[m] <= (value * before[m] if value <= 1 else value) + 1e-9 for m, value in targets.items())


networks = st.sampled_from([(mlp, ()), (images, ()), (images, ("a", "b")), (images, ("b",))])
# A share next to 1 is 1 to ``within``, but not to the budget.
portions = st.integers(450, 1000).map(lambda n: n / 1000)
targets = st.dictionaries(st.sampled_from(MEASURES), portions, min_size=1, max_size=3)


@given(networks, seeds, targets)
@settings(max_examples=30)
def test_the_network_that_is_made_costs_no_more_than_the_target_and_no_rank_more_would_fit(
    case, seed, wanted
):
    model, batch, found, costs, before = prepared(*case)
    curves = falling(found, seed)
    try:
        ranks = shared(costs, found, curves, wanted)
    except ps.PysolveError:
        smallest = counted(factored(model, found, {one.unit: 1 for one in found}), batch)
        assert not within(smallest, before, wanted)
        return
    assert within(counted(factored(model, found, ranks), batch), before, wanted)
    for one in found:
        if one.unit not in ranks or ranks[one.unit] == one.most:
            continue
        more = ranks | {one.unit: ranks[one.unit] + 1}
        assert not within(counted(factored(model, found, more), batch), before, wanted)
    for one in found:
        if one.unit in ranks:
            less = {name: rank for name, rank in ranks.items() if name != one.unit}
            # Of several measures the one counts that a whole layer costs most of.
            assert len(wanted) > 1 or not within(counted(factored(model, found, less), batch), before, wanted)


@given(networks, seeds, st.sampled_from(MEASURES), st.floats(0.5, 0.95))
@settings(max_examples=15)
def test_one_measure_is_shared_out_nearly_as_well_as_by_trying_all_ranks(case, seed, measure, value):
    _, _, found, costs, before = prepared(*case, last=2)
    curves = falling(found, seed)
    rest = before[measure] - sum(one.dense[measure] for one in found)
    best = np.inf
    for choice in itertools.product(*[range(1, one.most + 2) for one in found]):
        cost = rest + sum(
            one.dense[measure] if k > one.most else k * one.each[measure]
            for one, k in zip(found, choice, strict=True)
        )
        if cost <= value * before[measure] + 1e-9:
            best = min(best, sum(curve[k] for curve, k in zip(curves, choice, strict=True)))
    try:
        ranks = shared(costs, found, curves, {measure: value})
    except ps.PysolveError:
        assert best == np.inf
        return
    # Two sites of up to 64 sizes are searched whole.
    assert divergence(found, curves, ranks) == pytest.approx(best)


def test_nothing_is_factored_where_nothing_has_to_be_saved():
    for build, spatial in ((mlp, ()), (images, ()), (images, ("a", "b"))):
        _, _, found, costs, _ = prepared(build, spatial)
        curves = falling(found, 0)
        for wanted in ({m: 1.0} for m in MEASURES):
            assert shared(costs, found, curves, wanted) == {}
        assert shared(costs, found, curves, dict.fromkeys(MEASURES, 1.0)) == {}
        assert shared(costs, found, curves, {"params": 10**9}) == {}


def test_a_layer_that_costs_nothing_is_factored_first():
    _, _, found, costs, _ = prepared(mlp)
    curves = falling(found, 0)
    for i, one in enumerate(found):
        divergences = [*curves]
        divergences[i] = np.array([np.inf, *[1e-9] * one.most, 0.0])
        ranks = shared(costs, found, divergences, {"params": 0.9})
        assert one.unit in ranks


@pytest.mark.parametrize("measure", MEASURES)
def test_a_target_out_of_reach_is_refused_and_the_smallest_cost_named(measure):
    model, batch, found, costs, before = prepared(images)
    smallest = counted(factored(model, found, {one.unit: 1 for one in found}), batch)
    share_left = smallest[measure] / before[measure]
    with pytest.raises(ps.PysolveError, match=rf"{measure}.*{smallest[measure]:,}"):
        shared(costs, found, falling(found, 0), {measure: 0.99 * share_left})
    ranks = shared(costs, found, falling(found, 0), {measure: int(smallest[measure])})
    assert ranks == {one.unit: 1 for one in found}


def test_without_candidates_only_a_target_that_holds_already_is_met():
    costs = costs_of(*mlp(), [])
    assert shared(costs, [], [], {"params": 1.0}) == {}
    with pytest.raises(ps.PysolveError, match="params"):
        shared(costs, [], [], {"params": 0.9})


def test_the_costs_of_a_candidate_are_those_of_the_two_layers():
    model, batch = images()
    for spatial in ((), ("a", "b")):
        for one in candidates(model, batch, spatial):
            for rank in (1, one.most):
                two = factored(model, [one], {one.unit: rank})
                assert isinstance(two.get_submodule(one.unit), Factored)
                now, before = counted(two, batch), counted(model, batch)
                for measure in MEASURES:
                    assert before[measure] - now[measure] == pytest.approx(
                        one.dense[measure] - rank * one.each[measure]
                    )
                    assert now[measure] < before[measure]
