"""Networks pruned while they are trained: dynamic surgery, and gradual pruning to the same size."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment import loader, score, terminal_table
from rich.console import RenderableType
from rich.table import Table
from torch import nn

from pysolve.cli.datasets import Dataset
from pysolve.methods.gradual import network_surgery, prune_gradually
from pysolve.nn.cost.nonzeros import Nonzeros, nonzeros
from pysolve.report import drawing
from pysolve.tables import as_text

# Times fewer parameters, as published, and shares of all weights that are removed for it; biases stay.
PUBLISHED = {"LeNet-5": 108, "LeNet-300-100": 56}
AMOUNTS = {"LeNet-5": 0.9925, "LeNet-300-100": 0.984}
EPOCHS, LR = 8, 3e-3
METHODS = {"dynamic surgery": network_surgery, "gradual": prune_gradually}


@dataclass(frozen=True)
class Outcome:
    """One network, pruned while it was trained."""

    method: str
    amount: float
    accuracy: float
    counts: Nonzeros
    seconds: float


def compare_surgery(
    model: nn.Module,
    dataset: Dataset,
    path: Path,
    *,
    name: str = "LeNet-5",
    amount: float | None = None,
    epochs: int = EPOCHS,
) -> Iterator[RenderableType]:
    """Both methods at one size, the published one by default."""
    before, share = score(model, dataset), AMOUNTS[name] if amount is None else amount
    outcomes = [train(model, dataset, method, share, epochs) for method in METHODS]
    yield surgery_table(name, before, outcomes, epochs)
    yield "\n".join(["", *as_text(outcomes[0].counts.table()), ""])
    draw(name, before, outcomes, path)


def train(model: nn.Module, dataset: Dataset, method: str, amount: float, epochs: int) -> Outcome:
    """Prune by one of the methods, and judge the result."""
    start = time.perf_counter()
    pruned = METHODS[method](
        model, loader(dataset), amount=amount, epochs=epochs, lr=LR, layout="dense"
    ).model
    seconds = time.perf_counter() - start
    return Outcome(method, amount, score(pruned, dataset), nonzeros(pruned), seconds)


def surgery_table(name: str, before: float, outcomes: Sequence[Outcome], epochs: int) -> Table:
    """Published and ours."""
    caption = f"Dense network: {before:.2f} %. {epochs} epochs on labels; parameters: weights and biases."
    columns = ("", "weights pruned", "parameters left", "times fewer", "accuracy", "seconds")
    table = terminal_table(f"{name} on MNIST: pruned while trained", columns, caption)
    table.add_row("published, dynamic surgery", "", "", f"{PUBLISHED[name]}", "", "")
    for one in outcomes:
        shown = (f"{one.counts.nonzeros:,}", f"{one.counts.rate:.1f}", f"{one.accuracy:.2f}")
        table.add_row(one.method, f"{one.amount:.2%}", *shown, f"{one.seconds:.0f}")
    return table


def draw(name: str, before: float, outcomes: Sequence[Outcome], path: Path) -> None:
    """Share of each layer's weights that is left, by method."""
    bars = {}
    for one in outcomes:
        weights = [tensor for tensor in one.counts.tensors if tensor.name.endswith(".weight")]
        shares = {one.name.removesuffix(".weight"): 100 * one.nonzeros / one.size for one in weights}
        bars[f"{one.method}: {one.counts.rate:.0f} times fewer, {one.accuracy:.2f} %"] = shares
    ax = drawing.new_axes(7.5)
    width = 0.8 / len(bars)
    for i, (label, shares) in enumerate(bars.items()):
        places = [layer + (i - (len(bars) - 1) / 2) * width for layer in range(len(shares))]
        color = drawing.COLORS[i % len(drawing.COLORS)]
        shown = ax.bar(places, [*shares.values()], 0.95 * width, color=color, label=label)
        ax.bar_label(shown, fmt="%.2g", fontsize=8)
    ax.set(yscale="log", ylabel="weights left (%)", title=f"{name} on MNIST, dense {before:.2f} %")
    ax.set_xticks(range(len(shares)), [*shares])
    drawing.finish(ax, path, grid=None)
