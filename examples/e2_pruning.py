"""Zero pruning and activation pruning of an MLP on MNIST, as published, beside ours at the same sizes.

    python examples/e2_pruning.py --data DIR

1. Network: 784–512–256–128–10, trained once and kept in mlp.safetensors.
2. Weights below a threshold become zero; beside it the same weights with the others refitted, and optimal
   brain surgeon with as many zeros.
3. Neurons whose mean activation lies below a threshold are removed; beside it as many of every layer with
   weights refitted, and by elimination.

Every figure is printed next to the published one, in Markdown, and drawn (pruning.png). Nothing is trained
but the network itself; what is refitted sees unlabelled training images alone.
"""

from pathlib import Path

import experiment
from e2_thresholds import (
    FEW,
    NEURONS,
    ZEROS,
    draw,
    neurons_table,
    without_neurons,
    without_weights,
    zeros_table,
)
from experiment import show

from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.zoo import Mlp

RECIPE = {"epochs": 5, "batch_size": 64, "lr": 1e-3}
QUICK = {"images": 600, "few": 100, "epochs": 1, "thresholds": 3}


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Train once, prune both ways, print and draw."""
    model = trained(dataset, out / "mlp.safetensors", seed, quick=quick)
    few = QUICK["few"] if quick else FEW
    step = len(ZEROS) // QUICK["thresholds"] if quick else 1
    weights = [without_weights(model, dataset, tau, few) for tau in [*ZEROS][::step]]
    show(zeros_table(weights, few))
    neurons = [without_neurons(model, dataset, limit, few) for limit in [*NEURONS][::step]]
    show(neurons_table(neurons, few))
    draw(weights, neurons, out / "pruning.png")
    show(f"Wrote {out / 'pruning.png'}")


def trained(dataset: Dataset, path: Path, seed: int = 0, *, quick: bool = False) -> Mlp:
    """The network from ``path``, or trained as published."""
    recipe = RECIPE | ({"epochs": QUICK["epochs"]} if quick else {})
    return experiment.kept(Mlp, dataset, path, recipe, seed, train=experiment.adam)


def read(folder: Path) -> Dataset:
    """MNIST, scaled as published."""
    return mnist(folder, mean=0.5, std=0.5)


app = experiment.script(run, read, out="e2", few=QUICK["images"])


if __name__ == "__main__":
    app()
