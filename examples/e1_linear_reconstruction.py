"""Linear activation reconstruction of LeNet-5 on MNIST, as published, step by step.

    python examples/e1_linear_reconstruction.py --data DIR

1. Solvers: two random problems, every method, and how each converges (convergence.png).
2. Network: LeNet-5, trained once and kept in lenet5.safetensors.
3. fc2: which of its 500 inputs are needed, without a bias and with an unpenalised one.

Every figure is printed next to the published one.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other: solves then take up to ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import pysolve as ps
from pysolve import plots
from pysolve.datasets import Dataset, mnist
from pysolve.nn.evaluate import accuracy, parameters
from pysolve.nn.network import evaluating, forward
from pysolve.nn.surgery import masked
from pysolve.nn.train import fit
from pysolve.nn.zoo import LeNet5
from pysolve.path import lam_for_groups

LAM = 0.01
FC2 = ps.Site(500, writers=("fc1",), readers=("fc2",))
RECIPE = {"epochs": 8, "batch_size": 256, "lr": 3e-3}

NO_BIAS = {
    "λ, as published": "0.0100",
    "inputs kept": "56 (11.2 %)",
    "after the solve": "97.21",
    "after collapse": "97.21",
    "after debias": "98.81",
    "parameters left": "70,996 (16.47 %)",
    "mass per layer (%)": "0.7 35.3 63.2 0.8",
}
WITH_BIAS = {
    "λ, as published": "0.0100",
    "inputs kept": "53 (10.6 %)",
    "after debias": "98.75",
    "parameters left": "68,563 (15.90 %)",
}

# r_xx and r_yx.
Problem = tuple[np.ndarray, np.ndarray]
# A reader's bias that suits its weights M; None: the network's own stays.
Bias = Callable[[np.ndarray], np.ndarray] | None

DATA = Path(os.environ.get("PYSOLVE_DATA", "data"), "mnist")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the four MNIST files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the picture.")] = Path("results/e1"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train even if there are weights.")] = False,
) -> None:
    """The whole experiment."""
    try:
        dataset = mnist(data)
        out.mkdir(parents=True, exist_ok=True)
        compare_solvers(out / "convergence.png")
        model = trained(dataset, out / "lenet5.safetensors", seed=seed, retrain=retrain)
        compress_fc2(model, dataset)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def compare_solvers(path: Path) -> None:
    """Times on both published problems, and a picture of how the gap falls."""
    problems = {
        "toy, d = 100, h = 200": random_problem(100, 200, 80, 10_000),
        "benchmark, d = 500, h = 200": random_problem(500, 200, 450, 60_000),
    }
    published = ({}, {"fista": "4.39 s", "alternate_minimization": "0.672 s"})
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    rows = figure.subplots(2, 3, sharey=True)
    for (name, problem), seconds, axes in zip(problems.items(), published, rows, strict=True):
        methods = (ps.newton, ps.alternate_minimization, ps.fista, ps.proximal_gradient)
        solved = {solve.__name__: median_of_3(partial(solve, problem, 0.1)) for solve in methods}
        # The published FISTA never restarts; q slows its look-ahead.
        slowed = {f"q = {q}": ps.fista(problem, 0.1, q=q, restart=False) for q in (1, 5, 50, 250)}
        console.print(solver_table(name, seconds, solved | {f"no restart, {q}": slowed[q] for q in slowed}))
        draw(name, solved, slowed, axes)
    figure.savefig(path, dpi=130)
    console.out(f"Wrote {path}")


def random_problem(d: int, h: int, r: int, n: int) -> Problem:
    """x = randn(d, r) randn(r, n), y = randn(h, d) x; correlations divided by d, as published."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((d, r)) @ rng.standard_normal((r, n))
    y = rng.standard_normal((h, d)) @ x
    return (x / d) @ (x.T / n), (y / d) @ (x.T / n)


def median_of_3(solve: Callable[[], ps.Solution]) -> ps.Solution:
    return sorted((solve() for _ in range(3)), key=lambda one: one.seconds)[1]


def solver_table(title: str, published: dict[str, str], solutions: dict[str, ps.Solution]) -> Table:
    objectives = [one.objective for one in solutions.values()]
    spread = (max(objectives) - min(objectives)) / abs(objectives[0])
    table = Table(title=title, caption=f"The objectives agree to {spread:.0e} of their size.")
    table.add_column("method")
    for column in ("published", "ours", "iterations", "relative gap"):
        table.add_column(column, justify="right")
    for name, one in solutions.items():
        ours = (f"{one.seconds:.3f} s", str(one.iterations), f"{one.relative_gap:.1e}")
        table.add_row(name, published.get(name, ""), *ours)
    return table


def draw(
    title: str, solved: dict[str, ps.Solution], slowed: dict[str, ps.Solution], axes: Sequence[Axes]
) -> None:
    """One row of the picture."""
    blue, orange, grey, red = plots.COLORS
    methods = {name.replace("_", " "): one.history for name, one in solved.items()}
    for ax, against in zip(axes, ("iteration", "seconds"), strict=False):
        plots.convergence_curves(methods, against=against, colors=(blue, orange, red, grey), ax=ax)
    fista = {f"no restart, {q}": one.history for q, one in slowed.items()}
    fista["restart (default)"] = solved["fista"].history
    plots.convergence_curves(fista, colors=(*plots.SHADES, red), ax=axes[2])
    titles = (f"{title}: all methods", "all methods, in seconds", "FISTA: look-ahead (k − 1)/(k + q + 2)")
    for ax, text in zip(axes, titles, strict=True):
        ax.set(title=text, ylabel="relative gap" if ax is axes[0] else "")


def trained(dataset: Dataset, path: Path, *, seed: int = 0, retrain: bool = False) -> LeNet5:
    """LeNet-5 from ``path`` if this recipe made it from these data, else trained and written there."""
    recipe = json.dumps({"data": dataset.name, "images": len(dataset.x_train), "seed": seed, **RECIPE})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LeNet5()
    if not retrain and recipe_of(path) == recipe:
        model.load_state_dict(load_file(path))
        console.out(f"Loaded {path}")
        return model
    fit(model, dataset.x_train, dataset.y_train, seed=seed, **RECIPE)
    part = path.with_suffix(".part")
    save_file(model.state_dict(), part, metadata={"recipe": recipe})
    os.replace(part, path)
    console.out(f"Trained LeNet-5 and wrote {path}")
    return model


def recipe_of(path: Path) -> str | None:
    """How the weights in a file were made; None when it is absent, damaged or from elsewhere."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("recipe")
    except (OSError, SafetensorError):
        return None


@dataclass(frozen=True)
class Outcome:
    """What is left of a layer at one lam, and of the network; accuracies in per cent of the test set."""

    lam: float
    kept: int
    channels: int
    solved: float
    collapsed: float
    change: float
    debiased: float
    masses: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(self.masses.values())


def compress(
    model: torch.nn.Module,
    dataset: Dataset,
    site: ps.Site,
    problem: Problem,
    solution: ps.Solution,
    bias: Bias = None,
) -> Outcome:
    """Put a solution into the site's reader, collapse the site, debias; ``bias``: of the reader, given M."""
    x, y, keep, (reader,) = torch.from_numpy(dataset.x_test), dataset.y_test, solution.keep, site.readers

    def plan(M: np.ndarray) -> ps.Plan:
        biases = {} if bias is None else {reader: bias(M)}
        return ps.Plan((ps.Collapse(site, keep, {reader: M[:, keep]}, biases),))

    solved = masked(model, plan(solution.M))
    collapsed = ps.apply(model, plan(solution.M), probe=x[:256])
    debiased = ps.apply(model, plan(ps.debias(*problem, keep)), probe=x[:256])
    return Outcome(
        lam=solution.lam,
        kept=len(keep),
        channels=site.channels,
        solved=accuracy(solved, x, y),
        collapsed=accuracy(collapsed, x, y),
        change=largest_change(solved, collapsed, x),
        debiased=accuracy(debiased, x, y),
        masses={name: parameters(layer) for name, layer in debiased.named_children()},
    )


def largest_change(a: torch.nn.Module, b: torch.nn.Module, x: torch.Tensor) -> float:
    """The largest difference of any output on any input."""
    with evaluating(a, b):
        return max(float((forward(a, part) - forward(b, part)).abs().max()) for part in x.split(1000))


def at_published(
    model: LeNet5, dataset: Dataset, problem: Problem, kept: int, bias: Bias = None
) -> tuple[Outcome, Outcome]:
    """fc2 at the published lam, and at the lam that keeps the published number of inputs."""
    # Published: R = x/d @ xᵀ/n = E[x xᵀ]/d, and C alike. ½⟨M R, M⟩ − ⟨C, M⟩ + λ‖M‖ is then 1/d times our
    # objective at λ_ours = λ d, so both have the same minimiser.
    at_lam = ps.solve_linear_reconstruction(*problem, LAM * len(problem[0]))
    at_size = lam_for_groups(*problem, kept)[0]
    first, second = (compress(model, dataset, FC2, problem, one, bias) for one in (at_lam, at_size))
    return first, second


def constant_input(correlations: ps.Correlations, lam: float) -> tuple[bool, float]:
    """The bias as published, as a constant input of weight 0: same groups as centring? Largest difference?"""
    x_mean, y_mean = correlations.x_sum / correlations.count, correlations.y_sum / correlations.count
    r_xx = np.block([[correlations.r_xx, x_mean[:, None]], [x_mean, np.ones(1)]])
    r_yx = np.column_stack([correlations.r_yx, y_mean])
    weights = np.append(np.ones(len(x_mean)), 0.0)
    appended = ps.solve_linear_reconstruction(r_xx, r_yx, lam, weights=weights)
    problem = correlations.centered()
    centred = ps.solve_linear_reconstruction(problem.r_xx, problem.r_yx, lam)
    wanted = np.column_stack([centred.M, correlations.bias(centred.M)])
    same = np.array_equal(appended.keep, [*centred.keep, len(x_mean)])
    return same, float(np.abs(appended.M - wanted).max())


def compress_fc2(model: LeNet5, dataset: Dataset) -> None:
    """Everything about fc2, from one pass over the training images."""
    images = torch.from_numpy(dataset.x_train).split(1000)
    correlations = ps.gather(model, images, layers=["fc2"])["fc2"]
    # Without a bias y = W x, and the network keeps its own bias; centring is what frees it.
    plain = (correlations.r_xx, model.fc2.weight.detach().double().numpy() @ correlations.r_xx)
    centred = (correlations.centered().r_xx, correlations.centered().r_yx)
    no_bias = at_published(model, dataset, plain, kept=56)
    with_bias = at_published(model, dataset, centred, kept=53, bias=correlations.bias)

    table = layer_table("fc2 of LeNet-5 on MNIST")
    on_train = accuracy(model, dataset.x_train, dataset.y_train)
    on_test = accuracy(model, dataset.x_test, dataset.y_test)
    table.add_row("[bold]dense network")
    table.add_row("parameters", "431,080", f"{parameters(model):,}")
    table.add_row("accuracy, training", "99.69", f"{on_train:.2f}")
    table.add_row("accuracy", "99.07", f"{on_test:.2f}", end_section=True)
    add_rows(table, "no bias", NO_BIAS, no_bias, parameters(model))
    add_rows(table, "unpenalised bias", WITH_BIAS, with_bias, parameters(model))
    console.print(table)
    same, difference = constant_input(correlations, LAM * correlations.groups)
    console.out(
        f"The bias as a constant input of weight 0 instead of centring: {'the same' if same else 'other'} "
        f"inputs kept,\nweights and biases differ by at most {difference:.1e}."
    )


def layer_table(title: str) -> Table:
    caption = (
        "Accuracies in per cent of the test set. Largest change: of any output by the collapse. "
        "Layers: conv1, conv2, fc1, fc2."
    )
    table = Table(title=title, caption=caption, show_edge=False, pad_edge=False)
    table.add_column("")
    for column in ("published", f"ours, λ = {LAM}", "ours, same size"):
        table.add_column(column, justify="right")
    return table


def add_rows(
    table: Table, title: str, published: dict[str, str], outcomes: tuple[Outcome, ...], dense: int
) -> None:
    """One row a figure: published, then ours."""
    columns = [cells(one, dense) for one in outcomes]
    table.add_row(f"[bold]{title}")
    for label in columns[0]:
        table.add_row(label, published.get(label, ""), *(column[label] for column in columns))
    table.add_section()


def cells(one: Outcome, dense: int) -> dict[str, str]:
    shares = " ".join(f"{100 * mass / one.parameters:.1f}" for mass in one.masses.values())
    return {
        "λ, as published": f"{one.lam / one.channels:.4f}",
        "inputs kept": f"{one.kept} ({100 * one.kept / one.channels:.1f} %)",
        "after the solve": f"{one.solved:.2f}",
        "after collapse": f"{one.collapsed:.2f}",
        "largest change": f"{one.change:.1e}",
        "after debias": f"{one.debiased:.2f}",
        "parameters left": f"{one.parameters:,} ({100 * one.parameters / dense:.2f} %)",
        "mass per layer (%)": shares,
    }


if __name__ == "__main__":
    app()
