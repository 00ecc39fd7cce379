"""Bare parameters and buffers as members of sites."""

import numpy as np
import pytest
import torch
from small import Net, network
from torch import nn

from pysolve.errors import CollapseError, LayerNotFoundError
from pysolve.forms import Codebook
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.bare import Bare, find_member
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan, Site


def test_whole_rows_and_columns_go_and_nothing_else():
    owner = Net(None, table=nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False))
    bare = Bare(owner, "table")
    with pytest.raises(CollapseError, match="only whole rows or columns of `table`"):
        bare.narrow(np.array([1, 1, 0, 1, 1, 1], bool))
    bare.narrow(np.array([1, 0, 1, 1, 0, 1], bool))
    assert bare.values.tolist() == [[0, 2], [3, 5]]
    assert isinstance(owner.table, nn.Parameter)
    assert not owner.table.requires_grad


def test_members_are_layers_and_tensors_of_the_networks_own():
    model, _ = network("weighted_features")
    assert find_member(model, "a") is model.a
    assert find_member(model, "mask") == Bare(model, "mask")
    assert find_member(model, "scales.1") == Bare(model.scales, "1")
    for name in ("runs", "scales.2", "run"):
        with pytest.raises(LayerNotFoundError):
            find_member(model, name)
    site = Site(6, ("a",), ("c",), ("a.bias",))
    with pytest.raises(CollapseError, match=r"a\.bias is one tensor, not a layer"):
        apply(model, Plan((Collapse(site, [0]),)))


@pytest.mark.parametrize("name", ["weighted_features", "handmade_batch_norms", "learned_positions"])
def test_costs_count_what_bare_tensors_lose(name):
    model, x = network(name)
    sites = find_sites(model, x)
    steps = [Collapse(site, [*range(1, site.channels)]) for site in sites if site.pinned is None]
    left = [len(site.rows) and site.channels - (site.pinned is None) for site in sites]
    costs, smaller = cost_model(model, sites, x).cost(np.array(left)), apply(model, Plan(tuple(steps)))
    assert (costs["params"], costs["bytes"]) == (parameters(smaller), nbytes(smaller))


def test_ignoring_a_module_keeps_its_tensors():
    model, x = network("handmade_batch_norms")
    assert find_sites(model, x, ignore=["1"])[0].pinned == "`1.gain` is to be ignored"


def test_a_bare_tensor_that_is_cut_can_take_another_form():
    model, x = network("weighted_features")
    _, site, _ = find_sites(model, x)
    form = Codebook(np.array([[[[0]], [[1]]]], np.uint8), np.array([0.5, 2.0], np.float32))
    plan = Plan((Collapse(site, [1, 4]),), forms={"scales.0": form})
    smaller, wide = apply(model, plan, probe=x), masked(model, plan)
    assert smaller.scales[0].flatten().tolist() == [0.5, 2.0]
    assert wide.scales[0].flatten()[[1, 4]].tolist() == [0.5, 2.0]


def test_a_tensor_that_two_modules_share_is_not_cut():
    model, x = network("handmade_batch_norms")
    model[4].gain = nn.Parameter(model[4].gain.detach())
    model[1].shift = model[1].gain
    first, second, _ = find_sites(model, x)
    assert second.pinned is None
    assert "the parameter `1." in first.pinned
