"""Whole experts go with the rows of their router: as if it never chose them."""

from dataclasses import replace

import families
import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pysolve.errors import CollapseError, PysolveError
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cost.per_sample import sample_macs
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.outputs import tensors_of
from pysolve.nn.running import evaluating, forward
from pysolve.plan import Collapse, Plan


def outputs(model, batch):
    with evaluating(model):
        return tensors_of(forward(model, batch))[0]


def experts_of(model, batch):
    return [site for site in find_sites(model, batch) if site.router is not None]


@given(st.sets(st.integers(0, 5), min_size=2, max_size=5), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_without_some_experts_is_with_a_router_that_never_chooses_them(kept, seed):
    model, _ = small.mixture()
    batch = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed))
    (site,) = experts_of(model, batch)
    step = Collapse(site, np.array(sorted(kept)))
    smaller, wide = apply(model, Plan((step,))), masked(model, Plan((step,)))
    model.mixture.gate.bias.data[step.removed] = -torch.inf
    wanted = outputs(model, batch)
    torch.testing.assert_close(outputs(smaller, batch), wanted)
    torch.testing.assert_close(outputs(wide, batch), wanted)
    assert len(smaller.mixture.experts.up) == smaller.mixture.num_experts == len(kept)
    assert smaller.mixture.experts.num_experts == smaller.mixture.gate.out_features == len(kept)


@pytest.mark.parametrize("by_rows", [False, True, "masks"])
@given(st.sets(st.integers(0, 5), min_size=2, max_size=5))
@settings(max_examples=6, deadline=None)
def test_experts_in_a_list_go_alike(by_rows, kept):
    model, batch = small.mixture(listed=True, by_rows=by_rows)
    (site,) = experts_of(model, batch)
    assert (site.writers, site.readers, site.pinned) == (("mixture.gate",), ("mixture.experts:e",), None)
    step = Collapse(site, np.array(sorted(kept)))
    smaller = apply(model, Plan((step,)), probe=batch)
    for new, old in zip(smaller.mixture.experts, step.keep, strict=True):
        assert torch.equal(new[0].weight, model.mixture.experts[old][0].weight)
    model.mixture.gate.bias.data[step.removed] = -torch.inf
    torch.testing.assert_close(outputs(smaller, batch), outputs(model, batch))


@pytest.mark.parametrize("by_rows", [True, "masks"])
def test_hidden_channels_of_experts_that_take_some_rows_go(by_rows):
    model, batch = small.mixture(listed=True, by_rows=by_rows)
    free = [site.name for site in find_sites(model, batch) if site.pinned is None and not site.router]
    assert free == [f"mixture.experts.{e}.0 → mixture.experts.{e}.2" for e in range(6)]


def test_lists_of_blocks_are_no_experts():
    torch.manual_seed(0)
    layers = {"blocks": nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), "out": nn.Linear(5, 3)}
    model = small.Net(lambda net, x: net.out(net.blocks[2](net.blocks[1](net.blocks[0](x).relu()))), **layers)
    assert not experts_of(model.eval(), torch.randn(4, 5))


def test_sites_say_which_experts_there_are():
    model, batch = small.mixture()
    (site,) = experts_of(model, batch)
    assert site.writers == ("mixture.gate",)
    assert site.readers == ("mixture.experts.up:e", "mixture.experts.down:e", "mixture.experts.up_bias:e")
    assert (site.channels, site.least, site.router) == (6, 2, "mixture.gate.weight")
    assert dict(site.integers) == {"mixture.num_experts": 1, "mixture.experts.num_experts": 1}


def test_experts_that_all_tokens_go_to_stay():
    (site,) = experts_of(*small.mixture(experts=2))
    assert site.pinned == "every token goes to all of them"


def test_what_counts_experts_where_none_can_see_it_keeps_them():
    model, batch = small.mixture()
    run = model.run
    model.run = lambda net, x: run(net, x) * (6 - net.mixture.gate(x).shape[-1] + 1)
    (site,) = experts_of(model, batch)
    assert "the outputs differ" in site.pinned
    with pytest.raises(CollapseError, match="cannot be removed"):
        apply(model, Plan((Collapse(site, np.arange(3)),)))


def test_ignored_experts_stay():
    model, batch = small.mixture()
    for name in ("mixture.experts", "mixture.gate"):
        (site,) = (site for site in find_sites(model, batch, ignore=[name]) if site.router)
        assert site.pinned == f"`{name}.up:e` is to be ignored".replace("gate.up:e", "gate")


def test_inputs_and_outputs_that_can_go_keep_experts():
    torch.manual_seed(0)
    layers = {"stem": nn.Linear(4, 5), "mixture": small.Mixture(), "out": nn.Linear(5, 3)}
    model = small.Net(lambda net, x: net.out(net.mixture(net.stem(x))), **layers).eval()
    sites = find_sites(model, torch.randn(20, 4))
    assert len([site for site in sites if site.pinned is None]) >= 2
    (site,) = (site for site in sites if site.router)
    assert "products of two sizes" in site.pinned


@pytest.mark.parametrize("kept", [5, 3, 2])
def test_costs_are_those_of_the_network_with_fewer_experts(kept):
    model, batch = small.mixture()
    sites = [site for site in find_sites(model, batch) if site.pinned is None]
    costs = cost_model(model, sites, batch)
    for inner in (1, 2):
        sizes = [kept if site.router else site.channels // inner for site in sites]
        steps = (Collapse(site, np.arange(k)) for site, k in zip(sites, sizes, strict=True))
        smaller = apply(model, Plan(tuple(steps)), probe=batch)
        found = costs.cost(sizes)
        assert (found["params"], found["bytes"]) == (parameters(smaller), nbytes(smaller))
        if inner == 1:
            # Each token goes to as many experts as before: the router's MACs alone are fewer.
            assert costs.original["macs"] - found["macs"] == (6 - kept) * 5
            assert found["macs"] >= sum(sample_macs(smaller, batch).values())


class Masked(nn.Module):
    """The router of Mixtral and of Qwen's mixtures, in a few lines, that never chooses some experts."""

    def __init__(self, router, gone):
        super().__init__()
        self.router, self.gone = router, gone

    def forward(self, x):
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.router.weight)
        logits[:, self.gone] = -torch.inf
        best, index = logits.softmax(-1).topk(2, -1)
        return logits, best / best.sum(-1, keepdim=True), index


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_of_transformers_lose_experts(name):
    transformers = pytest.importorskip("transformers")
    model, batch = families.made(transformers, name)
    if name == "qwen3_moe":
        model.model.layers[1].mlp.gate.norm_topk_prob = True
    sites = experts_of(model, batch)
    assert [site.channels for site in sites] == [4] * (2 if name == "mixtral" else 1)
    for kept in ([0, 2], [1, 2, 3]):
        step = Collapse(sites[-1], np.array(kept))
        smaller = apply(model, Plan((step,)), probe=batch)
        mlp, router = smaller.model.layers[1].mlp, model.model.layers[1].mlp.gate
        assert type(smaller) is type(model)
        assert len(mlp.experts.down_proj) == len(mlp.gate.weight) == mlp.experts.num_experts == len(kept)
        model.model.layers[1].mlp.gate = Masked(router, step.removed)
        torch.testing.assert_close(outputs(smaller, batch), outputs(model, batch))
        model.model.layers[1].mlp.gate = router


def test_whole_experts_and_their_neurons_go_together():
    transformers = pytest.importorskip("transformers")
    model, batch = families.made(transformers, "mixtral")
    sites = [site for site in find_sites(model, batch) if site.pinned is None]
    steps = tuple(Collapse(site, np.arange(max(site.least, site.channels // 2))) for site in sites)
    smaller = apply(model, Plan(steps), probe=batch)
    assert smaller.model.layers[0].mlp.experts.down_proj.shape == (2, 16, 4)
    costs = cost_model(model, sites, batch).cost([len(step.keep) for step in steps])
    assert (costs["params"], costs["bytes"]) == (parameters(smaller), nbytes(smaller))


def test_as_many_experts_of_each_group_stay():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = families.deepseek(transformers)
    (site,) = experts_of(model.eval(), batch)
    assert (site.pinned, site.channels, site.least) == (None, 4, 2)
    smaller = apply(model, Plan((Collapse(site, np.array([0, 2, 3])),)), probe=batch)
    weight = model.model.layers[1].mlp.gate.weight
    assert torch.equal(smaller.model.layers[1].mlp.gate.weight, weight[[0, 2, 3, 4, 6, 7]])


def test_biases_go_with_their_experts():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = families.gpt_oss(transformers)
    site, other = experts_of(model.eval(), batch)
    assert site.pinned is other.pinned is None
    smaller = apply(model, Plan((Collapse(site, np.array([1, 3])),)), probe=batch)
    assert smaller.model.layers[0].mlp.router.bias.shape == (2,)
    assert smaller.model.layers[0].mlp.experts.gate_up_proj_bias.shape[0] == 2


def test_costs_have_products_of_two_sizes():
    torch.manual_seed(0)
    layers = {"stem": nn.Linear(4, 5), "mixture": small.Mixture(), "out": nn.Linear(5, 3)}
    model = small.Net(lambda net, x: net.out(net.mixture(net.stem(x))), **layers).eval()
    batch = torch.randn(20, 4)
    sites = [
        replace(site, pinned=site.pinned if not site.router else None) for site in find_sites(model, batch)
    ]
    with pytest.raises(PysolveError, match="leave out one of the sites"):
        cost_model(model, sites, batch)
