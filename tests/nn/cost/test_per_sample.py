"""MACs of a sample are those of a batch of one, whatever batch there is to count on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import NETWORKS, Net, network
from torch import nn

from pysolve.errors import DataError
from pysolve.nn.cost.counting import macs
from pysolve.nn.cost.per_sample import SHAPES, sample_macs, workload
from pysolve.nn.running import Inputs, few_samples


class Keyed(nn.Module):
    """A network whose inputs have names."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, **given):
        return self.net(given)


def table(**more):
    """A layer for samples, and one for a table of three places that runs once a batch."""

    def run(net, x):
        return net.fc(x) + net.places(net.where).sum(0)

    return Net(run, fc=nn.Linear(4, 5), places=nn.Linear(2, 5), where=nn.Parameter(torch.zeros(3, 2)), **more)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_takes_for_a_sample_what_it_takes_for_one(name):
    model, batch = network(name)
    one = few_samples(batch, 1)
    assert sum(sample_macs(model, batch).values()) == macs(model, one)
    assert sample_macs(model, one) == sample_macs(model, batch)


@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_what_runs_once_a_batch_counts_whole(n):
    assert sample_macs(table(), torch.zeros(n, 4)) == {"fc": 20, "places": 30}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=SHAPES))
def test_samples_of_several_lengths_take_the_mean(sizes):
    model = Net(lambda net, x: net.fc(x), fc=nn.Linear(4, 5))
    work = workload([torch.zeros(n, length, 4) for n, length in sizes])
    mean = 20 * sum(n * length for n, length in sizes) / sum(n for n, _ in sizes)
    assert sample_macs(model, work)["fc"] == pytest.approx(mean, abs=0.5)
    assert sum(work.shares) == pytest.approx(1)


def test_many_lengths_count_as_a_few_that_are_no_shorter():
    lengths = range(1, 5 * SHAPES + 1)
    work = workload([torch.zeros(1, length, 4) for length in lengths])
    assert len(work.batches) == SHAPES
    mean = sum(batch.shape[1] * share for batch, share in zip(work.batches, work.shares, strict=True))
    assert sum(lengths) / len(lengths) <= mean <= sum(lengths) / len(lengths) + 4


def test_a_network_for_batches_of_one_size_is_counted_on_such_a_batch():
    model = Net(lambda net, x: net.fc(x.view(6, 4)), fc=nn.Linear(4, 5))
    assert sample_macs(model, torch.zeros(6, 4)) == {"fc": 20}


def test_tensors_that_do_not_share_their_samples_are_left_as_they_are():
    model = Net(lambda net, x: net.fc(x["a"]) + x["b"].sum(), fc=nn.Linear(4, 5))
    model.forward = lambda a, b: model.fc(a) + b.sum()
    assert sample_macs(model, {"a": torch.zeros(6, 4), "b": torch.zeros(3)}) == {"fc": 20}


@pytest.mark.parametrize("batch", [torch.zeros(0, 4), {"x": 3}])
def test_a_batch_has_samples(batch):
    with pytest.raises(DataError, match="at least one sample"):
        workload([batch])


@pytest.mark.parametrize("first", [False, True])
def test_what_all_samples_share_is_none_whatever_stands_first(first):
    def run(net, x):
        return (x["table"] @ net.fc(x["given"])).mean(1)

    model = Keyed(Net(run, fc=nn.Linear(4, 5)))
    shared, given = {"table": torch.rand(3, 3)}, {"given": torch.rand(8, 3, 4)}
    batch = Inputs({**shared, **given} if first else {**given, **shared}, {0 if first else 1})
    assert sum(sample_macs(model, batch).values()) == 3 * 4 * 5 + 3 * 3 * 5


@pytest.mark.parametrize("nodes", [2, 30])
def test_a_graph_is_one_sample(nodes):
    model = Keyed(Net(lambda net, x: net.fc(x["nodes"])[x["edges"]].sum(0), fc=nn.Linear(4, 5)))
    graph = {"nodes": torch.rand(nodes, 4), "edges": torch.zeros(2, 5, dtype=torch.long)}
    assert sample_macs(model, Inputs(graph, {0, 1})) == {"net.fc": 20 * nodes}
    larger = {**graph, "nodes": torch.rand(3 * nodes, 4)}
    work = workload([Inputs(one, {0, 1}) for one in (graph, larger)])
    assert sample_macs(model, work) == {"net.fc": 40 * nodes}
