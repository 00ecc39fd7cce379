"""A walk through the graph computes what the network does, in both networks, and frees what is done with."""

import pytest
import torch
from graphs import traced as trace
from small import NETWORKS, Net, network, vectors
from torch import nn
from torch.utils import _pytree as pytree

from pysolve.nn.refit.walk import Walk, last_uses
from pysolve.nn.running import evaluating, forward


def tensors(output):
    """Floating-point tensors of an output, as the graph returns them: structures flattened."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def walked(model, batches, values=None, *, added=None, graph=None, at=lambda walk, node: None):
    """Original and compressed outputs of every batch after a walk that frees all it can."""
    graph = graph or trace(model, batches[0], free_sizes=len(batches) > 1)
    walk = Walk(graph, model, batches, values or {})
    *nodes, output = graph.module.graph.nodes
    finished = last_uses([*nodes, output])
    with evaluating(model):
        for node in nodes:
            if node.op != "placeholder":
                walk.run_original(node)
                if added is not None and node.name in added:
                    walk.added[node] = added[node.name]
                walk.run_compressed(node)
            at(walk, node)
            walk.forget(finished[node])
    leaves = [node for node in output.args[0] if isinstance(node, torch.fx.Node)]
    return [
        [[values[node][b] for node in leaves] for b in range(len(batches))]
        for values in (walk.original, walk.compressed)
    ]


def assert_outputs(found, model, batches):
    for outputs, batch in zip(found, batches, strict=True):
        with evaluating(model):
            wanted = tensors(forward(model, batch))
        torch.testing.assert_close(outputs, wanted)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"noisy"}))
def test_original_values_are_the_networks_and_nothing_is_freed_too_early(name):
    model, batch = network(name)
    before = pytree.tree_map(torch.clone, batch)
    wide, slim = walked(model, [batch])
    assert_outputs(wide, model, [batch])
    assert all(a is b for a, b in zip(wide[0], slim[0], strict=True))
    pytree.tree_map(torch.testing.assert_close, batch, before)


def writes_to_a_slice():
    def run(net, x):
        h = net.a(x)
        first, rest = h[:, :2], h.view(-1)
        first += 1.0
        first.mul_(net.b(x))
        rest[3:5].relu_()
        return net.c(h), first * 2, rest

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(4, 2), c=nn.Linear(6, 3)), vectors(5, 4)


def writes_what_differs_to_what_does_not():
    def run(net, x):
        y = x * 2
        y[:, 0] = net.a(x)[:, 0]
        return net.b(y)

    return Net(run, a=nn.Linear(4, 1), b=nn.Linear(4, 2)), vectors(5, 4)


def writes_to_its_input():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True)), vectors(5, 4)


def writes_to_pieces():
    def run(net, x):
        first, second = net.a(x).chunk(2, 1)
        first.relu_()
        second.copy_(first * 3)
        return net.b(torch.cat([first, second], 1))

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2)), vectors(5, 4)


def writes_to_a_buffer():
    def run(net, x):
        net.seen.add_(x.mean(0))
        return net.a(x) + net.seen

    model = Net(run, a=nn.Linear(4, 4))
    model.register_buffer("seen", torch.ones(4))
    return model, vectors(5, 4)


WRITING = {
    build.__name__: build
    for build in (
        *(writes_to_a_slice, writes_what_differs_to_what_does_not, writes_to_its_input, writes_to_pieces),
        writes_to_a_buffer,
    )
}


@pytest.mark.parametrize("name", WRITING)
def test_what_is_written_in_place_is_seen_through_every_view(name):
    torch.manual_seed(0)
    model, batch = WRITING[name]()
    before = batch.clone()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    wide, slim = walked(model, [batch])
    assert torch.equal(batch, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_outputs(wide, model, [batch])
    assert all(a is b for a, b in zip(wide[0], slim[0], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("residual", "concat", "in_place", "keywords", "norm_without_affine", "shared_layer", "swiglu"),
        *(name for name in WRITING if name != "writes_to_a_buffer"),
    ],
)
def test_compressed_values_are_those_of_a_network_with_other_parameters(name):
    model, batch = network(name) if name in NETWORKS else WRITING[name]()
    values = {key: value + 0.1 for key, value in model.state_dict().items() if value.is_floating_point()}
    some = dict(list(values.items())[1::2])
    wide, slim = walked(model, [batch], some)
    assert_outputs(wide, model, [batch])
    model.load_state_dict({**model.state_dict(), **some})
    assert_outputs(slim, model, [batch])


@pytest.mark.parametrize("name", ["residual", "attention", "flattened_by_view", "keywords", "upsampled"])
def test_batches_of_other_sizes_fit_the_graph(name):
    model, batch = network(name)
    longer = pytree.tree_map(lambda t: torch.cat([t, t.flip(0), t]), batch)
    wide, _ = walked(model, [batch, longer])
    assert_outputs(wide, model, [batch, longer])


def test_until_something_differs_every_operator_runs_once():
    model, batch = network("two_residuals")
    graph = trace(model, batch, free_sizes=False)
    runs = []
    for node in graph.module.graph.nodes:
        if node.op == "call_function":

            def counted(*args, target=node.target, name=node.name, **kwargs):
                runs.append(name)
                return target(*args, **kwargs)

            node.target = counted
    walked(model, [batch], {"b1.bias": model.b1.bias + 1}, graph=graph)
    counts = [runs.count(node.name) for node in graph.module.graph.nodes if node.op == "call_function"]
    first = next(i for i, count in enumerate(counts) if count == 2)
    assert counts[:first] == [1] * first
    assert "linear_2" in runs[first]
    # The inner layers of the second branch read what differs, and so does all that follows.
    assert set(counts[first:]) == {2}


def test_what_nothing_has_written_stays_shared():
    def run(net, x):
        y = x.relu()
        return net.b(net.a(x).mul_(2)), net.b(y)

    model = Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    batch = torch.randn(3, 4)
    wide, slim = walked(model, [batch], {"a.bias": model.a.bias + 1})
    assert [a is b for a, b in zip(wide[0], slim[0], strict=True)] == [False, True]


def test_an_added_value_is_seen_by_the_compressed_network_alone():
    model, batch = network("two_residuals")
    bias = torch.arange(6.0)
    wide, slim = walked(model, [batch], added={"linear_2": bias})
    assert_outputs(wide, model, [batch])
    model.b1.bias.data += bias
    assert_outputs(slim, model, [batch])


@pytest.mark.parametrize("name", ["two_residuals", "dead_end", "in_place"])
def test_a_value_is_kept_until_its_last_use_and_not_longer(name):
    model, batch = network(name)
    graph = trace(model, batch, free_sizes=False)
    *nodes, output = graph.module.graph.nodes
    order = {node: i for i, node in enumerate([*nodes, output])}

    def check(walk, node):
        for held in walk.original:
            if node.op != "placeholder" and held not in graph.inputs:
                later = [user for user in held.users if order[user] >= order[node]]
                assert later or held is node

    walked(model, [batch], graph=graph, at=check)


def test_last_uses_name_every_node_once():
    graph = trace(*network("residual"), free_sizes=False)
    nodes = list(graph.module.graph.nodes)
    finished = last_uses(nodes)
    assert sorted(done.name for parts in finished.values() for done in parts) == sorted(n.name for n in nodes)
    for user, parts in finished.items():
        for done in parts:
            assert done is user or done in user.all_input_nodes


def test_an_operator_draws_the_same_random_numbers_in_both_networks():
    model = Net(lambda net, x: torch.randn_like(net.a(x)) + torch.randn_like(net.a(x)), a=nn.Linear(4, 3))
    batch = vectors(5, 4)
    graph = trace(model, batch, free_sizes=False)
    walk = Walk(graph, model, [batch], {"a.weight": torch.ones(3, 4)})
    drawn = []
    for node in graph.module.graph.nodes:
        if node.op == "call_function":
            walk.run_original(node)
            walk.run_compressed(node)
            if "randn_like" in str(node.target):
                assert walk.differs(node)
                assert torch.equal(walk.original[node][0], walk.compressed[node][0])
                drawn.append(walk.original[node][0])
    assert not torch.equal(*drawn)
