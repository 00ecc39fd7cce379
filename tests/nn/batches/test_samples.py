"""Samples that do not lie along the first dimension of batches are noticed."""

import pytest
import torch
from small import NETWORKS, Net, Noisy, network, vectors
from torch import nn

import pysolve as ps
from pysolve.nn.batches.samples import laid_out, mixed, samples_in


def time_first():
    def run(net, x):
        return net.head(net.body(x)[0])

    return Net(run, body=nn.LSTM(6, 5), head=nn.Linear(5, 3)).eval(), torch.randn(7, 4, 6)


def mean_over_the_first():
    return Net(lambda net, x: net.a(x).mean(0), a=nn.Linear(6, 5)).eval(), torch.randn(7, 4, 6)


def normed_by_the_batch():
    return nn.BatchNorm1d(5, track_running_stats=False).eval(), torch.randn(9, 5)


def one_number():
    return Net(lambda net, x: net.a(x).sum(), a=nn.Linear(6, 5)).eval(), torch.randn(7, 6)


@pytest.mark.parametrize("made", [time_first, mean_over_the_first, normed_by_the_batch, one_number])
def test_a_network_that_mixes_samples_is_told(made):
    torch.manual_seed(0)
    model, batch = made()
    assert "along the first dimension" in mixed(model, batch)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_of_networks_of_single_samples_nothing_is_said(name):
    torch.manual_seed(0)
    model, batch = network(name)
    tensors = batch if isinstance(batch, dict) else {"": batch}
    many = {key: torch.cat([value] * 4) for key, value in tensors.items()}
    assert mixed(model, many if isinstance(batch, dict) else many[""]) == ""


def outputs_behind_time(net, x):
    return net.a(x).transpose(0, 1)


def rows_of_all_samples(net, x):
    return net.a(x).flatten(0, 1)


@pytest.mark.parametrize("run", [outputs_behind_time, rows_of_all_samples])
def test_outputs_may_have_samples_elsewhere(run):
    assert mixed(Net(run, a=nn.Linear(6, 5)).eval(), torch.randn(7, 4, 6)) == ""


def test_random_networks_are_not_judged():
    torch.manual_seed(0)
    assert mixed(Noisy(), vectors(40, 4)) == ""


def test_the_report_notes_it():
    torch.manual_seed(0)
    model, _ = time_first()
    batches = [torch.randn(9, 8, 6) for _ in range(3)]
    result = ps.prune(model, batches, method="obs", amount=0.5, progress=False, latency=False)
    assert sum("along the first dimension" in note for note in result.report.notes) == 1


def test_empty_outputs_tell_nothing():
    assert mixed(Net(lambda net, x: net.a(x)[:, :0], a=nn.Linear(6, 5)).eval(), torch.randn(7, 6)) == ""


def test_batches_as_long_as_their_texts_are_divided_in_half_precision_too():
    torch.manual_seed(0)

    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.a, self.b = nn.Embedding(20, 32), nn.Linear(32, 256), nn.Linear(256, 20)

        def forward(self, ids, mask):
            return self.b(self.a(self.words(ids) * mask[..., None].to(self.a.weight.dtype)).relu())

    batch = {"ids": torch.randint(20, (8, 8)), "mask": torch.ones(8, 8, dtype=torch.long)}
    for dtype in (torch.float32, torch.bfloat16):
        first, _ = laid_out(Texts().to(dtype).eval(), batch, [batch])
        assert samples_in(first) == 8
