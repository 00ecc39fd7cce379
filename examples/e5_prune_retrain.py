"""Pruning with and without retraining, as published: LeNets on MNIST, step by step.

    python examples/e5_prune_retrain.py --data DIR

1. Weights by standard deviation: the Linear layers of LeNet-5 with C5 keep 7 % and 5 %, retrained; beside
   it optimal brain surgeon, without labels and without retraining (weights.png).
2. Channels by importance propagated back from the outputs: ranked in each layer, and over all of them.
3. Dynamic network surgery: masks change while LeNet-5 and LeNet-300-100 are trained (surgery-*.png).

Every figure is printed next to the published one where there is one. Networks are trained once and kept.
"""

from pathlib import Path

import experiment
from e5_channels import compare_rankings
from e5_deep_compression import NETWORKS
from e5_surgery import compare_surgery
from e5_weights import compare_weights
from experiment import kept, show

from pysolve.cli.datasets import Dataset, mnist
from pysolve.nn.zoo import LeNetC5

C5_RECIPE = {"epochs": 4, "batch_size": 256, "lr": 3e-3}
# With --quick: one size each, and little training.
QUICK_WEIGHTS = {"shares": (1.0,), "epochs": 1}
QUICK_CHANNELS = {"sizes": (0.3,)}
QUICK_SURGERY = {"amount": 0.98, "epochs": 1}


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """All three parts."""
    c5 = kept(LeNetC5, dataset, out / "c5.safetensors", C5_RECIPE, seed)
    for part in compare_weights(c5, dataset, out / "weights.png", **(QUICK_WEIGHTS if quick else {})):
        show(part)
    models = {
        name: kept(one.make, dataset, out / one.file, one.recipe, seed) for name, one in NETWORKS.items()
    }
    show(compare_rankings(models["LeNet-5"], dataset, **(QUICK_CHANNELS if quick else {})))
    for name, model in models.items():
        options = {"name": name, **(QUICK_SURGERY if quick else {})}
        for part in compare_surgery(model, dataset, out / f"surgery-{name}.png", **options):
            show(part)
    show(f"Wrote weights.png, and surgery-*.png of each network, to {out}/")


app = experiment.script(run, lambda data: mnist(data), out="e5")


if __name__ == "__main__":
    app()
