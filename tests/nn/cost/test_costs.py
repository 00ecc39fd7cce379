"""At every width, the cost model says what is counted in the network that is really that narrow."""

from functools import cache

import numpy as np
import pytest
import torch
from allocation import allocate
from cuts import found, free
from hypothesis import given
from hypothesis import strategies as st
from small import NETWORKS, Net, chains, network, vectors
from strategies import seeds
from torch import nn
from torch.nn.functional import relu

from pysolve.errors import CollapseError, DataError, PysolveError
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cost.per_sample import sample_macs, workload
from pysolve.nn.cut.apply import apply
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layers.attention import opened
from pysolve.nn.zoo import DigitsNet, LeNet5, Mlp, ResNet
from pysolve.plan import Collapse, Plan, Site


class Everything(nn.Module):
    """Stride, dilation, groups, depthwise and transposed convolutions, norms, concat, residual, flatten."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.side = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.mixed = nn.Conv2d(22, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.group_norm = nn.GroupNorm(3, 12)
        self.residual = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2, bias=False)
        self.slope = nn.PReLU(5)
        self.fc1 = nn.Linear(5 * 64, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x):
        both = torch.cat([self.side(x), self.depthwise(relu(self.norm(self.first(x))))], 1)
        x = self.group_norm(self.grouped(relu(self.mixed(both))))
        x = x + self.residual(relu(x))
        return self.fc2(relu(self.fc1(self.slope(self.up(x)).flatten(1))))


@cache
def everything():
    """One for all: its values play no part."""
    return Everything()


SITES = (
    Site(
        8,
        ("first",),
        ("mixed",),
        ("norm", "depthwise"),
        columns={"mixed": np.arange(6, 22).reshape(8, 2)},
    ),
    Site(6, ("side",), ("mixed",), columns={"mixed": np.arange(6)[:, None]}),
    Site(3, ("mixed", "residual"), ("residual", "up"), ("grouped", "group_norm")),
    Site(5, ("up",), ("fc1",), ("slope",)),
    Site(10, ("fc1",), ("fc2",)),
)
IMAGES = torch.zeros(2, 3, 8, 8)


def counted(model, example):
    return {
        "params": parameters(model),
        "macs": sum(sample_macs(model, example).values()),
        "bytes": nbytes(model),
    }


def narrowed(model, sites, kept, rng=None, values=None):
    """The network that apply makes with ``kept[s]`` channels in each site."""
    rng = rng or np.random.default_rng(0)
    chosen = [np.sort(rng.permutation(site.channels)[:k]) for site, k in zip(sites, kept, strict=True)]
    steps = tuple(Collapse(site, keep) for site, keep in zip(sites, chosen, strict=True))
    return apply(model, Plan(steps, values or {}))


@given(seeds, st.sets(st.integers(0, len(SITES) - 1)))
def test_any_widths_cost_what_the_narrow_network_costs(seed, chosen):
    rng, model = np.random.default_rng(seed), everything()
    sites = [SITES[s] for s in sorted(chosen)]
    costs = cost_model(model, sites, IMAGES)
    kept = [int(rng.integers(1, site.channels + 1)) for site in sites]
    assert costs.cost(kept) == counted(narrowed(model, sites, kept, rng), IMAGES)
    assert costs.original == counted(model, IMAGES)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=6), seeds)
def test_any_mlp_costs_what_one_built_narrower_costs(sizes, seed):
    rng, x = np.random.default_rng(seed), torch.zeros(3, sizes[0])
    sites = [Site(K, (f"fc{i}",), (f"fc{i + 1}",)) for i, K in enumerate(sizes[1:-1], start=1)]
    kept = rng.integers(1, np.array(sizes[1:-1]) + 1).tolist()
    costs = cost_model(Mlp(sizes), sites, x)
    assert costs.cost(kept) == counted(Mlp((sizes[0], *kept, sizes[-1])), x)


def check_sites(model, batch, sites, seed=0, tries=3):
    rng = np.random.default_rng(seed)
    model = opened(model)
    costs, cut = cost_model(model, sites, batch), free(sites)
    assert costs.original == counted(model, batch)
    for _ in range(tries):
        kept = {site: int(rng.integers(1, site.channels + 1)) for site in cut}
        smaller = narrowed(model, cut, [*kept.values()], rng)
        assert costs.cost([kept.get(site, site.channels) for site in sites]) == counted(smaller, batch)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_costs_at_any_widths_what_is_counted(name):
    check_sites(*network(name), found(name))


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_half_the_macs_of_every_network_are_half_of_those_counted(name):
    model, batch = network(name)
    model, sites = opened(model), free(found(name))
    costs, whole = cost_model(model, sites, batch), counted(model, batch)["macs"]

    def share(kept):
        return counted(narrowed(model, sites, kept), batch)["macs"] / whole

    curves = [np.linspace(1.0, 0.0, site.channels + 1) for site in sites]
    if share([1] * len(sites)) > 0.5:
        with pytest.raises(PysolveError, match="macs cannot go below"):
            allocate(costs, curves, {"macs": 0.5})
        return
    kept = allocate(costs, curves, {"macs": 0.5})
    assert share(kept) <= 0.5
    for s, site in enumerate(sites):
        assert kept[s] == site.channels or share(kept + np.eye(len(sites), dtype=int)[s]) > 0.5


@given(chains(), seeds)
def test_any_convolutional_network_costs_at_any_widths_what_is_counted(example, seed):
    check_sites(*example, find_sites(*example), seed, tries=1)


def test_samples_of_several_lengths_cost_the_mean():
    model, work = network("attention")[0], workload([torch.zeros(2, 6, 5), torch.zeros(6, 9, 5)])
    (site,) = (site for site in find_sites(model, torch.zeros(2, 6, 5)) if site.pinned is None)
    for k in (1, 2, 3):
        by_hand = [n * k * 4 * (3 * 5 + 4) + 2 * k * 4 * n**2 for n in (6, 9)]
        assert cost_model(model, [site], work).cost([k])["macs"] == (by_hand[0] + 3 * by_hand[1]) / 4


def test_lenet_costs_what_is_counted_by_hand():
    sites = (
        Site(20, ("conv1",), ("conv2",)),
        Site(50, ("conv2",), ("fc1",)),
        Site(500, ("fc1",), ("fc2",)),
    )
    costs = cost_model(LeNet5(), sites, torch.zeros(1, 1, 28, 28))
    a, b, c = 7, 12, 31
    by_hand = a * 26 + b * (25 * a + 1) + c * (16 * b + 1) + 10 * (c + 1)
    assert costs.cost([a, b, c]) == {
        "params": by_hand,
        "macs": a * 25 * 24 * 24 + b * a * 25 * 8 * 8 + c * 16 * b + 10 * c,
        "bytes": 4 * by_hand,
    }


def test_the_inner_channels_of_a_residual_network_cost_what_is_counted():
    model, images = ResNet(8), torch.zeros(2, 3, 32, 32)
    blocks = [(f"layer{i}.0", width) for i, width in ((1, 16), (2, 32), (3, 64))]
    sites = [Site(width, (f"{b}.conv1",), (f"{b}.conv2",), (f"{b}.bn1",)) for b, width in blocks]
    kept = [3, 17, 64]
    assert cost_model(model, sites, images).cost(kept) == counted(narrowed(model, sites, kept), images)


def test_groups_that_all_lose_as_many_channels_cost_what_is_counted():
    layers = nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 15, 3, groups=3), nn.ReLU(), nn.Conv2d(15, 4, 1)
    model, images = nn.Sequential(*layers), torch.zeros(2, 2, 5, 5)
    inner, outer = np.arange(12).reshape(3, 4).T, np.arange(15).reshape(3, 5).T
    sites = [
        Site(4, ("0",), ("2",), rows={"0": inner}, columns={"2": inner}),
        Site(5, ("2",), ("4",), rows={"2": outer}, columns={"4": outer}),
    ]
    assert cost_model(model, sites, images).cost([3, 2]) == counted(narrowed(model, sites, [3, 2]), images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_follow_the_type(dtype):
    model, images = Everything().to(dtype), IMAGES.to(dtype)
    kept = [2, 5, 1, 3, 4]
    assert cost_model(model, SITES, images).cost(kept) == counted(narrowed(model, SITES, kept), images)


class Twice(nn.Module):
    """One layer called at two sizes, and under two names."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
        self.again = self.fc1

    def forward(self, x):
        return self.fc2(relu(self.fc1(x))) + self.fc2(relu(self.again(x.repeat(1, 2, 1)))).sum(
            1, keepdim=True
        )


@pytest.mark.parametrize("writers", [("fc1",), ("fc1", "again"), ("again",)])
def test_a_layer_called_several_times_has_its_parameters_once_and_its_macs_each_time(writers):
    model, site, x = Twice(), Site(6, writers, ("fc2",)), torch.zeros(2, 5, 4)
    costs = cost_model(model, [site], x)
    assert costs.cost([2]) == {"params": 10 + 9, "macs": 15 * (8 + 6), "bytes": 76}
    assert costs.cost([2]) == counted(narrowed(model, [site], [2]), x)


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    costs = cost_model(model, [Site(6, ("0",), ("2",))], torch.zeros(1, 6))
    assert costs.original == {"params": 36, "macs": 72, "bytes": 144}


def test_embeddings_and_unnamed_layers_count():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4, bias=False), nn.LayerNorm(4))
    tokens = torch.zeros(2, 5, dtype=torch.long)
    costs = cost_model(model, [Site(6, ("0",), ("1",))], (tokens, None))
    assert costs.cost([2]) == {"params": 22 + 8 + 8, "macs": 5 * 8, "bytes": 4 * 38}


def test_keyword_batches_are_counted_per_sample():
    costs = cost_model(Mlp((4, 6, 3)), [Site(6, ("fc1",), ("fc2",))], {"x": torch.zeros(7, 4)})
    assert costs.cost([2])["macs"] == 8 + 6


def test_new_biases_count_with_their_rows_but_in_no_share():
    model, names = Everything(), ("first", "residual", "up", "fc1")
    costs = cost_model(model, SITES, IMAGES, extra_biases=names)
    kept = [2, 5, 1, 3, 4]
    widths = {"first": 8, "residual": 12, "up": 5}
    values = {f"{name}.bias": np.zeros(width) for name, width in widths.items()}
    assert costs.cost(kept) == counted(narrowed(model, SITES, kept, values=values), IMAGES)
    assert costs.original == counted(model, IMAGES)


def test_a_bias_for_a_layer_of_no_site_counts_too():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    costs = cost_model(model, [], torch.zeros(1, 4), extra_biases=["2"])
    assert costs.cost([]) == {"params": 51, "macs": 42, "bytes": 204}
    assert costs.original["params"] == 48


def test_only_linear_layers_and_convolutions_can_be_given_a_bias():
    with pytest.raises(CollapseError, match="norm is a BatchNorm2d"):
        cost_model(Everything(), SITES, IMAGES, extra_biases=["norm"])


def test_a_pinned_site_costs_the_same_whatever_it_keeps():
    pinned = Site(256, ("fc1",), ("fc2",), pinned="for the test")
    costs = cost_model(DigitsNet(), [pinned], torch.zeros(1, 1, 8, 8))
    assert costs.cost([1]) == costs.original == {"params": 138_698, "macs": 216_576, "bytes": 554_792}


def test_groups_that_go_whole_for_one_site_and_in_part_for_another_are_refused():
    sites = [Site(3, ("mixed",), ("residual", "up"), ("grouped",)), Site(4, ("grouped",), ("residual",))]
    with pytest.raises(PysolveError, match="grouped passes on the channels of one site"):
        cost_model(Everything(), sites, IMAGES)


def test_layers_that_cannot_be_narrowed_are_refused():
    with pytest.raises(CollapseError, match="norm is a BatchNorm2d"):
        cost_model(Everything(), [Site(8, ("first",), ("norm",))], IMAGES)


@pytest.mark.parametrize("example", [torch.zeros(0, 4), {"x": 3}])
def test_an_example_has_samples(example):
    with pytest.raises(DataError, match="at least one sample"):
        cost_model(Mlp((4, 6, 3)), [], example)


def test_counting_leaves_the_network_as_it_was():
    model = Everything().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost_model(model, SITES, IMAGES)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_runs_once_a_batch_costs_the_same_whatever_the_example():
    model = Net(
        lambda net, x: net.b(net.a(x).relu()) + net.position(net.grid).sum(),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        position=nn.Linear(2, 5),
        grid=nn.Parameter(vectors(8, 2)),
    )
    counted = [cost_model(model, [], vectors(n, 4)).original["macs"] for n in (2, 8)]
    assert counted == [4 * 6 + 6 * 3 + 8 * 2 * 5] * 2
