"""How often rows are looked up, and what errors there do to the network's outputs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pysolve.nn.gathering.lookups import lookup_counts, lookup_sensitivities
from pysolve.nn.graph.export import trace


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


@pytest.mark.parametrize("traced", [False, True])
def test_every_call_of_the_table_counts(traced):
    model, calls = Net(), []
    graph = trace(model, data()[0]) if traced else None
    model.head.register_forward_hook(lambda *args: calls.append(0))
    found = lookup_counts(model, graph, {"words": model.words.weight}, data())["words"]
    wanted = np.bincount(torch.cat(data()).flatten().numpy(), minlength=9).astype(float)
    wanted[0] += 90
    assert np.array_equal(found, wanted)
    assert len(calls) == (0 if traced else 3)


def test_blocks_of_the_graph_that_hide_lookups_run():
    class Rough(Net):
        def forward(self, ids):
            with torch.autocast("cpu", torch.bfloat16):
                found = self.words(ids)
            return self.head(found.float())

    model = Rough()
    with torch.no_grad():
        graph = trace(model, data()[0])
    found = lookup_counts(model, graph, {"words": model.words.weight}, data())["words"]
    assert np.array_equal(found, np.bincount(torch.cat(data()).flatten().numpy(), minlength=9))


def test_padding_counts_nowhere():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
            self.register_buffer("first", torch.arange(6), persistent=False)

        def forward(self, input_ids, attention_mask):
            places = self.first + 0 * (attention_mask.cumsum(1) - 1).clamp_min(0)
            return (self.words(input_ids) + self.places(places)) * attention_mask[..., None]

    model = Masked()
    batches = [{"input_ids": ids, "attention_mask": (ids > 1).long()} for ids in data()]
    tables = {"words": model.words.weight, "places": model.places.weight}
    with torch.no_grad():
        graph = trace(model, batches[0])
    plain = lookup_counts(model, None, tables, batches)
    found = lookup_counts(model, graph, tables, batches)
    assert all(np.array_equal(found[name], plain[name]) for name in tables)
    assert found["words"].sum() == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert not found["words"][:2].any()


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
