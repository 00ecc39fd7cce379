"""The steps of the demonstration, each on its own, and the published experiment in small."""

import dataclasses

import numpy as np
import pytest
import torch
from rich.console import Console

from pysolve.cli import demo
from pysolve.cli.datasets import Dataset, mnist
from pysolve.correlations import Correlations
from pysolve.errors import PysolveError
from pysolve.nn.apply import apply
from pysolve.nn.evaluate import accuracy, parameters
from pysolve.nn.gather import gather
from pysolve.solve.least_squares import debias


def quiet():
    return Console(quiet=True)


def layer(d=40, h=3, n=500):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 1, 0)
    return Correlations.from_samples(x, x @ rng.standard_normal((d, h)))


@pytest.mark.parametrize("wanted", [1, 5, 20, 39])
def test_bisection_finds_a_lam_that_keeps_about_as_many_as_wanted(wanted):
    solution = demo.select(layer(), wanted, quiet())
    assert abs(len(solution.keep) - wanted) <= 1
    assert solution.converged


def test_every_neuron_silent_is_said_not_crashed():
    rng = np.random.default_rng(0)
    silent = Correlations.from_samples(np.zeros((20, 4)), rng.standard_normal((20, 2)))
    with pytest.raises(PysolveError, match="no neuron of fc1"):
        demo.select(silent, 2, quiet())


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
    correlations = gather(model, demo.batches(data.x_train), layers=["fc2"])["fc2"]
    solution = demo.select(correlations, 56, quiet())
    M = debias(correlations.centered(), keep=solution.keep)
    smaller = apply(model, demo.plan(correlations, M, solution.keep), probe=demo.batches(data.x_test)[0])
    assert parameters(smaller) < 0.17 * parameters(model)
    before, after = (accuracy(network, data.x_test, data.y_test) for network in (model, smaller))
    assert before > 96
    assert after > before - 1
