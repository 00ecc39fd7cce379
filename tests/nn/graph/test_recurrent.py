"""Hidden units of recurrent layers go with all of their gates, in every layer and direction of a module."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Net
from torch import nn

import pysolve as ps
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cost.per_sample import sample_macs
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan

INPUTS, UNITS = 6, 8
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
KINDS = [
    ("LSTM", ()),
    ("GRU", ()),
    ("RNN", ()),
    ("LSTM", ("deep",)),
    ("GRU", ("both",)),
    ("LSTM", ("deep", "both", "bare")),
    ("RNN", ("relu",)),
]
MORE = {"deep": ("num_layers", 2), "both": ("bidirectional", True), "bare": ("bias", False)}
MORE["relu"] = ("nonlinearity", "relu")


@cache
def network(kind, more=()):
    """Features, a recurrent layer over them, and what reads its hidden units."""
    torch.manual_seed(0)
    options = dict(MORE[one] for one in more)
    layer = getattr(nn, kind)(INPUTS, UNITS, batch_first=True, **options)
    ways = 1 + ("both" in more)
    layers = {"stem": nn.Linear(5, INPUTS), "rec": layer, "out": nn.Linear(ways * UNITS, 3)}
    return Net(lambda net, x: net.out(net.rec(net.stem(x))[0]), **layers).eval(), texts(1)[0]


@cache
def sites(kind, more=()):
    return find_sites(*network(kind, more))


def texts(count):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(16, 7, 5, generator=random) for _ in range(count)]


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def zeroed(model, units):
    """The network whose hidden units of these numbers are always zero, as nothing ever moves them."""
    model = copy.deepcopy(model)
    gates = GATES[type(model.rec).__name__]
    with torch.no_grad():
        for value in model.rec.parameters():
            value.view(gates, UNITS, -1)[:, units] = 0
    return model


SOME = st.sets(st.integers(0, UNITS - 1), min_size=1, max_size=UNITS - 1)


@pytest.mark.parametrize(("kind", "more"), KINDS)
@given(SOME)
@settings(max_examples=8, deadline=None)
def test_a_smaller_layer_is_one_whose_units_are_zero(kind, more, kept):
    model, x = network(kind, more)
    hidden = next(site for site in sites(kind, more) if "out" in site.readers)
    assert (hidden.channels, hidden.pinned) == (UNITS, None)
    step = Collapse(hidden, np.array(sorted(kept)))
    smaller, wide = apply(model, Plan((step,))), masked(model, Plan((step,)))
    wanted = outputs(zeroed(model, step.removed), x)
    torch.testing.assert_close(outputs(smaller, x), wanted)
    torch.testing.assert_close(outputs(wide, x), wanted)
    assert smaller.rec.hidden_size == len(kept)
    assert model.rec.hidden_size == UNITS
    made = type(model.rec)(INPUTS, len(kept), batch_first=True, **dict(MORE[one] for one in more))
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in smaller.rec.named_parameters()
    }


@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_inputs_go_too(kind, more):
    model, x = network(kind, more)
    (inner,) = (site for site in sites(kind, more) if site.writers == ("stem",))
    step = Collapse(inner, np.array([0, 2, 3]))
    smaller = apply(model, Plan((step,)), probe=x)
    assert (smaller.rec.input_size, smaller.rec.hidden_size) == (3, UNITS)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.stem.weight[step.removed], silent.stem.bias[step.removed] = 0, 0
    torch.testing.assert_close(outputs(smaller, x), outputs(silent, x))


@pytest.mark.parametrize(("kind", "more"), KINDS)
@given(st.integers(1, UNITS), st.integers(1, INPUTS))
@settings(max_examples=4, deadline=None)
def test_costs_are_those_of_the_smaller_network(kind, more, units, features):
    model, x = network(kind, more)
    free = [site for site in sites(kind, more) if site.pinned is None]
    kept = [units if "out" in site.readers else features for site in free]
    costs = costs_of(kind, more).cost(kept)
    steps = (Collapse(site, np.arange(k)) for site, k in zip(free, kept, strict=True))
    smaller = apply(model, Plan(tuple(steps)))
    found = (parameters(smaller), nbytes(smaller), sum(sample_macs(smaller, x).values()))
    assert (costs["params"], costs["bytes"], costs["macs"]) == found


@cache
def costs_of(kind, more):
    model, x = network(kind, more)
    return cost_model(model, [site for site in sites(kind, more) if site.pinned is None], x)


@pytest.mark.parametrize(("kind", "more"), [KINDS[0], KINDS[4]])
def test_units_that_do_nothing_go_first_and_nothing_is_lost(kind, more, tmp_path):
    model = zeroed(network(kind, more)[0], [1, 4, 6])
    result = ps.compress(model, texts(6), keep={"rec.weight_ih_l0:oi": 5}, progress=False, latency=False)
    (step,) = (step for step in result.plan.steps if "out" in step.site.readers)
    assert step.removed.tolist() == [1, 4, 6]
    assert result.report.divergence < 1e-9
    ps.save(result, tmp_path / "cut.safetensors")
    restored = ps.load(tmp_path / "cut.safetensors", model)
    x = texts(1)[0]
    assert torch.equal(outputs(restored, x), outputs(result.model, x))
    torch.testing.assert_close(
        outputs(copy.deepcopy(result.model), x), outputs(model, x), atol=1e-4, rtol=1e-4
    )


def test_units_that_others_need_stay_though_no_reader_sees_them():
    torch.manual_seed(0)
    model = copy.deepcopy(network("RNN")[0])
    with torch.no_grad():
        # The reader sees the last unit, which repeats the first.
        model.out.weight[:, :-1] = 0
        model.rec.weight_ih_l0[1:] *= 0.01
        model.rec.weight_hh_l0[1:] *= 0.01
        model.rec.weight_hh_l0[-1] = 0
        model.rec.weight_hh_l0[-1, 0] = 3
    result = ps.compress(model, texts(6), keep={"rec.weight_ih_l0:oi": 2}, progress=False, latency=False)
    (step,) = (step for step in result.plan.steps if "out" in step.site.readers)
    assert step.keep.tolist() == [0, UNITS - 1]


def test_recurrent_layers_one_after_the_other_and_last_states():
    torch.manual_seed(0)
    layers = {"a": nn.LSTM(5, UNITS), "b": nn.GRU(UNITS, 4), "out": nn.Linear(4, 3)}
    model = Net(lambda net, x: net.out(net.b(net.a(x)[0])[1][-1]), **layers).eval()
    x = torch.randn(7, 16, 5)
    free = [site for site in find_sites(model, x) if site.pinned is None]
    assert [site.channels for site in free] == [UNITS, 4]
    steps = tuple(Collapse(site, np.arange(2)) for site in free)
    smaller = apply(model, Plan(steps), probe=x)
    assert (smaller.a.hidden_size, smaller.b.input_size, smaller.b.hidden_size) == (2, 2, 2)


def test_states_of_a_fixed_width_keep_units():
    torch.manual_seed(0)
    layers = {"rec": nn.GRU(5, UNITS, batch_first=True), "out": nn.Linear(UNITS, 3)}
    model = Net(lambda net, x: net.out(net.rec(x, torch.ones(1, len(x), UNITS))[0]), **layers).eval()
    (site,) = (site for site in find_sites(model, texts(1)[0]) if site.writers[0] != "out")
    assert site.pinned is not None


def test_projected_states_are_left_alone():
    torch.manual_seed(0)
    layers = {"rec": nn.LSTM(5, UNITS, batch_first=True, proj_size=3), "out": nn.Linear(3, 3)}
    model = Net(lambda net, x: net.out(net.rec(x)[0]), **layers).eval()
    assert all(site.pinned for site in find_sites(model, texts(1)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATES)
def test_every_verb_makes_them_smaller(kind):
    model, data = network(kind)[0], texts(6)
    quiet = {"progress": False}
    for result in (
        ps.compress(model, data, target={"params": 0.6}, **quiet),
        ps.prune(model, data, method="activation", amount=0.5, **quiet),
        ps.low_rank(model, data, target={"params": 0.6}, prune=True, layout="factored", **quiet),
    ):
        assert parameters(result.model) < parameters(model)
        assert np.isfinite(result.report.divergence)


class Steps(nn.Module):
    """A cell, run step by step, that begins with zeros or with a state of another layer's making."""

    def __init__(self, kind, given, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Linear(5, INPUTS), nn.Linear(5, UNITS)
        self.rec = getattr(nn, kind)(INPUTS, UNITS, **options)
        self.out, self.given = nn.Linear(UNITS, 3), given

    def forward(self, x):
        state, found = (self.first(x[:, 0]) if self.given else None), []
        if state is not None and isinstance(self.rec, nn.LSTMCell):
            state = state.tanh(), state
        for t in range(x.shape[1]):
            state = self.rec(self.stem(x[:, t]), state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return self.out(torch.stack(found, 1))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("kind", "bias"), [("LSTMCell", True), ("GRUCell", True), ("RNNCell", False)])
def test_cells_lose_units_and_inputs(kind, bias, given):
    model, x = Steps(kind, given, bias=bias).eval(), texts(1)[0]
    free = {site.writers[-1]: site for site in find_sites(model, x) if site.pinned is None}
    assert {site.channels for site in free.values()} == {INPUTS, UNITS}
    plan = Plan(tuple(Collapse(site, np.arange(1, site.channels, 2)) for site in free.values()))
    smaller = apply(model, plan)
    torch.testing.assert_close(outputs(smaller, x), outputs(masked(model, plan), x))
    assert (smaller.rec.input_size, smaller.rec.hidden_size) == (INPUTS // 2, UNITS // 2)
    made = type(model.rec)(INPUTS // 2, UNITS // 2, bias=bias)
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in smaller.rec.named_parameters()
    }
    costs = cost_model(model, [*free.values()], x).cost([site.channels // 2 for site in free.values()])
    assert costs["params"] == parameters(smaller)
    assert costs["macs"] == sum(sample_macs(smaller, x).values())


def test_a_state_that_one_layer_hands_to_another_loses_the_same_units():
    torch.manual_seed(0)
    layers = {"enc": nn.GRU(5, UNITS, batch_first=True), "dec": nn.GRU(5, UNITS, batch_first=True)}
    model = Net(lambda net, x: net.out(net.dec(x, net.enc(x)[1])[0]), **layers, out=nn.Linear(UNITS, 3))
    x = texts(1)[0]
    site = find_sites(model.eval(), x)[0]
    assert (site.pinned, {name.partition(".")[0] for name in site.writers}) == (None, {"enc", "dec"})
    plan = Plan((Collapse(site, np.array([1, 4, 5])),))
    torch.testing.assert_close(outputs(apply(model, plan), x), outputs(masked(model, plan), x))
