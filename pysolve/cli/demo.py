"""The demonstration: train a small network, compress its fully connected part, show before and after."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset, Images
from pysolve.correlations import Array
from pysolve.nn.evaluate import latency, macs, parameters
from pysolve.nn.running import evaluating, forward
from pysolve.nn.state import copy_of
from pysolve.nn.zoo import DigitsNet, LeNet5
from pysolve.report import plots

Network = DigitsNet | LeNet5
# Figures of a network, by their names in the table.
Costs = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """Network and training, share of the neurons of ``fc1`` to keep, and number of threads."""

    network: Callable[[], Network]
    epochs: int
    batch_size: int
    lr: float
    share: float
    threads: int


# More threads bring nothing to batches of 64 tiny images; on a busy machine two took 20 times as long as one.
DIGITS = Setting(DigitsNet, epochs=20, batch_size=64, lr=5e-3, share=0.2, threads=1)
MNIST = Setting(LeNet5, epochs=8, batch_size=256, lr=3e-3, share=0.112, threads=torch.get_num_threads())


def run(data: Path | None, out: Path, *, seed: int = 0, epochs: int | None = None) -> None:
    """Run all steps from data to picture; ``data`` is a folder of MNIST files, None means embedded digits."""
    console = Console(highlight=False)
    dataset, setting = (ps.digits(seed), DIGITS) if data is None else (ps.mnist(data), MNIST)
    out.mkdir(parents=True, exist_ok=True)
    with threads(setting.threads):
        model = train(setting, dataset, seed, epochs or setting.epochs, console)
        correlations = ps.gather(model, batches(dataset.x_train), layers=["fc2"])["fc2"]
        solution = select(correlations, round(setting.share * correlations.groups), console)
        M = np.asarray(ps.debias(correlations.centered(), keep=solution.keep))
        refitted = plan(correlations, M, solution.keep)
        smaller = ps.apply(model, refitted, probe=torch.from_numpy(dataset.x_test[:256]))
        files = {"dense.safetensors": model, "compressed.safetensors": smaller}
        costs = [measure(network, dataset, out / name) for name, network in files.items()]
        console.print(table(*costs))
        picture(model, dataset, correlations, solution, costs).savefig(out / "demo.png", dpi=150)
    console.out(f"Wrote dense.safetensors, compressed.safetensors and demo.png to {out}/")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(images: Images) -> tuple[torch.Tensor, ...]:
    """Images in parts of 256, as views."""
    return torch.from_numpy(images).split(256)  # type: ignore[no-untyped-call, no-any-return]


def train(setting: Setting, dataset: Dataset, seed: int, epochs: int, console: Console) -> Network:
    """Step 1: an ordinary network, trained the ordinary way."""
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setting.network()
    x, y = dataset.x_train, dataset.y_train
    ps.fit(model, x, y, epochs=epochs, batch_size=setting.batch_size, lr=setting.lr, seed=seed)
    console.out(
        f"Trained {type(model).__name__} on {dataset.name}: {len(x):,} images, {epochs} epochs, "
        f"{time.perf_counter() - start:.1f} s."
    )
    return model


def select(correlations: ps.Correlations, wanted: int, console: Console) -> ps.Solution:
    """Step 2: the lam whose solution keeps about ``wanted`` neurons, by bisection."""
    problem = correlations.centered()
    if not ps.lam_max(problem.r_xx, problem.r_yx):
        raise ps.PysolveError(
            "no neuron of fc1 has any effect on fc2, so there is nothing to choose: train again."
        )
    best = ps.lam_for_groups(problem, k=wanted)[0]
    console.out(
        f"Kept {len(best.keep)} of {problem.groups} neurons of fc1: a solve of {best.seconds:.2f} s at "
        f"lam = {best.lam:.3g}, certified to be within {best.relative_gap:.1e} of the optimum."
    )
    return best


def plan(correlations: ps.Correlations, M: Array, keep: npt.NDArray[np.intp]) -> ps.Plan:
    """Step 3: remove the other neurons, and give ``fc2`` the weights ``M`` and the bias that suits them."""
    site = ps.Site(correlations.groups, writers=("fc1",), readers=("fc2",))
    return ps.Plan((ps.Collapse(site, keep, {"fc2": M[:, keep]}, {"fc2": correlations.bias(M)}),))


def measure(model: nn.Module, dataset: Dataset, path: Path) -> Costs:
    """Write the weights, and take all figures of one network."""
    save_file(model.state_dict(), path)
    x = dataset.x_test
    return {
        "test accuracy": ps.accuracy(model, x, dataset.y_test),
        "parameters": parameters(model),
        "MACs per image": macs(model, torch.from_numpy(x[:1])),
        "bytes on disk": path.stat().st_size,
        "latency, 1 image": latency(model, x[:1], repeats=200).median,
        "latency, 256 images": latency(model, x[:256], repeats=20).median,
    }


def table(before: Costs, after: Costs) -> Table:
    """Before and after, side by side."""
    result = Table()
    result.add_column()
    for column in ("before", "after", "left"):
        result.add_column(column, justify="right")
    for name, old in before.items():
        new = after[name]
        if name == "test accuracy":
            result.add_row(name, f"{old:.2f} %", f"{new:.2f} %", "")
            continue
        shown = (f"{1e3 * cost:.2f} ms" if name.startswith("latency") else f"{cost:,}" for cost in (old, new))
        result.add_row(name, *shown, f"{100 * new / old:.0f} %")
    return result


def picture(
    model: Network, dataset: Dataset, correlations: ps.Correlations, solution: ps.Solution, costs: list[Costs]
) -> Figure:
    """Accuracy at every size on the left, costs of the compressed network on the right."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    kept, curves = sweep(model, dataset, correlations, solution)
    before, after = (one["test accuracy"] for one in costs)
    plots.accuracy_curves(kept, curves, dense=before, chosen=len(solution.keep), ax=left)
    left.set_title(f"{type(model).__name__} on {dataset.name}: removing neurons of fc1")
    names = {"parameters": "parameters", "bytes on disk": "bytes on disk", "MACs": "MACs per image"}
    old, new = ({label: one[name] for label, name in names.items()} for one in costs)
    plots.cost_bars(old, new, {label: f"{new[label]:,} of {old[label]:,}" for label in names}, ax=right)
    share = f"{len(solution.keep)} of {correlations.groups} neurons"
    right.set_title(f"{share}: {before:.2f} → {after:.2f} % accuracy")
    return figure


def sweep(
    model: Network, dataset: Dataset, correlations: ps.Correlations, solution: ps.Solution
) -> tuple[list[int], dict[str, list[float]]]:
    """Test accuracy of three ways to remove neurons, at the sizes that a path of lam passes through."""
    problem = correlations.centered()
    lams = ps.lam_max(problem.r_xx, problem.r_yx) * np.geomspace(0.6, 1e-3, 14)
    path = [ps.solve_linear_reconstruction(problem.r_xx, problem.r_yx, lam, tol=1e-6) for lam in lams]
    by_size = {len(one.keep): one for one in (*path, solution) if len(one.keep)}
    kept = sorted(by_size)
    score = head_accuracy(model, dataset)
    strength = model.fc1.weight.detach().norm(dim=1).numpy()
    weight, bias = (value.detach().double().numpy() for value in (model.fc2.weight, model.fc2.bias))
    refitted = [np.asarray(ps.debias(problem, keep=by_size[k].keep)) for k in kept]
    strongest = [weight * np.isin(np.arange(len(strength)), np.argsort(-strength)[:k]) for k in kept]
    return kept, {
        "group lasso, then least squares": [score(M, correlations.bias(M)) for M in refitted],
        "group lasso": [score(M, correlations.bias(M)) for k in kept for M in by_size[k].readers],
        "largest weights, no refit": [score(M, bias) for M in strongest],
    }


def head_accuracy(model: Network, dataset: Dataset) -> Callable[[Array, Array], float]:
    """Accuracy as a function of fc2's weight and bias; the layers before it are computed once."""
    headless = copy_of(model)
    headless.fc2 = nn.Identity()  # type: ignore[assignment]
    with evaluating(headless):
        read = torch.cat([forward(headless, part) for part in batches(dataset.x_test)]).double().numpy()
    return lambda M, bias: 100 * float(np.mean((read @ M.T + bias).argmax(1) == dataset.y_test))
