"""The number of samples is free first, all sizes where batches ask for it, and no try leaves marks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import small
import torch
from small import Net
from torch import nn

import pysolve as ps
from pysolve.errors import PysolveError
from pysolve.nn.batches.samples import samples_in
from pysolve.nn.graph.export import trace, trace_once
from pysolve.nn.graph.sizes import fits


def halving():
    """Divides height and width several times: torch.export makes inequalities of it that nothing solves."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Linear(216, 3),
    )


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


def test_networks_that_halve_their_images_are_traced_for_any_number_of_samples():
    graph, few = trace_once(halving(), torch.zeros(5, 3, 64, 64))
    assert samples_in(few) == 2
    assert graph.takes_any_batch
    assert fits(graph, torch.zeros(9, 3, 64, 64))


class Wrapped(nn.Module):
    """Hands on whatever it is given, as wrappers of networks do."""

    def __init__(self):
        super().__init__()
        self.net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 2))

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def test_of_a_wrapper_any_number_of_samples_is_traced():
    graph, few = trace_once(Wrapped().eval(), torch.zeros(5, 4))
    assert samples_in(few) == 2
    assert fits(graph, torch.zeros(9, 4))


def test_a_try_that_fails_leaves_no_marks():
    x = torch.zeros(2, 3, 64, 64)
    graph = trace(halving(), x, every_size=True)
    assert not graph.takes_any_batch
    assert vars(x) == {}


def test_sizes_are_free_where_batches_ask_for_it():
    x = torch.zeros(5, 3, 9, 9)
    for every, other in ((False, 9), (True, 7)):
        graph = trace(images(), x, every_size=every)
        assert fits(graph, torch.zeros(3, 3, other, 9))
        assert fits(graph, torch.zeros(3, 3, 7, 8)) == every


def test_batches_of_all_sizes_are_refitted_on():
    batches = [torch.randn(24, 3, 9 - i, 6 + i) for i in range(4)]
    result = ps.compress(images(), batches, keep=0.5, progress=False)
    assert result.report.samples == 96 - 96 // 8
    assert not any("refit" in note for note in result.report.notes)


def test_a_batch_size_in_the_code_is_traced_as_it_is():
    model = Net(lambda net, x: net.fc(x.reshape(5, 4)), fc=nn.Linear(4, 2))
    graph, few = trace_once(model, torch.zeros(5, 4))
    assert samples_in(few) == 5
    assert not graph.takes_any_batch


def test_a_size_that_the_code_compares_holds_for_its_branch_alone():
    def run(net, x):
        return net.fc(-x if x.shape[0] > 10 else x)

    model, x = Net(run, fc=nn.Linear(4, 2)), torch.randn(128, 4)
    graph, few = trace_once(model, x)
    assert samples_in(few) == 128
    assert [n for n in (1, 2, 10, 11, 12, 9999) if fits(graph, x[:1].expand(n, 4))] == [11, 12, 9999]
    few_only = trace(model, x[:2])
    assert not few_only.takes_any_batch
    assert [n for n in (1, 2, 10, 11) if fits(few_only, x[:n])] == [1, 2, 10]


def test_networks_that_fail_only_while_they_are_compiled_are_traced_as_they_run():
    def forward(net, x):
        mask = None if torch.compiler.is_compiling() else torch.ones(x.shape[0], 1)
        return net.b((net.a(x) * mask[:, :1]).relu())

    torch.manual_seed(0)
    model, asked = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2)), torch.compiler.is_compiling
    graph = trace(model, torch.randn(3, 4))
    assert graph.takes_any_batch
    assert torch.compiler.is_compiling is asked
    assert sum(site.pinned is None for site in ps.find_sites(model, torch.randn(3, 4))) == 1


def test_several_threads_trace_by_turns_and_what_is_printed_afterwards_is_seen(capsys):
    nets = [small.residual(), small.swiglu(), small.attention(), small.conv3d()]
    with ThreadPoolExecutor(len(nets)) as pool:
        found = [*pool.map(lambda one: trace(*one), nets)]
    counts = [len(graph.module.graph.nodes) for graph in found]
    assert counts == [len(trace(*one).module.graph.nodes) for one in nets]
    print("heard")
    assert capsys.readouterr().out == "heard\n"


class Rescaled(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(x)


class Differentiated(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x)[0]


@pytest.mark.parametrize(
    ("model", "where"),
    [(nn.Sequential(nn.Linear(4, 8), Rescaled(8, 3)), "`1`"), (Differentiated(), "its code")],
)
def test_tensors_that_no_graph_holds_are_told_in_our_words(model, where):
    with pytest.raises(PysolveError, match=f"cannot be traced.*: {where} sets .data, or asks torch.autograd"):
        trace(model.eval(), torch.randn(5, 4))
