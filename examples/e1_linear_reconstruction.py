"""Linear activation reconstruction of LeNet-5 on MNIST, as published, step by step.

    python examples/e1_linear_reconstruction.py --data DIR

1. Solvers: two random problems, every method, and how each converges (convergence.png).
2. Network: LeNet-5, trained once and kept in lenet5.safetensors.
3. fc2: which of its 500 inputs are needed, without a bias and with an unpenalised one.
4. conv2, fc1 and fc2: the lasso's whole path beside elimination.
5. The whole network: accuracy against size, also after one epoch of retraining (accuracy.png).

Every figure is printed next to the published one where there is one.
"""

import json
import os
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other: solves then take up to ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
import typer
from e1_layers import CONV2, FC1, FC2, compare_selectors, compress_fc2, gather_readers
from e1_network import compare_sizes, draw_sizes, sizes_table
from e1_solvers import compare_solvers
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import pysolve as ps
from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.zoo import LeNet5
from pysolve.training.fit import fit

RECIPE = {"epochs": 8, "batch_size": 256, "lr": 3e-3}
# With --quick, of lam_max: for one layer, and for the whole network.
FEW_SHARES = ((1.0, 0.1, 0.02), (1.1, 0.1, 0.01))

DATA = Path(os.environ.get("PYSOLVE_DATA", "data"), "mnist")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the four MNIST files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the pictures.")] = Path("results/e1"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train even if there are weights.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer values of λ.")] = False,
) -> None:
    """The whole experiment."""
    try:
        dataset = mnist(data)
        out.mkdir(parents=True, exist_ok=True)
        for table in compare_solvers(out / "convergence.png"):
            console.print(table)
        console.out(f"Wrote {out / 'convergence.png'}")
        model = trained(dataset, out / "lenet5.safetensors", seed=seed, retrain=retrain)
        compress_layers(model, dataset, quick=quick)
        compress_network(model, dataset, out / "accuracy.png", quick=quick)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def trained(dataset: Dataset, path: Path, *, seed: int = 0, retrain: bool = False) -> LeNet5:
    """LeNet-5 from ``path`` if this recipe made it from these data, else trained and written there."""
    recipe = json.dumps({"data": dataset.name, "images": len(dataset.x_train), "seed": seed, **RECIPE})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LeNet5()
    if not retrain and recipe_of(path) == recipe:
        model.load_state_dict(load_file(path))
        console.out(f"Loaded {path}")
        return model
    fit(model, dataset.x_train, dataset.y_train, seed=seed, **RECIPE)
    part = path.with_suffix(".part")
    save_file(model.state_dict(), part, metadata={"recipe": recipe})
    os.replace(part, path)
    console.out(f"Trained LeNet-5 and wrote {path}")
    return model


def recipe_of(path: Path) -> str | None:
    """How the weights in a file were made; None when it is absent, damaged or from elsewhere."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError):
        return None


def compress_layers(model: LeNet5, dataset: Dataset, *, quick: bool = False) -> None:
    """One layer at a time, all from one pass over the training images."""
    correlations = gather_readers(model, dataset)
    for part in compress_fc2(model, dataset, correlations["fc2"]):
        console.print(part)
    shares = {"shares": FEW_SHARES[0]} if quick else {}
    for site in (CONV2, FC1, FC2):
        (reader,) = site.readers
        console.print(compare_selectors(model, dataset, site, correlations[reader], **shares))


def compress_network(model: LeNet5, dataset: Dataset, path: Path, *, quick: bool = False) -> None:
    """All layers together."""
    with console.status("Compressing the whole network …"):
        pairs = compare_sizes(model, dataset, **({"shares": FEW_SHARES[1]} if quick else {}))
    console.print(sizes_table(pairs))
    draw_sizes(pairs, path)
    console.out(f"Wrote {path}")


if __name__ == "__main__":
    app()
