"""A small convolutional network at 8 bits: files as published and ours."""

from e2_quantization import SCHEMES, quantized
from e4_pruning import COUNT, PUBLISHED_FILE
from experiment import file_bytes, measured
from torch import nn

from pysolve.cli.datasets import Dataset
from pysolve.tables import Table

# Dynamic int8 is of the Linear layers alone: convolutions stay as they are.
PUBLISHED_DYNAMIC = "170"


def int8_table(model: nn.Module, dataset: Dataset, count: int = COUNT) -> Table:
    """A row for the network as it is and for every scheme; published | ours."""
    size, score = measured(model, model, dataset)
    rows = [("as trained", PUBLISHED_FILE, size, "100 %", score)]
    for name, scheme in SCHEMES.items():
        result = quantized(model, dataset, scheme, count)
        size, score = measured(result, result.model, dataset)
        published = PUBLISHED_DYNAMIC if scheme == "int8-dynamic" else ""
        share = f"{100 * file_bytes(result) / file_bytes(model):.0f} %"
        rows.append((name, published, size, share, score))
    head = ("weights", "published: kB", "ours: kB", "left", "accuracy")
    title = "At 8 bits, not trained again: files, and accuracy on the test set (%)"
    return Table(title, head, tuple(rows))
