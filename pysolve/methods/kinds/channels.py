"""Channels that are removed: the joint selection problem of a site's readers, and its menu."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from scipy.linalg import solve_triangular

from pysolve.correlations import Array, Correlations, Indices, all_but, group_columns, without_sums
from pysolve.layer.layer_fit import LayerFit
from pysolve.methods.heads import order_of, scores_lost
from pysolve.methods.kinds.experts import expert_path
from pysolve.methods.kinds.sensed import metrics_of
from pysolve.methods.menu import FLOOR, Chosen, Menu, Task
from pysolve.methods.study import Study, widths
from pysolve.nn.threads import all_blas_threads
from pysolve.plan import Site
from pysolve.solve.elimination import elimination_path
from pysolve.solve.lapack import eigh
from pysolve.solve.least_squares import least_squares, refit
from pysolve.solve.problem import Problem
from pysolve.solve.scaling import schur
from pysolve.solve.selection import select_channels

# Share of the mean square of inputs that is rounding of sums in single precision.
_ROUNDING = 1e-7
# Elimination in the metric of the network's outputs: what errors do to them to first order, and a tenth of
# the errors themselves. A lean network at 30 % of its MACs: divergence 0.102 instead of 0.109.
SENSITIVITY, _ALIKE, _DIRECTIONS = "sensitivity", 0.1, 4
ELIMINATIONS: tuple[object, ...] = ("elimination", SENSITIVITY)
# A method of ``select_channels``, or scores of every channel, of which the largest stay, by site.
Select = str | Mapping[Site, Array]


@dataclass(frozen=True)
class Channels:
    """Sites that keep some of their channels.

    Parameters
    ----------
    select : str or {Site: (channels,) scores}
        "sensitivity": elimination in the metric of what errors mean to the network's outputs.
    metrics : {reader: (h, h) array}
        What errors at a reader's outputs mean; by default all count alike.
    """

    select: Select = field(default="elimination")
    metrics: Mapping[str, Array] = field(default_factory=dict)

    def menus(self, study: Study) -> list[Menu]:
        """The menu of every site that can shrink; eliminations are shared out among processes."""
        if self.select == SENSITIVITY:
            return Channels("elimination", _metrics(study)).menus(study)
        with all_blas_threads():
            return self._menus(study)

    def _menus(self, study: Study) -> list[Menu]:
        sites, ranks = study.free, study.options.ranks
        if ranks.size == 1 or self.select != "elimination":
            return [self.menu(study, site) for site in sites]

        # Their samples are those of all processes.
        experts = {site: ranks.first(_timed_path(study, site)) for site in sites if site.router is not None}

        def path(number: int) -> tuple[Indices, Array, float]:
            start, site = time.perf_counter(), sites[number]
            if site in experts:
                return experts[site]
            if _is_turned(study, site):
                return *_leading(study, site), time.perf_counter() - start
            order, error = _eliminated(
                *site_problem(site, _known(study, site, self.metrics), widths(study, site))
            )
            return order, error, time.perf_counter() - start

        found = zip(sites, ranks.shared_out(len(sites), path), strict=True)
        return [
            replace(_of_order(site, order, error), seconds=seconds) for site, (order, error, seconds) in found
        ]

    def menu(self, study: Study, site: Site) -> Menu:
        """What the readers lose with 1 … all channels, as a share of their outputs' energy, refitted.

        Only elimination knows a path; the error of other selections is taken at a few sizes and interpolated.
        Whole experts are eliminated whatever the selection, but for scores.
        """
        start = time.perf_counter()
        if site.router is not None:
            scores = None if isinstance(self.select, str) else self.select[site]
            found = _of_order(site, *expert_path(study, site, scores))
            return replace(found, seconds=time.perf_counter() - start)
        if _is_turned(study, site):
            found = _of_order(site, *_leading(study, site))
            return replace(found, seconds=time.perf_counter() - start)
        problem, left = site_problem(site, _known(study, site, self.metrics), widths(study, site))
        select = self.select if isinstance(self.select, str) else self.select[site]
        return replace(site_menu(site, problem, left, select), seconds=time.perf_counter() - start)

    def fit(self, task: Task) -> LayerFit:
        """Least squares, held a little to the weights that are known to be good."""
        return ridge_fit(task)


def site_menu(
    site: Site, problem: Problem, left: Sequence[float], select: str | Array = "elimination"
) -> Menu:
    """The menu of a site from the problem that ``site_problem`` gives; of scores the largest stay."""
    if not isinstance(select, str):
        order = np.argsort(-np.asarray(select, dtype=np.float64), kind="stable")
        return _sampled(site, problem, left, lambda k: np.sort(order[:k]), "scores")
    if select == "elimination":
        return _of_order(site, *_eliminated(problem, left))
    K = site.channels
    keep = cache(lambda k: select_channels(problem, k=k, method=select) if 0 < k < K else np.arange(k))
    return _sampled(site, problem, left, keep, select)


def ridge_fit(task: Task) -> LayerFit:
    """The weights of least error near those that are known to be good; these where nothing is known."""
    if task.correlations is None:
        return LayerFit(task.weight, None, 0.0)
    return LayerFit(*refit(task.correlations, np.arange(task.weight.shape[1]), task.weight))


def site_problem(
    site: Site,
    correlations: Mapping[str, Correlations],
    widths: Mapping[str, int],
    *,
    normalised: bool = True,
) -> tuple[Problem, list[float]]:
    """The joint problem of a site's readers, each centred, with outputs of unit energy.

    Inputs of a reader that are not the site's stay free to compensate: they are minimised out. A reader whose
    channels have fewer inputs than another's is filled up with inputs that are always zero.

    Parameters
    ----------
    site : Site
    correlations : {reader: Correlations}
        Readers without any, which no sample reached, are left out.
    widths : {reader: int}
        Input channels of each reader.
    normalised : bool
        Outputs of unit energy, so that every reader counts alike; otherwise as they are.

    Returns
    -------
    Problem, list of float
        And of each reader the energy that is left of its outputs without the site.
    """
    seen = [name for name in site.readers if name in correlations]
    names = [name for name in seen if len(correlations[name].yx)] or seen
    readers = [_reader(site, correlations[name], name, widths[name], normalised) for name in names]
    size = max(len(R) for R, _, _ in readers) // site.channels
    xx, yx = zip(*(_filled(R, C, site.channels, size) for R, C, _ in readers), strict=True)
    return Problem(xx, yx, size, np.ones(site.channels)), [left for _, _, left in readers]


def reader_columns(site: Site, correlations: Correlations, reader: str, width: int) -> Indices:
    """(channels, c·taps) columns of a reader's correlations that belong to each channel of a site."""
    taps = len(correlations.xx) // width
    table = site.columns_of(reader, width)
    return (table[:, :, None] * taps + np.arange(taps)).reshape(site.channels, -1)


def _known(study: Study, site: Site, metrics: Mapping[str, Array]) -> dict[str, Correlations]:
    """Correlations of a site's readers, of those that were seen, with outputs that count alike."""
    known = {name: _of_reader(study, name) for name in site.readers if name in study.correlations}
    return {
        n: _weighed(one, study.matrix(n), metrics[n]) if n in metrics else one for n, one in known.items()
    }


def _metrics(study: Study) -> dict[str, Array]:
    """What errors at the outputs of layers that read sites mean to the network's."""
    readers = {name for site in study.free for name in site.readers if name in study.correlations}
    layers = {name: study.layers[name].module for name in sorted(readers) if name in study.layers}
    return metrics_of(study, layers, alike=_ALIKE, directions=_DIRECTIONS)


def _weighed(known: Correlations, W: Array, metric: Array) -> Correlations:
    """Correlations with outputs A y of  y = W x + b,  AᵀA the metric by which errors count."""
    values, vectors = eigh(metric)
    A = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    R, _ = known.covariance()
    M, mean = A @ W, A @ known.y_sum / known.count
    yy = known.count * (np.vecdot(M @ R, M) + mean**2)
    return replace(known, yx=A @ known.yx, yy=yy, y_sum=A @ known.y_sum)


def _of_reader(study: Study, name: str) -> Correlations:
    """A reader's correlations; around zero where no bias can make up for the means."""
    known = study.correlations[name]
    able = study.options.new_biases or (name in study.layers and study.layers[name].takes_bias)
    return known if able else without_sums(known)


def _eliminated(problem: Problem, left: Sequence[float]) -> tuple[Indices, Array]:
    """Channels in the order of removal, and the error of every size."""
    path = elimination_path(problem, r_yy=left if len(left) > 1 else left[0])
    return path.order, np.maximum(2 * path.error / len(left), FLOOR)


def _timed_path(study: Study, site: Site) -> tuple[Indices, Array, float]:
    start = time.perf_counter()
    return *expert_path(study, site), time.perf_counter() - start


def _is_turned(study: Study, site: Site) -> bool:
    return study.turn is not None and site in study.turn.sites


def _leading(study: Study, site: Site) -> tuple[Indices, Array]:
    """Channels from the last to the first, and the error of every size, which a Cholesky factor tells.

    Reader by reader, for all of them together need not fit in memory. Scores of attention count as one more.
    """
    names = [name for name in site.readers if name in study.correlations]
    inputs, error, order = widths(study, site), np.zeros(site.channels + 1), order_of(study, site)
    for name in names:
        R, C, left = _reader(site, _of_reader(study, name), name, inputs[name], True)
        places = group_columns(order, len(R) // site.channels)
        R, C = R[np.ix_(places, places)], C[:, places]
        explained = np.square(solve_triangular(_factor(R), C.T, lower=True)).sum(1)
        error += left
        error[1:] -= np.cumsum(explained.reshape(site.channels, -1).sum(1))
    error /= max(1, len(names))
    if site.attention:
        error = (error + scores_lost(study, site, order)) / 2
    return order[::-1], np.maximum(np.minimum.accumulate(error), FLOOR)


def _factor(R: Array) -> Array:
    """Cholesky factor of a matrix that may be indefinite by the rounding of its sums."""
    scale, ridge = float(np.trace(R)) / len(R) or 1.0, _ROUNDING
    while True:
        with suppress(np.linalg.LinAlgError):
            return np.asarray(np.linalg.cholesky(R + ridge * scale * np.eye(len(R))))
        ridge *= 10


def _of_order(site: Site, order: Indices, error: Array) -> Menu:
    return _menu(site, lambda k: np.sort(order[len(order) - k :]), error, "elimination")


def _menu(site: Site, keep: Callable[[int], Indices], error: Array, method: str) -> Menu:
    return Menu(site, error, lambda size: Chosen({site: keep(size)}), method=method)


def _sampled(
    site: Site, problem: Problem, left: Sequence[float], keep: Callable[[int], Indices], method: str
) -> Menu:
    """A menu whose error is taken at a few sizes."""
    K = site.channels
    sizes = np.unique([0, *np.geomspace(1, K, 9).round().astype(int)])
    error = np.minimum.accumulate([max(_error(problem, left, keep(int(k))), FLOOR) for k in sizes])
    return _menu(site, keep, np.exp(np.interp(np.arange(K + 1), sizes, np.log(error))), method)


def _reader(
    site: Site, correlations: Correlations, name: str, width: int, normalised: bool
) -> tuple[Array, Array, float]:
    """R and C of one reader on the site's columns, channel after channel, and the energy left without."""
    p = reader_columns(site, correlations, name, width).ravel()
    u = all_but(len(correlations.xx), p)
    left = correlations.restrict(()).centered().energy
    R, C = correlations.covariance()
    energy = (left if normalised else 0.0) or 1.0
    if len(u):
        explained = C[:, u]
        R, C, _, base, _ = schur(R, C, p, u)
        left = max(0.0, left - float(np.vdot(base, explained)))
    elif not np.array_equal(p, np.arange(len(R))):
        R, C = R[np.ix_(p, p)], C[:, p]
    return R, C / np.sqrt(energy), left / energy


def _filled(R: Array, C: Array, channels: int, size: int) -> tuple[Array, Array]:
    """A reader's matrices with as many inputs a channel as another reader has."""
    own = len(R) // channels
    if own == size:
        return R, C
    place = (np.arange(channels)[:, None] * size + np.arange(own)).ravel()
    wide_R, wide_C = np.zeros((channels * size,) * 2), np.zeros((len(C), channels * size))
    wide_R[np.ix_(place, place)] = R
    wide_C[:, place] = C
    return wide_R, wide_C


def _error(problem: Problem, left: Sequence[float], keep: Indices) -> float:
    """Mean over readers of E‖y − M x‖² / E‖y‖², refitted on the groups kept."""
    columns = group_columns(keep, problem.group_size)
    gains = [np.vdot(least_squares(R, C, columns), C) for R, C in zip(problem.xx, problem.yx, strict=True)]
    return float(np.mean(np.subtract(left, gains)))
