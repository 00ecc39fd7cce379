"""Zero pruning and activation pruning of an MLP on MNIST, as published, beside ours at the same sizes.

    python examples/e2_pruning.py --data DIR

1. Network: 784–512–256–128–10, trained once and kept in mlp.safetensors.
2. Weights below a threshold become zero; beside it the same weights with the others refitted, and optimal
   brain surgeon with as many zeros.
3. Neurons whose mean activation lies below a threshold are removed; beside it as many of every layer with
   weights refitted, and by elimination.

Every figure is printed next to the published one, in Markdown, and drawn (pruning.png). Nothing is trained
but the network itself; what is refitted sees unlabelled training images alone.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
import typer
from e1_linear_reconstruction import recipe_of
from e2_thresholds import (
    FEW,
    NEURONS,
    ZEROS,
    draw,
    neurons_table,
    without_neurons,
    without_weights,
    zeros_table,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import pysolve as ps
from pysolve.cli.datasets import Dataset, mnist
from pysolve.cli.demo import threads
from pysolve.nn.zoo import Mlp
from pysolve.tables import Table, as_markdown

RECIPE = {"epochs": 5, "batch_size": 64, "lr": 1e-3}
QUICK = {"images": 600, "few": 100, "epochs": 1, "thresholds": 3}
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"), "mnist")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the four MNIST files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the picture.")] = Path("results/e2"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few images and thresholds, one epoch.")] = False,
) -> None:
    """The whole experiment."""
    try:
        dataset = mnist(data, mean=0.5, std=0.5)
        # More threads wait for each other on a busy machine.
        with threads(1):
            run(first_images(dataset, QUICK["images"]) if quick else dataset, out, seed, quick=quick)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Train once, prune both ways, print and draw."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE | ({"epochs": QUICK["epochs"]} if quick else {})
    model = trained(dataset, out / "mlp.safetensors", recipe, seed)
    few = QUICK["few"] if quick else FEW
    step = len(ZEROS) // QUICK["thresholds"] if quick else 1
    weights = [without_weights(model, dataset, tau, few) for tau in [*ZEROS][::step]]
    show(zeros_table(weights, few))
    neurons = [without_neurons(model, dataset, limit, few) for limit in [*NEURONS][::step]]
    show(neurons_table(neurons, few))
    draw(weights, neurons, out / "pruning.png")
    typer.echo(f"Wrote {out / 'pruning.png'}")


def first_images(dataset: Dataset, n: int) -> Dataset:
    """The first images of both splits."""
    parts = {name: getattr(dataset, name)[:n] for name in ("x_train", "y_train", "x_test", "y_test")}
    return replace(dataset, **parts)


def trained(dataset: Dataset, path: Path, recipe: dict[str, float], seed: int) -> Mlp:
    """The network from ``path`` if this recipe made it from these data, else trained and written there."""
    text = json.dumps({"data": dataset.name, "images": len(dataset.x_train), "seed": seed, **recipe})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mlp()
    if recipe_of(path) == text:
        model.load_state_dict(load_file(path))
        return model
    train(model, dataset, seed=seed, **recipe)
    part = path.with_suffix(".part")
    save_file(model.state_dict(), part, metadata={"recipe": text})
    os.replace(part, path)
    typer.echo(f"Trained the network and wrote {path}")
    return model


def train(
    model: nn.Module, dataset: Dataset, *, epochs: int, batch_size: int, lr: float, seed: int = 0
) -> None:
    """Adam at a constant rate, as published."""
    x, y = torch.from_numpy(dataset.x_train), torch.from_numpy(dataset.y_train)
    adam, random = torch.optim.Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=random).split(batch_size):
            adam.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            adam.step()


def show(table: Table) -> None:
    typer.echo("\n".join([f"**{table.title}**", "", *as_markdown(table), ""]))


if __name__ == "__main__":
    app()
