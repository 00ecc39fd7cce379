"""Every site of a network is found, and nothing that is no site: by example, by poison and by cutting."""

import copy
import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cuts import (
    SITES,
    assert_cuts_cleanly,
    assert_poison_stays_inside,
    found,
    free,
    outputs,
    shown,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NETWORKS, Net, attention, chains, images, network, vectors
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.errors import CollapseError, LayerNotFoundError, PysolveError
from pysolve.nn.cut.apply import apply
from pysolve.nn.divergence import kl_divergence
from pysolve.nn.graph.sites import _first_words, find_sites
from pysolve.nn.layers.attention import opened
from pysolve.nn.zoo import Mlp
from pysolve.plan import Collapse, Plan
from pysolve.training.loss import floating


def test_every_network_is_listed():
    assert SITES.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_and_reasons_are_exactly_these(name):
    sites, expected = found(name), SITES[name]
    assert [shown(site) for site in sites] == [line.partition(" ! ")[0] for line in expected]
    for site, line in zip(sites, expected, strict=True):
        words = line.partition(" ! ")[2]
        assert (site.pinned is None) == (not words), site.pinned
        assert words in (site.pinned or "")


@pytest.mark.parametrize("name", NETWORKS)
def test_poison_in_a_channel_reaches_exactly_its_columns(name):
    assert_poison_stays_inside(*network(name), found(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_random_plans_cut_cleanly(name):
    for seed in range(3):
        assert_cuts_cleanly(*network(name), found(name), seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_empty_plans_and_plans_that_keep_all_change_nothing(name):
    model, batch = network(name)
    everything = Plan(tuple(Collapse(site, range(site.channels)) for site in free(found(name))))
    for plan, before in ((Plan(), model), (everything, opened(model))):
        for a, b in zip(outputs(before, batch), outputs(apply(model, plan), batch), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=settings().max_examples // 4)
@given(chains(), st.integers(0, 1000))
def test_random_networks_are_understood(chain, seed):
    model, batch = chain
    sites = find_sites(model, batch)
    assert free(sites)
    assert all("not understood" not in (site.pinned or "") for site in sites)
    assert_poison_stays_inside(model, batch, sites)
    assert_cuts_cleanly(model, batch, sites, seed)


def test_tables_say_which_rows_and_columns_a_channel_is():
    (flat, _) = found("flattened_by_view")
    assert flat.columns["fc"].tolist() == np.arange(80).reshape(5, 16).tolist()
    heads, _ = found("grouped_queries")
    assert heads.rows["q"].tolist() == [[*range(8)], [*range(8, 16)]]
    assert heads.rows["k"].tolist() == heads.rows["v"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert heads.columns["o"].tolist() == [[*range(8)], [*range(8, 16)]]
    halves, _ = found("chunked_swiglu")
    assert halves.rows["a"].tolist() == [[i, 7 + i] for i in range(7)]
    shifted, _, padded, _ = found("padded_shortcut_by_a_layer")
    assert shifted.rows["conv2"].ravel().tolist() == shifted.columns["fc"].ravel().tolist() == [1, 2, 3, 4]
    assert padded.rows["conv2"].ravel().tolist() == [0, 5, 6, 7]
    assert padded.rows["shortcut.pad"].ravel().tolist() == [0, 1, 2, 3]
    beside, after, _ = found("concat")
    assert beside.columns["c"].ravel().tolist() == [0, 1, 2, 3]
    assert after.columns["c"].ravel().tolist() == [7, 8, 9, 10, 11]


class Written(nn.Module):
    """Its reasons name these lines."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.fc1(x).softmax(1)
        x = self.fc2(x).unflatten(1, (2, 4)).flatten(1)
        return self.fc3(x).cumsum(0)


def test_reasons_name_the_line_of_code():
    softmax, view, _ = find_sites(Written(), vectors(4, 4))
    assert softmax.pinned.startswith("softmax mixes these channels (test_sites.py:")
    assert softmax.pinned.endswith(": x = self.fc1(x).softmax(1))")
    assert view.pinned.startswith("a width is written into the code (test_sites.py:")
    assert ": x = self.fc2(x).unflatten(1, (2, 4)).flatten(1))" in view.pinned


def test_a_width_in_the_code_is_found_even_where_nothing_of_it_shows():
    model, x = attention(width=16, heads=4, written=True)
    assert "without some of them" in find_sites(model, x)[0].pinned
    with torch.no_grad():
        model.o.weight.zero_()
    assert "without some of them" in find_sites(model, x)[0].pinned


def test_among_many_sites_only_the_guilty_are_pinned():
    def run(net, x):
        for layer in net.layers:
            x = x + layer(x)
        return x

    torch.manual_seed(0)
    inner = [attention(written=i in (2, 7)) for i in range(9)]
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), one) for one, _ in inner)
    sites = find_sites(Net(run, layers=layers), vectors(2, 6, 4))
    written = [site.writers[0] for site in sites if "written into the code" in (site.pinned or "")]
    assert written == ["layers.2.1.q", "layers.7.1.q"]
    assert len(free(sites)) == 16


def test_a_width_in_the_size_of_zeros_is_written_into_the_code():
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)}
    model = Net(lambda net, x: net.b(torch.zeros(len(x), 6).add(net.a(x))), **layers)
    site, _ = find_sites(model, vectors(5, 4))
    assert site.pinned.startswith("a width is written into the code (test_sites.py")


def test_integers_that_count_heads_shrink_with_them():
    model, x = network("counted_heads")
    site = found("counted_heads")[1]
    assert site.integers == {"1.heads": 1, "1.width": 4}
    plan = Plan((Collapse(site, [0, 2]),))
    smaller = apply(model, plan, probe=x)
    assert [smaller[1].heads, smaller[1].width, smaller[1].last, smaller[1].unread] == [2, 8, 3, 3]
    assert [model[1].heads, model[1].width] == [3, 12]
    for wrong in ({"1.heads": 2}, {"1.size": 1}, {"1.training": 1}, {"1.heads.0": 1}, {"1.heads.9": 1}):
        with pytest.raises(CollapseError, match="does not count the channels"):
            apply(model, Plan((Collapse(replace(site, integers=wrong), [0, 2]),)))


def test_integers_that_two_sites_share_follow_neither():
    def run(net, x):
        heads = [F.softmax(layer(x).view(len(x), net.heads, -1), -1).flatten(1) for layer in (net.a, net.b)]
        return net.out(torch.cat(heads, 1))

    model = Net(run, a=nn.Linear(4, 6), b=nn.Linear(4, 9), out=nn.Linear(15, 2))
    model.heads = 3
    first, second, _ = find_sites(model, vectors(4, 4))
    assert first.pinned.startswith("a width is written into the code (test_sites.py:")
    assert second.pinned.startswith("the code counts on all of these channels: without some of them")
    assert not first.integers
    assert not second.integers


def with_a_head_for_training(head):
    def run(net, x):
        x = F.relu(net.stem(x))
        y = net.fc(F.relu(net.conv(x)).mean((2, 3)))
        return (y, head(net, x)) if net.training else y

    stem, conv, fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 1), nn.Linear(5, 2)
    aux, more = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(3, 6, 1)
    return Net(run, stem=stem, conv=conv, fc=fc, aux=aux, more=more)


IN_TRAINING = {
    "reads": (lambda net, x: net.aux(x), "`aux.0.weight` works on these channels in training"),
    "writes": (lambda net, x: x + net.more(images()), "`more.weight` works on these channels in training"),
    "knows the width": (lambda net, x: x.view(2, 6, 64), "training needs these channels (test_sites.py:"),
    "cannot be traced": (lambda net, x: net.aux(x) if x.sum() >= 0 else x, "training needs these channels"),
}


@pytest.mark.parametrize("name", IN_TRAINING)
def test_channels_that_training_alone_needs_stay_and_the_smaller_network_trains(name):
    head, reason = IN_TRAINING[name]
    model, x = with_a_head_for_training(head), images()
    state = copy.deepcopy(model.state_dict())
    first, second, _ = find_sites(model, x)
    assert reason in first.pinned
    assert second.pinned is None
    smaller = apply(model, Plan((Collapse(second, [0, 2]),))).train()
    smaller(x)[0].sum().backward()
    assert all(torch.equal(values, state[key]) for key, values in model.state_dict().items())


@dataclass
class Answer:
    scores: torch.Tensor
    more: list


def test_outputs_may_be_dataclasses():
    def run(net, x):
        return Answer(net.b(F.relu(net.a(x))), [{"input": x}])

    model, x = Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), vectors(4, 4)
    site, last = find_sites(model, x)
    assert (site.pinned, last.pinned) == (None, "the network's output")
    assert not model._forward_hooks
    smaller = apply(model, Plan((Collapse(site, [0, 3]),)), probe=x)
    assert kl_divergence(model(x), smaller(x)) > 0
    assert [one.shape for one in floating(smaller(x))] == [(4, 3), (4, 4)]


def test_heads_that_training_does_not_use_either_hold_nothing():
    model, x = with_a_head_for_training(lambda net, x: x.mean()), images()
    assert len(free(find_sites(model, x))) == 2


def test_ignored_layers_keep_their_channels():
    model, x = Mlp((4, 5, 6, 7, 3)), vectors(4, 4)
    assert [site.pinned for site in find_sites(model, x, ignore=["fc2"])[:3]] == [
        "`fc2` is to be ignored",
        "`fc2` is to be ignored",
        None,
    ]
    pinned = [site.pinned for site in find_sites(model, x, ignore=("re:fc[34]",))]
    assert pinned[0] is None
    assert pinned[1] == "`fc3` is to be ignored"
    model, x = network("depthwise")
    assert find_sites(model, x, ignore=["4"])[0].pinned == "`4` is to be ignored"


def test_ignoring_what_is_not_there_is_an_error():
    model, x = Mlp((4, 5, 3)), vectors(4, 4)
    with pytest.raises(LayerNotFoundError, match="did you mean 'fc2'"):
        find_sites(model, x, ignore=["fc-2"])
    with pytest.raises(LayerNotFoundError, match="no layer that matches 're:fc'"):
        find_sites(model, x, ignore=["re:fc"])
    with pytest.raises(TypeError, match=r"pass \['fc1'\]"):
        find_sites(model, x, ignore="fc1")


class Counting(nn.Module):
    """Changes a buffer whenever it runs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.layers(x)


def test_the_network_and_the_world_stay_as_they_are():
    model, x = Counting().train(), vectors(4, 4)
    model.layers[1].eval()
    model.layers[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    level, copied = logging.root.manager.disable, x.clone()
    assert len(free(find_sites(model, x))) == 1
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    old = before.state_dict()
    assert all(torch.equal(values, old[name]) for name, values in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copied)
    assert logging.root.manager.disable == level
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("batch", [vectors(1, 4), vectors(3, 4), (vectors(3, 4), 1), {"x": vectors(3, 4)}])
def test_examples_have_the_forms_that_gather_takes(batch):
    assert [site.channels for site in free(find_sites(Mlp((4, 5, 3)), batch))] == [5]


def test_a_batch_size_in_the_code_is_met():
    model = Net(lambda net, x: net.b(net.a(x.view(6, 4))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    assert len(free(find_sites(model, vectors(6, 4)))) == 1
    model = Net(lambda net, x: net.b(net.a(x.view(1, 2, 4))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    assert len(free(find_sites(model, vectors(1, 8)))) == 1


def test_only_a_few_samples_of_a_large_example_are_run():
    sizes = []
    model = Mlp((4, 5, 3))
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    find_sites(model, vectors(500, 4))
    assert max(sizes) <= 4


def test_types_other_than_single_precision_work():
    for dtype in (torch.float64, torch.bfloat16):
        sites = find_sites(Mlp((4, 5, 3)).to(dtype), vectors(4, 4).to(dtype))
        assert len(free(sites)) == 1


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        print("hello")
        if x.sum() > 0:
            x = -x
        return self.fc(x)


def test_what_cannot_be_traced_is_one_error_that_names_the_line(capfd):
    with pytest.raises(
        PysolveError, match=r"Branching cannot be traced \(test_sites.py:\d+: if x.sum"
    ) as error:
        find_sites(Branching(), vectors(4, 4))
    assert "a list of Site, written by hand" in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_it_is_a_public_name():
    assert ps.find_sites is find_sites


# --- long texts


def texts(run, length=100, **layers):
    """A network of words and 100 of these, and how long the texts are that it is run on."""
    torch.manual_seed(0)
    seen = []

    def noted(net, ids):
        seen.append(ids.shape[1])
        return run(net, ids)

    layers = {"words": nn.Embedding(11, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 5), **layers}
    return Net(noted, **layers).eval(), torch.randint(11, (4, length)), seen


def test_sites_are_tried_on_the_beginnings_of_long_texts():
    model, ids, seen = texts(lambda net, ids: net.down(net.up(net.words(ids)).relu()))
    sites = find_sites(model, ids)
    assert [site.pinned for site in sites if "up" in site.writers] == [None]
    assert seen.count(32) > 5 > seen.count(100)


def test_sites_are_tried_on_whole_texts_where_the_network_takes_no_others():
    model, ids, seen = texts(
        lambda net, ids: net.down(net.up(net.words(ids) + net.place.weight).relu()),
        place=nn.Embedding(100, 6),
    )
    assert any(site.pinned is None for site in find_sites(model, ids))
    assert set(seen) == {32, 100}
    assert seen.count(32) == 1


@pytest.mark.parametrize("x", [torch.randn(4, 100), torch.randint(9, (4, 20)), torch.randint(9, (4, 3, 50))])
def test_only_long_texts_are_cut(x):
    assert _first_words(nn.Identity(), x) is x


def test_decoders_must_run_with_the_caches_that_they_have_in_use():
    class Config:
        use_cache, width = True, 8

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.up, self.down = Config(), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            hidden = self.up(x).relu()
            if self.config.use_cache:
                # A state that starts as wide as the configuration says.
                hidden = torch.maximum(hidden, torch.zeros(len(x), self.config.width))
            return self.down(hidden)

    site = find_sites(Kept().eval(), torch.randn(5, 4))[0]
    assert "a width is written into the code" in site.pinned
    Config.use_cache = False
    assert find_sites(Kept().eval(), torch.randn(5, 4))[0].pinned is None
