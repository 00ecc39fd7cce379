"""Deep compression of LeNet-5 and LeNet-300-100, as published, beside ours; and ternary networks.

    python examples/e5_deep_compression.py --data DIR

1. LeNet-5, as Caffe has it, and LeNet-300-100 on MNIST: pruned, sharing values and Huffman-coded, each
   stage trained on labels, as published. Beside it as many zeros and bits without labels and without
   training, and networks within so many bytes of a file. All files also by asymmetric numeral systems.
   Where it is published how many weights are left, ours are bytes, positions included.
2. Three values a layer: LeNet-5 and ResNet-20 on JPEG-recompressed CIFAR-10, taught by what they were.

Every figure is printed next to the published one where there is one, in Markdown, and drawn (deep.png).
Networks on MNIST are trained once and kept. All of it takes a quarter of an hour on one core, of which
--ternary seconds are the training of ResNet-20.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import experiment
from e1_linear_reconstruction import RECIPE as LENET5_RECIPE
from e5_published import LENET5, LENET_300_100, Published
from e5_stages import all_stages, draw, stages_table
from e5_ternary import ternary_table
from experiment import first_images, kept, show
from safetensors.torch import load_file
from torch import nn

from pysolve.cli.datasets import Dataset, cifar, mnist
from pysolve.nn.zoo import LeNet5, Mlp, ResNet
from pysolve.tables import Table

LENET_300_RECIPE = {"epochs": 10, "batch_size": 128, "lr": 2e-3}
# With --quick: few images, one size, little training.
IMAGES = 600
QUICK = {"smaller": (40,), "count": 200, "epochs": 1}
# Of ResNet-20's training, what LeNet-5 is trained for.
LENET_SHARE = 0.2


@dataclass(frozen=True)
class Network:
    """One network: how it is made and trained, its published figures, and epochs of each stage."""

    make: Callable[[], nn.Module]
    recipe: Mapping[str, float]
    file: str
    published: Published
    epochs: int


NETWORKS = {
    "LeNet-5": Network(LeNet5, LENET5_RECIPE, "lenet5.safetensors", LENET5, 3),
    "LeNet-300-100": Network(
        partial(Mlp, (784, 300, 100, 10)), LENET_300_RECIPE, "lenet-300-100.safetensors", LENET_300_100, 12
    ),
}


def run(dataset: Dataset, data: Path, out: Path, seed: int, *, ternary: float, quick: bool) -> None:
    """Every way on both networks, then three values a layer."""
    models = compress(dataset, out, seed, QUICK if quick else {})
    if ternary:
        show(taught(models["LeNet-5"], dataset, data, ternary, quick=quick))


def compress(dataset: Dataset, out: Path, seed: int, options: Mapping[str, object]) -> dict[str, nn.Module]:
    """Every way on both networks, printed and drawn."""
    models, drawn = {}, {}
    for name, network in NETWORKS.items():
        models[name] = model = kept(network.make, dataset, out / network.file, network.recipe, seed)
        found = all_stages(model, dataset, network.published, **{"epochs": network.epochs, **options})
        title = f"{name} on MNIST: files, and accuracy on the test set (%)"
        show(stages_table(title, model, found, network.published))
        drawn[name] = (found, network.published)
    draw(drawn, out / "deep.png")
    show(f"Wrote {out / 'deep.png'}\n")
    return models


def taught(lenet5: nn.Module, images: Dataset, data: Path, seconds: float, *, quick: bool) -> Table:
    """LeNet-5 and ResNet-20 with three values a layer."""
    model, pictures = ResNet(20), cifar(data / "cifar10_jpeg")
    model.load_state_dict(load_file(data / "resnet20_cifar10_jpeg.safetensors"))
    pictures = first_images(pictures, IMAGES) if quick else pictures
    networks = {"LeNet-5": (lenet5, images), "ResNet-20": (model.eval(), pictures)}
    options = {"count": QUICK["count"]} if quick else {}
    return ternary_table(networks, (LENET_SHARE * seconds, seconds), **options)


app = experiment.script(run, lambda data: mnist(data / "mnist"), out="e5", data="", few=IMAGES)


if __name__ == "__main__":
    app()
