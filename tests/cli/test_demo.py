"""The steps of the demonstration, each on its own, and the published experiment in small."""

import dataclasses

import numpy as np
import pytest
import torch
from rich.console import Console

import pysolve as ps
from pysolve.cli import demo
from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.evaluate import parameters


def quiet():
    return Console(quiet=True)


def test_threads_come_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), demo.threads(before + 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.mnist
def test_lenet_keeps_its_accuracy_on_a_ninth_of_its_neurons(mnist_folder):
    full = mnist(mnist_folder)
    data = Dataset("part", full.x_train[:8000], full.y_train[:8000], full.x_test[:2000], full.y_test[:2000])
    # One thread: on a busy machine two can take five times as long.
    with demo.threads(1):
        model = demo.train(dataclasses.replace(demo.MNIST, batch_size=64), data, 0, 1, quiet())
    correlations = ps.gather(model, demo.batches(data.x_train), layers=["fc2"])["fc2"]
    solution = ps.lam_for_groups(correlations.centered(), k=56)[0]
    assert solution.converged
    M = np.asarray(ps.debias(correlations.centered(), keep=solution.keep))
    site = ps.Site(correlations.groups, writers=("fc1",), readers=("fc2",))
    step = ps.Collapse(site, solution.keep, {"fc2": M[:, solution.keep]}, {"fc2": correlations.bias(M)})
    smaller = ps.apply(model, ps.Plan((step,)), probe=demo.batches(data.x_test)[0])
    assert parameters(smaller) < 0.17 * parameters(model)
    before, after = (ps.accuracy(network, data.x_test, data.y_test) for network in (model, smaller))
    assert before > 96
    assert after > before - 1
