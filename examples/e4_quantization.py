"""A small convolutional network at 8 bits: files as published and ours."""

from e2_quantization import SCHEMES, quantized
from e4_pruning import COUNT, PUBLISHED_FILE, kilobytes
from torch import nn

from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import accuracy
from pysolve.tables import Table

# Dynamic int8 is of the Linear layers alone: convolutions stay as they are.
PUBLISHED_DYNAMIC = "170"


def int8_table(model: nn.Module, dataset: Dataset, count: int = COUNT) -> Table:
    """A row for the network as it is and for every scheme; published | ours."""
    whole = kilobytes(model)
    rows = [("as trained", PUBLISHED_FILE, whole, "100 %", _score(model, dataset))]
    for name, scheme in SCHEMES.items():
        result = quantized(model, dataset, scheme, count)
        size = kilobytes(result)
        published = PUBLISHED_DYNAMIC if scheme == "int8-dynamic" else ""
        share = f"{100 * _number(size) / _number(whole):.0f} %"
        rows.append((name, published, size, share, _score(result.model, dataset)))
    head = ("weights", "published: kB", "ours: kB", "left", "accuracy")
    title = "At 8 bits, not trained again: files, and accuracy on the test set (%)"
    return Table(title, head, tuple(rows))


def _score(network: nn.Module, dataset: Dataset) -> str:
    return f"{accuracy(network, dataset.x_test, dataset.y_test):.2f}"


def _number(kilobytes: str) -> float:
    return float(kilobytes.replace(",", ""))
