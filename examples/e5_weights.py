"""Single weights of LeNet-5's Linear layers: by standard deviation and retrained, or without labels."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment import dense_line, error_axis, errors, loader, score, terminal_table, unlabelled
from matplotlib.ticker import NullLocator
from rich.console import RenderableType
from rich.table import Table
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.cost.nonzeros import Nonzeros, nonzeros
from pysolve.report import drawing
from pysolve.tables import as_text
from pysolve.training.finetune import finetune

# Shares of the weights that are kept, as published, and multiples of them for the curves.
KEPT = {"fc1": 0.0712, "fc2": 0.0477}
SHARES = (4.0, 2.0, 1.0, 0.5, 0.25)
EPOCHS, LR = 4, 1e-3
# Unlabelled images for optimal brain surgeon.
IMAGES = 2000
PUBLISHED = {"before": 98.52, "pruned": 91.73, "retrained": 98.69, "left": 43_681}


@dataclass(frozen=True)
class Outcome:
    """Accuracies, in per cent of the test set, at one size: a multiple of the published shares."""

    share: float
    pruned: float
    retrained: float
    surgeon: float
    counts: Nonzeros


def compare_weights(
    model: nn.Module, dataset: Dataset, path: Path, *, shares: Sequence[float] = SHARES, epochs: int = EPOCHS
) -> Iterator[RenderableType]:
    """Prune at every size, with and without training; tables at the published one, a picture of all."""
    before = score(model, dataset)
    outcomes = [prune_and_retrain(model, dataset, share, epochs) for share in shares]
    published = min(outcomes, key=lambda one: abs(one.share - 1))
    yield results_table(before, published, epochs)
    yield "\n".join(["", *as_text(published.counts.table()), ""])
    yield sensitivities(model)
    draw(before, outcomes, path)


def prune_and_retrain(model: nn.Module, dataset: Dataset, share: float, epochs: int) -> Outcome:
    """The published way, and without labels, at one size."""
    amount = {name: 1 - share * kept for name, kept in KEPT.items()}
    masked = ps.prune(model, method="std", amount=amount, layout="masked").model
    retrained = copy.deepcopy(masked)
    finetune(retrained, loader(dataset), epochs=epochs, lr=LR)
    networks = (masked, retrained, by_surgeon(model, dataset, amount))
    return Outcome(share, *(score(network, dataset) for network in networks), nonzeros(retrained))


def by_surgeon(model: nn.Module, dataset: Dataset, amount: dict[str, float]) -> nn.Module:
    """Optimal brain surgeon in every layer, its other weights refitted: no labels, no training."""
    how = {"method": "obs", "amount": amount, "layout": "dense", "progress": False}
    return ps.prune(model, unlabelled(dataset, IMAGES), **how).model


def results_table(before: float, ours: Outcome, epochs: int) -> Table:
    """Published and ours, side by side."""
    title = "LeNet-5 with C5 on MNIST: Linear layers pruned by standard deviation"
    caption = f"Optimal brain surgeon: {IMAGES:,} unlabelled images, nothing trained."
    table = terminal_table(title, ("", "published", "ours"), caption)
    rate = ours.counts.size / PUBLISHED["left"]
    kept = " and ".join(f"{100 * ours.share * kept:.2f} %" for kept in KEPT.values())
    rows = (
        ("kept of fc1 and fc2", "7.12 % and 4.77 %", kept),
        ("accuracy before (%)", f"{PUBLISHED['before']}", f"{before:.2f}"),
        ("pruned", f"{PUBLISHED['pruned']}", f"{ours.pruned:.2f}"),
        (f"pruned, {epochs} epochs of retraining", f"{PUBLISHED['retrained']}", f"{ours.retrained:.2f}"),
        ("optimal brain surgeon, no retraining", "", f"{ours.surgeon:.2f}"),
        ("parameters left", f"{PUBLISHED['left']:,}", f"{ours.counts.nonzeros:,}"),
        ("rate", f"{rate:.2f}", f"{ours.counts.rate:.2f}"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def sensitivities(model: nn.Module) -> str:
    """The thresholds of the published shares, in standard deviations."""
    parts = []
    for name, kept in KEPT.items():
        weight = model.get_submodule(name).weight.detach()
        limit = float(weight.abs().flatten().quantile(1 - kept) / weight.std(correction=0))
        parts.append(f"{limit:.2f} standard deviations of {name}")
    return f"Thresholds: {' and '.join(parts)}."


def draw(before: float, outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy against the share of the Linear layers' weights that is left."""
    ax = drawing.new_axes(7.5, 4.6)
    shares = [100 * one.share * KEPT["fc1"] for one in outcomes]
    dense_line(ax, before, f"dense, {before:.2f} %")
    curves = {
        "pruned, retrained on labels": [one.retrained for one in outcomes],
        "optimal brain surgeon, no labels": [one.surgeon for one in outcomes],
        "pruned": [one.pruned for one in outcomes],
    }
    for (label, scores), color in zip(curves.items(), drawing.COLORS, strict=False):
        wrong = [errors(one) for one in scores]
        ax.plot(shares, wrong, color=color, marker="o", markersize=5, linewidth=1.8, label=label)
    stars = {"published: pruned": PUBLISHED["pruned"], "published: retrained": PUBLISHED["retrained"]}
    for (label, right), marker in zip(stars.items(), "v*", strict=True):
        ax.plot(7.12, errors(right), marker, color="0.2", markersize=10, linestyle="none", label=label)
    ax.set(xscale="log", xlabel="weights left in fc1 (%); two thirds of that in fc2")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(shares, [f"{share:.3g}" for share in shares])
    error_axis(ax, (0.5, 95))
    drawing.finish(ax, path)
