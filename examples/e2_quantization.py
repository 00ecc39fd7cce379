"""Linear layers at 8 bits whose inputs are rounded too, on MNIST, as published, beside ours.

    python examples/e2_quantization.py --data DIR

1. Network: the MLP of e2_pruning.py, 784–512–256–128–10, trained once and kept in mlp.safetensors.
2. Dynamic int8: every weight has 8 bits, and the inputs of a layer are rounded to 8 bits in each call; beside
   it the same weights with inputs as they are.

Every figure is printed next to the published one, in Markdown. Nothing is trained but the network itself;
weights are rounded by what layers read of unlabelled training images.
"""

import os
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import typer
from e2_pruning import DATA, QUICK, RECIPE, first_images, show, trained
from e2_thresholds import images
from e4_pruning import kilobytes
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, mnist
from pysolve.cli.demo import threads
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import accuracy, latency
from pysolve.tables import Table

# Unlabelled training images.
COUNT = 2000
PUBLISHED = "97.24"
# Rows of the table: a network in words, and the scheme of its weights.
SCHEMES = {"dynamic int8": "int8-dynamic", "int8, inputs as they are": "int8"}
# Images that are timed together.
BATCHES = (1, 256)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the four MNIST files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights.")] = Path("results/e2"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few images, one epoch.")] = False,
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
    """Train once, quantise and print."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE | ({"epochs": QUICK["epochs"]} if quick else {})
    model = trained(dataset, out / "mlp.safetensors", recipe, seed)
    show(int8_table(model, dataset, QUICK["few"] if quick else COUNT))


def int8_table(model: nn.Module, dataset: Dataset, count: int = COUNT) -> Table:
    """A row for the network as it is and for every scheme; published | ours."""
    rows = [("as trained", "", *_measured(model, model, dataset))]
    for name, scheme in SCHEMES.items():
        result = quantized(model, dataset, scheme, count)
        published = PUBLISHED if scheme == "int8-dynamic" else ""
        rows.append((name, published, *_measured(result, result.model, dataset)))
    head = ("weights", "accuracy published", "ours", "file: kB", *(f"{n} at a time: ms" for n in BATCHES))
    return Table("At 8 bits, not trained again: accuracy on the test set (%)", head, tuple(rows))


def quantized(model: nn.Module, dataset: Dataset, scheme: str, count: int) -> Compressed:
    """The network with weights of 8 bits, fitted on so many unlabelled images."""
    return ps.quantize(model, images(dataset, count), scheme=scheme, progress=False)


def _measured(stored: nn.Module | Compressed, network: nn.Module, dataset: Dataset) -> tuple[str, ...]:
    times = (latency(network, dataset.x_test[:n]).median for n in BATCHES)
    score = accuracy(network, dataset.x_test, dataset.y_test)
    return f"{score:.2f}", kilobytes(stored), *(f"{1e3 * time:.2f}" for time in times)


if __name__ == "__main__":
    app()
