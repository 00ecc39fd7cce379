"""Whole channels of LeNet-5: by their own weights or by their effect on the outputs, by layer or over all."""

import copy
from collections.abc import Sequence

import numpy as np
from e1_layers import CONV2, FC1, FC2
from experiment import loader, score, terminal_table, unlabelled
from rich.table import Table
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.layer.scores import channel_norms, propagated_importance
from pysolve.nn.evaluate import parameters
from pysolve.training.finetune import finetune

SITES = (CONV2, FC1, FC2)
LAYERS = ("conv1", "conv2", "fc1", "fc2")
# Of the parameters.
SIZES = (0.5, 0.3, 0.15)
# Unlabelled, for elimination.
IMAGES = 2000

Kept = tuple[np.ndarray, ...]


def compare_rankings(model: nn.Module, dataset: Dataset, *, sizes: Sequence[float] = SIZES) -> Table:
    """Both scores, ranked both ways, and elimination, at equal sizes; as pruned and after one epoch."""
    title = "LeNet-5 on MNIST: channels ranked by layer or over all layers"
    caption = (
        f"Importance: propagated back from the outputs. Elimination: {IMAGES:,} unlabelled images, weights "
        "refitted. +1 epoch: trained on labels."
    )
    columns = ("share", "score", "ranked", "kept", "parameters", "accuracy", "+1 epoch")
    table = terminal_table(title, columns, caption, words=("score", "ranked"))
    for size in sizes:
        for name, values in scores(model).items():
            for ranked in ("by layer", "over all"):
                kept = fitting(model, values, size, together=ranked == "over all")
                network = ps.apply(model, ps.Plan(tuple(map(ps.Collapse, SITES, kept))))
                table.add_row(f"{size:.0%}", name, ranked, *figures(network, dataset))
        eliminated = by_elimination(model, dataset, size)
        table.add_row(f"{size:.0%}", "elimination", "", *figures(eliminated, dataset), end_section=True)
    return table


def scores(model: nn.Module) -> dict[str, tuple[np.ndarray, ...]]:
    """Scores of the channels of every site: norms of their own weights, and importance for the outputs."""
    weights = [model.get_submodule(name).weight.detach().numpy() for name in LAYERS]
    return {
        "norm": tuple(channel_norms(weight) for weight in weights[:-1]),
        "importance": propagated_importance(weights)[:-1],
    }


def fitting(model: nn.Module, values: tuple[np.ndarray, ...], size: float, *, together: bool) -> Kept:
    """The most channels, largest scores first, whose network has this share of the parameters at most."""
    limit = size * parameters(model)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if left(best(values, middle, together=together)) <= limit:
            low = middle
        else:
            high = middle
    return best(values, low, together=together)


def best(values: tuple[np.ndarray, ...], share: float, *, together: bool) -> Kept:
    """This share of the channels: of every site, or of all, scores measured by their site's mean."""
    if not together:
        counts = [max(1, int(share * len(value))) for value in values]
        return tuple(np.sort(np.argsort(-v)[:k]) for v, k in zip(values, counts, strict=True))
    relative = [value / value.mean() for value in values]
    limit = np.quantile(np.concatenate(relative), 1 - share)
    return tuple(np.flatnonzero((value >= limit) | (value == value.max())) for value in relative)


def left(kept: Kept) -> int:
    """Parameters of a LeNet-5 with so many channels."""
    a, b, c = map(len, kept)
    return 26 * a + (25 * a + 1) * b + (16 * b + 1) * c + 10 * (c + 1)


def by_elimination(model: nn.Module, dataset: Dataset, size: float) -> nn.Module:
    """The network as ``compress`` shrinks it on unlabelled images."""
    return ps.compress(model, unlabelled(dataset, IMAGES), target={"params": size}, progress=False).model


def figures(network: nn.Module, dataset: Dataset) -> tuple[str, ...]:
    """Channels, parameters, accuracy, and accuracy after one epoch."""
    trained = copy.deepcopy(network)
    finetune(trained, loader(dataset), epochs=1, lr=1e-3, progress=False)
    widths = " ".join(str(len(network.get_submodule(name).weight)) for name in LAYERS[:-1])
    accuracies = (f"{score(one, dataset):.2f}" for one in (network, trained))
    return widths, f"{parameters(network):,}", *accuracies
