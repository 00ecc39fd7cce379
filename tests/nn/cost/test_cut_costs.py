"""MACs that no layer's widths explain are known at every width, from few networks that are cut."""

from itertools import product

import numpy as np
import pytest
import torch
from heads import inputs, network
from small import Net, attention
from torch import nn
from torch.nn import functional as F

from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cost.cut_costs import _Cuts
from pysolve.nn.cost.per_sample import sample_macs
from pysolve.nn.cut.apply import apply
from pysolve.nn.evaluate import parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan, Site


def check_all_sizes(model, sites, x):
    """The cost model says what is counted, whatever the sites keep."""
    costs = cost_model(model, sites, x)
    for kept in product(*(range(1, site.channels + 1) for site in sites)):
        steps = (Collapse(site, np.arange(k)) for site, k in zip(sites, kept, strict=True))
        assert costs.cost(kept)["macs"] == sum(sample_macs(apply(model, Plan(tuple(steps))), x).values())
    return costs


def block(heads, hidden, d=3):
    """A transformer's block on a stream of 8."""

    def run(net, x):
        x = x + net.attend(x)
        return x + net.fc2(F.gelu(net.fc1(x)))

    attend = attention(heads * d, heads)[0]
    for name in "qkv":
        setattr(attend, name, nn.Linear(8, heads * d))
    attend.o = nn.Linear(heads * d, 8)
    return Net(run, attend=attend, fc1=nn.Linear(8, hidden), fc2=nn.Linear(hidden, 8))


def test_a_transformer_costs_at_any_heads_and_widths_what_is_counted():
    model, x = nn.Sequential(nn.Linear(5, 8), block(3, 2), block(2, 4)).eval(), torch.randn(2, 6, 5)
    sites = [site for site in find_sites(model, x) if site.pinned is None]
    assert sorted(site.channels for site in sites) == [2, 2, 3, 4]
    costs = check_all_sizes(model, sites, x)
    # Two products a head: length² times the width of a head.
    slopes = {2 * 36 * 3 * (site.channels in (2, 3) and "attend" in site.name) for site in sites}
    assert {*costs.gradient[1]} == slopes
    assert not costs.hessian.any()


def test_heads_or_their_dimensions_cost_what_is_counted():
    """Whichever a layer loses, beside what the other layers lose."""
    model, x = network(blocks=2, heads=3, d=3, hidden=3), inputs(2)
    sites = [
        site for site in find_sites(model, x, head_dims=True) if site.pinned is None and len(site.rows) < 4
    ]
    costs = cost_model(model, sites, x)
    assert sum(bool(site.attention) for site in sites) == 2
    rng = np.random.default_rng(0)
    for _ in range(20):
        kept = np.array([rng.integers(1, site.channels + 1) for site in sites])
        for s, site in enumerate(sites):
            for other in (t for t in range(s) if site.overlaps(sites[t])):
                whole = s if rng.random() < 0.5 else other
                kept[whole] = sites[whole].channels
        steps = (Collapse(site, np.arange(k)) for site, k in zip(sites, kept, strict=True))
        smaller = apply(model, Plan(tuple(one for one in steps if len(one.removed))))
        assert costs.cost(kept)["macs"] == sum(sample_macs(smaller, x).values())
        assert costs.cost(kept)["params"] == parameters(smaller)


def test_only_few_networks_are_cut(monkeypatch):
    model = nn.Sequential(*(block(3, 4) for _ in range(8))).eval()
    x, cuts = torch.randn(2, 6, 8), []
    original = _Cuts.calls
    monkeypatch.setattr(
        _Cuts, "calls", lambda self, chosen: cuts.append(tuple(chosen)) or original(self, chosen)
    )
    sites = [site for site in find_sites(model, x) if site.pinned is None]
    costs = cost_model(model, sites, x)
    assert len(sites) == 16
    assert len(set(cuts)) == 1 + 5 + 1
    kept = [1] * 16
    smaller = apply(model, Plan(tuple(Collapse(site, np.arange(1)) for site in sites)))
    assert costs.cost(kept)["macs"] == sum(sample_macs(smaller, x).values())


def per_head(net, x):
    return net.o(net.shared(net.q(x).unflatten(-1, (-1, 3))).flatten(-2))


def test_a_layer_that_runs_over_heads_runs_over_fewer():
    model = Net(per_head, q=nn.Linear(5, 12), shared=nn.Linear(3, 3), o=nn.Linear(12, 2))
    check_all_sizes(model, [Site(4, ("q",), ("o",))], torch.zeros(2, 6, 5))


def test_a_layer_over_heads_that_is_narrowed_itself():
    def run(net, x):
        return net.back(net.shared(net.q(x).unflatten(-1, (-1, 3)))).sum(-2)

    model = Net(run, q=nn.Linear(5, 12), shared=nn.Linear(3, 4), back=nn.Linear(4, 2))
    check_all_sizes(model, [Site(4, ("q",), ()), Site(4, ("shared",), ("back",))], torch.zeros(2, 6, 5))


def test_sites_that_share_a_size_are_told_apart():
    def run(net, x):
        both = torch.cat([net.a(x), net.b(x), net.c(x)], -1).unflatten(-1, (-1, 2))
        return net.o((both @ net.w).flatten(-2))

    layers = {name: nn.Linear(5, 2 * n) for name, n in (("a", 2), ("b", 3), ("c", 4))}
    model = Net(run, **layers, w=nn.Parameter(torch.zeros(2, 2)), o=nn.Linear(18, 2))
    starts = np.arange(18).reshape(9, 2)
    sites = [
        Site(len(part), (name,), ("o",), columns={"o": part})
        for name, part in zip("abc", np.split(starts, [2, 5]), strict=True)
    ]
    check_all_sizes(model, sites, torch.zeros(2, 6, 5))


def test_products_of_two_sites_and_of_one_with_itself():
    def run(net, x):
        a, b = net.a(x), net.b(x)
        return (a.mT @ b).sum() + (a.mT @ a).sum()

    model = Net(run, a=nn.Linear(5, 3), b=nn.Linear(5, 4))
    costs = check_all_sizes(model, [Site(3, ("a",), ()), Site(4, ("b",), ())], torch.zeros(2, 6, 5))
    assert costs.hessian[1].tolist() == [[12, 6], [6, 0]]


def test_what_falls_with_the_third_power_counts_as_it_is():
    def run(net, x):
        gram = net.a(x).mT @ net.a(x)
        return gram @ gram

    model, x = Net(run, a=nn.Linear(5, 4)), torch.zeros(2, 6, 5)
    costs = cost_model(model, [Site(4, ("a",), ())], x)
    assert costs.original["macs"] == sum(sample_macs(model, x).values())
    smaller = apply(model, Plan((Collapse(Site(4, ("a",), ()), np.arange(2)),)))
    assert costs.cost([2])["macs"] == sum(sample_macs(smaller, x).values()) + 4**3 - 2**3


@pytest.mark.parametrize("pinned", [None, "for the test"])
def test_a_network_that_does_not_run_when_it_is_cut_costs_what_its_widths_say(pinned):
    model = Net(
        lambda net, x: net.b(net.a(x).view(-1, 2, 4).flatten(1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2)
    )
    site, x = Site(8, ("a",), ("b",), pinned=pinned), torch.zeros(4, 4)
    assert cost_model(model, [site], x).cost([4])["macs"] == (24 if pinned is None else 48)


def test_layers_whose_tokens_depend_on_values_cost_what_their_widths_say():
    def run(net, x):
        x = net.stem(x)
        chosen = net.gate(x).sum(-1) > 0
        return net.out(x).index_put((chosen,), net.back(net.expert(x[chosen])))

    torch.manual_seed(2)
    layers = {"stem": nn.Linear(5, 8), "gate": nn.Linear(8, 3), "expert": nn.Linear(8, 6)}
    model = Net(run, **layers, back=nn.Linear(6, 2), out=nn.Linear(8, 2))
    x = torch.randn(2, 50, 5)
    sites = [Site(8, ("stem",), ("gate", "expert", "out")), Site(6, ("expert",), ("back",))]
    half = apply(model, Plan((Collapse(sites[0], np.arange(4)),)))
    now, cut = (sample_macs(one, x) for one in (model, half))
    tokens = now["back"] / 12
    assert cut["back"] != now["back"]
    costs = cost_model(model, sites, x)
    assert costs.cost([8, 3])["macs"] == pytest.approx(sum(now.values()) - tokens * 3 * (8 + 2), abs=1)
    assert costs.cost([4, 6])["macs"] == pytest.approx(
        sum(now.values()) - 50 * 4 * (5 + 3 + 2) - tokens * 4 * 6, abs=1
    )
