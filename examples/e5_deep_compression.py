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

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import typer
from e1_linear_reconstruction import RECIPE as LENET5_RECIPE
from e2_pruning import first_images, show
from e5_published import LENET5, LENET_300_100, Published
from e5_stages import all_stages, draw, stages_table
from e5_ternary import ternary_table
from kept import kept_or_trained
from safetensors.torch import load_file
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, cifar, mnist
from pysolve.cli.demo import threads
from pysolve.nn.zoo import LeNet5, Mlp, ResNet
from pysolve.tables import Table
from pysolve.training.fit import fit

LENET_300_RECIPE = {"epochs": 10, "batch_size": 128, "lr": 2e-3}
# With --quick: few images, one size, little training.
IMAGES = 600
QUICK: dict[str, Any] = {"smaller": (40,), "count": 200, "epochs": 1}
# Of ResNet-20's training, what LeNet-5 is trained for.
LENET_SHARE = 0.2
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Network:
    """What is compressed: how it is made and trained, what is published of it, and epochs of each stage."""

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


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with mnist/, cifar10_jpeg/ and ResNet-20.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the picture.")] = Path("results/e5"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    ternary: Annotated[float, typer.Option(help="Seconds of training; 0: no ternary networks.")] = 300.0,
    quick: Annotated[bool, typer.Option("--quick", help="Few images, one size, one epoch.")] = False,
) -> None:
    """The whole experiment."""
    try:
        start, cpu, images = time.perf_counter(), time.process_time(), mnist(data / "mnist")
        images = first_images(images, IMAGES) if quick else images
        # More threads wait for each other on a busy machine.
        with threads(1):
            models = compress(images, out, seed, QUICK if quick else {})
            if ternary:
                show(taught(models["LeNet-5"], images, data, ternary, quick=quick))
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    minutes = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60
    typer.echo(f"{minutes[0]:.1f} minutes in all, {minutes[1]:.1f} of one processor.")


def compress(dataset: Dataset, out: Path, seed: int, options: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Every way on both networks, printed and drawn."""
    out.mkdir(parents=True, exist_ok=True)
    models, drawn = {}, {}
    for name, network in NETWORKS.items():
        models[name] = model = trained(network, dataset, out, seed)
        found = all_stages(model, dataset, network.published, **{"epochs": network.epochs, **options})
        title = f"{name} on MNIST: files, and accuracy on the test set (%)"
        show(stages_table(title, model, found, network.published))
        drawn[name] = (found, network.published)
    draw(drawn, out / "deep.png")
    typer.echo(f"Wrote {out / 'deep.png'}\n")
    return models


def trained(network: Network, dataset: Dataset, out: Path, seed: int) -> nn.Module:
    """With labels, or from its file."""

    def train(model: nn.Module) -> None:
        fit(model, dataset.x_train, dataset.y_train, seed=seed, progress=False, **network.recipe)

    path = out / network.file
    return kept_or_trained(network.make, train, path, dataset=dataset, seed=seed, recipe=network.recipe)


def taught(lenet5: nn.Module, images: Dataset, data: Path, seconds: float, *, quick: bool) -> Table:
    """LeNet-5 and ResNet-20 with three values a layer."""
    model, pictures = ResNet(20), cifar(data / "cifar10_jpeg")
    model.load_state_dict(load_file(data / "resnet20_cifar10_jpeg.safetensors"))
    pictures = first_images(pictures, IMAGES) if quick else pictures
    networks = {"LeNet-5": (lenet5, images), "ResNet-20": (model.eval(), pictures)}
    options = {"count": QUICK["count"]} if quick else {}
    return ternary_table(networks, (LENET_SHARE * seconds, seconds), **options)


if __name__ == "__main__":
    app()
