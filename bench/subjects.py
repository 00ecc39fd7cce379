"""The trained networks and real images that whole-network compression is measured on."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Networks are trained once and kept as by the examples.
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import experiment
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pysolve.cli.datasets import Dataset, cifar, mnist
from pysolve.nn.evaluate import accuracy, macs, parameters
from pysolve.nn.running import keeping_modes
from pysolve.nn.zoo import LeanNet, LeNet5, Mlp, MnistCnn, ResNet

# Share of the network's parameters or multiply-accumulates that may be left.
Target = dict[str, float]

DATA = experiment.DATA
# Recipes of the examples e1_linear_reconstruction, e5_deep_compression and e2_pruning, whose weights are used
# when they are there.
LENET_RECIPE = {"epochs": 8, "batch_size": 256, "lr": 3e-3}
LENET_300_RECIPE = {"epochs": 10, "batch_size": 128, "lr": 2e-3}
PERCEPTRON_RECIPE = {"epochs": 5, "batch_size": 64, "lr": 1e-3}
LEAN_RECIPE = {"epochs": 28, "batch_size": 64, "lr": 0.1}
CALIBRATION = 2000


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network, unlabelled images to compress it with, and labelled ones to judge it by.

    Parameters
    ----------
    title : str
    model : nn.Module
    calibration : list of (n, …) tensors
        Images of the training split.
    x_test, y_test : arrays
    targets : tuple of {"params" | "macs": float}
    fixed : tuple of str
        Layers whose outputs must keep their number when a tool cannot tell by itself.
    """

    title: str
    model: nn.Module
    calibration: list[Tensor]
    x_test: np.ndarray
    y_test: np.ndarray
    targets: tuple[Target, ...]
    fixed: tuple[str, ...]

    @property
    def example(self) -> Tensor:
        return self.calibration[0][:1]

    def accuracy(self, model: nn.Module) -> float:
        """Per cent of the test images."""
        return accuracy(model, self.x_test, self.y_test)

    def cost(self, what: str, model: nn.Module | None = None) -> int:
        """Parameters, or multiply-accumulates of one image, of the network or of a smaller one."""
        model = self.model if model is None else model
        return {"params": parameters, "macs": lambda model: macs(model, self.example)}[what](model)


def lenet(data: Path, out: Path) -> Subject:
    """LeNet-5 on MNIST."""
    images = mnist(data / "mnist")
    targets = ({"params": 0.093}, {"params": 0.042}, {"params": 0.025})
    model = experiment.kept(LeNet5, images, out / "e1" / "lenet5.safetensors", LENET_RECIPE)
    return _subject("LeNet-5 on MNIST", model, images, targets, ("fc2",))


def resnet20(data: Path, out: Path) -> Subject:
    """ResNet-20 on JPEG-recompressed CIFAR-10."""
    model = ResNet(20)
    model.load_state_dict(load_file(data / "resnet20_cifar10_jpeg.safetensors"))
    title = "ResNet-20 on JPEG-recompressed CIFAR-10, 5000 images"
    images = cifar(data / "cifar10_jpeg", train=CALIBRATION)
    return _subject(title, model, images, ({"macs": 0.75}, {"macs": 0.5}), residual_stream(model))


def mnist_cnn(data: Path, out: Path) -> Subject:
    """A convolutional network on MNIST."""
    model = MnistCnn()
    model.load_state_dict(load_file(data / "mnist_cnn.safetensors"))
    images = mnist(data / "mnist")
    return _subject("MnistCnn on MNIST", model, images, ({"params": 0.25},), ("fc_layers.2",))


def lenet_300_100(data: Path, out: Path) -> Subject:
    """784–300–100–10 on MNIST."""
    images, make = mnist(data / "mnist"), partial(Mlp, (784, 300, 100, 10))
    model = experiment.kept(make, images, out / "deep" / "lenet-300-100.safetensors", LENET_300_RECIPE)
    return _subject("LeNet-300-100 on MNIST", model, images, (), ("fc3",))


def perceptron(data: Path, out: Path) -> Subject:
    """784–512–256–128–10 on MNIST."""
    images, path = mnist(data / "mnist", mean=0.5, std=0.5), out / "e2" / "mlp.safetensors"
    model = experiment.kept(Mlp, images, path, PERCEPTRON_RECIPE, train=experiment.adam)
    return _subject("784–512–256–128–10 on MNIST", model, images, (), ("fc4",))


def lean(data: Path, out: Path, gated: bool = False) -> Subject:
    """Inverted residuals on JPEG-recompressed CIFAR-10, with ReLU6, or with hard-swish and gates."""
    images, name = cifar(data / "cifar10_jpeg"), "lean-gated" if gated else "lean"
    path = out / "lean" / f"{name}.safetensors"
    model = experiment.kept(partial(LeanNet, gated), images, path, LEAN_RECIPE, train=experiment.augmented)
    title = f"{'Gated lean' if gated else 'Lean'} network on JPEG-recompressed CIFAR-10, 5000 images"
    return _subject(title, model, images, ({"macs": 0.75}, {"macs": 0.5}), residual_writers(model))


SUBJECTS: dict[str, Callable[[Path, Path], Subject]] = {
    "lenet": lenet,
    "resnet20": resnet20,
    "mnist-cnn": mnist_cnn,
    "lenet-300-100": lenet_300_100,
    "mlp": perceptron,
    "lean": lean,
    "lean-gated": partial(lean, gated=True),
}


def _subject(
    title: str, model: nn.Module, images: Dataset, targets: tuple[Target, ...], fixed: tuple[str, ...]
) -> Subject:
    # A copy: the rest of the training images can go.
    calibration = torch.from_numpy(images.x_train[:CALIBRATION].copy()).split(250)
    return Subject(title, model.eval(), list(calibration), images.x_test, images.y_test, targets, fixed)


def residual_stream(model: ResNet) -> tuple[str, ...]:
    """The layers that write the residual stream, and the last one."""
    inner = [name for name, _ in model.named_modules() if name.startswith("layer") and name.endswith("conv2")]
    return ("conv1", *inner, "linear")


def residual_writers(model: LeanNet) -> tuple[str, ...]:
    """The layers that write the streams between blocks, and the last one."""
    inner = [f"blocks.{i}.layers.{len(block.layers) - 2}" for i, block in enumerate(model.blocks)]
    return (*inner, "linear")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Linear layers and convolutions."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def with_norms(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """The network with its batch norms' statistics measured anew, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # The plain mean over all batches.
        norm.momentum = None
    with keeping_modes(model), torch.no_grad():
        model.train()
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model
