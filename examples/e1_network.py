"""The whole LeNet-5: accuracy against size by the lasso and by elimination, also retrained."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from e1_layers import CONV2, FC1, FC2
from experiment import dense_line, error_axis, errors, fitted, score, terminal_table, unlabelled
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter
from rich.table import Table
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.zoo import LeNet5
from pysolve.report import drawing

IMAGES = 2000
RETRAINING = {"epochs": 1, "batch_size": 256, "lr": 1e-3}
# Of each site's lam_max; above 1 nothing of a layer is left.
SHARES = (1.1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003)
# Share of the parameters and accuracy, in per cent: fc2's inputs selected, weights debiased.
PUBLISHED = (16.47, 98.81)

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Pair:
    """Both methods at one size: that of one share of every site's lam_max, or the published one."""

    share: float | None
    lasso: ps.Report | None
    elimination: ps.Report


def compare_sizes(model: LeNet5, dataset: Dataset, shares: Sequence[float] = SHARES) -> list[Pair]:
    """Compress on unlabelled images by the lasso, and by elimination to as many parameters; retrain both."""
    images, dense = unlabelled(dataset, IMAGES), score(model, dataset)

    def evaluate(network: nn.Module) -> float:
        return dense if network is model else score(network, dataset)

    def retrain(network: nn.Module) -> None:
        fitted(network, dataset, **RETRAINING, progress=False)

    highest = largest_penalties(model, images)
    lasso: list[ps.Report] = []
    for share in shares:
        lam = {writer: share * most for writer, most in highest.items()}
        found = ps.compress(model, images, lam=lam, evaluate=evaluate, progress=False)
        trained = copy.deepcopy(found.model)
        retrain(trained)
        lasso.append(replace(found.report, retrained=evaluate(trained)))
    targets = [{"params": one.after["params"]} for one in lasso] + [{"params": PUBLISHED[0] / 100}]
    swept = ps.sweep(model, images, targets=targets, evaluate=evaluate, retrain=retrain, progress=False)
    pairs = [Pair(*both) for both in zip([*shares, None], [*lasso, None], swept.reports, strict=True)]
    return sorted(pairs, key=lambda pair: pair.elimination.after["params"])


def largest_penalties(model: LeNet5, images: Sequence[torch.Tensor]) -> dict[str, float]:
    """lam_max of each site, by its writer."""
    sites = (CONV2, FC1, FC2)
    found = ps.gather(model, images, sites=sites, progress=False)
    return {site.writers[0]: ps.lam_max(found[site.readers[0]].centered()) for site in sites}


def sizes_table(pairs: Sequence[Pair]) -> Table:
    """Both methods at every size; below, the notes of the lasso where it leaves nothing of a layer."""
    notes = [f"λ/λ_max = {one.share:g}: {note}" for one in pairs if one.lasso for note in one.lasso.notes]
    share, published = PUBLISHED
    caption = (
        f"Compressed on {IMAGES:,} unlabelled images. Kept: channels of conv1, conv2 and fc1, of 20, 50 and "
        f"500. Dense network: {pairs[0].elimination.score_before:.2f} %. "
        f"Published: {published} % at {share} %."
    )
    columns = ("λ/λ_max", "method", "parameters", "share", "kept", "accuracy", "+1 epoch")
    title, caption = "LeNet-5 on MNIST: accuracy against size", "\n".join([caption, *notes])
    table = terminal_table(title, columns, caption, words=("method",))
    for pair in pairs:
        if pair.lasso is not None:
            table.add_row(f"{pair.share:g}", "lasso", *figures(pair.lasso))
        table.add_row("", "elimination", *figures(pair.elimination), end_section=True)
    return table


def figures(one: ps.Report) -> tuple[str, ...]:
    """Parameters and their share, channels kept, accuracy, and accuracy after retraining."""
    size, share = f"{one.after['params']:,}", f"{100 * one.share('params'):.2f} %"
    kept = " ".join(str(site.kept) for site in one.sites if site.pinned is None)
    return size, share, kept, f"{one.score_after:.2f}", f"{one.retrained:.2f}"


def draw_sizes(pairs: Sequence[Pair], path: Path) -> None:
    """Accuracy against the share of parameters left; the axis is logarithmic in what is misclassified."""
    blue, orange, red, _ = drawing.COLORS
    ax, dense = drawing.new_axes(8.5, 5.2), pairs[0].elimination.score_before
    dense_line(ax, dense, f"original network, {dense:.2f} %")
    draw_method(ax, "elimination", blue, [pair.elimination for pair in pairs])
    draw_method(ax, "group lasso", orange, [pair.lasso for pair in pairs if pair.lasso])
    share, published = PUBLISHED
    label = f"published, {published} % with {share} % left"
    ax.plot(share, errors(published), "*", color=red, markersize=15, linestyle="none", label=label)
    ax.set(xscale="log", xlabel="parameters left (%)")
    ax.set_title(f"LeNet-5 on MNIST, all layers compressed on {IMAGES:,} unlabelled images")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    error_axis(ax, (0.42, 95))
    drawing.finish(ax, path, loc="lower right")


def draw_method(ax: Axes, label: str, color: str, reports: Sequence[ps.Report]) -> None:
    """Two curves: as compressed, and retrained."""
    shares = [100 * one.share("params") for one in reports]
    before, after = (
        [errors(score) for score in scores]
        for scores in zip(*((r.score_after, r.retrained) for r in reports), strict=True)
    )
    style = {"color": color, "marker": "o", "markersize": 5, "linewidth": 1.8}
    ax.plot(shares, before, label=label, **style)
    ax.plot(
        shares, after, label=f"{label}, retrained for one epoch", linestyle="--", fillstyle="none", **style
    )
