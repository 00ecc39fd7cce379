"""Rows that two networks choose by what they compute are never taken for the same ones."""

import pytest
import torch
from small import Net
from torch import nn
from torch.nn.functional import one_hot, scaled_dot_product_attention

import pysolve as ps
from pysolve.nn.graph.branches import find_layers
from pysolve.nn.graph.export import trace
from pysolve.nn.graph.routes import routed

X = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0))


def wide(index, x):
    return index[..., None].expand(-1, -1, x.shape[-1])


def capacity(net, x):
    """Each expert takes its best tokens."""
    x, y = net.stem(x), torch.zeros(1)
    weight, best = net.gate(x).softmax(1)[..., 0].topk(4, 1)
    chosen = net.inner(x.gather(1, wide(best, x)))
    y = torch.zeros_like(x).scatter_add(1, wide(best, x), chosen * weight[..., None])
    return net.head(x + y)


def in_place(net, x):
    x = net.stem(x).flatten(0, 1)
    best = net.gate(x)[:, 0].topk(7).indices
    y = torch.zeros_like(x)
    y.index_add_(0, best, net.inner(x[best]))
    return net.head(y)


def back_and_forth(net, x):
    x = net.stem(x)
    order = net.gate(x)[..., 0].argsort(1)
    sorted_ = net.inner(x.gather(1, wide(order, x)))
    return net.head(sorted_.gather(1, wide(order.argsort(1), x)))


def by_ones_and_zeros(net, x):
    x = net.stem(x)
    places = one_hot(net.gate(x)[..., 0].topk(3, 1).indices, 9).float()
    return net.head(places.mT @ net.inner(places @ x))


def fewer_tokens(net, x):
    x = net.stem(x)
    x = net.inner(x.gather(1, wide(net.gate(x)[..., 0].topk(5, 1).indices, x)))
    return net.head(x.gather(1, wide(x[..., 0].topk(2, 1).indices, x)))


def compared(net, x):
    x = net.stem(x).flatten(0, 1)
    good = net.gate(x)[:, 0] > 0
    y = torch.zeros_like(x)
    y[good] = net.inner(x[good])
    return net.head(y)


def looked_up(net, x):
    """A code for each token: the row stays the token's."""
    x = net.stem(x)
    return net.head(net.inner(net.table[net.gate(x).argmax(-1)]))


def of_the_input(net, x):
    """Both networks read the same input, so they choose the same rows."""
    order = wide(x[..., 0].argsort(1), net.stem(x))
    return net.head(net.inner(net.stem(x).gather(1, order)))


def attended(net, x):
    """The order of keys is all the same."""
    x = net.stem(x)
    keys = x.gather(1, wide(net.gate(x)[..., 0].argsort(1), x))
    return net.head(scaled_dot_product_attention(x, keys, net.inner(keys)))


def gated(net, x):
    x = net.stem(x)
    return net.head(net.inner(x * (x > 0)))


CASES = {
    capacity: {"inner"},
    in_place: {"inner"},
    back_and_forth: {"inner"},
    by_ones_and_zeros: {"inner"},
    compared: {"inner"},
    fewer_tokens: {"inner", "head"},
    attended: {"inner"},
    looked_up: set(),
    of_the_input: set(),
    gated: set(),
}


def network(run):
    torch.manual_seed(0)
    layers = {"stem": nn.Linear(5, 8), "gate": nn.Linear(8, 2), "inner": nn.Linear(8, 8)}
    return Net(run, **layers, head=nn.Linear(8, 3), table=nn.Parameter(torch.randn(2, 8))).eval()


@pytest.mark.parametrize("run", CASES, ids=lambda run: run.__name__)
def test_layers_behind_a_computed_choice_are_routed_until_rows_are_back(run):
    model = network(run)
    graph = trace(model, X)
    found = routed(graph)
    assert {layer.name for node, layer in find_layers(graph, model).items() if node in found} == CASES[run]


def sorts(net, x):
    x = net.stem(x)
    order = net.score(x).argsort(1).expand(-1, -1, 16)
    t = net.down(net.up(x.gather(1, order)).relu())
    return net.head(t.gather(1, order.argsort(1)))


def test_a_refit_behind_a_computed_order_is_no_worse_than_one_on_the_originals_inputs():
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16))
    layers = {"score": nn.Linear(16, 1), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}
    model, batches = (
        Net(sorts, stem=stem, **layers, head=nn.Linear(16, 4)).eval(),
        [*torch.randn(12, 32, 12, 6)],
    )

    def lost(refit):
        how = {"layout": "factored", "divergence": relative, "progress": False}
        return ps.low_rank(model, batches, rank=4, refit=refit, **how).report.divergence

    # 2.7 times as much where rows of different tokens are paired.
    assert lost("sequential") < 1.1 * lost("independent")


def relative(wanted, got):
    return (wanted - got).square().mean() / wanted.var()
