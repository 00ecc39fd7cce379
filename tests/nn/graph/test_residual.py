"""Which branches can go whole, what goes with them, and that nothing but their constants is left."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cuts import found
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NETWORKS, Net, classifier, images, network, vectors
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.errors import CollapseError
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cost.counting import macs
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.verify import mismatch
from pysolve.nn.evaluate import parameters
from pysolve.nn.layer_kinds import WEIGHTED
from pysolve.nn.layers.attention import opened
from pysolve.nn.layers.idle import Constant, Empty, PassedBy
from pysolve.plan import Branch, Collapse, Plan, Site

# Branches of the small networks, and what has nothing to do without them.
BRANCHES = {
    "residual": {"conv1": ()},
    "two_residuals": {"a1": (), "a2": ()},
    "padded_shortcut_in_code": {"conv1": ()},
    "padded_shortcut_by_a_layer": {"conv1": ()},
    "transformer_layer": {"self_attn.q_proj": (), "linear1": ()},
    "layer_norm_stream": {"fc1": ("norm",)},
    "rms_norm_stream": {"fc1": ("norm",)},
    "handmade_norm_stream": {"fc1": ("norm",)},
    "offset_norm_stream": {"fc1": ("norm",)},
    "embedding_stream": {"fc1": ()},
}


def branches(sites):
    return {site.writers[0]: site for site in sites if site.least == 0}


def empty(sites):
    return Plan(tuple(Collapse(site, np.zeros(0, np.intp)) for site in sites))


def block(width=6, inner=5):
    """A block of a residual network whose code writes into what its branch makes."""

    def run(net, x):
        out = net.relu(net.bn1(net.conv1(x)))
        out = net.bn2(net.conv2(out))
        out += x
        return net.relu(out)

    convolutions = (nn.Conv2d(*sizes, 3, padding=1, bias=False) for sizes in ((width, inner), (inner, width)))
    conv1, conv2 = convolutions
    bn1, bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(width)
    for norm in (bn1, bn2):
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(values, 0.5, 1.5)
    return Net(run, conv1=conv1, bn1=bn1, conv2=conv2, bn2=bn2, relu=nn.ReLU(inplace=True))


def written_block():
    torch.manual_seed(0)
    run = lambda net, x: classifier(net, net.block(net.stem(x)))  # noqa: E731
    return Net(run, stem=nn.Conv2d(3, 6, 1), block=block(), fc=nn.Linear(6, 3)).eval(), images()


def bottleneck():
    def run(net, x):
        x = net.stem(x)
        return classifier(net, x + net.conv3(F.relu(net.bn2(net.conv2(F.relu(net.bn1(net.conv1(x))))))))

    layers = {"conv1": nn.Conv2d(6, 4, 1), "conv2": nn.Conv2d(4, 5, 3, padding=1, stride=1)}
    norms = {"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(5)}
    conv3, fc = nn.Conv2d(5, 6, 1), nn.Linear(6, 3)
    return Net(run, stem=nn.Conv2d(3, 6, 1), **layers, **norms, conv3=conv3, fc=fc).eval(), images()


class Attention(nn.Module):
    """Heads by their number, which the code cannot divide nothing by; returns no weights."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, *, mask=None):
        q, k, v = (one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), mask


def attending():
    def run(net, x):
        x = net.stem(x)
        x = x + net.attention(net.norm(x))[0]
        return net.fc(x)

    layers = {"stem": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "attention": Attention(8, 2)}
    torch.manual_seed(0)
    return Net(run, **layers, fc=nn.Linear(8, 3)).eval(), vectors(2, 5, 4)


def nested():
    """Inside of the branch is a sum with another, as with positions in the attention of Swin V2."""

    def run(net, x):
        x = net.stem(x)
        inner = net.query(x) + net.last(F.relu(net.first(x)))
        return net.fc(x + net.down(inner * net.value(x)))

    sizes = {
        "stem": (4, 6),
        "query": (6, 5),
        "value": (6, 5),
        "first": (6, 4),
        "last": (4, 5),
        "down": (5, 6),
    }
    torch.manual_seed(0)
    layers = {name: nn.Linear(*size) for name, size in sizes.items()}
    return Net(run, **layers, fc=nn.Linear(6, 3)).eval(), vectors(4, 4)


def gated():
    """What the branch makes is a factor, too."""

    def run(net, x):
        x = net.stem(x)
        y = net.down(F.relu(net.up(x)))
        return net.fc(x * y.sigmoid() + y)

    layers = {"stem": nn.Linear(4, 6), "up": nn.Linear(6, 5), "down": nn.Linear(5, 6)}
    return Net(run, **layers, fc=nn.Linear(6, 3)).eval(), vectors(4, 4)


def joined():
    """The last layer reads the stream besides."""

    def run(net, x):
        x = net.stem(x)
        return net.fc(x + net.down(torch.cat([F.relu(net.up(x)), x], -1)))

    layers = {"stem": nn.Linear(4, 6), "up": nn.Linear(6, 5), "down": nn.Linear(11, 6)}
    return Net(run, **layers, fc=nn.Linear(6, 3)).eval(), vectors(4, 4)


def broadcast():
    """A sum that is as large as the branch alone makes it."""

    def run(net, x):
        x = net.stem(x)
        return net.fc(x.mean(1, keepdim=True) + net.down(F.relu(net.up(x))))

    layers = {"stem": nn.Linear(4, 6), "up": nn.Linear(6, 5), "down": nn.Linear(5, 6)}
    return Net(run, **layers, fc=nn.Linear(6, 3)).eval(), vectors(2, 5, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_branches_and_what_goes_with_them_are_exactly_these(name):
    seen = {writer: site.branch.idle for writer, site in branches(found(name)).items()}
    assert seen == BRANCHES.get(name, {})


@settings(max_examples=20)
@given(st.sampled_from([*BRANCHES]), st.data())
def test_any_of_them_can_go_beside_channels_of_others(name, data):
    model, batch = network(name)
    steps = []
    for site in (one for one in found(name) if one.pinned is None):
        count = data.draw(st.integers(site.least, site.channels))
        keep = data.draw(st.permutations(range(site.channels)))[:count]
        steps.append(Collapse(site, np.sort(np.array(keep, dtype=np.intp))))
    # A site all of whose channels stay cannot follow where its branch is gone.
    plan = Plan(tuple(step for step in steps if len(step.keep) < step.site.channels))
    assert mismatch(masked(model, plan), apply(model, plan), batch) is None


@pytest.mark.parametrize(
    "make", [written_block, bottleneck, attending, nested, *(partial(network, name) for name in BRANCHES)]
)
def test_without_its_branches_a_network_computes_nothing_for_them(make):
    model, batch = make()
    gone = branches(ps.find_sites(model, batch))
    assert gone
    smaller = apply(model, empty(gone.values()), probe=batch)
    # As it is used, in whatever ways torch has for that.
    with torch.no_grad():
        smaller.eval()(batch)
    for site in gone.values():
        for name in (*site.writers, *site.readers):
            left = dict(smaller.named_modules()).get(name)
            assert left is None or isinstance(left, Empty | Constant | nn.Identity)
    assert macs(smaller, batch) < macs(model, batch)
    assert (macs(smaller, batch) > 0) == any(isinstance(one, WEIGHTED) for one in smaller.modules())
    for site in gone.values():
        names = [name for name, _ in smaller.named_parameters()]
        assert not any(f"{writer}." in name for writer in site.writers for name in names)


@pytest.mark.parametrize(
    "make", [written_block, attending, nested, *(partial(network, name) for name in BRANCHES)]
)
def test_costs_without_branches_are_those_of_the_network(make):
    model, batch = make()
    model = opened(model)
    sites = [site for site in ps.find_sites(model, batch) if site.pinned is None]
    costs = cost_model(model, sites, batch)
    left = costs.cost([0 if site.least == 0 else site.channels for site in sites])
    smaller = apply(model, empty([site for site in sites if site.least == 0]))
    assert left["macs"] * macs(model, batch) == pytest.approx(costs.original["macs"] * macs(smaller, batch))
    # Norms that have nothing to do are gone as well.
    idle = [name for site in sites if site.branch for name in site.branch.idle]
    norms = sum(parameters(model.get_submodule(name)) for name in idle)
    assert 0 <= left["params"] - parameters(smaller) <= norms + 6


def test_batch_norms_behind_the_branch_take_its_constant():
    model, batch = written_block()
    site = branches(ps.find_sites(model, batch))["block.conv1"]
    assert site.branch == Branch({"block.conv2": "block.bn2"}, (), written=True)
    smaller = apply(model, empty([site]), probe=batch)
    kinds = [type(smaller.block.get_submodule(name)) for name in ("conv1", "bn1", "conv2", "bn2")]
    assert kinds == [Empty, nn.Identity, Empty, Constant]
    # Its input must be what it was: the code adds to what the branch makes.
    x = torch.randn(2, 6, 8, 8)
    kept = x.clone()
    smaller.block(x)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_of_a_bottleneck_the_last_channels_take_the_first_layer_along():
    model, batch = bottleneck()
    seen = branches(ps.find_sites(model, batch))
    assert {writer: site.branch.idle for writer, site in seen.items()} == {"conv2": ("conv1", "bn1")}


def test_attention_whose_code_takes_no_heads_is_passed_by():
    model, batch = attending()
    (site,) = branches(ps.find_sites(model, batch)).values()
    assert site.branch.whole == "attention"
    assert (site.branch.argument, site.branch.results, site.branch.position) == (0, 2, 0)
    assert site.branch.idle == ("norm",)
    smaller = apply(model, empty([site]), probe=batch)
    assert isinstance(smaller.attention, PassedBy)
    assert [*smaller.attention.state_dict()] == ["o.bias"]
    torch.testing.assert_close(smaller.attention.o.bias, model.attention.o.bias, rtol=0, atol=0)


@pytest.mark.parametrize("make", [gated, joined, broadcast])
def test_what_leaves_more_than_a_term_of_a_sum_stays(make):
    model, batch = make()
    sites = ps.find_sites(model, batch)
    assert any(site.writers == ("up",) and site.pinned is None for site in sites)
    assert not branches(sites)


def test_one_channel_stays_where_there_is_no_branch():
    model, batch = network("swiglu")
    site = next(site for site in ps.find_sites(model, batch) if site.pinned is None)
    with pytest.raises(CollapseError, match="no channel of"):
        apply(model, empty([site]))
    with pytest.raises(ValueError, match="needs a Branch"):
        Site(4, ("a",), ("b",), least=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": {"block.conv2": "block.bn1"}}, "block.bn1 is no batch norm over what block.conv2 makes"),
        ({"norms": {"block.conv2": "fc"}}, "fc is no batch norm"),
        ({"idle": ("",)}, "cannot leave the whole network without work"),
        ({"whole": "fc"}, "fc holds no constant that block.conv2 could leave"),
        ({"whole": "block", "norms": {"block.conv2": "block.bn2"}}, "block holds no constant"),
    ],
)
def test_a_branch_that_is_none_is_refused(changes, message):
    model, batch = written_block()
    site = branches(ps.find_sites(model, batch))["block.conv1"]
    other = replace(site, branch=replace(site.branch, **changes))
    with pytest.raises(CollapseError, match=message):
        apply(model, empty([other]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_go_on_from_what_they_kept(family):
    transformers = pytest.importorskip("transformers")
    import families

    torch.manual_seed(0)
    model, batch = getattr(families, family)(transformers)
    model.eval()
    seen = branches(ps.find_sites(model, batch))
    # Words are counted by what the first attention keeps.
    attention = {"llama": "model.layers.{}.self_attn.q_proj", "gpt2": "transformer.h.{}.attn.c_attn"}[family]
    assert attention.format(0) not in seen
    smaller = apply(model, empty([seen[attention.format(1)]]), probe=batch)
    ids = batch["input_ids"]
    with torch.no_grad():
        wanted = smaller(input_ids=ids, use_cache=False).logits
        past = smaller(input_ids=ids[:, :4], use_cache=True).past_key_values
        rest = smaller(input_ids=ids[:, 4:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(rest, wanted[:, 4:], rtol=1e-4, atol=1e-5)
