"""Pruning with and without retraining, as published: LeNet-5 on MNIST, step by step.

    python examples/e5_prune_retrain.py --data DIR

1. Weights by standard deviation: the Linear layers of LeNet-5 with C5 keep 7 % and 5 %, retrained; beside
   it optimal brain surgeon, without labels and without retraining (weights.png).
2. Channels by importance propagated back from the outputs: ranked in each layer, and over all of them.
3. Dynamic network surgery: masks change while LeNet-5 is trained (surgery.png).

Every figure is printed next to the published one where there is one. Networks are trained once and kept.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import e1_linear_reconstruction as e1
import torch
import typer
from e5_channels import compare_rankings
from e5_surgery import compare_surgery
from e5_weights import compare_weights
from rich.console import Console, RenderableType
from safetensors.torch import load_file, save_file
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, mnist
from pysolve.cli.demo import threads
from pysolve.nn.zoo import LeNet5, LeNetC5
from pysolve.training.fit import fit

C5_RECIPE = {"epochs": 4, "batch_size": 256, "lr": 3e-3}
# With --quick: one size each, and little training.
QUICK_WEIGHTS = {"shares": (1.0,), "epochs": 1}
QUICK_CHANNELS = {"sizes": (0.3,)}
QUICK_SURGERY = {"amounts": (0.98,), "epochs": 1}

DATA = Path(os.environ.get("PYSOLVE_DATA", "data"), "mnist")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the four MNIST files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the pictures.")] = Path("results/e5"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes, one epoch each.")] = False,
) -> None:
    """The whole experiment."""
    try:
        dataset = mnist(data)
        # More threads wait for each other on a busy machine.
        with threads(1):
            run(dataset, out, seed, quick=quick)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """All three parts."""
    out.mkdir(parents=True, exist_ok=True)
    c5 = kept_or_trained(LeNetC5, C5_RECIPE, dataset, out / "c5.safetensors", seed)
    for part in compare_weights(c5, dataset, out / "weights.png", **(QUICK_WEIGHTS if quick else {})):
        show(part)
    lenet5 = kept_or_trained(LeNet5, e1.RECIPE, dataset, out / "lenet5.safetensors", seed)
    console.print(compare_rankings(lenet5, dataset, **(QUICK_CHANNELS if quick else {})))
    for part in compare_surgery(lenet5, dataset, out / "surgery.png", **(QUICK_SURGERY if quick else {})):
        show(part)
    console.out(f"Wrote weights.png and surgery.png to {out}/")


def show(part: RenderableType) -> None:
    """A table, or lines that are not to be folded."""
    if isinstance(part, str):
        console.out(part)
    else:
        console.print(part)


def kept_or_trained(
    make: Callable[[], nn.Module], recipe: Mapping[str, float], dataset: Dataset, path: Path, seed: int
) -> nn.Module:
    """The network from ``path`` if this recipe made it from these data, else trained and written there."""
    text = json.dumps({"data": dataset.name, "images": len(dataset.x_train), "seed": seed, **recipe})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    if e1.recipe_of(path) == text:
        model.load_state_dict(load_file(path))
        return model
    fit(model, dataset.x_train, dataset.y_train, seed=seed, **recipe)
    part = path.with_suffix(".part")
    save_file(model.state_dict(), part, metadata={"recipe": text})
    os.replace(part, path)
    console.out(f"Trained {type(model).__name__} and wrote {path}")
    return model


if __name__ == "__main__":
    app()
