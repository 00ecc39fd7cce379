"""The reference networks have the published sizes."""

import pytest
import torch
from torch import nn

from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import DigitsNet, LeNet5, Mlp


def test_lenet_has_431080_parameters_in_its_published_shapes():
    model = LeNet5()
    assert parameters(model) == 431_080
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (20, 1, 5, 5),
        "conv2.weight": (50, 20, 5, 5),
        "fc1.weight": (500, 800),
        "fc2.weight": (10, 500),
    }


def test_lenet_pools_before_its_relu_and_has_none_at_the_end():
    torch.manual_seed(0)
    model, x = LeNet5(), torch.randn(2, 1, 28, 28)
    reference = nn.Sequential(
        model.conv1, nn.MaxPool2d(2), nn.ReLU(), model.conv2, nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), model.fc1, nn.ReLU(), model.fc2,
    )  # fmt: skip
    torch.testing.assert_close(model(x), reference(x))


def test_the_mlp_has_567434_parameters_and_flattens_images():
    model = Mlp()
    assert parameters(model) == 567_434
    assert [name for name, _ in model.named_children()] == ["fc1", "fc2", "fc3", "fc4"]
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_an_mlp_has_relu_between_its_layers_only():
    torch.manual_seed(0)
    model, x = Mlp((4, 5, 6, 2)), torch.randn(7, 4)
    reference = nn.Sequential(model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), model.fc3)
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(Mlp((4, 2))(x).shape, torch.Size([7, 2]))


def test_an_mlp_needs_two_sizes():
    with pytest.raises(ValueError, match=r"got \(784,\)"):
        Mlp((784,))


def test_the_digits_network_is_mostly_its_first_linear_layer():
    model = DigitsNet()
    assert parameters(model) == 138_698
    assert parameters(model.fc1) / parameters(model) > 0.94
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
