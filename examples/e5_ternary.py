"""Networks of three values a layer, taught by what they were, without labels."""

import time
from collections.abc import Iterable, Mapping

from experiment import file_bytes, score, unlabelled
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import nbytes
from pysolve.tables import Table

# Trained ternary quantisation of ResNet-32, 44 and 56 on CIFAR-10: files, and changes of accuracy.
PUBLISHED_RATE, PUBLISHED = 16, "+0.04, +0.16, +0.36"
COUNT = 2000


def ternary_table(
    networks: Mapping[str, tuple[nn.Module, Dataset]],
    seconds: Iterable[float],
    *,
    count: int = COUNT,
) -> Table:
    """Each network as it is, with its weights rounded, and trained for so many seconds."""
    rows = [("ResNet-32, 44, 56, published", "labels", "", f"{PUBLISHED_RATE}", "", PUBLISHED, "")]
    for (name, (model, dataset)), limit in zip(networks.items(), seconds, strict=True):
        before = score(model, dataset)
        rows.append((name, "", f"{nbytes(model):,}", "1", f"{before:.2f}", "", ""))
        ways = {
            "nothing": {},
            f"outputs, {limit:g} s": {"distill": {"seconds": limit}},
        }
        for way, options in ways.items():
            rows.append((name, way, *ternary(model, dataset, before, count, options)))
    head = ("network", "trained on", "bytes", "times smaller", "accuracy", "change", "seconds")
    return Table("Ternary weights", head, tuple(rows), words=(0, 1))


def ternary(
    model: nn.Module, dataset: Dataset, before: float, count: int, options: Mapping[str, object]
) -> tuple[str, ...]:
    """Cells of a table's row."""
    start = time.perf_counter()
    result = ps.quantize(model, unlabelled(dataset, count), scheme="ternary", progress=False, **options)
    seconds, size = time.perf_counter() - start, file_bytes(result, "auto")
    right = score(result.model, dataset)
    rate = nbytes(model) / size
    return f"{size:,}", f"{rate:.1f}", f"{right:.2f}", f"{right - before:+.2f}", f"{seconds:.0f}"
