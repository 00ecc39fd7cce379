"""Data of the plots: Pareto fronts, error curves, histograms of non-zero weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pysolve.compressed import Compressed
from pysolve.correlations import AnyArray, Array, Indices
from pysolve.report.report import Report
from pysolve.report.rows import SiteReport
from pysolve.solve.elimination import EliminationPath
from pysolve.solve.solution import History, Solution


@dataclass(frozen=True, eq=False)
class Curve:
    """Error at several sizes of one site.

    Parameters
    ----------
    label : str
    channels : int
        Of the site, as it is.
    kept, error : (n,) arrays
        Channels kept, ascending, and the error as a share of the outputs' energy.
    chosen : int, optional
        The size that was chosen, one of those in ``kept``.
    """

    label: str
    channels: int
    kept: Indices
    error: Array
    chosen: int | None = None


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of one layer's non-zero weights between (bins + 1,) edges; its zeros in per cent."""

    label: str
    counts: Indices
    edges: Array
    zeros: float


def front(
    sizes: Sequence[float], scores: Sequence[float | None], lower_is_better: bool = False
) -> tuple[Array, Array]:
    """Sizes and scores of the (2, k) Pareto-optimal points, by size, and of the (2, m) dominated ones.

    Points whose score is None are left out.
    """
    sign = -1 if lower_is_better else 1
    pairs = [(size, score) for size, score in zip(sizes, scores, strict=True) if score is not None]
    points = np.array(sorted(pairs, key=lambda pair: (pair[0], -sign * pair[1]))).reshape(-1, 2).T
    highest = np.maximum.accumulate(sign * points[1])
    best = sign * points[1] > np.concatenate([[-np.inf], highest[:-1]])
    return points[:, best], points[:, ~best]


# One or more results, or their reports.
Results = Sequence[Report | Compressed]


def scored(reports: Results | Mapping[str, Results], measure: str) -> dict[str, list[Report]]:
    """Reports of each method, checked to have the measure, and scores all of them or none."""
    if isinstance(reports, Report | Compressed):
        kind = type(reports).__name__
        raise TypeError(f"reports must be a list, such as sweep returns, got one {kind}: pass [it].")
    named = reports if isinstance(reports, Mapping) else {"compressed": reports}
    for runs in named.values():
        _check_results(runs)
    methods = {
        str(label): [one.report if isinstance(one, Compressed) else one for one in runs]
        for label, runs in named.items()
    }
    if not any(methods.values()):
        raise ValueError("there are no reports to draw: pass what sweep returned for one target or more.")
    none = all(one.score_after is None for runs in methods.values() for one in runs)
    for label, runs in methods.items():
        for i, one in enumerate(runs):
            if not none and (one.score_before is None or one.score_after is None):
                raise ValueError(
                    f"report {i} of {label!r} has no score, but others have: give sweep or compress "
                    "evaluate=, a function from a network to a score."
                )
            if measure not in one.before:
                known = ", ".join(one.before)
                raise ValueError(f"report {i} of {label!r} has no measure {measure!r}; it has {known}.")
    return methods


def _check_results(runs: object) -> None:
    listed = runs if isinstance(runs, Sequence) else [runs]
    others = [one for one in listed if one is runs or not isinstance(one, Report | Compressed)]
    if others:
        kind = type(others[0]).__name__
        raise TypeError(f"reports must be a list of results, or {{label: such a list}}, got {kind}.")


def histories_of(solves: object) -> dict[str, History]:
    """History of each solve."""
    if not isinstance(solves, Mapping):
        raise TypeError(
            f"histories must be {{label: Solution or History}}, got {type(solves).__name__}: pass "
            '{"newton": solution}, say.'
        )
    if not solves:
        raise ValueError("there are no solves to draw: pass {label: Solution or History}.")
    found = {str(label): one.history if isinstance(one, Solution) else one for label, one in solves.items()}
    for label, one in found.items():
        if not isinstance(one, History):
            raise TypeError(f"{label!r} must be a Solution or History, got {type(one).__name__}.")
    return found


def error_curves(curves: object) -> list[Curve]:
    """Curves of a report's sites, of one elimination path or of several labelled ones."""
    if isinstance(curves, Report):
        found = [_curve_of_site(site) for site in curves.sites if site.curve]
        if not found:
            raise ValueError(
                "the report has no error curves: they come with compress and sweep; for one layer, pass what "
                "elimination_path returned."
            )
        return found
    named = {"": curves} if isinstance(curves, EliminationPath) else curves
    if not isinstance(named, Mapping) or not all(isinstance(one, EliminationPath) for one in named.values()):
        raise TypeError(
            "curves must be an EliminationPath, {label: EliminationPath} or a Report, got "
            f"{type(curves).__name__}."
        )
    if not named:
        raise ValueError("there are no curves to draw: pass {label: EliminationPath}.")
    return [_curve_of_path(str(label), path) for label, path in named.items()]


def _curve_of_site(site: SiteReport) -> Curve:
    """The site's curve with the chosen size added; an error of 0 there is interpolated instead."""
    known = dict(sorted(site.curve))
    between = np.interp(site.kept, [*known], [*known.values()])
    errors = {site.kept: site.error or float(between), **known}
    kept = sorted(errors)
    return Curve(site.name, site.channels, np.array(kept), np.array([errors[k] for k in kept]), site.kept)


def _curve_of_path(label: str, path: EliminationPath) -> Curve:
    """The path's curve; without ``r_yy`` errors are shares of the energy that all inputs explain."""
    error = path.error if path.error[0] > 0 else path.error - path.error[-1]
    groups = len(path.order)
    return Curve(label, groups, np.arange(groups + 1), error / (error[0] or 1.0))


def histograms(
    weights: object, thresholds: float | Mapping[str, float] | None, bins: int
) -> tuple[dict[str, tuple[float, float]], list[Histogram]]:
    """Thresholds by layer, common ones under "", and each layer's histogram of weights."""
    values = _weights(weights)
    limits = _thresholds(thresholds, list(values))
    edges = _edges(values.values(), bins, [high for _, high in limits.values()])
    found = []
    for name, one in values.items():
        zeros = 100 * (1 - np.count_nonzero(one) / max(one.size, 1))
        found.append(Histogram(name, np.histogram(one[one != 0], edges)[0], edges, zeros))
    return limits, found


def _weights(weights: object) -> dict[str, AnyArray]:
    """Values of each layer; where there are matrices, vectors are left out."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be {{name: array or tensor}}, got {type(weights).__name__}: pass "
            'model.state_dict() or {"fc1": weight}.'
        )
    values = {str(name): _array(value) for name, value in weights.items()}
    if any(value.ndim > 1 for value in values.values()):
        values = {name: value for name, value in values.items() if value.ndim > 1}
    if not any(value.size for value in values.values()):
        raise ValueError("there are no weights to draw: pass {name: array or tensor} with some values.")
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has values that are not finite; a histogram needs finite weights.")
    return {name: value.ravel() for name, value in values.items()}


def _thresholds(
    thresholds: float | Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Each layer's threshold on both sides of zero."""
    named = thresholds if isinstance(thresholds, Mapping) else {} if thresholds is None else {"": thresholds}
    for name, value in named.items():
        if name and name not in names:
            raise ValueError(f"there is a threshold for {name!r}, but weights only of {', '.join(names)}.")
        if not value >= 0:
            raise ValueError(f"thresholds are magnitudes, at least 0, got {value}.")
    return {str(name): (-float(value), float(value)) for name, value in named.items()}


def _edges(values: Iterable[AnyArray], bins: int, thresholds: Iterable[float]) -> Array:
    """Edges of about ``bins`` bins over all values; zero and the smallest threshold are edges.

    A bin across a threshold would look like weights that escaped it.
    """
    ends = [float(end) for one in values if one.size for end in (one.min(), one.max())]
    width = (max(ends) - min(ends)) / bins or 1.0 / bins
    limit = min((one for one in thresholds if one > width), default=0.0)
    if limit:
        width = limit / np.ceil(limit / width)
    first, last = np.floor(min(ends) / width), np.ceil(max(ends) / width)
    return np.asarray(width * np.arange(first, max(last, first + 1) + 1))


def _array(value: object) -> AnyArray:
    # NumPy knows no bfloat16.
    return np.asarray(value.detach().cpu().double() if hasattr(value, "detach") else value)
