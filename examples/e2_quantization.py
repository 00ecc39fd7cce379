"""Linear layers at 8 bits whose inputs are rounded too, on MNIST, as published, beside ours.

    python examples/e2_quantization.py --data DIR

1. Network: the MLP of e2_pruning.py, 784–512–256–128–10, trained once and kept in mlp.safetensors.
2. Dynamic int8: every weight has 8 bits, and the inputs of a layer are rounded to 8 bits in each call; beside
   it the same weights with inputs as they are.

Every figure is printed next to the published one, in Markdown. Nothing is trained but the network itself;
weights are rounded by what layers read of unlabelled training images.
"""

from pathlib import Path

import experiment
from e2_pruning import QUICK, read, trained
from experiment import measured, show, unlabelled
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import latency
from pysolve.tables import Table

# Unlabelled training images.
COUNT = 2000
PUBLISHED = "97.24"
# Rows of the table: a network in words, and the scheme of its weights.
SCHEMES = {"dynamic int8": "int8-dynamic", "int8, inputs as they are": "int8"}
# Images that are timed together.
BATCHES = (1, 256)


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Train once, quantise and print."""
    model = trained(dataset, out / "mlp.safetensors", seed, quick=quick)
    show(int8_table(model, dataset, QUICK["few"] if quick else COUNT))


def int8_table(model: nn.Module, dataset: Dataset, count: int = COUNT) -> Table:
    """A row for the network as it is and for every scheme; published | ours."""
    rows = [("as trained", "", *_timed(model, model, dataset))]
    for name, scheme in SCHEMES.items():
        result = quantized(model, dataset, scheme, count)
        published = PUBLISHED if scheme == "int8-dynamic" else ""
        rows.append((name, published, *_timed(result, result.model, dataset)))
    head = ("weights", "accuracy published", "ours", "file: kB", *(f"{n} at a time: ms" for n in BATCHES))
    return Table("At 8 bits, not trained again: accuracy on the test set (%)", head, tuple(rows))


def quantized(model: nn.Module, dataset: Dataset, scheme: str, count: int) -> Compressed:
    """The network with weights of 8 bits, fitted on so many unlabelled images."""
    return ps.quantize(model, unlabelled(dataset, count, 500), scheme=scheme, progress=False)


def _timed(stored: nn.Module | Compressed, network: nn.Module, dataset: Dataset) -> tuple[str, ...]:
    """Accuracy, kilobytes of the file, and milliseconds of each batch."""
    times = (latency(network, dataset.x_test[:n]).median for n in BATCHES)
    size, accuracy = measured(stored, network, dataset)
    return accuracy, size, *(f"{1e3 * time:.2f}" for time in times)


app = experiment.script(run, read, out="e2", few=QUICK["images"])


if __name__ == "__main__":
    app()
