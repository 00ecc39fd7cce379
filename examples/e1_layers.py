"""LeNet-5 one layer at a time: which of its input channels a layer needs, by lasso and by elimination."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from e1_solvers import Problem
from experiment import score, terminal_table
from rich.console import RenderableType
from rich.table import Table
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.cut.apply import masked
from pysolve.nn.evaluate import accuracy, parameters
from pysolve.nn.running import evaluating, forward
from pysolve.nn.zoo import LeNet5
from pysolve.solve.path import lam_for_groups

LAM = 0.01
CONV2 = ps.Site(20, writers=("conv1",), readers=("conv2",))
FC1 = ps.Site(50, writers=("conv2",), readers=("fc1",))
FC2 = ps.Site(500, writers=("fc1",), readers=("fc2",))
# Of lam_max, where everything is zero.
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
# Of conv2's 64 output positions a sample, this share is plenty for 500 inputs.
POSITIONS = {"conv2": 1 / 8}

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

# A reader's bias that suits its weights M; None: the network's own stays.
Bias = Callable[[np.ndarray], np.ndarray] | None


def gather_readers(model: LeNet5, dataset: Dataset) -> dict[str, ps.Correlations]:
    """Correlations of conv2, fc1 and fc2, in one pass over the training images."""
    images = torch.from_numpy(dataset.x_train).split(1000)
    return ps.gather(model, images, sites=[CONV2, FC1, FC2], positions=POSITIONS)


@dataclass(frozen=True)
class Outcome:
    """One layer and the network at one lam; accuracies in per cent of the test set."""

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
    model: nn.Module,
    dataset: Dataset,
    site: ps.Site,
    problem: Problem,
    solution: ps.Solution,
    bias: Bias = None,
) -> Outcome:
    """Put a solution into the site's reader, collapse the site, debias; ``bias``: of the reader, given M."""
    x, keep = torch.from_numpy(dataset.x_test), solution.keep
    refitted = ps.debias(*problem, keep)
    solved = masked(model, plan_of(model, site, keep, solution.M, bias))
    collapsed = ps.apply(model, plan_of(model, site, keep, solution.M, bias), probe=x[:256])
    debiased = ps.apply(model, plan_of(model, site, keep, refitted, bias), probe=x[:256])
    return Outcome(
        lam=solution.lam,
        kept=len(keep),
        channels=site.channels,
        solved=score(solved, dataset),
        collapsed=score(collapsed, dataset),
        change=largest_change(solved, collapsed, x),
        debiased=score(debiased, dataset),
        masses=masses(debiased, site, keep),
    )


def plan_of(model: nn.Module, site: ps.Site, keep: np.ndarray, M: np.ndarray, bias: Bias = None) -> ps.Plan:
    """M in the site's reader, and only the channels in ``keep`` left; all of them, unread, if there are none.

    No layer can be without inputs: a reader whose M is zero gives its bias alone, at its full width.
    """
    (reader,) = site.readers
    biases = {} if bias is None else {reader: bias(M)}
    if len(keep):
        weights = M.reshape(len(M), site.channels, -1)[:, keep].reshape(len(M), -1)
        return ps.Plan((ps.Collapse(site, keep, {reader: weights}, biases),))
    zero = np.zeros(model.get_submodule(reader).weight.shape)
    return ps.Plan(values={f"{reader}.weight": zero, **{f"{name}.bias": b for name, b in biases.items()}})


def masses(model: nn.Module, site: ps.Site, keep: np.ndarray) -> dict[str, int]:
    """Parameters that matter, by layer: where no channel is kept, the reader's bias and what follows it."""
    counts = {name: parameters(layer) for name, layer in model.named_children()}
    if len(keep):
        return counts
    (reader,), names = site.readers, list(counts)
    alone = model.get_submodule(reader).bias.numel()
    follow = names[names.index(reader) + 1 :]
    return {name: alone if name == reader else counts[name] * (name in follow) for name in names}


def largest_change(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
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


def compress_fc2(model: LeNet5, dataset: Dataset, correlations: ps.Correlations) -> Iterator[RenderableType]:
    """fc2 as published, without a bias and with an unpenalised one."""
    # Without a bias y = W x, and the network keeps its own bias; centring is what frees it.
    plain = (correlations.r_xx, model.fc2.weight.detach().double().numpy() @ correlations.r_xx)
    centred = (correlations.centered().r_xx, correlations.centered().r_yx)
    no_bias = at_published(model, dataset, plain, kept=56)
    with_bias = at_published(model, dataset, centred, kept=53, bias=correlations.bias)

    table = layer_table("fc2 of LeNet-5 on MNIST")
    on_train = accuracy(model, dataset.x_train, dataset.y_train)
    table.add_row("[bold]dense network")
    table.add_row("parameters", "431,080", f"{parameters(model):,}")
    table.add_row("accuracy, training", "99.69", f"{on_train:.2f}")
    table.add_row("accuracy", "99.07", f"{score(model, dataset):.2f}", end_section=True)
    add_rows(table, "no bias", NO_BIAS, no_bias, parameters(model))
    add_rows(table, "unpenalised bias", WITH_BIAS, with_bias, parameters(model))
    yield table
    same, difference = constant_input(correlations, LAM * correlations.groups)
    yield (
        f"The bias as a constant input of weight 0: {'the same' if same else 'other'} inputs kept as by "
        f"centring,\nweights and biases differ by at most {difference:.1e}."
    )


def layer_table(title: str) -> Table:
    caption = (
        "Accuracies in per cent of the test set. Largest change: of any output by the collapse. "
        "Layers: conv1, conv2, fc1, fc2."
    )
    return terminal_table(title, ("", "published", f"ours, λ = {LAM}", "ours, same size"), caption)


def add_rows(
    table: Table, title: str, published: Mapping[str, str], outcomes: tuple[Outcome, ...], dense: int
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


def compare_selectors(
    model: LeNet5,
    dataset: Dataset,
    site: ps.Site,
    correlations: ps.Correlations,
    shares: Sequence[float] = SHARES,
) -> Table:
    """Accuracy along the lasso's path, bias unpenalised, beside elimination at the same numbers kept."""
    (reader,), (writer,), problem = site.readers, site.writers, correlations.centered()
    table = terminal_table(
        f"{reader} of LeNet-5: which of the {site.channels} channels of {writer} it needs",
        ("λ/λ_max", "kept", "lasso", "debiased", "elimination", "parameters left"),
        f"Columns a channel: {correlations.group_size}. Accuracies in per cent of the test set.\n"
        f"With 0 kept, {reader} gives its bias alone.",
    )
    eliminated, highest = ps.elimination_path(problem), ps.lam_max(problem)
    for one in ps.regularization_path(problem, lams=[share * highest for share in shares]):
        keep, k = one.keep, len(one.keep)
        refitted = ps.debias(problem, keep=keep)
        choices = [(keep, one.M), (keep, refitted), (eliminated.keep(k), eliminated.refit(k))]
        plans = [plan_of(model, site, *choice, correlations.bias) for choice in choices]
        networks = [ps.apply(model, plan, probe=torch.from_numpy(dataset.x_test[:256])) for plan in plans]
        accuracies = [score(network, dataset) for network in networks]
        left = sum(masses(networks[0], site, keep).values())
        table.add_row(f"{one.lam / highest:g}", f"{k}", *(f"{a:.2f}" for a in accuracies), f"{left:,}")
    return table
