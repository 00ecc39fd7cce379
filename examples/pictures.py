"""Every picture of docs/plots.md, from a network trained on the embedded digits, in about a minute.

python examples/pictures.py [FOLDER]
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, digits
from pysolve.nn.evaluate import accuracy
from pysolve.nn.zoo import DigitsNet
from pysolve.report import plots
from pysolve.training.fit import fit

TARGETS = [{"params": share} for share in (0.3, 0.1, 0.05, 0.03, 0.02, 0.014, 0.01, 0.007, 0.005, 0.0035)]
PRUNED = 0.8


def main(folder: Path) -> None:
    """Train, compress in several ways, draw."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset, model = digits(), trained()
    batches = torch.from_numpy(dataset.x_train).split(256)
    plots.plot_pareto(sweeps(model, dataset, batches), folder / "plot_pareto.png", score="test accuracy (%)")
    report = ps.compress(model, batches, target={"params": 0.1}, progress=False).report
    plots.plot_elimination(report, folder / "plot_elimination.png")
    report = ps.compress(model, batches, target={"params": 0.1}, select="lasso", progress=False).report
    plots.plot_channels(report, folder / "plot_channels.png")
    correlations = ps.gather(model, batches, progress=False)
    draw_solves(correlations["fc2"], folder / "plot_convergence.png")
    draw_weights(model, folder / "plot_weights.png")
    print(f"Wrote {', '.join(sorted(one.name for one in folder.glob('plot_*.png')))} to {folder}/")


def trained() -> DigitsNet:
    """An ordinary network, trained the ordinary way."""
    dataset = digits()
    torch.manual_seed(0)
    model = DigitsNet()
    fit(model, dataset.x_train, dataset.y_train, epochs=20, batch_size=64, lr=5e-3)
    return model


def sweeps(model: DigitsNet, dataset: Dataset, batches: tuple[torch.Tensor, ...]) -> dict[str, ps.Sweep]:
    """Two ways to choose channels, at every target, also retrained for two epochs."""

    def evaluate(network: nn.Module) -> float:
        return accuracy(network, dataset.x_test, dataset.y_test)

    def retrain(network: nn.Module) -> None:
        fit(network, dataset.x_train, dataset.y_train, epochs=2, batch_size=64, progress=False)

    return {
        select: ps.sweep(
            model, batches, targets=TARGETS, select=select, evaluate=evaluate, retrain=retrain, progress=False
        )
        for select in ("elimination", "magnitude")
    }


def draw_solves(correlations: ps.Correlations, path: Path) -> None:
    """One layer's group lasso, by every solver."""
    problem = correlations.centered()
    lam = 0.05 * ps.lam_max(problem)
    solvers = (ps.newton, ps.alternate_minimization, ps.fista, ps.proximal_gradient)
    histories = {solve.__name__.replace("_", " "): solve(problem, lam, tol=1e-9) for solve in solvers}
    plots.plot_convergence(histories, path)


def draw_weights(model: DigitsNet, path: Path) -> None:
    """One layer before and after pruning."""
    pruned = ps.prune(model, amount={"fc1": PRUNED}).model
    weights = {"fc1": model.fc1.weight, "fc1, pruned": pruned.fc1.weight}
    threshold = float(model.fc1.weight.detach().abs().quantile(PRUNED))
    plots.plot_weights(weights, path, thresholds=threshold)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
