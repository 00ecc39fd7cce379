"""Linear activation reconstruction of LeNet-5 on MNIST, as published, step by step.

    python examples/e1_linear_reconstruction.py --data DIR

1. Solvers: two random problems, every method, and how each converges (convergence.png).
2. Network: LeNet-5, trained once and kept in lenet5.safetensors.
3. fc2: which of its 500 inputs are needed, without a bias and with an unpenalised one.
4. conv2, fc1 and fc2: the lasso's whole path beside elimination.
5. The whole network: accuracy against size, also after one epoch of retraining (accuracy.png).

Every figure is printed next to the published one where there is one.
"""

from pathlib import Path

import experiment
import torch
from e1_layers import CONV2, FC1, FC2, compare_selectors, compress_fc2, gather_readers
from e1_network import compare_sizes, draw_sizes, sizes_table
from e1_solvers import compare_solvers
from experiment import console, show

from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.zoo import LeNet5

RECIPE = {"epochs": 8, "batch_size": 256, "lr": 3e-3}
# With --quick, of lam_max: for one layer, and for the whole network.
FEW_SHARES = ((1.0, 0.1, 0.02), (1.1, 0.1, 0.01))


def run(dataset: Dataset, out: Path, seed: int, *, retrain: bool, quick: bool) -> None:
    """Solvers, single layers, and the whole network."""
    for table in compare_solvers(out / "convergence.png"):
        show(table)
    show(f"Wrote {out / 'convergence.png'}")
    model = experiment.kept(LeNet5, dataset, out / "lenet5.safetensors", RECIPE, seed, retrain=retrain)
    compress_layers(model, dataset, quick=quick)
    compress_network(model, dataset, out / "accuracy.png", quick=quick)


def compress_layers(model: LeNet5, dataset: Dataset, *, quick: bool = False) -> None:
    """One layer at a time, all from one pass over the training images."""
    correlations = gather_readers(model, dataset)
    for part in compress_fc2(model, dataset, correlations["fc2"]):
        show(part)
    shares = {"shares": FEW_SHARES[0]} if quick else {}
    for site in (CONV2, FC1, FC2):
        (reader,) = site.readers
        show(compare_selectors(model, dataset, site, correlations[reader], **shares))


def compress_network(model: LeNet5, dataset: Dataset, path: Path, *, quick: bool = False) -> None:
    """All layers together."""
    with console.status("Compressing the whole network …"):
        pairs = compare_sizes(model, dataset, **({"shares": FEW_SHARES[1]} if quick else {}))
    show(sizes_table(pairs))
    draw_sizes(pairs, path)
    show(f"Wrote {path}")


# Training on all of MNIST gains from more threads than one.
app = experiment.script(run, lambda data: mnist(data), out="e1", threads=torch.get_num_threads())


if __name__ == "__main__":
    app()
