"""Outputs with some parameters changed are the network's own with these, whatever runs before them."""

from dataclasses import dataclass

import pytest
import torch
from small import NETWORKS, network
from torch import nn

from pysolve.nn.changed import changed_outputs, is_repeatable
from pysolve.nn.divergence import run
from pysolve.nn.graph.export import trace_once
from pysolve.nn.outputs import tensors_of


def changes(model, graph):
    """New values of every third parameter that the graph reads alone, and of all of them together."""
    random = torch.Generator().manual_seed(1)
    state = model.state_dict()
    new = {
        name: state[name] + 0.1 * torch.randn(state[name].shape, generator=random)
        for name in sorted(graph.used)
        if name in dict(model.named_parameters())
    }
    return [*[{name: value} for name, value in new.items()][::3], new]


def assert_same_outputs(model, batch, *more):
    graph, part = trace_once(model, batch)
    batches = [part, *more]
    wanted = changes(model, graph)
    originals = [*run(model, batches)]
    found = changed_outputs(
        graph, model, batches, originals, [[*one] for one in wanted], wanted.__getitem__, base={}
    )
    seen = []
    for number, outputs in found:
        seen.append(number)
        for output, right in zip(outputs, run(model, batches, wanted[number]), strict=True):
            assert type(output) is type(right)
            torch.testing.assert_close(tensors_of(output), tensors_of(right))
    assert sorted(seen) == [*range(len(wanted))]
    for output, before in zip(run(model, batches), originals, strict=True):
        torch.testing.assert_close(tensors_of(output), tensors_of(before), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"noisy"}))
def test_outputs_with_changed_parameters(name):
    assert_same_outputs(*network(name))


@dataclass
class Scores:
    logits: torch.Tensor
    kept: dict[str, torch.Tensor]


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.a(x).relu_()
        return Scores(self.b(hidden), {"hidden": hidden})


def test_several_batches_and_structured_outputs():
    torch.manual_seed(0)
    assert_same_outputs(Structured().eval(), *(torch.randn(n, 4) for n in (6, 3, 1)))


def test_networks_that_draw_random_numbers_are_told():
    assert not is_repeatable(trace_once(*network("noisy"))[0])
    assert is_repeatable(trace_once(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), torch.ones(4, 3))[0])
