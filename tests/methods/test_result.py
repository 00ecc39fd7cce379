"""What a report says of two networks is what the networks are."""

import platform

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.methods.result import account, costs, distance, scored
from pysolve.methods.study import Options, Study
from pysolve.nn.calibration import Calibration
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.zoo import LeNet5


def studied(model, held=(), apart=None, seed=0):
    """A study of which only the held-out samples count."""
    held = [*held]
    shared = Calibration(0, held, held if apart is None else apart) if held else None
    return Study(model, Options(seed=seed), calibration=shared)


def networks():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    after = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        after[0].weight[0, 0] = 0
    return before, after


def test_costs_are_those_of_the_networks():
    before, after = networks()
    x = torch.randn(70, 6)
    report = account(before, after, studied(before, [x]))
    assert report.after == {
        "params": parameters(after),
        "nonzeros": parameters(after) - 1,
        "bytes": nbytes(after),
        "macs": macs(after, x[:1]),
    }
    assert report.before == costs(before, x)
    assert [one.batch_size for one, _ in report.latencies] == [1, 64]
    assert report.held == 70


def test_divergence_is_the_mean_over_all_samples():
    before, after = networks()
    parts = [torch.randn(n, 6) for n in (3, 20)]
    together = distance(before, after, [torch.cat(parts)])
    assert distance(before, after, parts) == pytest.approx(together)
    assert distance(before, before, parts) == 0.0
    with torch.no_grad():
        p, q = (model(torch.cat(parts)).log_softmax(1).numpy() for model in (before, after))
    assert together == pytest.approx(float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))), rel=1e-4)


def test_the_divergence_is_that_on_the_samples_apart_from_the_choice():
    before, after = networks()
    held, apart = torch.randn(70, 6), torch.randn(9, 6)
    report = account(before, after, studied(before, [held], [apart]))
    assert report.divergence == pytest.approx(distance(before, after, [apart]))
    assert report.held == 9
    assert report.notes == ()
    assert len(account(before, after, studied(before, [held])).notes) == 1


def test_without_a_batch_nothing_is_timed():
    before, after = networks()
    report = account(before, after, studied(before))
    assert (report.latencies, report.mass, report.held) == ((), (), 0)
    assert np.isnan(report.divergence)
    assert "macs" not in report.before


def test_a_network_for_one_batch_size_is_timed_on_what_it_takes():
    class Fixed(LeNet5):
        def forward(self, x):
            return super().forward(x.view(2, 1, 28, 28))

    report = account(Fixed(), Fixed(), studied(Fixed(), [torch.zeros(2, 1, 28, 28)]))
    assert [one.batch_size for one, _ in report.latencies] == [2]


def test_scores_are_of_the_original_and_the_result():
    before, after = networks()
    report = account(before, after, studied(before))
    assert scored(report, before, after, None) is report
    found = scored(report, before, after, parameters)
    assert (found.score_before, found.score_after) == (parameters(before), parameters(after))


def test_versions_and_the_seed_are_told():
    before, after = networks()
    made = account(before, after, studied(before, seed=7)).made_with
    assert made["seed"] == "7"
    assert made["torch"] == torch.__version__
    assert made["pysolve"] == ps.__version__
    assert made["python"] == platform.python_version()
