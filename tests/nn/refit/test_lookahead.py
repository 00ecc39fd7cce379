"""The layer in front of a branch that is gone makes what was linear in its inputs, and nothing else moves."""

import pytest
import torch
from small import Net, vectors
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.nn.graph.branches import find_layers
from pysolve.nn.graph.export import trace
from pysolve.nn.refit.lookahead import sums_beyond, what_went
from pysolve.nn.refit.walk import Walk, last_uses

QUIET = {"progress": False, "latency": False}


def stream(add=torch.add, between=lambda x: x, tap=False):
    """A stem, two branches behind norms, and a head; ``tap``: the sum in the middle is an output as well."""

    def run(net, x):
        x = net.stem(x)
        first = add(x, net.b1(F.relu(net.a1(net.norm1(x)))))
        second = between(first)
        second = add(second, net.b2(F.relu(net.a2(net.norm2(second)))))
        return (net.fc(second), first) if tap else net.fc(second)

    layers = {"a1": nn.Linear(6, 5), "b1": nn.Linear(5, 6), "a2": nn.Linear(6, 7), "b2": nn.Linear(7, 6)}
    norms = {"norm1": nn.LayerNorm(6), "norm2": nn.LayerNorm(6)}
    torch.manual_seed(0)
    return Net(run, stem=nn.Linear(4, 6), **norms, **layers, fc=nn.Linear(6, 3)).eval(), vectors(5, 4)


def beyond(model, batch, *gone):
    """Names of layers, and of those behind the sums of which they make more than before."""
    graph = trace(model, batch, free_sizes=False)
    layers = find_layers(graph, model)
    nodes = {layer.name: node for node, layer in layers.items()}
    found = sums_beyond(graph, layers, {nodes[name] for name in gone})
    sums = {layer.sum: layer.name for layer in layers.values() if layer.sum is not None}
    return {layers[node].name: sums[last] for node, (_, last) in found.items()}


@pytest.mark.parametrize(
    ("gone", "wanted"),
    [
        (("b2",), {"b1": "b2"}),
        (("b1",), {"stem": "b1"}),
        (("b1", "b2"), {"stem": "b2"}),
        ((), {}),
    ],
)
def test_the_layer_in_front_is_the_last_one_that_stays(gone, wanted):
    assert beyond(*stream(), *gone) == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"add": lambda x, y: x.add_(y)},
        {"between": torch.relu},
        {"tap": True},
    ],
)
def test_nothing_is_made_up_for_where_the_stream_is_read_or_changed_in_between(options):
    assert beyond(*stream(**options), "b2") == {}


def test_what_went_is_what_the_branch_added():
    model, batch = stream()
    graph = trace(model, batch, free_sizes=False)
    layers = find_layers(graph, model)
    nodes = [node for node in graph.module.graph.nodes if node.op != "output"]
    finished, walk = last_uses(nodes), Walk(graph, model, [batch], {})
    (node, (total, last)), *others = sums_beyond(
        graph, layers, {node for node, layer in layers.items() if layer.name == "b2"}
    ).items()
    assert not others
    added = []
    handle = model.b2.register_forward_hook(lambda _, given, output: added.append(output))
    with torch.no_grad():
        model(batch)
        handle.remove()
        for i, one in enumerate(nodes):
            if one.op != "placeholder":
                walk.run_original(one)
                walk.run_compressed(one)
            if one is node:
                known = {*walk.original}
                (found,) = what_went(walk, nodes[i + 1 :], total, last, finished)
                assert {*walk.original} == known
                break
            walk.forget(finished[one])
    torch.testing.assert_close(found, added[0])


def test_a_branch_that_is_linear_in_what_is_read_before_it_is_merged_whole():
    def run(net, x):
        x = net.stem(x)
        return net.fc(x + net.down(net.up(x)))

    torch.manual_seed(0)
    layers = {"stem": nn.Linear(4, 6), "up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}
    model = Net(run, **layers, fc=nn.Linear(6, 3)).eval()
    batches = [torch.randn(64, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    result = ps.compress(model, batches, keep={"up": 0}, **QUIET)
    with torch.no_grad():
        found, wanted = result.model(batches[0]), model(batches[0])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    apart = ps.compress(model, batches, keep={"up": 0}, refit="independent", **QUIET)
    assert result.report.divergence < 1e-3 * apart.report.divergence
