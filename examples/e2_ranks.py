"""One layer of an MLP at low rank: accuracy by its weights alone and by what it reads; operations."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from experiment import score, unlabelled
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.layer.reduced_rank import factor_layer
from pysolve.nn.running import as_array
from pysolve.report.drawing import COLORS, finish, log_axis, new_axes
from pysolve.tables import Table

LAYER, BATCH = "fc3", 32
RANKS = (128, 100, 90, 80, 60, 50, 40, 30, 20, 10, 5, 2, 1)
# Published accuracies where they are known, and operations for a batch.
PUBLISHED = {128: 97.24, 90: 97.26, 80: 97.26, 60: 97.26, 20: 97.16, 10: 97.24, 5: 80.23, 2: 34.73}
PUBLISHED_OPERATIONS = {60: 852_480, 20: 258_560, 10: 126_080}
PUBLISHED_DENSE = 1_048_576
# Unlabelled training images.
COUNTS = (10_000, 60_000)
DENSER = "not smaller"


def operations(sizes: Sequence[int]) -> int:
    """Multiplications in a product of matrices, by the best order.

    Parameters
    ----------
    sizes : sequence of int
        Matrix i is of sizes[i] × sizes[i + 1].
    """
    labels = [chr(ord("a") + i) for i in range(len(sizes))]
    terms = ["".join(pair) for pair in pairwise(labels)]
    size = dict(zip(labels, sizes, strict=True))
    # Shapes are all that is looked at.
    matrices = [np.broadcast_to(0.0, shape) for shape in pairwise(sizes)]
    order, _ = np.einsum_path(f"{','.join(terms)}->{labels[0]}{labels[-1]}", *matrices, optimize="optimal")
    total = 0
    for step in order[1:]:
        several = [terms.pop(i) for i in sorted(step, reverse=True)]
        total += int(np.prod([size[label] for label in set("".join(several))]))
        # Labels that appear once are kept.
        terms.append("".join(set.symmetric_difference(*map(set, several))))
    return total


def ranks_table(
    model: nn.Module, scores: Mapping[int, Sequence[float]], counts: Sequence[int], dense: float
) -> Table:
    """A row for every rank; published | ours, for accuracies and for operations."""
    h, d = model.get_submodule(LAYER).weight.shape
    head = ("rank", "published", "weights alone", *(f"ours, {n:,} images" for n in counts))
    work = ("operations published", "x U S V", "x U V")
    empty = ("",) * len(counts)
    rows = [
        ("dense", "", f"{dense:.2f}", *empty, f"{PUBLISHED_DENSE:,}", *[f"{operations((BATCH, d, h)):,}"] * 2)
    ]
    for rank, (plain, *ours) in scores.items():
        cells = [f"{plain:.2f}", *(f"{score:.2f}" for score in ours), *[DENSER] * (len(counts) - len(ours))]
        published = f"{PUBLISHED[rank]:.2f}" if rank in PUBLISHED else ""
        known = f"{PUBLISHED_OPERATIONS[rank]:,}" if rank in PUBLISHED_OPERATIONS else ""
        both = [operations((BATCH, d, rank, rank, h)), operations((BATCH, d, rank, h))]
        rows.append((str(rank), published, *cells, known, *(f"{count:,}" for count in both)))
    title = f"{LAYER} at low rank, not trained: accuracy on the test set (%), operations for {BATCH} images"
    return Table(title, (*head, *work), tuple(rows), words=())


def accuracies(model: nn.Module, dataset: Dataset, rank: int, counts: Sequence[int]) -> list[float]:
    """Accuracies of the truncated SVD, and by so many images each where the rank pays."""
    layer = model.get_submodule(LAYER)
    plain = factor_layer(as_array(layer.weight).astype(float), None, rank).form
    networks = [ps.apply(model, ps.Plan(forms={f"{LAYER}.weight": plain}))]
    h, d = layer.weight.shape
    if rank * (h + d) < h * d:
        how = {"rank": {LAYER: rank}, "layout": "factored", "progress": False}
        networks += [ps.low_rank(model, unlabelled(dataset, n, 500), **how).model for n in counts]
    return [score(network, dataset) for network in networks]


def draw(scores: Mapping[int, Sequence[float]], path: Path) -> None:
    """Accuracy against the rank."""
    ax = new_axes()
    ax.plot(*zip(*PUBLISHED.items(), strict=True), "*--", color="0.5", label="published")
    for i, (label, color) in enumerate((("weights alone", COLORS[0]), ("by what it reads", COLORS[1]))):
        # The last column has most images.
        points = [(rank, row[-i]) for rank, row in scores.items() if len(row) > i]
        ax.plot(*zip(*points, strict=True), "o-", ms=4, color=color, label=label)
    log_axis(ax.xaxis)
    ax.set(xlabel=f"rank of {LAYER}", ylabel="test accuracy (%)")
    finish(ax, path, loc="lower right")
