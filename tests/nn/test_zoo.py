"""The reference networks have the published sizes."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import avg_pool2d, pad, relu

from pysolve.cli.datasets import cifar, mnist
from pysolve.nn.evaluate import accuracy, macs, parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.zoo import DigitsNet, LeanNet, LeNet5, LeNetC5, Mlp, MnistCnn, ResNet


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


def test_lenet_with_c5_has_167566_parameters_of_which_convolutions_hold_33412():
    model = LeNetC5()
    assert parameters(model) == 167_566
    assert sum(parameters(model.get_submodule(f"conv{i}")) for i in (1, 2, 3)) == 33_412
    assert tuple(model.conv3.weight.shape) == (120, 16, 4, 4)
    assert tuple(model.fc1.weight.shape) == (1024, 120)
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


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


def varied(model, seed=0):
    """The network with batch norms that do something, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean):
                values.copy_(torch.randn(values.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    ("depth", "millions"), [(8, 0.08), (20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)]
)
def test_residual_networks_have_their_published_sizes(depth, millions):
    assert round(parameters(ResNet(depth)) / 1e6, 2) == millions


def test_resnet20_has_269722_parameters_and_41_million_multiplications():
    model = ResNet(20)
    assert parameters(model) == 269_722
    assert macs(model, torch.zeros(1, 3, 32, 32)) == 40_551_040
    assert ResNet(8, classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_residual_network_computes_what_its_weights_say():
    torch.manual_seed(0)
    model, x = varied(ResNet(14)), torch.randn(2, 3, 32, 32)
    state, wanted = model.state_dict(), x

    def convolved(x, conv, norm, stride=1):
        y = torch.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, weight, bias = (
            state[f"{norm}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    wanted = relu(convolved(wanted, "conv1", "bn1"))
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(2):
            halved, name = stage > 1 and block == 0, f"layer{stage}.{block}"
            inner = relu(convolved(wanted, f"{name}.conv1", f"{name}.bn1", stride=1 + halved))
            if halved:
                wanted = pad(wanted[:, :, ::2, ::2], (0, 0, 0, 0, width // 4, width // 4))
            wanted = relu(convolved(inner, f"{name}.conv2", f"{name}.bn2") + wanted)
    wanted = avg_pool2d(wanted, 8)[:, :, 0, 0] @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_shortcut_has_no_parameters_and_no_width_in_its_code():
    block = ResNet(8).layer2[0]
    assert not list(block.shortcut.parameters())
    x = torch.randn(2, 5, 4, 4)
    wanted = torch.cat([torch.zeros(2, 8, 2, 2), x[:, :, ::2, ::2], torch.zeros(2, 8, 2, 2)], 1)
    torch.testing.assert_close(block.shortcut(x), wanted)


@pytest.mark.parametrize("depth", [2, 19, 21, -4])
def test_a_depth_that_no_whole_blocks_make_is_refused(depth):
    with pytest.raises(ValueError, match=f"6 k \\+ 2.*got {depth}"):
        ResNet(depth)


def test_the_mnist_network_is_two_chains_with_a_flatten_between():
    torch.manual_seed(0)
    model, x = MnistCnn(), torch.randn(3, 1, 28, 28)
    assert parameters(model) == 390_410
    wanted = model.fc_layers(model.conv_layers(x).reshape(3, 1152))
    torch.testing.assert_close(model(x), wanted)
    assert wanted.shape == (3, 10)
    kinds = [type(layer) for layer in model.conv_layers]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 3


@pytest.mark.slow
@pytest.mark.data
def test_real_networks_fit_the_published_weights_and_reach_their_accuracy(data_folder):
    resnet, cnn = ResNet(20), MnistCnn()
    resnet.load_state_dict(load_file(data_folder / "resnet20_cifar10_jpeg.safetensors"))
    cnn.load_state_dict(load_file(data_folder / "mnist_cnn.safetensors"))
    images, digits = cifar(data_folder / "cifar10_jpeg", train=1), mnist(data_folder / "mnist")
    assert accuracy(resnet, images.x_test, images.y_test) == pytest.approx(87.86, abs=0.03)
    assert accuracy(cnn, digits.x_test, digits.y_test) == pytest.approx(99.06, abs=0.02)


@pytest.mark.parametrize(
    ("gated", "params", "cost"), [(False, 141_722, 7_096_960), (True, 233_654, 7_187_712)]
)
def test_the_lean_networks_have_inverted_residuals_in_which_all_channels_can_shrink(gated, params, cost):
    model, x = LeanNet(gated).eval(), torch.randn(2, 3, 32, 32)
    assert (parameters(model), macs(model, x[:1])) == (params, cost)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert len(depthwise) == 7
    assert all(site.pinned is None for site in find_sites(model, x) if site.readers != ())
    assert model(x).shape == (2, 10)
