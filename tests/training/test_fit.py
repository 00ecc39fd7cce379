"""Training learns, is repeatable, and disturbs nothing but the parameters it may train."""

import numpy as np
import pytest
import torch
from clouds import clouds, network, weights
from torch import nn
from torch.nn.functional import mse_loss

from pysolve.errors import DataError, PysolveError
from pysolve.nn.evaluate import accuracy
from pysolve.nn.zoo import Mlp
from pysolve.training.fit import fit


def test_training_learns_and_returns_a_falling_loss():
    model, (x, y) = network(), clouds()
    history = fit(model, x, y, epochs=15, batch_size=16, lr=0.02)
    assert len(history) == 15
    assert history[-1] < 0.5 * history[0]
    assert accuracy(model, x, y) > 85


def test_the_same_seed_gives_the_same_network_and_another_seed_another():
    results = []
    for seed in (0, 0, 1):
        model = network(dropout=0.5)
        torch.rand(seed)
        fit(model, *clouds(), epochs=2, batch_size=32, seed=seed)
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_global_random_state_is_left_alone():
    model = network(dropout=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(model, *clouds(), epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_modes_come_back_and_frozen_parameters_stay():
    model = network().eval()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, *clouds(), epochs=1)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[0].weight, before)


def test_inputs_are_not_changed():
    x, y = clouds()
    before = x.copy(), y.copy()
    fit(nn.Sequential(nn.ReLU(inplace=True), Mlp((4, 3))), x, y, epochs=1)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.parametrize("n", [1, 2, 33])
def test_any_number_of_samples_can_be_trained_on(n):
    x, y = clouds(n)
    assert len(fit(network(), x, y, epochs=1, batch_size=32)) == 1


def test_a_last_batch_of_one_does_not_stop_a_batch_norm():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    fit(model, *clouds(33), epochs=1, batch_size=32)


def test_other_losses_can_be_trained_on():
    x = clouds()[0]
    history = fit(network(), x, torch.from_numpy(x[:, :3]), epochs=5, batch_size=16, lr=0.02, loss=mse_loss)
    assert history[-1] < history[0]


def test_a_loss_that_is_not_finite_stops_with_the_epoch():
    x, y = clouds()
    x[0, 0] = np.nan
    model = network()
    with pytest.raises(DataError, match=r"became nan in epoch 1: sample 0 holds NaN or infinity"):
        fit(model, x, y, epochs=3)
    with pytest.raises(PysolveError, match=r"became \w+ in epoch \d: lower lr"):
        fit(model, *clouds(), epochs=3, batch_size=8, lr=1e30)
    assert model.training


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"epochs": 1, "batch_size": 0}])
def test_epochs_and_batch_size_must_be_positive(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        fit(network(), *clouds(), **wrong)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (len, {}, "model must be a torch.nn.Module, .* got builtin"),
        (network(), {"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        (network(), {"batch_size": float("inf")}, "batch_size must be an integer of at least 1, got inf"),
    ],
)
def test_what_cannot_be_trained_is_named(model, options, message):
    with pytest.raises(TypeError, match=message):
        fit(model, *clouds(), epochs=1, **options)


def test_labels_must_belong_to_the_inputs():
    x, y = clouds()
    with pytest.raises(DataError, match="got 119 for 120"):
        fit(network(), x, y[1:], epochs=1)
