"""Dimensions of attention heads as sites: which rows they are, what follows their number, and the trial."""

import numpy as np
import pytest
import torch
from families import IDS, gpt2, llama, t5, vit
from heads import inputs, network
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Net, vectors
from torch import nn
from torch.nn import functional as F

from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.verify import mismatch
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan

scales = st.sampled_from(["held", "sizes", "fixed"])


def dims_of(model, x):
    return [site for site in find_sites(model, x, head_dims=True) if site.attention]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 50),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    d=st.integers(2, 5),
    bias=st.booleans(),
    scale=scales,
    products=st.booleans(),
    data=st.data(),
)
def test_any_dimensions_can_go(seed, heads, d, bias, scale, products, data):
    """The narrower network is the masked one: scores keep their scale, whatever the code makes of sizes."""
    x = inputs(4)
    model = network(seed, heads=heads[0], groups=heads[1], d=d, bias=bias, scale=scale, products=products)
    found = dims_of(model, x)
    assert [site.channels for site in found] == [d, d]
    keep = [data.draw(st.sets(st.integers(0, d - 1), min_size=1)) for _ in found]
    steps = tuple(Collapse(site, np.array(sorted(one))) for site, one in zip(found, keep, strict=True))
    assert mismatch(masked(model, Plan(steps)), apply(model, Plan(steps)), x) is None


@pytest.mark.parametrize("products", [False, True, "enable_gqa", "named", "other order", "dots", "groups"])
def test_some_dimensions_of_grouped_heads_can_go(products):
    model, x = network(blocks=1, heads=4, groups=2, products=products), inputs(4)
    (site,) = dims_of(model, x)
    assert (site.attention[0].query, site.attention[0].key) == ("1.attend.q", "1.attend.k")
    plan = Plan((Collapse(site, np.array([0, 3])),))
    assert mismatch(masked(model, plan), apply(model, plan), x) is None


@pytest.mark.parametrize(("scale", "held"), [("held", "1.attend.scaling"), ("sizes", ""), ("fixed", None)])
def test_where_the_scale_is_held(scale, held):
    (site,) = dims_of(network(blocks=1, scale=scale), inputs(4))
    assert [one.scale for one in site.attention] == [held]
    smaller = apply(network(blocks=1, scale=scale), Plan((Collapse(site, np.arange(2)),)))
    if held:
        assert smaller[1].attend.scaling == 2**-0.5


def test_attention_that_runs_several_times_is_scaled_once():
    model, x = network(blocks=1), inputs(4)
    model.insert(2, model[1])
    (site,) = dims_of(model, x)
    assert len(site.attention) == 1
    plan = Plan((Collapse(site, np.array([0, 3])),))
    assert mismatch(masked(model, plan), apply(model, plan), x) is None


def test_rows_of_each_head_and_of_those_that_share_keys():
    (site,) = dims_of(network(blocks=1, heads=4, groups=2), inputs(4))
    (one,) = site.attention
    assert (one.query, one.key, one.value, one.output) == tuple(f"1.attend.{name}" for name in "qkvo")
    np.testing.assert_array_equal(one.queries, np.arange(16).reshape(4, 4))
    np.testing.assert_array_equal(one.keys, np.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(one.values, np.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(one.outputs, np.arange(16).reshape(4, 4))


def test_of_whole_heads_nothing_changes():
    model, x = network(), inputs(4)
    without, every = find_sites(model, x), find_sites(model, x, head_dims=True)
    assert every[: len(without)] == without
    assert {site.name for site in every[len(without) :]} == {
        f"{block}.attend.q (+2) → {block}.attend.o, in each head" for block in (1, 2)
    }


def test_they_overlap_with_heads_and_with_nothing_else():
    every = find_sites(network(), inputs(4), head_dims=True)
    free = [site for site in every if site.pinned is None]
    dims = [site for site in free if site.attention]
    for site in dims:
        others = [other for other in free if other is not site and site.overlaps(other)]
        assert [other.writers for other in others] == [site.writers]


@pytest.mark.parametrize("bare", ["q", "o"])
def test_matrices_in_one_parameter_keep_the_dimensions_of_heads(bare):
    def run(net, x):
        q, k, v = (multiply(net, name, x).unflatten(-1, (-1, 4)).transpose(1, 2) for name in "qkv")
        return multiply(net, "o", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def multiply(net, name, x):
        layer = getattr(net, name)
        return x @ layer if name == bare else layer(x)

    layers = {**{name: nn.Linear(5, 12) for name in "qkv"}, "o": nn.Linear(12, 4)}
    layers[bare] = nn.Parameter(vectors(12, 4) if bare == "o" else vectors(5, 12))
    model, x = Net(run, **layers).eval(), vectors(2, 6, 5)
    assert dims_of(model, x) == []


def test_dimensions_of_states_that_attend_stay():
    """As in a decoder of words whose queries are the states of a recurrent layer."""

    def run(net, x):
        states = net.lstm(x)[0]
        return net.out((states @ net.keys(x).mT).softmax(-1) @ states)

    layers = {"lstm": nn.LSTM(5, 6, batch_first=True), "keys": nn.Linear(5, 6), "out": nn.Linear(6, 3)}
    assert dims_of(Net(run, **layers).eval(), vectors(2, 6, 5)) == []


def test_a_size_that_is_written_into_the_code_stays():
    def run(net, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    layers = {name: nn.Linear(5, 12) for name in "qkv"}
    (site,) = dims_of(Net(run, **layers, o=nn.Linear(12, 4)).eval(), vectors(2, 6, 5))
    assert site.pinned is not None
    assert "the code counts on all of these channels" in site.pinned or "written into the code" in site.pinned


def test_heads_that_share_keys_with_others_than_their_neighbours_say_so():
    (site,) = dims_of(network(blocks=1, heads=4, groups=2, products="other groups"), inputs(4))
    assert site.pinned == "heads that share keys or values are not next to each other"


def test_heads_that_positions_turn_in_part_say_so():
    def turned(x):
        a, b = x[..., :2].unbind(-1)
        angles = torch.arange(x.shape[2]) * 1.0
        pair = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        return torch.cat([torch.stack(pair, -1), x[..., 2:]], -1)

    def run(net, x):
        q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return net.o(y.transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(5, 12) for name in "qkv"}
    (site,) = dims_of(Net(run, **layers, o=nn.Linear(12, 4)).eval(), vectors(2, 6, 5))
    assert (site.channels, site.writers, site.readers) == (4, ("q", "k", "v"), ("o",))
    assert "as where positions turn a part of each head" in site.pinned


def test_ignored_layers_keep_theirs():
    found = find_sites(network(), inputs(4), ignore=["1.attend.k"], head_dims=True)
    assert [site.pinned for site in found if site.attention] == ["`1.attend.k` is to be ignored", None]


@pytest.mark.parametrize(
    ("family", "channels", "counts"),
    [
        (gpt2, [4, 4], {"head_dim", "split_size"}),
        (vit, [4, 4], {"head_dim"}),
        (t5, [4] * 6, {"key_value_proj_dim"}),
    ],
)
@pytest.mark.slow
def test_families(family, channels, counts):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = family(transformers)
    found = dims_of(model.eval(), batch)
    assert [site.channels for site in found] == channels
    assert all({path.rpartition(".")[2] for path in site.integers} == counts for site in found)


@pytest.mark.slow
def test_frequencies_go_in_all_layers():
    """With rotary positions a channel is one frequency: two dimensions of every head of every layer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = llama(transformers)[0].eval()
    (site,) = dims_of(model, {"input_ids": IDS})
    assert (site.channels, len(site.attention), site.passed) == (2, 2, ("model.rotary_emb.inv_freq",))
    assert [*site.integers.values()] == [2, 2]
    smaller = apply(model, Plan((Collapse(site, np.array([1])),)), probe={"input_ids": IDS})
    assert smaller.model.rotary_emb.inv_freq.shape == (1,)


def test_learnt_queries_of_one_head_have_no_heads():
    class Pool(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = torch.nn.Parameter(torch.randn(3, 8))
            self.q, self.k, self.v = (torch.nn.Linear(8, 8) for _ in range(3))
            self.out = torch.nn.Linear(24, 5)

        def forward(self, x):
            weights = (self.q(self.latents) @ self.k(x).mT).softmax(-1)
            return self.out((weights @ self.v(x)).flatten(1))

    assert not [
        site for site in find_sites(Pool().eval(), torch.randn(4, 6, 8), head_dims=True) if site.attention
    ]
