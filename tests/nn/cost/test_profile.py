"""Two networks are timed by turns, and every parameter of theirs belongs to one row."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import NETWORKS, Net, network
from torch import nn

import pysolve as ps
from pysolve.nn.cost import profile
from pysolve.nn.cost.per_sample import sample_macs
from pysolve.nn.cost.profile import FEWEST, latencies, layer_inputs, masses
from pysolve.nn.evaluate import macs, parameters


@pytest.fixture(autouse=True)
def _as_many_runs(monkeypatch):
    monkeypatch.setattr(profile, "FEWEST", FEWEST)


def mlp(widths):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_rows_add_up_to_the_network(widths):
    model = mlp(widths)
    x = torch.zeros(3, widths[0])
    rows = masses(model, model, x)
    assert [row.name for row in rows] == [name for name, _ in model.named_children()]
    assert sum(row.params for row in rows) == parameters(model)
    assert sum(row.macs for row in rows) == macs(model, x[:1])
    assert all((row.params, row.macs) == (row.left, row.macs_left) for row in rows)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_no_parameter_of_any_network_is_forgotten(name):
    model, batch = network(name)
    rows = masses(model, model, batch)
    assert sum(row.params for row in rows) == parameters(model)
    # Nothing was removed, whatever zeros biases and paddings begin with.
    assert all(row.left == row.params for row in rows)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_no_multiplication_of_any_network_is_forgotten(name):
    model, batch = network(name)
    rows = masses(model, model, batch)
    assert sum(row.macs for row in rows) == sum(sample_macs(model, batch).values())
    assert all(row.macs == row.macs_left for row in rows)


def test_what_multiplies_without_a_layer_has_a_row_and_so_has_the_rest():
    def run(net, x):
        return net.rnn(x)[0] @ net.attend(x) @ net.w

    def attend(net, x):
        return net.q(x).mT @ net.k(x)

    inner = Net(attend, q=nn.Linear(4, 3), k=nn.Linear(4, 6), norm=nn.LayerNorm(4))
    w = nn.Parameter(torch.ones(6, 2))
    before = Net(run, rnn=nn.GRU(4, 3, batch_first=True), attend=inner, w=w).eval()
    after = copy.deepcopy(before)
    after.attend.k = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 6))
    rows = {row.name: row for row in masses(before, after, torch.randn(2, 5, 4))}
    counts = {name: (row.params, row.macs, row.macs_left) for name, row in rows.items()}
    assert counts == {
        "rnn": (81, 5 * 9 * 7, 5 * 9 * 7),
        "attend": (0, 5 * 18, 5 * 18),
        "attend.q": (15, 60, 60),
        "attend.k": (30, 120, 50),
        "attend.norm": (8, 0, 0),
        "all others": (12, 5 * 3 * 6 + 5 * 6 * 2, 5 * 3 * 6 + 5 * 6 * 2),
    }
    assert sum(row.left for row in rows.values()) == parameters(after)
    # Of a module with rows inside, the time is theirs.
    assert [name for name in counts if rows[name].seconds] == ["rnn", "attend.q", "attend.k"]
    assert rows["attend.k"].seconds_left > 0


def test_zeros_and_layers_that_took_anothers_place_count_as_its_own():
    before = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    after = nn.Sequential(nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 6)), nn.ReLU(), before[2])
    with torch.no_grad():
        after[2].weight[0] = 0
    first, second = masses(before, after, torch.zeros(2, 8))
    assert (first.name, first.params, first.left, first.macs, first.macs_left) == ("0", 54, 34, 48, 28)
    assert (second.params, second.left, second.macs_left) == (28, 22, 24)
    assert first.seconds > 0 < first.seconds_left


def test_sparse_layers_count_their_entries():
    model = mlp((40, 30, 5))
    small = ps.prune(model, amount=0.9, layout="sparse").model
    row = masses(model, small, torch.zeros(2, 40))[0]
    assert (row.left, row.macs, row.macs_left) == (120 + 30, 1200, 120)


def test_embeddings_have_rows_and_small_leftovers_share_one():
    model = nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 300), nn.LayerNorm(300), nn.Linear(300, 300))
    model.append(nn.LayerNorm(300))
    rows = masses(model, model, torch.zeros(2, 3, dtype=torch.long))
    assert [row.name for row in rows] == ["0", "1", "3", "all others"]
    assert rows[-1].params == 1200
    assert rows[0].seconds is None


def test_zeros_that_were_never_removed_are_kept():
    model = nn.Sequential(nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, 5), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[12:] = 0
        model[1].bias.zero_()
    ids = torch.randint(0, 20, (40, 3))
    rows = masses(model, model, ids)
    assert all(row.left == row.params for row in rows)
    batches = [*ids.split(10)]
    found = ps.compress(model, batches, keep=0.5, sites=ps.find_sites(model, ids), progress=False).report
    assert {row.name: (row.params, row.left) for row in found.mass}["0"] == (120, 60)
    coded = ps.quantize(model, batches, scheme="codebook", bits=8, progress=False)
    values = coded.model[0].weight[1:12]
    assert coded.report.layers[0].density == int(values.count_nonzero()) / values.numel()
    pruned = ps.prune(model, batches, amount=0.5, layout="dense", progress=False).report
    assert [row.left / row.params for row in pruned.mass] == [1.0, 20 / 35, 7 / 12]


def test_what_layers_share_is_in_the_row_of_the_first():
    model = nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, 30, bias=False))
    model[1].weight = model[0].weight
    rows = masses(model, model, torch.zeros(2, 3, dtype=torch.long))
    assert [(row.name, row.params, row.left, row.macs) for row in rows] == [
        ("0", 180, 180, 0),
        ("1", 0, 0, 540),
    ]


def test_hooks_and_modes_are_left_as_they_were():
    model = mlp((4, 3, 2)).train()
    masses(model, model, torch.zeros(2, 4))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_latencies_are_taken_by_turns(seconds, monkeypatch):
    monkeypatch.setattr(profile, "SECONDS", seconds)
    calls = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    found = latencies((Named("a"), Named("b")), torch.zeros(5, 2))
    assert [one.batch_size for one in found] == [5, 5]
    assert all(0 < one.low <= one.median <= one.high for one in found)
    # After one call each to warm up.
    assert len(calls) >= 2 + 2 * FEWEST
    assert calls[2:] == ["a", "b"] * (len(calls) // 2 - 1)


def test_layers_run_alone_on_what_they_read_under_autocast():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner, self.outer = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, ids):
            with torch.autocast("cpu", torch.bfloat16):
                return self.outer(self.inner(self.table(ids)).relu()).float()

    model, ids = Mixed().eval(), torch.randint(9, (6, 4))
    read = layer_inputs(model, dict(model.named_children()), ids)
    assert [x.dtype for x in read.values()] == [torch.int64, torch.float32, torch.float32]
    assert all(torch.isfinite(layer(read[name])).all() for name, layer in model.named_children())
    small = ps.low_rank(model, ids.repeat(8, 1).split(8), target={"params": 0.7}, prune=True, progress=False)
    assert small.report.after["params"] == parameters(small.model) <= 0.7 * parameters(model)
