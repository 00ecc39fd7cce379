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


def networks():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    after = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        after[0].weight[0, 0] = 0
    return before, after


def known(model, held=(), apart=None, **options):
    """A study of a network by samples that are held out."""
    seen = Calibration(0, [*held], [*held] if apart is None else apart) if held else None
    return Study(model, Options(**options), calibration=seen)


def test_costs_are_those_of_the_networks():
    before, after = networks()
    x = torch.randn(70, 6)
    report = account(before, after, known(before, [x], [x[:50]]))
    assert report.after == {
        "params": parameters(after),
        "nonzeros": parameters(after) - 1,
        "bytes": nbytes(after),
        "macs": macs(after, x[:1]),
    }
    assert report.before == costs(before, x)
    assert [one.batch_size for one, _ in report.latencies] == [1, 64]
    assert report.held == 50


def test_divergence_is_the_mean_over_all_samples():
    before, after = networks()
    parts = [torch.randn(n, 6) for n in (3, 20)]
    together = distance(before, after, [torch.cat(parts)])
    assert distance(before, after, parts) == pytest.approx(together)
    assert distance(before, before, parts) == 0.0
    with torch.no_grad():
        p, q = (model(torch.cat(parts)).log_softmax(1).numpy() for model in (before, after))
    assert together == pytest.approx(float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))), rel=1e-4)


def test_without_a_batch_nothing_is_timed():
    before, after = networks()
    report = account(before, after, known(before))
    assert (report.latencies, report.mass, report.held) == ((), (), 0)
    assert np.isnan(report.divergence)
    assert "macs" not in report.before


def test_a_network_for_one_batch_size_is_timed_on_what_it_takes():
    class Fixed(LeNet5):
        def forward(self, x):
            return super().forward(x.view(2, 1, 28, 28))

    model = Fixed()
    report = account(model, Fixed(), known(model, [torch.zeros(2, 1, 28, 28)]))
    assert [one.batch_size for one, _ in report.latencies] == [2]


def test_scores_are_of_the_original_and_the_result():
    before, after = networks()
    report = account(before, after, known(before))
    assert scored(report, before, after, None) is report
    found = scored(report, before, after, parameters)
    assert (found.score_before, found.score_after) == (parameters(before), parameters(after))


def test_versions_and_the_seed_are_told():
    before, after = networks()
    made = account(before, after, known(before, seed=7)).made_with
    assert made["seed"] == "7"
    assert made["torch"] == torch.__version__
    assert made["pysolve"] == ps.__version__
    assert made["python"] == platform.python_version()
