"""Which channels every site keeps: under a budget, at given sizes, or by a penalty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pysolve.errors import PysolveError
from pysolve.methods.choice import site_problem
from pysolve.methods.study import Study, measure
from pysolve.nn.costs import cost_model
from pysolve.plan import Indices, Site
from pysolve.report.rows import Solve
from pysolve.solve.budget import Costs, allocate
from pysolve.solve.certificate import certify
from pysolve.solve.problem import Problem
from pysolve.solve.selection import lasso_solution
from pysolve.solve.solution import Solution
from pysolve.solve.solvers import newton

# Measured harm may exceed the predicted one so many times; otherwise sizes are chosen anew, so often.
TRUSTED_RATIO, MAX_ROUNDS = 1.1, 6


@dataclass(frozen=True, eq=False)
class Sizes:
    """Channels that stay of every free site, the divergence to expect of each, and what the report tells."""

    kept: list[Indices]
    predicted: list[float]
    notes: tuple[str, ...] = ()
    solves: tuple[Solve, ...] = ()


def check_free(found: Study) -> None:
    """Refuse a network of which no channel can go."""
    if not found.free:
        reasons = sorted({site.pinned for site in found.sites if site.pinned})
        raise PysolveError(f"no channel of this network can go: {'; '.join(reasons) or 'it has no sites'}.")


def channels_to_keep(
    found: Study,
    target: Mapping[str, float] | None,
    keep: float | Mapping[str, float] | None,
    lam: float | Mapping[str, float] | None,
    round_to: int,
) -> Sizes:
    """Channels that stay of every free site, by one of three ways to ask for them.

    Parameters
    ----------
    found : Study
    target, keep, lam, round_to
        As in ``pysolve.compress``.
    """
    check_free(found)
    if lam is not None:
        _check_names(found, "lam", lam)
        return _kept_by_lasso(found, lam)
    if keep is not None:
        _check_names(found, "keep", keep)
        sizes = [_size(site, _entry(site, keep), round_to) for site in found.free]
        return _nested(found, sizes, [found.curve(s)[k] for s, k in enumerate(sizes)])
    costs = cost_model(found.model, found.free, found.calibration.held[0], extra_biases=found.new_biases)
    return _within(found, costs, {"params": 0.25} if target is None else target, round_to)


def _within(found: Study, costs: Costs, target: Mapping[str, float], round_to: int) -> Sizes:
    """Sizes that do the least harm within the target.

    Curves are interpolated: the sizes chosen are measured, and chosen anew, until no prediction is far off.
    """
    for _ in range(MAX_ROUNDS):
        curves = [found.curve(s) for s in range(len(found.free))]
        sizes: list[int] = allocate(costs, curves, target, round_to=round_to).tolist()
        predicted = [float(curve[k]) for curve, k in zip(curves, sizes, strict=True)]
        measured = sum(measure(found, s, k) for s, k in enumerate(sizes))
        if measured <= TRUSTED_RATIO * sum(predicted):
            break
    return _nested(found, sizes, predicted)


def _nested(found: Study, sizes: list[int], predicted: list[float]) -> Sizes:
    kept = [choice.keep(k) for choice, k in zip(found.choices, sizes, strict=True)]
    return Sizes(kept, [float(harm) for harm in predicted], solves=tuple(_lasso_solves(found, sizes)))


def _lasso_solves(found: Study, sizes: list[int]) -> Iterator[Solve]:
    """The solves that the lasso took its channels from."""
    for site, choice, k in zip(found.free, found.choices, sizes, strict=True):
        if choice.method not in ("lasso", "weighted_lasso") or k == site.channels:
            continue
        problem, _ = site_problem(site, found.correlations, found.widths(site))
        solved = lasso_solution(problem, k, weighted=choice.method == "weighted_lasso")
        if solved is not None:
            yield _certified(site, *solved)


def _certified(site: Site, problem: Problem, solution: Solution) -> Solve:
    """A solve with its certificate, by code that no solver shares."""
    M = [*solution.M] if isinstance(solution.M, tuple) else [solution.M]
    judged = certify(
        [*problem.xx],
        [*problem.yx],
        M,
        solution.lam,
        group_size=problem.group_size,
        weights=problem.weights,
    )
    return Solve(
        site.name,
        solution.method,
        solution.lam,
        len(solution.keep),
        judged.relative_gap,
        judged.kkt,
        solution.iterations,
        solution.seconds,
    )


def _kept_by_lasso(found: Study, lam: float | Mapping[str, float]) -> Sizes:
    kept, notes, solves = [], [], []
    for site, choice in zip(found.free, found.choices, strict=True):
        penalty = _entry(site, lam)
        keep = np.arange(site.channels)
        if penalty is not None:
            problem, _ = site_problem(site, found.correlations, found.widths(site), normalised=False)
            solution = newton(problem, penalty)
            keep = solution.keep
            solves.append(_certified(site, problem, solution))
        if not len(keep):
            notes.append(f"lam = {penalty:.3g} leaves no channel of {site.name}: the most useful one stays.")
            keep = choice.keep(1)
        kept.append(keep)
    predicted = [float(found.curve(s)[len(keep)]) for s, keep in enumerate(kept)]
    return Sizes(kept, predicted, tuple(notes), tuple(solves))


def _check_names(found: Study, what: str, values: float | Mapping[str, float]) -> None:
    """Refuse names that are no writers of sites that can shrink."""
    writers = list(dict.fromkeys(name for site in found.free for name in site.writers))
    pinned = {name: site.pinned for site in found.sites for name in site.writers if site.pinned}
    for name in values if isinstance(values, Mapping) else ():
        if name not in writers:
            why = f"whose channels cannot go ({pinned[name]})" if name in pinned else "which writes no site"
            raise ValueError(f"{what} names {name!r}, {why}; those that can shrink: {', '.join(writers)}.")


def _entry(site: Site, values: float | Mapping[str, float]) -> float | None:
    """What a setting says for a site: by any of its writers' names, or the same for all."""
    if not isinstance(values, Mapping):
        return values
    given = {name: values[name] for name in site.writers if name in values}
    if len(set(given.values())) > 1:
        raise ValueError(f"{', '.join(given)} write one site, which cannot have several values: {given}.")
    return next(iter(given.values()), None)


def _size(site: Site, value: float | None, round_to: int) -> int:
    if value is None:
        return site.channels
    wanted = value * site.channels if value <= 1 and not isinstance(value, int | np.integer) else value
    return min(site.channels, max(1, round(wanted / round_to)) * round_to)
