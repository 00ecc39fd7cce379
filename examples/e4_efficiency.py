"""Pruning, 8 bits and distillation of small convolutional networks on CIFAR-10, as published, beside ours.

    python examples/e4_efficiency.py --data DIR

1. SimpleCNN, trained once (simple.safetensors) and pruned: published files keep their 488 kB, because zeros
   are stored; ours shrink.
2. The same network at 8 bits, in the Linear layers with inputs rounded too, as published, and in all layers.
3. A ResNet-18, trained once (resnet18.safetensors), teaches a padded SimpleCNN: α T² KL + (1 − α) CE with
   T = 5 and α = 0.5, by SGD with a momentum of 0.9 at 1e-3; beside it the same student on a better schedule.

The images are JPEG-recompressed CIFAR-10: 25,000 to train on, 5,000 to test. ResNet-18 sees them 3 times and
students 5 times, so that all of it fits half an hour on two cores; no augmentation. Published accuracies are
not at hand. Tables are in Markdown; files are pictured in files.png.
"""

import os
import time
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import typer
from e2_pruning import first_images, show
from e4_distillation import SEEDS, STUDENT, TEACHER, distillation_table, trained_teacher
from e4_networks import SimpleCnn
from e4_pruning import COUNT, draw, pruning_table
from e4_quantization import int8_table
from kept import kept_or_trained
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, cifar
from pysolve.cli.demo import threads
from pysolve.training.fit import fit

RECIPE = {"epochs": 6, "batch_size": 64, "lr": 2e-3}
QUICK = {"images": 320, "count": 100, "epochs": 1}
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"), "cifar10_jpeg")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the images, as JPEG in two .npz files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the picture.")] = Path("results/e4"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few images, one epoch, one seed.")] = False,
) -> None:
    """The whole experiment."""
    try:
        dataset = cifar(data)
        # More threads wait for each other on a busy machine.
        with threads(1):
            run(first_images(dataset, QUICK["images"]) if quick else dataset, out, seed, quick=quick)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Train, prune, quantise, distil, print and draw."""
    start, cpu = time.perf_counter(), time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    shorter = {"epochs": QUICK["epochs"]} if quick else {}
    model = trained(dataset, out / "simple.safetensors", RECIPE | shorter, seed)
    count = QUICK["count"] if quick else COUNT
    table = pruning_table(model, dataset, seed, count)
    show(table)
    draw(table, out / "files.png")
    typer.echo(f"Wrote {out / 'files.png'}\n")
    show(int8_table(model, dataset, count))
    teacher = trained_teacher(dataset, out / "resnet18.safetensors", TEACHER | shorter, seed)
    show(distillation_table(teacher, dataset, STUDENT | shorter, SEEDS[:1] if quick else SEEDS))
    minutes = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60
    typer.echo(f"{minutes[0]:.1f} minutes in all, {minutes[1]:.1f} of one processor.")


def trained(dataset: Dataset, path: Path, recipe: dict[str, float], seed: int) -> nn.Module:
    """SimpleCNN with labels, or from ``path``."""

    def train(network: nn.Module) -> None:
        fit(network, dataset.x_train, dataset.y_train, seed=seed, progress=False, **recipe)

    return kept_or_trained(SimpleCnn, train, path, dataset=dataset, seed=seed, recipe=recipe)


if __name__ == "__main__":
    app()
