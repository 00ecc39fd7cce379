"""How often rows are looked up, and what errors there do to the network's outputs."""

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pysolve.nn.gathering.lookups import lookup_counts, lookup_sensitivities


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(
            self.words(ids) + torch.nn.functional.embedding(input=ids * 0, weight=self.words.weight)
        )


def data():
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 7, (5, 6), generator=random) for _ in range(3)]


def test_every_call_of_the_table_counts():
    model = Net()
    found = lookup_counts(model, {"words": model.words.weight}, data())["words"]
    wanted = np.bincount(torch.cat(data()).flatten().numpy(), minlength=9).astype(float)
    wanted[0] += 90
    assert np.array_equal(found, wanted)


def test_errors_count_by_what_they_do_to_the_outputs_around_their_mean():
    torch.manual_seed(0)
    model = Net()
    found = lookup_sensitivities(model, {"words": model.words.weight}, data(), probes=400)["words"]
    V = (model.head.weight - model.head.weight.mean(0)).detach().double().numpy()
    assert np.allclose(found, V.T @ V, atol=0.1 * np.trace(V.T @ V))


def test_networks_without_gradients_tell_nothing():
    class Without(Net):
        def forward(self, ids):
            return super().forward(ids).detach()

    model = Without()
    found = lookup_sensitivities(model, {"words": model.words.weight}, data(), probes=2)["words"]
    assert not found.any()


def test_lookups_that_run_again_for_the_gradient_count_once():
    torch.manual_seed(0)
    model = Net()
    plain = lookup_sensitivities(model, {"words": model.words.weight}, data(), probes=3)["words"]
    run = model.forward
    model.forward = lambda ids: checkpoint(run, ids, use_reentrant=False)
    again = lookup_sensitivities(model, {"words": model.words.weight}, data(), probes=3)["words"]
    assert plain.any()
    assert np.allclose(again, plain)
