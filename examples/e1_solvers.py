"""The published solver problems: every method's time, and how its gap falls."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from experiment import terminal_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import pysolve as ps
from pysolve.report import drawing, plots

# r_xx and r_yx.
Problem = tuple[np.ndarray, np.ndarray]


def compare_solvers(path: Path) -> Iterator[Table]:
    """Times on both published problems, one table each; then a picture of how the gap falls."""
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
        yield solver_table(name, seconds, solved | {f"no restart, {q}": slowed[q] for q in slowed})
        draw(name, solved, slowed, axes)
    figure.savefig(path, dpi=130)


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
    columns = ("method", "published", "ours", "iterations", "relative gap")
    caption = f"The objectives agree to {spread:.0e} of their size."
    table = terminal_table(title, columns, caption, words=("method",))
    for name, one in solutions.items():
        ours = (f"{one.seconds:.3f} s", str(one.iterations), f"{one.relative_gap:.1e}")
        table.add_row(name, published.get(name, ""), *ours)
    return table


def draw(
    title: str, solved: dict[str, ps.Solution], slowed: dict[str, ps.Solution], axes: Sequence[Axes]
) -> None:
    """One row of the picture."""
    blue, orange, red, grey = drawing.COLORS
    methods = {name.replace("_", " "): one.history for name, one in solved.items()}
    for ax, against in zip(axes, ("iteration", "seconds"), strict=False):
        plots.plot_convergence(methods, against=against, colors=(blue, orange, red, grey), ax=ax)
    fista = {f"no restart, {q}": one.history for q, one in slowed.items()}
    fista["restart (default)"] = solved["fista"].history
    plots.plot_convergence(fista, colors=(*drawing.SHADES, red), ax=axes[2])
    titles = (f"{title}: all methods", "all methods, in seconds", "FISTA: look-ahead (k − 1)/(k + q + 2)")
    for ax, text in zip(axes, titles, strict=True):
        ax.set(title=text, ylabel="relative gap" if ax is axes[0] else "")
