"""Weights and neurons of an MLP below a threshold: removed as published, and ours at the same size."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from experiment import score, unlabelled
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.cost.nonzeros import nonzeros
from pysolve.nn.evaluate import parameters
from pysolve.report.drawing import COLORS, finish
from pysolve.tables import Table

# Unlabelled training images for what is refitted, and how few are compared.
IMAGES, FEW = 10_000, 2000

# Of a threshold: accuracy and share of zeros, in per cent; accuracy and share of the parameters removed.
ZEROS = {
    0.0: (97.07, 0.0),
    0.01: (97.05, 21.3),
    0.02: (97.03, 42.0),
    0.03: (96.58, 61.0),
    0.04: (93.75, 74.6),
    0.05: None,
    0.06: (82.20, 86.2),
    0.07: (79.39, 89.1),
    0.08: (74.05, 91.3),
    0.09: (63.63, 93.1),
    0.1: None,
}
NEURONS = {
    0.0: (96.63, 0.0),
    0.1: (96.44, 62.0),
    0.2: (96.37, 64.8),
    0.3: (96.11, 67.9),
    0.4: (94.24, 70.9),
    0.6: (87.49, 76.0),
    0.7: (86.40, 78.1),
    0.8: (82.55, 81.3),
    0.9: (77.36, 83.3),
}
ZEROS_TITLE = "Weights below a threshold set to zero: accuracy on the test set (%)"
NEURONS_TITLE = "Neurons of a mean activation below a threshold removed: accuracy on the test set (%)"


@dataclass(frozen=True)
class Outcome:
    """Networks at one threshold: accuracies in per cent of the test set.

    Parameters
    ----------
    threshold : float
    removed : float
        Per cent of the weights that are zero, or of the parameters that are removed.
    left : str
        Bytes as compressed rows, or widths of the hidden layers.
    pruned, refitted, ours, few : float
        As published; with the other weights refitted; by our own choice, and that on ``FEW`` images.
    """

    threshold: float
    removed: float
    left: str
    pruned: float
    refitted: float
    ours: float
    few: float


def without_weights(model: nn.Module, dataset: Dataset, tau: float, few: int) -> Outcome:
    """Weights below ``tau`` set to zero, and two ways to compensate as many zeros."""
    prune = partial(ps.prune, model, layout="dense", progress=False)
    pruned = prune(method="magnitude", threshold=tau).model
    weights = [layer.weight for layer in pruned.children()]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(map(torch.numel, weights))
    many = unlabelled(dataset, IMAGES, 500)
    networks = (
        pruned,
        prune(many, method="magnitude", threshold=tau, refit="sequential").model,
        prune(many, method="obs", amount=share, scope="global").model,
        prune(unlabelled(dataset, few, 500), method="obs", amount=share, scope="global").model,
    )
    stored = f"{nonzeros(pruned).bytes('csr'):,}"
    return Outcome(tau, 100 * share, stored, *scores(networks, dataset))


def without_neurons(model: nn.Module, dataset: Dataset, limit: float, few: int) -> Outcome:
    """Neurons whose mean activation is below ``limit`` removed, and two ways to compensate as many."""
    prune = partial(ps.prune, model, progress=False)
    pruned = prune(unlabelled(dataset, None, 500), method="activation", threshold=limit).model
    hidden = [name for name, _ in model.named_children()][:-1]
    widths = {name: len(pruned.get_submodule(name).weight) for name in hidden}
    amount = {name: 1 - width / len(model.get_submodule(name).weight) for name, width in widths.items()}
    many = unlabelled(dataset, IMAGES, 500)
    networks = (
        pruned,
        prune(many, method="activation", amount=amount, refit="sequential").model,
        prune(many, method="elimination", amount=amount).model,
        prune(unlabelled(dataset, few, 500), method="elimination", amount=amount).model,
    )
    removed = 1 - parameters(pruned) / parameters(model)
    return Outcome(limit, 100 * removed, " ".join(map(str, widths.values())), *scores(networks, dataset))


def scores(networks: Sequence[nn.Module], dataset: Dataset) -> list[float]:
    """Accuracies on the test set."""
    return [score(network, dataset) for network in networks]


def zeros_table(outcomes: Sequence[Outcome], few: int) -> Table:
    head = ("τ", "published: zeros (%)", "accuracy", "ours: zeros (%)", "accuracy", "bytes as CSR")
    more = ("refitted", "optimal brain surgeon", f"on {few:,} images")
    rows = [cells(one, ZEROS[one.threshold]) for one in outcomes]
    return Table(ZEROS_TITLE, (*head, *more), tuple(rows), words=())


def neurons_table(outcomes: Sequence[Outcome], few: int) -> Table:
    head = ("threshold", "published: removed (%)", "accuracy", "ours: removed (%)", "accuracy")
    more = ("hidden widths", "refitted", "elimination", f"on {few:,} images")
    rows = [cells(one, NEURONS[one.threshold]) for one in outcomes]
    return Table(NEURONS_TITLE, (*head, *more), tuple(rows), words=())


def cells(one: Outcome, published: tuple[float, float] | None) -> tuple[str, ...]:
    theirs = ("", "") if published is None else (f"{published[1]:.1f}", f"{published[0]:.2f}")
    ours = (f"{one.removed:.1f}", f"{one.pruned:.2f}", one.left, f"{one.refitted:.2f}")
    return (f"{one.threshold:g}", *theirs, *ours, f"{one.ours:.2f}", f"{one.few:.2f}")


def draw(weights: Sequence[Outcome], neurons: Sequence[Outcome], path: Path) -> None:
    """Both experiments side by side: accuracy against what is removed."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="zeros (% of the weights)", title="Single weights")
    right.set(xlabel="parameters removed (%)", title="Neurons")
    draw_outcomes(left, weights, ZEROS.values(), ("below a threshold", "optimal brain surgeon"))
    draw_outcomes(right, neurons, NEURONS.values(), ("by mean activation", "elimination"))
    figure.savefig(path, dpi=160)


def draw_outcomes(
    ax: Axes,
    outcomes: Sequence[Outcome],
    published: Iterable[tuple[float, float] | None],
    names: tuple[str, str],
) -> None:
    """The published points, and a curve for each way."""
    accuracies, shares = zip(*(pair for pair in published if pair is not None), strict=True)
    ax.plot(shares, accuracies, "*--", color="0.5", label="published")
    curves: dict[str, Callable[[Outcome], float]] = {
        names[0]: lambda one: one.pruned,
        f"{names[0]}, others refitted": lambda one: one.refitted,
        names[1]: lambda one: one.ours,
    }
    for (label, curve), color in zip(curves.items(), COLORS, strict=False):
        shares = [one.removed for one in outcomes]
        ax.plot(shares, [*map(curve, outcomes)], "o-", ms=4, color=color, label=label)
    ax.set(ylabel="test accuracy (%)")
    finish(ax, loc="lower left")
