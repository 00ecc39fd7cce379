"""A deep MLP on MNIST by singular values, as published, beside ours at the same ranks.

    python examples/e3_svd_mlp.py --data DIR

1. Network: 784–1024×5–10, Adam at 1e-4. Trained for 12 epochs instead of the published 53, so that the whole
   experiment fits 20 minutes on two cores; kept in mlp.safetensors.
2. Every weight but the last becomes two factors of D singular values: of the weights alone, and by what the
   layers read of unlabelled training images. Nothing is trained.
3. The network of D = 20 trained on: with labels, and without any from the original's outputs.

Every figure is printed next to the published one, in Markdown, and drawn (ranks.png).
"""

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import experiment
from experiment import first_images, loader, score, show, unlabelled
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import Mlp
from pysolve.report.drawing import COLORS, finish, new_axes
from pysolve.tables import Table

SIZES = (784, *[1024] * 5, 10)
RECIPE = {"epochs": 12, "batch_size": 128, "lr": 1e-4}
# Singular values, and the published accuracy.
PUBLISHED = {10: "67.9–74.5", 20: "94–95", 30: "97–97.6", 40: "97–97.6", 50: "98.1"}
TRAINED, PUBLISHED_TRAINED = 20, "98.0 (25 epochs)"
PUBLISHED_DENSE = "98.5 (53 epochs)"
# Of these ranks all training images are looked at too; they are 30 times as many as ``FEW``.
LARGE_RANKS = (10, 20)
FEW = 2000
# How the factors are trained on.
ON = {"epochs": 4, "lr": 1e-3, "batch_size": 128}
WITHOUT_LABELS = {"temperature": 4.0, "mix": 0.3}
QUICK = {"images": 600, "few": 200, "epochs": 1, "ranks": (10, 20)}
# Batches of the size trained with, to time an epoch by.
TIMED = 40


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Train once, factor at every rank, train on, print and draw."""
    shorter = {"epochs": QUICK["epochs"]} if quick else {}
    recipe = RECIPE | shorter
    show(f"Trained for {recipe['epochs']} epochs instead of 53, to fit 20 minutes on two cores.")
    path = out / "mlp.safetensors"
    model = experiment.kept(lambda: Mlp(SIZES), dataset, path, recipe, seed, train=experiment.adam)
    counts = (QUICK["few"], len(dataset.x_train)) if quick else (FEW, len(dataset.x_train))
    networks = {
        rank: factored(model, dataset, rank, counts if rank in LARGE_RANKS else counts[:1])
        for rank in (QUICK["ranks"] if quick else PUBLISHED)
    }
    scores = {rank: [score(one, dataset) for one in row] for rank, row in networks.items()}
    dense = score(model, dataset)
    show(ranks_table(dense, scores, networks, model, counts))
    show(trained_table(model, networks[TRAINED][-1], dataset, ON | shorter, seed))
    draw(scores, dense, counts, out / "ranks.png")
    show(f"Wrote {out / 'ranks.png'}")


def factored(model: Mlp, dataset: Dataset, rank: int, counts: Sequence[int]) -> list[nn.Module]:
    """All layers but the last at a rank: by their weights, and by so many images each."""
    *hidden, _ = dict(model.named_children())
    how = {"rank": dict.fromkeys(hidden, rank), "layout": "factored", "progress": False}
    plain = ps.low_rank(model, method="svd", **how).model
    return [plain, *(ps.low_rank(model, unlabelled(dataset, n, 500), **how).model for n in counts)]


def trained_on(
    model: nn.Module, smaller: nn.Module, dataset: Dataset, on: Mapping[str, float], seed: int
) -> dict[str, nn.Module]:
    """Two copies of the factored network: trained on with labels, and by the original's outputs."""
    supervised, distilled = copy.deepcopy(smaller), copy.deepcopy(smaller)
    training = {"epochs": on["epochs"], "lr": on["lr"], "seed": seed, "progress": False}
    ps.finetune(supervised, loader(dataset, on["batch_size"]), **training)
    how = {"batch_size": on["batch_size"], **WITHOUT_LABELS}
    ps.distill(distilled, model, unlabelled(dataset, None, 500), **how, **training)
    return {"with labels": supervised, "without labels, by the original's outputs": distilled}


def epoch_seconds(model: nn.Module, dataset: Dataset, batch_size: int) -> float:
    """Processor time of one epoch with labels, judged by a few batches."""
    n = min(TIMED * batch_size, len(dataset.x_train))
    few, network = first_images(dataset, n), copy.deepcopy(model)
    start = time.process_time()
    ps.finetune(network, loader(few, batch_size), epochs=1, progress=False)
    return (time.process_time() - start) * len(dataset.x_train) / n


def ranks_table(
    dense: float,
    scores: Mapping[int, Sequence[float]],
    networks: Mapping[int, Sequence[nn.Module]],
    model: nn.Module,
    counts: Sequence[int],
) -> Table:
    """A row for the dense network and for every rank."""
    head = ("D", "published", "ours: weights alone", *(f"by what is read, {n:,} images" for n in counts))
    rows = [("dense", PUBLISHED_DENSE, f"{dense:.2f}", *[""] * len(counts), f"{parameters(model):,}")]
    for rank, row in scores.items():
        cells = [f"{one:.2f}" for one in row] + [""] * (1 + len(counts) - len(row))
        rows.append((str(rank), PUBLISHED[rank], *cells, f"{parameters(networks[rank][0]):,}"))
    title = "Five layers at D singular values, not trained: accuracy on the test set (%)"
    return Table(title, (*head, "parameters"), tuple(rows))


def trained_table(
    model: nn.Module, smaller: nn.Module, dataset: Dataset, on: Mapping[str, float], seed: int
) -> Table:
    """The network of one rank trained on, and what an epoch costs."""
    seconds = [epoch_seconds(one, dataset, on["batch_size"]) for one in (model, smaller)]
    rows = [
        ("dense", PUBLISHED_DENSE, f"{score(model, dataset):.2f}", f"{seconds[0]:.1f}"),
        ("factored, not trained", "94.0", f"{score(smaller, dataset):.2f}", ""),
    ]
    for name, network in trained_on(model, smaller, dataset, on, seed).items():
        ours, labelled = f"{score(network, dataset):.2f}", name == "with labels"
        rows.append((name, PUBLISHED_TRAINED * labelled, ours, f"{seconds[1]:.1f}" * labelled))
    title = f"D = {TRAINED} trained on for {on['epochs']} epochs: accuracy on the test set (%)"
    return Table(title, ("network", "published", "ours", "CPU seconds an epoch with labels"), tuple(rows))


def draw(scores: Mapping[int, Sequence[float]], dense: float, counts: Sequence[int], path: Path) -> None:
    """Accuracy against the rank."""
    ax = new_axes()
    names = ("weights alone", *(f"by what is read, {n:,} images" for n in counts))
    for i, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        points = [(rank, row[i]) for rank, row in scores.items() if len(row) > i]
        ax.plot(*zip(*points, strict=True), "o-", ms=4, color=color, label=name)
    ax.axhline(dense, color="0.5", ls="--", lw=1, label="dense")
    ax.set(xlabel="singular values of every layer", ylabel="test accuracy (%)")
    finish(ax, path, loc="lower right")


app = experiment.script(run, lambda data: mnist(data), out="e3", few=QUICK["images"])


if __name__ == "__main__":
    app()
